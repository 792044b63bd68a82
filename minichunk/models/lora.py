"""LoRA: a trainable low-rank product beside frozen weights, and dropout that can be replayed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..chunks import Chunk
from ..errors import InputError
from .quantize import Linear4bit, is_in_4bit
from .stack import Stack


class DropoutMasks:
    """Which masks the model's dropouts draw now; one object, shared by all of a model's adapters.

    A rebuild must draw the masks that the fill drew, or its gradient is another function's. So
    on top of a cache a mask depends on nothing but the step's seed, the module and the chunk.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self.chunks: Sequence[Chunk] = ()

    @contextmanager
    def of(self, seed: int | None, chunks: Sequence[Chunk]) -> Iterator[None]:
        """Within the block: the masks of `chunks`, one after the other. No seed, or outside: ordinary dropout."""
        self.seed, self.chunks = seed, chunks
        try:
            yield
        finally:
            self.seed, self.chunks = None, ()

    def draw(self, x: Tensor, module: str, rate: float) -> Tensor:
        """A mask for x (B, T, ·): 0 with probability `rate`, else 1 / (1 - rate)."""
        if self.seed is None:
            return F.dropout(torch.ones_like(x), rate)
        parts = []
        for start, stop in self.chunks:
            digest = blake2b(f"{self.seed} {module} {start}".encode(), digest_size=7).digest()
            generator = torch.Generator(x.device).manual_seed(int.from_bytes(digest, "big"))
            mask = torch.empty(x.shape[0], stop - start, x.shape[2], dtype=torch.float32, device=x.device)
            parts.append(mask.bernoulli_(1 - rate, generator=generator).div_(1 - rate))
        return torch.cat(parts, dim=1).to(x.dtype)


class Placeholder(nn.Module):
    """Of a module that another rank has; returns its input.

    linear: the linear layers inside of it, (inputs, outputs) by name.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        found = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear))
        self.linear = {name: (layer.in_features, layer.out_features) for name, layer in found if name}

    def forward(self, x: object) -> object:
        return x


class Lora(NamedTuple):
    """Of a model's adapter."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]


def low_rank(in_features: int, out_features: int, rank: int, like: Tensor) -> tuple[nn.Linear, nn.Linear]:
    """A (rank, in), random, and B (out, rank), zero, on like's device, in its dtype or in float32 if that is wider."""
    wide = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
    A = nn.Linear(in_features, rank, bias=False, **wide)
    B = nn.Linear(rank, out_features, bias=False, **wide)
    nn.init.kaiming_uniform_(A.weight, a=5**0.5)  # as the LoRA paper's code: starts at B A = 0
    nn.init.zeros_(B.weight)
    return A, B


def adapters(model: Stack) -> dict[str, Any]:
    """The model's linear layers that have an adapter, by their names."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def linear_modules(model: Stack) -> list[str]:
    """Full names of the linear layers that an adapter can be put at: all but the LM head."""
    names = []
    for name, module in model.named_modules():
        inside = module.linear if isinstance(module, Placeholder) else ()
        linear = [name] if isinstance(module, nn.Linear | Linear4bit) else [f"{name}.{other}" for other in inside]
        names += [full for full in linear if full.rpartition(".")[2] not in ("lm_head", "lora_A", "lora_B")]
    return names


def default_targets(model: Stack) -> list[str]:
    """The last names of all linear layers, each once, but the LM head and what PEFT refuses in this family."""
    names = dict.fromkeys(name.rpartition(".")[2] for name in linear_modules(model))
    return [name for name in names if name not in model.unadapted]


def is_target(name: str, targets: Sequence[str]) -> bool:
    """Whether the targets, full names or ends of them, mean this layer, as PEFT reads them."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def add_lora(
    model: Stack, rank: int = 8, alpha: float = 16, targets: Sequence[str] | None = None, dropout: float = 0.0
) -> None:
    """Freeze the model and put a trainable adapter beside each linear layer named in `targets`.

    targets: names, or ends of them; None: q_proj and v_proj where the model has attention, else `default_targets`.
    The model is in training mode then, with dropout: `model.eval()` ends that.

    Every parameter keeps its name; `<layer>.lora_A.weight` (rank, in) and `<layer>.lora_B.weight`
    (out, rank) come beside it, in float32 (float64 for a float64 model). The update is alpha / rank · B A.
    Raises InputError for a wrong value and for a model that has an adapter already.
    """
    known, default = linear_modules(model), default_targets(model)
    if targets is None:
        targets = [name for name in ("q_proj", "v_proj") if name in default] or default
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    if not targets or not all(any(is_target(name, [target]) for name in known) for target in targets):
        ends = dict.fromkeys(name.rpartition(".")[2] for name in known)
        raise InputError(f"LoRA targets are {list(targets)}, but must be some of {', '.join(ends)}")
    if rank < 1 or not alpha > 0 or not 0 <= dropout < 1:
        given = f"rank {rank}, alpha {alpha}, dropout {dropout}"
        raise InputError(f"LoRA needs rank >= 1, alpha > 0 and 0 <= dropout < 1, got {given}")
    if adapters(model):
        raise InputError("the model has an adapter already: call merge_lora(model) first")
    model.requires_grad_(False)
    masks, like = DropoutMasks(), next(model.parameters())
    for name, module in list(model.named_modules()):
        if isinstance(module, Placeholder):  # the same random numbers whoever has which layers
            for inside, sizes in module.linear.items():
                if is_target(f"{name}.{inside}", targets):
                    low_rank(*sizes, rank, like)
        elif isinstance(module, nn.Linear | Linear4bit) and is_target(name, targets):
            layer: Any = module
            layer.lora_A, layer.lora_B = low_rank(layer.in_features, layer.out_features, rank, like)
            layer.name, layer.scale, layer.dropout, layer.masks = name, alpha / rank, dropout, masks
            layer.hook = layer.register_forward_hook(_add_product)
    model.lora = Lora(rank, alpha, dropout, targets)
    model.train()
    if dropout > 0:
        model.masks = masks


def _add_product(layer: Any, inputs: tuple[Tensor], y: Tensor) -> Tensor:
    """A layer's forward hook: its output, and scale · dropout(x) Aᵀ Bᵀ."""
    (x,) = inputs
    if layer.dropout > 0 and layer.training:
        x = x * layer.masks.draw(x, layer.name, layer.dropout)
    # The adapter's few columns are computed in the model's dtype; its weights stay wide.
    low = F.linear(x, layer.lora_A.weight.to(x.dtype))
    return y + F.linear(low, layer.lora_B.weight.to(x.dtype)) * layer.scale


@torch.no_grad()
def merge_lora(model: Stack) -> None:
    """Fold every adapter into its weight and take the adapters out; all parameters become trainable.

    Raises InputError for a 4-bit base, whose 16 levels would swallow the update.
    """
    if is_in_4bit(model):
        raise InputError("a 4-bit base cannot take an adapter in: save it, and merge it into the unquantized base")
    for layer in adapters(model).values():
        layer.weight.copy_(layer.weight + layer.scale * (layer.lora_B.weight @ layer.lora_A.weight))
        layer.hook.remove()
        del layer.lora_A, layer.lora_B
    model.lora = model.masks = None
    model.requires_grad_(True)
