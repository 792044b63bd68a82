"""Solution 7: LoRA."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LoraLinear(nn.Module):
    """A frozen linear layer and, beside it, a trainable product of two small matrices."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))  # B A = 0: starts as the base
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.lora_A.T @ self.lora_B.T)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        linear = copy.deepcopy(self.base)  # a copy: the base itself stays what it was
        linear.weight += self.scale * self.lora_B @ self.lora_A
        return linear


def add_lora(model: nn.Module, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Freeze the model and put a LoraLinear in the place of every linear layer named in `targets`."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):  # a list, for the loop changes the modules
        parent, _, child = name.rpartition(".")
        if child in targets:
            setattr(model.get_submodule(parent), child, LoraLinear(module, rank, alpha))
