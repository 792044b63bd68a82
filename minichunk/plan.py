"""`minichunk plan`: will it fit? The real code, run under fake tensors, forecasts its own memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from json import dumps
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .attention import BLOCK, FlashCUDA, use_kernel
from .chunks import Chunk, check_batch, cut
from .config import LlamaConfig
from .count import CountBytes
from .errors import InputError
from .full import full
from .lora import add_lora
from .model import Llama
from .options import DTYPES
from .report import human_bytes
from .seco import fill, new_cache, rebuild
from .shapes import shape

UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
METHODS = ("seco", "spaco", "full", "full-recompute")
LEFT_OUT = (
    "the CUDA context, the allocator's fragmentation and the libraries' own buffers (the reserve stands for them)"
)


@dataclass(frozen=True)
class Setting:
    """What is to be trained, and how. cache_grad_dtype None: float32, or wider with a wider model."""

    model: str = "llama-3-8b"
    method: str = "seco"
    chunk_size: int = 512
    budget: int = 8
    rank: int = 8
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dtype: torch.dtype = torch.bfloat16
    cache_grad_dtype: torch.dtype | None = None
    recompute: bool = True
    batch_size: int = 1
    device: str = "cuda"


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of one training step, and what they consist of."""

    peak: int
    weights: int
    adapter_and_optimizer: int
    cache: int
    cache_gradients: int
    chunk: int


@dataclass(frozen=True)
class Forecast:
    """The memory at a length, and how it grows: peak(T) = fixed + per_token * T from `base` tokens on."""

    at_base: Memory
    base: int
    per_token: float
    cache_per_token: float
    cache_gradients_per_token: float

    def at(self, tokens: int) -> Memory:
        more = max(0, tokens - self.base)
        m = self.at_base
        cache = m.cache + round(more * self.cache_per_token)
        grads = m.cache_gradients + round(more * self.cache_gradients_per_token)
        peak = m.peak + round(more * self.per_token)
        rest = peak - m.weights - m.adapter_and_optimizer - cache - grads
        return Memory(peak, m.weights, m.adapter_and_optimizer, cache, grads, rest)

    def longest(self, available: int, chunk_size: int) -> int:
        """Tokens, in whole chunks, of which the peak fits into `available` bytes; 0 if even the base does not."""
        if self.at_base.peak > available:
            return 0
        tokens = self.base + int((available - self.at_base.peak) / self.per_token)
        return tokens // chunk_size * chunk_size


def parse_bytes(text: str) -> int:
    """'24GiB', '80 GB' or a plain number of bytes. Raises InputError."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", text)
    try:
        assert match is not None
        return int(float(match[1]) * UNITS[match[2].lower()])
    except (AssertionError, KeyError, ValueError):
        raise InputError(f"{text!r} is not an amount of memory; write it like 24GiB, 80GB or 512MiB") from None


def step_memory(setting: Setting, tokens: int, fake: bool = True) -> Memory:
    """Run one training step of `tokens` tokens and count its bytes.

    fake: without memory or arithmetic. Otherwise really, on the CPU, counted the same way.
    """
    with ExitStack() as stack:
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if setting.device == "cuda":
            # Fake CPU tensors stand for CUDA ones: the flash operators' shapes are the same.
            stack.enter_context(use_kernel(FlashCUDA()))
        count = stack.enter_context(CountBytes())
        model = _build(shape(setting.model), setting)
        states = _optimizer_states(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        weights = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
        adapter = sum(p.numel() * p.element_size() for p in trained) + sum(s.numel() * 4 for s in states)
        adapter += sum(p.numel() * max(4, p.element_size()) for p in trained)  # their gradients
        ids = torch.zeros(setting.batch_size, tokens, dtype=torch.int64)
        _step(model, ids, setting)
        cache, grads = _cache_bytes(model, ids, setting)
    rest = count.peak - weights - adapter - cache - grads
    return Memory(count.peak, weights, adapter, cache, grads, rest)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def _build(config: LlamaConfig, setting: Setting) -> Llama:
    with _default_dtype(setting.dtype):
        model = Llama(config)
    if setting.rank:
        add_lora(model, setting.rank, 2 * setting.rank, setting.targets)
    return model


def _optimizer_states(model: Llama) -> list[Tensor]:
    """AdamW's two moments of every trained parameter, and the float32 copies of those in half precision."""
    trained = [p for p in model.parameters() if p.requires_grad]
    copies = [torch.zeros(p.shape, dtype=torch.float32) for p in trained if p.dtype.itemsize < 4]
    return copies + [torch.zeros(p.shape, dtype=torch.float32) for p in trained for _ in range(2)]


def _kept(setting: Setting, tokens: int) -> list[Chunk]:
    """The chunks that a step keeps; for SpaCO the last ones, so that the cache is as long as it gets."""
    chunks = cut(tokens, setting.chunk_size)
    return chunks[-setting.budget :] if setting.method == "spaco" else chunks


def _step(model: Llama, ids: Tensor, setting: Setting) -> None:
    """The heaviest part of a training step; seco.py and spaco.py call the same functions.

    The first chunk that is rebuilt sends gradients back, the second one also receives some, and all
    further ones do what the second does, on a shorter past.
    """
    count = float(ids.numel())
    if setting.method in ("full", "full-recompute"):
        full(model, ids, ids, recompute=setting.method == "full-recompute", num_targets=count)
        return
    targets, divisor = check_batch(model, ids, ids, count)
    chunks, kept = cut(ids.shape[1], setting.chunk_size), _kept(setting, ids.shape[1])
    cache = new_cache(model, ids, kept, setting.cache_grad_dtype)
    fill(model, ids, chunks[-2:-1], cache)
    for chunk in kept[:-4:-1]:
        loss, written, received = rebuild(model, ids, targets, chunk, cache, setting.recompute)
        if setting.method == "spaco":
            received = [1.0 * g for g in received]
        torch.autograd.backward([loss / divisor, *written], [None, *received])
        del loss, written, received


def _cache_bytes(model: Llama, ids: Tensor, setting: Setting) -> tuple[int, int]:
    """Bytes of the cache and of its gradients, of a cache made as the step makes it."""
    if setting.method in ("full", "full-recompute"):
        return 0, 0
    layers = new_cache(model, ids, _kept(setting, ids.shape[1]), setting.cache_grad_dtype).layers
    cache = sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values))
    grads = sum(x.numel() * x.element_size() for layer in layers for x in (layer.key_grads, layer.value_grads))
    return cache, grads


def forecast(setting: Setting) -> Forecast:
    """Run the step at two lengths beyond which memory grows linearly, and extend the line."""
    if setting.method not in METHODS:
        raise InputError(f"--method is {setting.method!r}, but must be one of {', '.join(METHODS)}")
    size = setting.chunk_size
    cut(1, size)  # checks the size
    if setting.method in ("full", "full-recompute"):
        base, more = 1024, 1024
    else:
        kept = setting.budget if setting.method == "spaco" else 0
        base, more = (max(BLOCK // size + 1, kept) + 2) * size, 2 * size
    first, second = step_memory(setting, base), step_memory(setting, base + more)
    return Forecast(
        first,
        base,
        (second.peak - first.peak) / more,
        (second.cache - first.cache) / more,
        (second.cache_gradients - first.cache_gradients) / more,
    )


def plan(setting: Setting, memory: int, seq_len: int | None, reserve: int) -> dict[str, Any]:
    """The forecast of the setting's method and of the others, as one JSON object. Raises InputError."""
    available = memory - reserve
    forecasts = {m: forecast(replace(setting, method=m)) for m in dict.fromkeys([setting.method, *METHODS])}
    longest = {m: found.longest(available, setting.chunk_size) for m, found in forecasts.items()}
    length = seq_len or longest[setting.method] or forecasts[setting.method].base
    at = forecasts[setting.method].at(length)
    return {
        "model": setting.model,
        "method": setting.method,
        "memory_bytes": memory,
        "reserve_bytes": reserve,
        "seq_len": length,
        "peak_bytes": at.peak,
        "fits": at.peak <= available,
        "max_tokens": longest[setting.method],
        "breakdown": {name: value for name, value in asdict(at).items() if name != "peak"},
        "methods": {m: {"max_tokens": longest[m], "bytes_per_token": f.per_token} for m, f in forecasts.items()},
        "peak_bytes_all_kept": forecasts["seco"].at(length).peak if setting.method == "spaco" else at.peak,
        "left_out": LEFT_OUT,
    }


def run_plan(
    model: str,
    memory: str,
    reserve: str,
    method: str,
    seq_len: int | None,
    chunk_size: int,
    budget: int,
    rank: int,
    targets: list[str],
    dtype: str,
    cache_grad_dtype: str | None,
    no_recompute: bool,
    device: str,
    json: bool,
) -> None:
    """`minichunk plan`: print the forecast. Raises InputError."""
    for name, value in (("dtype", dtype), ("cache-grad-dtype", cache_grad_dtype)):
        if value is not None and value not in DTYPES:
            raise InputError(f"--{name} is {value!r}, but must be one of {', '.join(DTYPES)}")
    for name, number, least in (
        ("seq-len", seq_len, 2),
        ("chunk-size", chunk_size, 1),
        ("budget", budget, 1),
        ("rank", rank, 0),
    ):
        if number is not None and number < least:
            raise InputError(f"--{name} is {number}, but must be at least {least}")
    setting = Setting(
        model, method, chunk_size, budget, rank, tuple(targets), DTYPES[dtype],
        DTYPES[cache_grad_dtype] if cache_grad_dtype else None, not no_recompute, device=device,
    )  # fmt: skip
    found = plan(setting, parse_bytes(memory), seq_len, parse_bytes(reserve))
    print(dumps(found, indent=2) if json else describe(found))


def describe(found: dict[str, Any]) -> str:
    """The forecast in words."""
    fits = "fits" if found["fits"] else "does NOT fit"
    lines = [
        f"{found['model']}, {found['method']}: the longest sequence that fits has {found['max_tokens']:,} tokens",
        f"peak at {found['seq_len']:,} tokens: {human_bytes(found['peak_bytes'])}; {fits} into "
        f"{human_bytes(found['memory_bytes'])} less a reserve of {human_bytes(found['reserve_bytes'])}",
        "",
    ]
    lines += [f"  {name.replace('_', ' '):22} {human_bytes(n):>10}" for name, n in found["breakdown"].items()]
    lines += ["", "  method           longest   grows per token"]
    for method, row in found["methods"].items():
        lines.append(f"  {method:14} {row['max_tokens']:>9,}   {human_bytes(row['bytes_per_token'])}")
    if found["method"] == "spaco":
        lines += ["", f"  with every chunk kept, as a random draw may: {human_bytes(found['peak_bytes_all_kept'])}"]
    return "\n".join([*lines, "", f"not counted: {found['left_out']}"])
