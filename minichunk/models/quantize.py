"""A frozen base in 4 bits, as in QLoRA (arXiv 2305.14314): NF4 weights, by bitsandbytes, 16 levels that fit a normal
distribution; a layer unpacks its own in the forward pass and again in the backward."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError

BLOCK = 64  # numbers that share a scale


def check_bitsandbytes() -> None:
    """Raise InputError unless the library is installed."""
    try:
        import bitsandbytes  # type: ignore[import-not-found,unused-ignore]  # noqa: F401 (registers the operators)
    except ImportError:
        raise InputError("a 4-bit base needs bitsandbytes: pip install 'minichunk[4bit]'") from None


class Linear4bit(nn.Module):
    """y = x Wᵀ + b with W (out, in) frozen and stored in 4 bits, plus a float32 scale for 64 numbers."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        packed, scales = torch.ops.bitsandbytes.quantize_4bit(weight.detach(), BLOCK, "nf4", torch.uint8)
        self.register_buffer("packed", packed)  # (out * in / 2, 1): two numbers in a byte
        self.register_buffer("scales", scales)  # (out * in / 64)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        """W, unpacked, (out, in)."""
        shape = (self.out_features, self.in_features)
        direct = dtype if dtype.itemsize <= 4 else torch.float32
        return torch.ops.bitsandbytes.dequantize_4bit(self.packed, self.scales, BLOCK, "nf4", shape, direct).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self)


class _Linear(torch.autograd.Function):
    """Saves no unpacked weight for the backward pass: it is unpacked again there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight_as(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] @ ctx.layer.weight_as(grads[0].dtype), None


def is_stored_in_4bit(name: str) -> bool:
    """Whether a 4-bit base stores the linear module of this name so: those of the layers, not the LM head."""
    return ".layers." in name


def is_in_4bit(model: nn.Module) -> bool:
    return any(isinstance(module, Linear4bit) for module in model.modules())


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model has, those stored in 4 bits included."""
    packed = [m.in_features * m.out_features for m in model.modules() if isinstance(m, Linear4bit)]
    return sum(parameter.numel() for parameter in model.parameters()) + sum(packed)


def quantize(model: nn.Module) -> None:
    """Store a model's linear layers in 4 bits. For measurements: from_pretrained does it while it loads."""
    check_bitsandbytes()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_stored_in_4bit(name):
            model.set_submodule(name, Linear4bit(module.weight, module.bias))
