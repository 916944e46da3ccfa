"""What an adapter is made of, and which modules of a model it takes hold of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from steerlora.lm.decoder import EditedLayer, layers_of
from steerlora.methods.routed_lora.lowrank import AdaptedLinear
from steerlora.saes.base import SparseAutoencoder

ROUTINGS = ("none", "dense", "sae")
ROUTERS = ("linear", "mlp", "prototype")
SOURCES = ("inline", "base", "base_last")

Linear = nn.Linear | Conv1D
"""What can be adapted; GPT-2's Conv1D is a linear layer with its weight transposed."""


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """Everything that fixes an adapter's tensors and arithmetic.

    Attributes:
        routing: "none" (plain LoRA: every specialist always on), "dense" (gate from the hidden
            state at the site) or "sae" (gate and rank from the site's features).
        sites: control sites c_1 < c_2 < ...; site i controls layers [c_i, c_{i+1}). Plain LoRA uses
            the first only, as the first adapted layer.
        source: of the signal: "inline" (the stream at the site), "base" (that of a separate forward
            of the frozen base) or "base_last" (the final hidden state of such a forward).
        router: "linear" or "mlp" (routers.py), or "prototype" (prototypes.py).
        router_hidden: H of "mlp".
        per_module: a router for every adapted module, in place of one a site.
        specialists: E.
        active: specialists active at first; None: all.
        rank: R of each specialist; the total rank is E * R for every routing.
        alpha: the update is scaled by alpha / R.
        top_k: specialists kept per token.
        temperature: tau of the gate.
        prototypes: reweight a learnt gate by cosine to prototypes.
        whitened, hard_gate, margin, null_specialist: of prototype routing.
        dynamic_rank: learn a token-dependent rank mask.
        initial_rank: effective rank at initialisation, as a fraction of R.
        hard_rank: where no gradient is recorded, mask values below it are zero and not computed.
        context: of the control signal: "token", "causal_mean" or "ema" (see context.py).
        decay: of "ema", a real token.
        target_modules: which linear layers of the decoder layers are adapted: by last name, by
            path inside the layer, or by a pattern of either, such as "*_proj" or "self_attn.*";
            None: all.
    """

    routing: str = "sae"
    sites: tuple[int, ...] = (0,)
    source: str = "inline"
    router: str = "linear"
    router_hidden: int = 256
    per_module: bool = False
    specialists: int = 4
    active: int | None = None
    rank: int = 16
    alpha: float = 16.0
    top_k: int = 2
    temperature: float = 1.0
    prototypes: bool = False
    whitened: bool = True
    hard_gate: bool = True
    margin: float = 0.05
    null_specialist: bool = True
    dynamic_rank: bool = True
    initial_rank: float = 0.75
    hard_rank: float = 0.0
    context: str = "token"
    decay: float = 0.9
    target_modules: tuple[str, ...] | None = None

    def as_dict(self) -> dict:
        return asdict(self)


def total_rank(shape: AdapterShape) -> int:
    """E * R: what plain LoRA of the same size has as its rank."""
    return shape.specialists * shape.rank


class Target(NamedTuple):
    """A linear layer to adapt: ``parent.<child>``."""

    parent: nn.Module
    child: str
    linear: nn.Module


class Size(NamedTuple):
    """D_in and D_out of a linear layer."""

    d_in: int
    d_out: int


def size_of(linear: Linear) -> Size:
    """What a linear layer reads and writes, of whichever type it is."""
    if isinstance(linear, Conv1D):
        return Size(linear.nx, linear.nf)
    return Size(linear.in_features, linear.out_features)


def find_targets(model: nn.Module, shape: AdapterShape) -> dict[str, Target]:
    """Everything adapted, lowest layer first, by "<layer>:<path inside it>" with dots as "/".

    Raises:
        ValueError: a site beyond the last layer; a name or pattern that no linear layer has, with
            the names that there are.
    """
    layers = layers_of(model)
    if any(site < 0 or site >= len(layers) for site in shape.sites) or not shape.sites:
        raise ValueError(
            f"control sites {list(shape.sites)}: the model has layers 0 to {len(layers) - 1}"
        )
    wanted = ("*",) if shape.target_modules is None else shape.target_modules
    found: dict[str, Target] = {}
    matched, linears = set(), {}
    for index in range(min(shape.sites), len(layers)):
        layer = layers[index]
        while isinstance(layer, EditedLayer):
            layer = layer.layer
        for path, module in layer.named_modules():
            adapted = isinstance(module, AdaptedLinear)
            plain = isinstance(module, Linear) and not path.endswith(".base")
            if not (adapted or plain):
                continue
            linears[path] = type(module).__name__
            by = [pattern for pattern in wanted if _matches(path, pattern)]
            if by:
                matched.update(by)
                above, _, child = path.rpartition(".")
                name = f"{index}:{path.replace('.', '/')}"
                found[name] = Target(layer.get_submodule(above), child, module)
    unknown = [pattern for pattern in wanted if pattern not in matched]
    if unknown or not found:
        listed = ", ".join(f"{path} ({kind})" for path, kind in linears.items())
        raise ValueError(
            f"no linear module named {', '.join(unknown) or 'at all'}; the layers' linear modules "
            f"are {listed or 'none: ' + _kinds(layers[min(shape.sites)])}"
        )
    return found


def _matches(path: str, pattern: str) -> bool:
    """Whether a pattern of ``target_modules`` means the module at a path inside a layer."""
    return fnmatchcase(path, pattern) or fnmatchcase(path.rsplit(".", 1)[-1], pattern)


def _kinds(layer: nn.Module) -> str:
    """What a layer is made of, for one without linear layers."""
    leaves = (m for m in layer.modules() if not any(True for _ in m.children()))
    return "it has " + ", ".join(sorted({type(leaf).__name__ for leaf in leaves}))


def refuse_adapted(model: nn.Module) -> None:
    """ValueError where ``model`` carries an adapter already."""
    if any(isinstance(module, AdaptedLinear) for module in model.modules()):
        raise ValueError("the model already carries an adapter: call its remove() first")


def check_saes(shape: AdapterShape, saes: Mapping[int, SparseAutoencoder], width: int) -> None:
    """ValueError unless there is an SAE of the model's width for each site that needs one."""
    for name, choices in {"routing": ROUTINGS, "router": ROUTERS, "source": SOURCES}.items():
        if getattr(shape, name) not in choices:
            raise ValueError(f"{name} {getattr(shape, name)!r}: choose from {', '.join(choices)}")
    if shape.routing != "sae":
        return
    if shape.source == "base_last":
        raise ValueError("source 'base_last' is a hidden state: no SAE of a site reads it")
    missing = [site for site in shape.sites if site not in saes]
    if missing:
        raise ValueError(f"no SAE for control site {missing[0]}; SAEs are given for {sorted(saes)}")
    for site, sae in saes.items():
        if sae.W_enc.shape[0] != width:
            raise ValueError(
                f"the SAE at site {site} reads width {sae.W_enc.shape[0]}, the model has {width}"
            )
