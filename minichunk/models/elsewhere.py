"""What stands where another process has a part of the model: it lets everything through."""

from __future__ import annotations

from torch import nn


class Elsewhere(nn.Module):
    """In the place of `module`, of which it knows the linear layers inside: their names, and (inputs, outputs)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        found = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear))
        self.linear = {name: (layer.in_features, layer.out_features) for name, layer in found if name}

    def forward(self, x: object) -> object:
        return x
