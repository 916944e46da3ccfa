"""What an attached method leaves in a model, and what it knows of the forwards that run.

Everything here is an object that refers to its method, never a closure: so ``copy.deepcopy`` and
``pickle`` of a model with a method give another model with a method of its own.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from steerlora.lm.forwards import ForwardArguments, ObservedForward
from steerlora.lm.targets import Target

if TYPE_CHECKING:
    from steerlora.methods.base import Method

logger = logging.getLogger(__name__)


@dataclass
class ForwardState(ForwardArguments):
    """What a method knows of one forward; made when it begins."""


class _Box:
    """Holds a forward."""

    def __init__(self, forward: ForwardState) -> None:
        self.forward = forward


class _Thread(threading.local):
    """A thread's own part of :class:`Running`; a thread that has not been here begins with this."""

    def __init__(self, shared: _Box) -> None:
        self.box = shared
        self.disabled = False
        self.intervention: Any = None


class Running:
    """The forwards of a method: each thread has its own, so that none reads another's.

    A thread in which no forward has begun reads the last one of all: the backward of a GPU has a
    thread of its own, in which layers that are recomputed read what their forward did. A copy, or
    one that was unpickled, begins with nothing.

    Args:
        state: makes what is known of a forward.
    """

    def __init__(self, state: type[ForwardState]) -> None:
        self._state = state
        self._shared = _Box(state())
        self._thread = _Thread(self._shared)

    def begin(self, given: dict[str, Any]) -> None:
        """A forward begins in this thread, of a decoder that is called with these arguments."""
        forward = self._state()
        forward.note(given)
        if self._thread.box is self._shared:
            self._thread.box = _Box(forward)
        self._thread.box.forward = self._shared.forward = forward

    @property
    def forward(self) -> Any:
        """This thread's last forward, of the type that was asked for."""
        return self._thread.box.forward

    @property
    def disabled(self) -> bool:
        """The model is the base, for now, in this thread."""
        return self._thread.disabled

    @disabled.setter
    def disabled(self, value: bool) -> None:
        self._thread.disabled = value

    @property
    def intervention(self) -> Any:
        """The control that acts in this thread; None: none does."""
        return self._thread.intervention

    @intervention.setter
    def intervention(self, value: Any) -> None:
        self._thread.intervention = value

    def __reduce__(self):
        return type(self), (self._state,)


class Edit:
    """A method's edit of the stream that enters a layer, asked of the method in every forward."""

    def __init__(self, method: Method, layer: int) -> None:
        self.method, self.layer = method, layer

    @torch.compiler.disable
    def __call__(self, stream: Tensor) -> Tensor:
        if self.method.running.disabled:
            return stream
        return self.method.edits()[self.layer](stream)


class SavesBase:
    """Stands in for ``save_pretrained`` of a model that a method is attached to: writes the base.

    Under the base's own names, so that ``from_pretrained`` reads it; the method is saved by
    ``save_adapter``.
    """

    def __init__(self, method: Method) -> None:
        self.method = method

    def __call__(self, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any):
        """As the model's own.

        Raises:
            ValueError: a state dict is given, whose names are those of the model with the method.
        """
        if state_dict is not None or len(args) > 1:
            raise ValueError(
                "save_pretrained writes the base of a model with an adapter: leave state_dict out, "
                "or call the adapter's remove() first"
            )
        method, model = self.method, self.method.model
        method.remove()
        try:
            result = model.save_pretrained(save_directory, *args, **kwargs)
        finally:
            method.attach(model)
        logger.warning(
            "%s is the base model alone: methods.saving.save_adapter writes the adapter",
            save_directory,
        )
        return result


class Attachment(NamedTuple):
    """What undoes the attachment of a method."""

    model: nn.Module
    observed: ObservedForward
    replaced: dict[str, Target]
