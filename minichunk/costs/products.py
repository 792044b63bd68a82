"""Half-precision matrix products on a CPU that has no instructions for them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HALF = (torch.bfloat16, torch.float16)


class Float32Products(TorchDispatchMode):
    """Computes them in float32 and rounds the result, as a CPU with such instructions does, for all but the speed.

    Without AVX-512, PyTorch 2.13 multiplies two bfloat16 matrices of certain layouts a hundred times as slowly as
    float32 ones: a large model's step would not end. The float32 copies live for one product, uncounted.
    """

    @staticmethod
    def needed(dtype: torch.dtype, device: torch.device) -> bool:
        return dtype in HALF and device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and args[0].dtype in HALF and not kwargs:
            return torch.mm(args[0].float(), args[1].float()).to(args[0].dtype)
        return func(*args, **(kwargs or {}))
