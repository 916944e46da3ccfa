"""How a model's layers run in training: recomputed in the backward, compiled."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import nn

from steerlora.lm.decoder import EditedLayer, layers_of


class LayerExecution(Callback):
    """For as long as a training lasts; nothing for a module without a language model.

    Args:
        recompute: keep only each decoder layer's input, and run the layer again in the backward.
        compile: run the decoder's layers through ``torch.compile``, for whatever length of text:
            one graph for the layers below the adapters, one for the first above, one for the rest.
    """

    def __init__(self, *, recompute: bool, compile: bool) -> None:
        self.recompute, self.compile = recompute, compile

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        model = getattr(module, "model", None)
        if model is None:
            return
        if self.recompute:
            # The engines that shard weights change the shapes that torch would compare.
            model.gradient_checkpointing_enable(
                {"use_reentrant": False, "determinism_check": "none"}
            )
            # Non-reentrant: it needs no input that takes a gradient. Transformers gives it one all
            # the same, and layers below the first adapted one would be recomputed for nothing.
            model.disable_input_require_grads()
            # It acts in training mode only. The layers' own parts stay in theirs: a frozen base
            # drops nothing out.
            for layer in _layers(model):
                layer.training = True
        for layer in _layers(model) if self.compile else ():
            layer.compile(dynamic=True)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        model = getattr(module, "model", None)
        if model is None:
            return
        if self.recompute:
            model.gradient_checkpointing_disable()
            for layer in _layers(model):
                layer.training = model.training
        for layer in _layers(model) if self.compile else ():
            layer._compiled_call_impl = None


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The decoder's layers; the edits around them stay as they are, in Python."""
    for layer in layers_of(model):
        while isinstance(layer, EditedLayer):
            layer = layer.layer
        yield layer
