"""Counting the bytes of live tensors, whether they hold numbers or only have shapes."""

from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountBytes(TorchDispatchMode):
    """Counts the storages of all tensors that operators make inside the block, and what is freed again.
    live: bytes now. peak: the most that was live at once. left_out: bytes of all that would be in host memory. `add`
    counts what was made before."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.left_out = 0
        self._storages: dict[int, tuple[ref[Any], int]] = {}  # by id

    def add(self, *tensors: Tensor, workspace: int = 0) -> None:
        """Count these tensors' storages, each once; workspace: bytes an operator used within itself."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) not in self._storages:
                self._storages[id(storage)] = ref(storage, partial(self._forget, id(storage))), storage.nbytes()
                self.live += storage.nbytes()
        self.peak = max(self.peak, self.live + workspace)

    def room(self, x: Tensor) -> Tensor:
        """As `host_like`, but on x's device, and counted as nothing: it would be in host memory."""
        peak, made = self.peak, torch.empty_like(x)
        known, size = self._storages[key := id(made.untyped_storage())]
        self._storages[key] = known, 0
        self.live -= size
        self.left_out += size
        self.peak = max(peak, self.live)
        return made

    def _forget(self, key: int, _: ref[Any]) -> None:
        self.live -= self._storages.pop(key)[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if made:
            flash = func is torch.ops.aten._flash_attention_backward.default
            self.add(*made, workspace=_flash_backward_workspace(args[1], args[2]) if flash else 0)
        return result


def _flash_backward_workspace(q: Tensor, k: Tensor) -> int:
    """Bytes that CUDA's flash backward allocates within itself: dq in float32, and dk, dv per query head."""
    B, C, H, D = q.shape
    per_query_head = 2 * B * k.shape[1] * H * D * k.element_size() if k.shape[2] != H else 0
    return 4 * B * C * H * D + per_query_head
