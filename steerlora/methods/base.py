"""The interface of a method: what is attached to a frozen base model, and how it trains.

A kind of method gives a configuration (``methods/config.py``) and a :class:`Method`; where it does
not train by the next token's loss alone, a :class:`Learner` as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from steerlora.data.batches import ChatBatch
from steerlora.data.chat import EncodedChat
from steerlora.lm.decoder import attach_edits, decoder_of, layers_of, remove_edits
from steerlora.lm.forwards import ObservedForward, cache_after, parameters_of_forward
from steerlora.lm.shapes import DecoderShape
from steerlora.lm.signal_tokens import ALL_TOKENS, SignalTokens
from steerlora.lm.targets import (
    ReplacedLinear,
    Target,
    find_targets,
    put_back,
    refuse_changed,
)
from steerlora.methods.attached import Attachment, Edit, ForwardState, Running, SavesBase
from steerlora.methods.config import MethodConfig
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.taxonomy import Taxonomy
from steerlora.training.language import Text, next_token_loss

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from steerlora.config import InterventionConfig
    from steerlora.methods.monitor import Monitor


class SiteSAE(NamedTuple):
    """A control site's trained SAE."""

    sae: SparseAutoencoder
    mean_norm: float = 1.0
    """Mean L2 norm of its features on held-out text."""
    path: Path | None = None
    """Its folder."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a method reads, by control site, as far as its capabilities ask for it."""

    saes: Mapping[int, SiteSAE] = field(default_factory=dict)
    taxonomies: Mapping[int, Taxonomy] = field(default_factory=dict)
    signal_tokens: SignalTokens = ALL_TOKENS
    """Which tokens of the base's text carry a signal."""


class LowRankUpdate(NamedTuple):
    """What a method adds to a linear layer: scale * sum_e g_e B_e A_e x, of its E specialists."""

    A: nn.Parameter
    """[E*R, D_in]; rows e*R ... (e+1)*R are those of specialist e."""
    B: nn.Parameter
    """[D_out, E*R]; columns likewise."""
    scale: float
    """alpha / R."""
    specialists: int
    """E."""


class Health(Protocol):
    """What a method measures of itself on held-out text."""

    def update(self, batch: ChatBatch, first: int) -> None:
        """Add the forward of this batch that has just been; its rows count from ``first``."""

    def result(self) -> dict[str, dict]:
        """{site: {statistic: value}}, plain numbers for JSON."""


class DomainRouter(Protocol):
    """Tells domains apart by the signals of their texts, fitted to one domain after the other."""

    def fit(self, specialist: int, signals: Tensor) -> None:
        """Take a domain's signals [texts, width]; its number is that of its specialist."""

    def nearness(self, signals: Tensor) -> Tensor:
        """As :meth:`Method.nearness`, of signals [texts, width]."""


class Method(nn.Module):
    """What trains: parameters and buffers beside a frozen model, and how they change its forwards.

    A method changes a model in one or both of two ways: it edits residual streams (:meth:`edits`)
    and replaces linear layers (:meth:`replacements`). Its state dict is what is saved; what it only
    reads, such as SAEs, is kept outside.

    With it the model stays an ordinary one. What is known of a forward belongs to the thread that
    runs it (``running``), and what it leaves for the next ones to the KV cache (:meth:`keep`).
    ``copy.deepcopy((model, method))`` gives another model with a method of its own.

    Args:
        config: of the method.
        model: the base; it is frozen here, and changed by :meth:`attach`.
        saes: {site: SAE} that it runs in every forward, where ``config.reads_features``. They are
            frozen, follow to another device, and keep their own type: in another one their features
            would not be the same.

    Raises:
        ValueError: the model carries a method already, keeps no keys and values, or does not have
            all the sites; a site's SAE is missing, or reads another width.

    Attributes:
        saes: those; a plain dict, so that they are no part of the state dict.
        signal_tokens: which tokens carry a signal; saved with it. All do, until a kind of method
            sets it.
        running: its forwards, and whether it is disabled.
    """

    forward_type: type[ForwardState] = ForwardState
    """Made for every forward."""

    def __init__(
        self,
        config: MethodConfig,
        model: nn.Module,
        saes: Mapping[int, SparseAutoencoder] | None = None,
    ) -> None:
        super().__init__()
        refuse_changed(model)
        parameters_of_forward(decoder_of(model))
        layers = len(layers_of(model))
        if max(config.sites) >= layers:
            raise ValueError(
                f"control sites {config.sites}: the model has layers 0 to {layers - 1}"
            )
        given = dict(saes or {}) if config.reads_features else {}
        _check_saes(config, given, decoder_of(model).config.hidden_size)
        self.saes = {site: sae.eval().requires_grad_(False) for site, sae in given.items()}
        self.config, self.running = config, Running(self.forward_type)
        self.signal_tokens = ALL_TOKENS
        # A list, so that the model is no part of this module.
        self._attached: list[Attachment] = []
        model.requires_grad_(False)

    def edits(self) -> dict[int, Callable[[Tensor], Tensor]]:
        """{site: what becomes of the stream [B, S, D] that enters it}; not run while disabled.

        Asked for in every forward: the sites are the same in all.
        """
        return {}

    def replacements(self, model: nn.Module) -> dict[str, ReplacedLinear]:
        """{name of a target of :meth:`targets`: the layer that stands in its place}.

        While ``running.disabled`` such a layer computes what its base does.
        """
        return {}

    def targets(self, model: nn.Module) -> dict[str, Target]:
        """The linear layers that the configuration means, from the first site's layer on."""
        return find_targets(model, self.first_layer, self.config.target_modules)

    def observe(self, model: nn.Module, given: dict[str, Any]) -> None:
        """Before every forward of the attached model that is not disabled.

        Args:
            model: the base.
            given: {argument: value} of the decoder's forward.
        """
        self.running.begin(given)

    def keep(self, cache: Cache | None) -> None:
        """After every such forward: put into its KV cache what later ones need of its tokens.

        Args:
            cache: what it has filled (``lm/caches.py``); None: it had none.
        """

    @property
    def forward_state(self) -> Any:
        """What is known of this thread's last forward, a ``forward_type``."""
        return self.running.forward

    @property
    def model(self) -> nn.Module:
        """The model that it is attached to.

        Raises:
            ValueError: it is not attached.
        """
        if not self._attached:
            raise ValueError("the adapter is not attached to a model")
        return self._attached[-1].model

    @property
    def first_layer(self) -> int:
        """The lowest layer that it may change; the stream that enters it is the base's own."""
        return min(self.config.sites)

    def attach(self, model: nn.Module) -> Self:
        """Put it into ``model``, in place; :meth:`remove` undoes it exactly.

        Raises:
            ValueError: the model carries a method already.
        """
        refuse_changed(model)
        self.to(next(model.parameters()).device)
        targets = self.targets(model)
        replaced = {}
        for name, layer in self.replacements(model).items():
            parent, child, _ = targets[name]
            setattr(parent, child, layer)
            replaced[name] = Target(parent, child, layer)
        attach_edits(model, {site: Edit(self, site) for site in self.edits()})
        observed = ObservedForward(model, self._before, self._after)
        if hasattr(model, "save_pretrained"):
            model.save_pretrained = SavesBase(self)
        self._attached.append(Attachment(model, observed, replaced))
        return self

    # What is known of a forward is Python's: compiled, it would be compiled again for every length.

    @torch.compiler.disable
    def _before(self, given: dict[str, Any]) -> None:
        if not self.running.disabled:
            self.observe(self.model, given)

    @torch.compiler.disable
    def _after(self, given: dict[str, Any], output: Any) -> None:
        if not self.running.disabled:
            self.keep(cache_after(given, output))
            self.forward_state.cache = None  # which is the caller's to keep

    def remove(self) -> None:
        """Give the model back as it was: the same modules, no wrapper left.

        Raises:
            ValueError: it is not attached.
        """
        model, replaced = self.model, self._attached[-1].replaced
        self._attached.pop().observed.remove()
        vars(model).pop("save_pretrained", None)
        remove_edits(model, self.edits())
        put_back(replaced)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The attached model computes exactly what the base model would, inside this context, in
        this thread."""
        before, self.running.disabled = self.running.disabled, True
        try:
            yield
        finally:
            self.running.disabled = before

    def intervention(self, name: str, **settings: Any) -> AbstractContextManager[Any]:
        """Run the model with the control signal changed, inside this context only.

        Raises:
            ValueError: it has no control signal.
        """
        raise ValueError(
            f"intervention {name} acts on a control signal of SAE features, and "
            f"{self.config.name or self.config.kind} has none"
        )

    def only(self, part: str) -> AbstractContextManager[None]:
        """Run the model with one of two parts, in this context and this thread only, where
        ``config.splices``.

        Args:
            part: "saes", the reconstructions without what was trained; or "adapter", what was
                trained without the reconstructions.
        """
        raise NotImplementedError

    def configure(self, **options: Any) -> None:
        """Take the options of ``config.only_in_evaluation``."""

    def products(self) -> list[nn.Parameter]:
        """Trained matrices that every token is multiplied by, for counting operations."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def low_rank(self) -> dict[str, LowRankUpdate]:
        """{name of a target: what is added to it}, where ``config.low_rank``; the matrices are the
        method's own."""
        return {}

    def gates(self) -> dict[int, Tensor]:
        """{site: weights of the specialists [B, S, E] in this thread's last forward}, detached;
        none where nothing is routed."""
        return {}

    def health(self, domains: Sequence[str], seed: int) -> Health | None:
        """What measures the method on the forwards that follow; None: nothing does."""
        return None

    def nearness(self, rows: Sequence[EncodedChat], pad_token_id: int) -> dict[int, Tensor]:
        """How near each text's prompt is to each domain, where ``config.tells_domains``.

        Returns:
            {site: [rows, specialists + 1]}, the larger the nearer, the last of general text; minus
            infinity where a domain is not known. Its unit is the router's.
        """
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What is saved beside the weights, as plain JSON."""
        return {}

    def load_facts(self, stored: dict[str, Any]) -> None:
        """Take back what :meth:`facts` gave."""

    def forget(self, specialist: int) -> None:
        """Never send text to a domain's specialist again, where ``config.tells_domains``."""
        raise NotImplementedError

    def export_peft(
        self, directory: Path, *, base_path: str, specialist: int | None = None
    ) -> None:
        """Write it in PEFT's format, where ``config.exports_to_peft``; or a domain's specialist
        alone, where ``config.tells_domains``."""
        raise NotImplementedError

    def parameter_count(self) -> int:
        """Trainable parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def _apply(self, function, *args, **kwargs):
        super()._apply(function, *args, **kwargs)
        device = next(self.parameters()).device
        for sae in self.saes.values():
            sae.to(device)
        return self


def _check_saes(config: MethodConfig, saes: Mapping[int, SparseAutoencoder], width: int) -> None:
    """ValueError unless there is an SAE of the model's width for each site that needs one."""
    missing = [site for site in config.sites if site not in saes] if config.reads_features else []
    if missing:
        raise ValueError(f"no SAE for control site {missing[0]}; SAEs are given for {sorted(saes)}")
    for site, sae in saes.items():
        if sae.width != width:
            raise ValueError(
                f"the SAE at site {site} reads width {sae.width}, the model has {width}"
            )


class Task(NamedTuple):
    """What a training learns: all domains together, or one of a sequence."""

    rows: dict[str, list[EncodedChat]]
    """{domain: its training rows}."""
    position: int | None = None
    """Of the domain in its sequence, from 0; None: all domains together."""

    @property
    def name(self) -> str:
        return "all" if self.position is None else next(iter(self.rows))


@dataclass(kw_only=True)
class Learner:
    """How a method trains: by the next token's loss, unless a kind of method says otherwise."""

    method: Method
    """Attached to ``model``."""
    model: nn.Module
    """The base model."""
    domains: Sequence[str]
    """All domains' names; the domain ids of batches are positions in it."""
    pad_token_id: int
    """Fills batches."""
    seed: int
    """Of what training draws."""
    intervention: InterventionConfig
    """That it trains under, if its phase says so."""
    monitor: Monitor | None = None
    """Of the stream at ``method.config.monitor``, if there is one."""
    general_text: Callable[[int], list[EncodedChat]] = lambda most: []
    """Gives rows of general text, encoded, at most so many."""
    optimizer: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """State that the last task left to the next one's optimizer, by number of the trained weight;
    empty where each has a fresh one."""

    def losses(self, batch: ChatBatch) -> dict[str, tuple[float, Tensor]]:
        """{name: (weight, value)} of a batch; the training's loss is their weighted sum.

        Of a part of a batch, a mean over tokens is multiplied by the part's share of them
        (``batch.shares``), so that parts and ranks add up to the whole batch.
        """
        return {"task": (1.0, next_token_loss(self.model, batch))}

    def flops_per_token(self, shape: DecoderShape, text: Text) -> float | None:
        """Floating-point operations of a step, forward and backward; None: those of one forward of
        the adapted model and its backward.

        Args:
            shape: of the base.
            text: what the batch costs.
        """
        return None

    def validation_loss(self, batch: ChatBatch) -> Tensor:
        """Mean loss in nats over the labelled tokens of a batch that is not trained on."""
        return next_token_loss(self.model, batch)

    def callbacks(self, task: Task) -> list[Callback]:
        """What else happens during the training of a task; their state is in its checkpoints."""
        return []

    def begin(self, task: Task) -> None:
        """Just before a task's first step, on every rank; what it leaves is in every checkpoint."""

    def notes(self, task: Task) -> list[str]:
        """What a user should know of a task that has begun, a sentence each."""
        return []

    def end(self, task: Task) -> None:
        """Just after a task's last step, on every rank."""

    def training(self, task: Task) -> AbstractContextManager[None]:
        """Open for as long as a task trains."""
        return nullcontext()

    def state(self) -> dict[str, Any]:
        """What the tasks so far leave for the next ones, beside the method's own state dict: plain
        values and tensors."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave, before the next task begins."""

    def history(self) -> dict[str, Any]:
        """What is worth keeping of the training, as plain JSON: lists by name."""
        return {}
