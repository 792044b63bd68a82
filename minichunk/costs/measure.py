"""One measurement of `minichunk bench`, in a process of its own so that its peak memory is its own."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..batch import prepare
from ..chunks import Chunk, cut
from ..full import full
from ..models.llama import Llama
from ..models.load import load_model
from ..models.lora import add_lora
from ..models.shapes import memory_bytes, random_model, shape
from ..models.stack import Stack
from ..protocol import Options, Recompute
from ..samplers import FixedBudget, Weight
from ..seco import fill, new_memory, rebuild, seco
from ..spaco import spaco
from ..targets import shift
from ..training.options import DTYPES
from ..training.report import peak_memory
from .baselines import concatenating, tiled_full, transformers_llama
from .count import CountBytes
from .operations import operations, peak_operations
from .products import Float32Products

METHODS = (
    "full", "full-recompute", "full-recompute-tiled", "full-recompute-offload", "transformers", "seco", "spaco",
    "forward", "concatenating-seco", "concatenating-spaco", "seco-parts",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What one process measures: a single step of `method`, after a warm-up on two short chunks."""

    method: str
    tokens: int
    chunk_size: int
    budget: int | None = None  # spaco: chunks kept
    model: str = "llama-47m"
    dtype: str = "float32"
    device: str = "cpu"
    rank: int = 0  # of LoRA on q and v; 0 trains all parameters
    recompute: bool = False
    offload: bool = False
    cache_grad_dtype: str | None = None
    fill_size: int | None = None
    memory_cap: int | None = None  # bytes of device memory, on CUDA
    count: bool = False  # count the bytes of live tensors too, as forecast.py does
    seed: int = 0

    @property
    def label(self) -> str:
        kept = "" if self.budget is None else f" {self.budget} of {len(cut(self.tokens, self.chunk_size))}"
        return self.method + kept + (", offload" if self.offload else "")

    @property
    def keywords(self) -> dict[str, Any]:
        """Of seco and spaco."""
        grad_dtype = DTYPES[self.cache_grad_dtype] if self.cache_grad_dtype else None
        return {
            "recompute": self.recompute, "offload": self.offload, "cache_grad_dtype": grad_dtype,
            "fill_size": self.fill_size,
        }  # fmt: skip


def measure(case: Case) -> dict[str, Any]:
    """Seconds of one step and the peak memory in bytes, or {'out_of_memory': true}."""
    device = torch.device(case.device)
    if case.memory_cap is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, case.memory_cap / total), device)
    by_float32 = Float32Products() if Float32Products.needed(DTYPES[case.dtype], device) else None
    try:
        torch.manual_seed(0)
        model = _model(case)
        run = _method(case, model)
        ids = torch.randint(shape(case.model).vocab_size, (1, case.tokens), generator=torch.Generator().manual_seed(0))
        ids = ids.to(device)
        warm_up = ids[:, : min(case.tokens, 2 * min(case.chunk_size, 64))]
        with by_float32 or nullcontext():
            run(warm_up)
        model.zero_grad(set_to_none=True)
        _synchronize(device)
        before = peak_memory(device)
        if case.method == "seco-parts":
            parts = measure_parts(case, model, ids)
            # A chunk's time is a straight line in its position, so a quarter and three quarters make the mean.
            per_chunk = (parts[2][1] + parts[4][1]) / 2
            step = parts[0][1] + per_chunk * len(cut(case.tokens, case.chunk_size))
            return {"seconds": step, "extrapolated": True, "parts": parts, "peak_bytes": peak_memory(device)}
        counted = CountBytes() if case.count else None
        began = time.perf_counter()
        with by_float32 or nullcontext(), counted or nullcontext():
            if counted is not None:
                counted.add(*model.parameters(), *model.buffers(), ids)
            loss = run(ids)
        _synchronize(device)
        seconds = time.perf_counter() - began
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    sample: dict[str, Any] = {
        "seconds": seconds,
        "peak_bytes": peak_memory(device),
        "start_bytes": before,
        "loss": float(loss),
    }
    if by_float32 is not None:
        sample["half_precision_products"] = "in float32, rounded"
    if counted is not None:
        sample["counted_bytes"] = counted.peak
    if (done := _operations(case, model)) is not None:
        sample["operations"] = done
        sample["operations_per_second"] = sum(done.values()) / seconds
        sample["peak_operations_per_second"] = (
            peak_operations(torch.cuda.get_device_name(device)) if ids.is_cuda else None
        )
    if case.method in ("seco", "spaco"):
        sample["cache_bytes"] = _cache_bytes(case)
    return sample


def _model(case: Case) -> Stack:
    """The weights of a checkpoint where there are any, else random ones."""
    if any(Path(case.model).glob("*.safetensors")):
        model = load_model(case.model, DTYPES[case.dtype], case.device)
        if case.rank:
            add_lora(model, case.rank, 2 * case.rank)
        return model
    return random_model(case.model, DTYPES[case.dtype], case.rank, device=case.device)


def _method(case: Case, model: Stack) -> Any:
    size = case.chunk_size
    if case.method == "transformers":
        assert isinstance(model, Llama)
        theirs = transformers_llama(model)
        model.requires_grad_(False).to("meta")  # one copy of the weights is enough

        def peer(ids: Tensor) -> Tensor:
            loss = theirs(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            return loss.detach()

        return peer

    def entries(ids: Tensor) -> Any:
        return _entries(case, ids.shape[1])

    methods = {
        "full": lambda ids: full(model, ids, ids),
        "full-recompute": lambda ids: full(model, ids, ids, recompute=True),
        "full-recompute-tiled": lambda ids: tiled_full(model, prepare(model, ids, ids, None)),
        "full-recompute-offload": lambda ids: tiled_full(model, prepare(model, ids, ids, None), offload=True),
        "seco": lambda ids: seco(model, ids, ids, size, **case.keywords),
        "spaco": lambda ids: spaco(model, ids, ids, size, sampler=lambda *_: entries(ids), **case.keywords),
        "seco-parts": lambda ids: seco(model, ids, ids, size, **case.keywords),
        "forward": lambda ids: _forward(model, ids, size),
        "concatenating-seco": lambda ids: concatenating(model, ids, ids, size),
        "concatenating-spaco": lambda ids: concatenating(model, ids, ids, size, entries(ids)),
    }
    return methods[case.method]


def _entries(case: Case, tokens: int) -> list[Weight | None]:
    """Which chunks SpaCO keeps, the same ones for every method; SeCO's are all of them."""
    num_chunks = len(cut(tokens, case.chunk_size))
    return FixedBudget(case.budget or num_chunks)(num_chunks, torch.Generator().manual_seed(case.seed))


def _cut(case: Case) -> tuple[list[Chunk], list[Weight | None]]:
    return cut(case.tokens, case.chunk_size), _entries(case, case.tokens)


def _operations(case: Case, model: Stack) -> dict[str, float] | None:
    """Those of the step, where we know them."""
    if not isinstance(model, Llama):
        return None
    if case.method.startswith("full"):
        recompute: Recompute = "all" if case.method != "full" else False
        return operations(model, [], cut(case.tokens, case.tokens), recompute)
    if case.method in ("seco", "spaco"):
        chunks, weights = _cut(case)
        kept = [chunk for chunk, weight in zip(chunks, weights, strict=True) if weight is not None]
        return operations(model, [chunk for chunk in chunks if chunk < kept[-1]], kept, case.recompute)
    return None


def _cache_bytes(case: Case) -> int:
    """Of what is remembered of all that lies before the last chunk that is kept."""
    kept = [chunk for chunk, weight in zip(*_cut(case), strict=True) if weight is not None]
    return memory_bytes(shape(case.model), DTYPES[case.dtype], kept)[0]


@torch.no_grad()
def _forward(model: Stack, ids: Tensor, chunk_size: int) -> Tensor:
    """Inference: the loss of every chunk, over the cache."""
    total = torch.zeros((), device=ids.device)
    for _, losses in model.chunk_losses(ids, shift(ids), chunk_size):
        total += losses.sum()
    return total / (ids.shape[1] - 1)


def measure_parts(case: Case, model: Stack, ids: Tensor) -> list[tuple[int, float]]:
    """Where a whole step would take too long: seconds of the fill, as (0, s), and of single chunks, as (stop, s).

    The chunks end at a quarter, a half, three quarters and the whole of the sequence; the last one relays nothing.
    """
    chunks = cut(ids.shape[1], case.chunk_size)
    batch, options = prepare(model, ids, ids, None), Options(**case.keywords)
    memory = new_memory(model, ids, chunks, options)
    found = []
    began = time.perf_counter()
    fill(model, ids, chunks[:-1], memory, options)
    _synchronize(ids.device)
    found.append((0, time.perf_counter() - began))
    for quarter in (4, 3, 2, 1):
        chunk = chunks[max(0, len(chunks) * quarter // 4 - 1)]
        began = time.perf_counter()
        loss, written, received = rebuild(model, batch, chunk, memory, options)
        torch.autograd.backward([loss, *written], [None, *received])
        _synchronize(ids.device)
        found.append((chunk.stop, time.perf_counter() - began))
        del loss, written, received
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":  # python -m minichunk.costs.measure '{"method": "seco", …}', as bench.py calls it
    case = Case(**json.loads(sys.argv[1]))
    print(json.dumps({"case": asdict(case), **measure(case)}))
