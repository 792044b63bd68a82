"""Counting the bytes of live tensors, whether they hold numbers or only have shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
T = TypeVar("T")


class CountBytes(TorchDispatchMode):
    """Counts the storages of all tensors that operators make inside the block, and what is freed again.

    live: bytes now. peak: the most that was live at once. `add` counts what was made before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._fleeting: set[int] = set()  # of them, those that are looked at to see whether they are gone

    def add(self, *tensors: Tensor, workspace: int = 0) -> None:
        """Count these tensors' storages, each once; workspace: bytes an operator used within itself."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known, _ = self._storages.get(storage._cdata, (None, 0))
            if known is None or known.expired():
                self._forget(storage._cdata)
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self._fleeting.add(storage._cdata)
                self.live += storage.nbytes()
        if self.live + workspace > self.peak:  # perhaps only because what is gone has not been looked for
            self.settle()
            self.peak = max(self.peak, self.live + workspace)

    def settle(self) -> None:
        """Stop counting what is gone."""
        expired = torch.UntypedStorage._expired  # what StorageWeakRef.expired asks, without its checks
        for key in [key for key in self._fleeting if expired(self._storages[key][0].cdata)]:
            self._forget(key)

    def lasting(self) -> None:
        """All that is counted now will live on: look no more whether it is gone."""
        self._fleeting.clear()

    def elsewhere(self, make: Callable[[], T], tensors: Callable[[T], Sequence[Tensor]]) -> T:
        """Call make() and return what it makes, without counting the `tensors` of that: they would be on the host."""
        peak, made = self.peak, make()
        for tensor in tensors(made):
            key = tensor.untyped_storage()._cdata
            reference, size = self._storages[key]
            self._storages[key] = (reference, 0)
            self.live -= size
        self.peak = max(peak, self.live)
        return made

    def _forget(self, key: int) -> None:
        self._fleeting.discard(key)
        self.live -= self._storages.pop(key, (None, 0))[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if made:
            flash = func is aten._flash_attention_backward.default
            self.add(*made, workspace=_flash_backward_workspace(args[1], args[2]) if flash else 0)
        return result


def _flash_backward_workspace(q: Tensor, k: Tensor) -> int:
    """Bytes that CUDA's flash backward allocates within itself: dq in float32, and dk, dv per query head."""
    B, C, H, D = q.shape
    per_query_head = 2 * B * k.shape[1] * H * D * k.element_size() if k.shape[2] != H else 0
    return 4 * B * C * H * D + per_query_head
