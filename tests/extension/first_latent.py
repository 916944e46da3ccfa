import torch
from torch import nn

from steerlora.methods.routed_lora.routing import RouterState, Routing, router


@router("first_latent")
class FirstLatentRouter(nn.Module):
    """Each token goes to the specialist that its strongest latent's number says, modulo E."""

    fitted = False  # it takes no signals of a domain's text
    leaves_out = True  # a batch may leave whole specialists without a token

    def __init__(self, width, config, modules, generator):
        super().__init__()
        self.config = config

    def available(self):
        return None

    def forward(self, signal, counted, active, state=None, restarts=None):
        strongest = signal.values.argmax(-1, keepdim=True)  # [B, S, 1]
        chosen = signal.indices.gather(-1, strongest) % self.config.specialists
        gate = torch.zeros(*counted.shape, self.config.specialists, device=counted.device)
        gate = gate.scatter(-1, chosen, 1.0)  # [B, S, E]
        mask = gate.new_ones(*counted.shape, self.config.rank)  # [B, S, R]
        return Routing(gate, mask), RouterState(None)
