"""LoRA: a trainable low-rank product beside frozen weights, and dropout that can be replayed."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..chunks import Chunk
from ..errors import InputError
from .quantize import Linear4bit, is_in_4bit
from .stack import Stack


class DropoutMasks:
    """Which masks the model's dropouts draw now; one object, shared by all of a model's adapters.
    A rebuild must draw the fill's masks: on top of a cache they depend on step's seed, module and chunk alone."""

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
    linear: the sizes of the linear layers inside of it, by name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        found = ((name, layer) for name, layer in module.named_modules() if name and isinstance(layer, nn.Linear))
        self.linear = {n: SimpleNamespace(in_features=x.in_features, out_features=x.out_features) for n, x in found}

    def forward(self, x: object) -> object:
        return x


@dataclass(frozen=True)
class Lora:
    """Of a model's adapter. Raises InputError for a wrong value."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        numbers = isinstance(self.rank, int) and all(isinstance(x, int | float) for x in (self.alpha, self.dropout))
        if not numbers or self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            given = f"rank {self.rank!r}, alpha {self.alpha!r}, dropout {self.dropout!r}"
            raise InputError(f"LoRA needs a whole rank >= 1, alpha > 0 and 0 <= dropout < 1, got {given}")


def adapters(model: Stack) -> dict[str, Any]:
    """The model's linear layers that have an adapter, by their names."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def linear_layers(model: Stack) -> dict[str, Any]:
    """By full name, what an adapter can be put at: all linear layers but the LM head; of other ranks, their sizes."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Linear4bit) and module is not getattr(model, "linear", None):  # a head's
            found[name] = module
        elif isinstance(module, Placeholder):
            found |= {f"{name}.{inside}": layer for inside, layer in module.linear.items()}
    others = "lm_head", "lora_A", "lora_B", *getattr(model, "fused", ())
    return {name: layer for name, layer in found.items() if not name.endswith(others)}


def default_targets(model: Stack) -> list[str]:
    """The last names of all linear layers, each once, but the LM head and what PEFT refuses in this family."""
    names = dict.fromkeys(name.rpartition(".")[2] for name in linear_layers(model))
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
    Parameters keep their names; `<layer>.lora_A.weight` (rank, in) and `<layer>.lora_B.weight` (out, rank) come beside
    them, in float32 (float64 for a float64 model). The update is alpha / rank · B A.
    Raises InputError for a wrong value and for a model that has an adapter already."""
    known, default = linear_layers(model), default_targets(model)
    if targets is None:
        targets = [name for name in ("q_proj", "v_proj") if name in default] or default
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    if not targets or not all(any(is_target(name, [target]) for name in known) for target in targets):
        ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in known))
        raise InputError(f"LoRA targets are {list(targets)}, but must be some of {ends or 'its linear layers: none'}")
    lora = Lora(rank, alpha, dropout, targets)
    if adapters(model):
        raise InputError("the model has an adapter already: call merge_lora(model) first")
    model.requires_grad_(False)
    masks, like, here = DropoutMasks(), next(model.parameters()), dict(model.named_modules())
    wide: Any = {"bias": False, "dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
    for name, layer in known.items():
        if is_target(name, targets):
            A, B = nn.Linear(layer.in_features, rank, **wide), nn.Linear(rank, layer.out_features, **wide)
            nn.init.kaiming_uniform_(A.weight, a=5**0.5)  # as the LoRA paper's code: starts at B A = 0
            nn.init.zeros_(B.weight)
            if name in here:  # the others were for the random numbers, the same whoever has which layers
                layer.lora_A, layer.lora_B = A, B
                layer.name, layer.scale, layer.dropout, layer.masks = name, alpha / rank, dropout, masks
                layer.hook = layer.register_forward_hook(_add_product)
    model.lora = lora
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


@contextmanager
def without_adapter(model: Stack) -> Iterator[None]:
    """Within the block the model is what it was before `add_lora`: the reference of a preference loss.
    Raises InputError for a model without an adapter, which would be its own reference."""
    layers = adapters(model).values()
    if not layers:
        raise InputError("without_adapter needs a model with an adapter: call add_lora(model) first")
    for layer in layers:
        layer.hook.remove()
    try:
        yield
    finally:
        for layer in layers:
            layer.hook = layer.register_forward_hook(_add_product)


@contextmanager
def changed(*attributes: tuple[Any, str, Any]) -> Iterator[None]:
    """Within the block, of each (thing, name, value) the thing's attribute of this name has this value."""
    before = [(thing, name, getattr(thing, name), name in vars(thing)) for thing, name, _ in attributes]
    for attribute in attributes:
        setattr(*attribute)
    try:
        yield
    finally:
        for thing, name, old, own in before:
            if own or not callable(old):
                setattr(thing, name, old)
            else:  # its class's
                delattr(thing, name)


def without_dropout(model: Any) -> AbstractContextManager[None]:
    """Within the block all of the model is in evaluation mode."""
    return changed(*((module, "training", False) for module in model.modules()))


@torch.no_grad()
def merge_lora(model: Stack) -> None:
    """Fold every adapter into its weight and take the adapters out; all parameters become trainable.
    Raises InputError for a 4-bit base, whose 16 levels would swallow the update."""
    if is_in_4bit(model):
        raise InputError("a 4-bit base cannot take an adapter in: save it, and merge it into the unquantized base")
    for layer in adapters(model).values():
        layer.weight.copy_(layer.weight + layer.scale * (layer.lora_B.weight @ layer.lora_A.weight))
        layer.hook.remove()
        del layer.lora_A, layer.lora_B
    model.lora = model.masks = None
    model.requires_grad_(True)
