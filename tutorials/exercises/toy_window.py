"""A layer's memory for the exercise on a window: one row, one head, and a list of who asked for what."""

from __future__ import annotations

from torch import Tensor, zeros_like


class Memory:
    """Keys and values (T, D) of a text, and what has been sent back to them so far."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.key_grads, self.value_grads = zeros_like(keys), zeros_like(values)
        self.reads: list[tuple[int, int]] = []
        self.adds: list[tuple[int, int]] = []

    def read(self, a: int, b: int) -> tuple[Tensor, Tensor]:
        """Keys and values (b - a, D) of the positions from a to b - 1, as leaves that require a gradient."""
        self.reads.append((a, b))
        keys, values = (x[a:b].detach().clone().requires_grad_() for x in (self.keys, self.values))
        return keys, values

    def add(self, a: int, b: int, key_grads: Tensor, value_grads: Tensor) -> None:
        """Add the gradients (b - a, D) that a chunk sends back to the positions from a to b - 1."""
        self.adds.append((a, b))
        self.key_grads[a:b] += key_grads
        self.value_grads[a:b] += value_grads
