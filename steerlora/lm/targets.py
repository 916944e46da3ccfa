"""Linear layers of a decoder that a method replaces by layers of its own."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from steerlora.lm.decoder import EditedLayer, Wrapper, layers_of

Linear = nn.Linear | Conv1D
"""What can be replaced; GPT-2's Conv1D is a linear layer with its weight transposed."""


class ReplacedLinear(Wrapper):
    """A layer that stands where a linear layer of the base model stood.

    It answers for what it does not have itself (``weight``, ``in_features``) as ``base`` would.

    Args:
        base: the frozen linear layer; put back by whoever replaced it.
    """

    wrapped = "base"

    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.base = base


class Target(NamedTuple):
    """A linear layer to replace: ``parent.<child>``."""

    parent: nn.Module
    child: str
    linear: nn.Module


def size_of(linear: Linear) -> tuple[int, int]:
    """D_in and D_out of a linear layer, of whichever type it is."""
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    return linear.in_features, linear.out_features


def find_targets(
    model: nn.Module, first_layer: int, patterns: Sequence[str] | None
) -> dict[str, Target]:
    """The linear layers meant, lowest layer first, by "<layer>:<path inside it>", dots as "/".

    Args:
        model: a causal language model.
        first_layer: layers below it are left alone.
        patterns: last names, paths inside a decoder layer, or patterns of either, such as "*_proj"
            or "self_attn.*"; None: all.

    Raises:
        ValueError: a layer that the model does not have; a name or pattern that no linear layer
            has, with the names that there are.
    """
    layers = layers_of(model)
    if not 0 <= first_layer < len(layers):
        raise ValueError(f"control site {first_layer}: the model has layers 0 to {len(layers) - 1}")
    wanted = ("*",) if patterns is None else patterns
    found: dict[str, Target] = {}
    matched, linears = set(), {}
    for index in range(first_layer, len(layers)):
        layer = layers[index]
        while isinstance(layer, EditedLayer):
            layer = layer.layer
        inside = ()
        for path, module in layer.named_modules():
            if inside and path.startswith(inside):
                continue  # a replaced layer's own parts
            if isinstance(module, ReplacedLinear):
                inside = (*inside, f"{path}.")
            elif not isinstance(module, Linear):
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
            f"are {listed or 'none: ' + _kinds(layers[first_layer])}"
        )
    return found


def put_back(targets: dict[str, Target]) -> None:
    """Give every replaced layer's place back to the linear layer that stood there."""
    for parent, child, replaced in targets.values():
        setattr(parent, child, replaced.base)


def refuse_changed(model: nn.Module) -> None:
    """ValueError where ``model`` carries replaced or edited layers, and so a method, already."""
    if any(isinstance(module, ReplacedLinear | EditedLayer) for module in model.modules()):
        raise ValueError("the model already carries an adapter: call its remove() first")


def _matches(path: str, pattern: str) -> bool:
    """Whether a pattern of ``target_modules`` means the module at a path inside a layer."""
    return fnmatchcase(path, pattern) or fnmatchcase(path.rsplit(".", 1)[-1], pattern)


def _kinds(layer: nn.Module) -> str:
    """What a layer is made of, for one without linear layers."""
    leaves = (m for m in layer.modules() if not any(True for _ in m.children()))
    return "it has " + ", ".join(sorted({type(leaf).__name__ for leaf in leaves}))
