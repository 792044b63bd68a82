"""The bytes that are alive, by what they are for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..costs.count import CountBytes


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each once."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


class Meter(CountBytes):
    """Counts a step's bytes, without what the observer itself computes on the way.

    parameters: of the model. others: all else that is there before the step, and stays.
    """

    def __init__(self, model: nn.Module, *batch: Tensor) -> None:
        super().__init__()
        self._paused = False
        self.parameters = list(model.parameters())
        self._weights = [*self.parameters, *model.buffers()]
        self.add(*self._weights, *batch, *self._gradients())
        self.lasting()

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block nothing is counted, and autograd sees nothing."""
        before, self._paused = self._paused, True
        try:
            with torch.no_grad():
                yield
        finally:
            self._paused = before

    def read(self, held: tuple[int, int]) -> tuple[dict[str, int], int]:
        """What is alive now, by what it is for, and the most that was since the last reading.

        held: bytes that the memory remembers, and those of the gradients sent back to it.
        """
        self.settle()
        sizes = {
            "weights": storage_bytes(self._weights), "gradients": storage_bytes(self._gradients()),
            "memory": held[0], "memory_gradients": held[1],
        }  # fmt: skip
        peak, self.peak = max(self.peak, self.live), self.live
        return {**sizes, "activations": self.live - sum(sizes.values())}, peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._paused:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)
