"""`minichunk bench --preset partial`: what a chunk and a token cost by their position, with full attention and with the
hybrids that `partial_context` makes of the same model.

All have the same weights, in one process, and are measured in turn. The memory holds random numbers, since time does
not depend on them; what runs on it are the functions that `seco` and `generate` consist of. sums.py makes whole steps
of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..batch import prepare
from ..chunks import cut
from ..files.atomic import write_json
from ..memory.pattern import Pattern, Strided, Window
from ..models.llama import Llama
from ..models.partial import full_layers_of, partial_config, set_patterns
from ..models.shapes import random_model
from ..protocol import DEFAULTS
from ..seco import fill, new_memory, rebuild
from .machine import command, machine

REPEATS = 3
POSITIONS = (0, 1024, 2048, 4096, 8192, 16384, 32768)
HYBRIDS: dict[str, Pattern] = {"window": Window(1024, 64), "strided": Strided(64, 16, 16)}
TOKENS = 10  # decoded in each repeat: one takes so little time that the others of the machine disturb it


def measure_positions(
    output: Path,
    repeats: int = REPEATS,
    quiet: bool = False,
    *,
    name: str = "llama-47m",
    chunk_size: int = 512,
    positions: Sequence[int] = POSITIONS,
    hybrids: dict[str, Pattern] = HYBRIDS,
) -> None:
    """Time a chunk and a token at each position `repeats` times, all of them once before any twice, and write that.

    positions: multiples of the chunk size. Raises InputError if the output cannot be written.
    """
    torch.manual_seed(0)
    model = random_model(name, torch.float32)
    assert isinstance(model, Llama)
    configs = {"full": model.config} | {which: partial_config(model.config, p) for which, p in hybrids.items()}
    seconds: dict[tuple[str, str, int], list[float]] = {}
    about = {
        "preset": "partial", "model": name, "dtype": "float32", "chunk_size": chunk_size, "clock": "process",
        "hybrids": {which: asdict(p) | {"full_layers": full_layers_of(configs[which])} for which, p in hybrids.items()},
    }  # fmt: skip
    list(_measure(model, 0, chunk_size))  # a first time, which also makes room for the gradients of the weights
    with tqdm(total=repeats * len(positions) * len(configs), desc="bench", unit="run", disable=quiet) as bar:
        for position in [*positions] * repeats:
            for which, config in configs.items():
                bar.set_postfix_str(f"{which}, position {position:,}")
                set_patterns(model, config)
                for what, sample in _measure(model, position, chunk_size):
                    seconds.setdefault((what, which, position), []).append(sample)
                bar.update()
            rows = [
                dict(zip(("what", "layers", "position", "seconds"), (*k, v), strict=True)) for k, v in seconds.items()
            ]
            write_json(output, {"command": command(), "machine": machine(), **about, "results": rows})


def _measure(model: Llama, position: int, chunk_size: int) -> Iterator[tuple[str, float]]:
    yield from _training(model, position, chunk_size)
    yield from _inference(model, position, chunk_size)


def _training(model: Llama, position: int, chunk_size: int) -> Iterator[tuple[str, float]]:
    """Seconds of a chunk's fill, and of its rebuild and backward, when the next chunk is done."""
    ids = torch.randint(model.config.vocab_size, (1, position + 2 * chunk_size))
    chunks = cut(ids.shape[1], chunk_size)
    batch, chunk = prepare(model, ids, ids, None), chunks[-2]
    memory: Any = new_memory(model, ids, chunks, DEFAULTS)
    for x in chain(*memory.tensors()):
        x.normal_()
    yield "fill", _timed(lambda: fill(model, ids, [chunk], memory, DEFAULTS))
    for layer in memory.layers:  # what the next chunk has sent back
        if near := min(layer.pattern.reach, chunk_size):
            sent = torch.randn(2, *layer.keys.shape[:2], near, layer.keys.shape[3])
            layer.add_near_grads(chunk.stop - near, *sent)

    def walk() -> None:
        loss, written, received = rebuild(model, batch, chunk, memory, DEFAULTS)
        torch.autograd.backward([loss, *written], [None, *received])

    yield "rebuild", _timed(walk)


@torch.no_grad()
def _inference(model: Llama, position: int, chunk_size: int) -> Iterator[tuple[str, float]]:
    """Seconds of a chunk's prefill, and of a token that is decoded; both at that position."""
    ids = torch.randint(model.config.vocab_size, (1, chunk_size))
    memory = model.new_memory(1, position + chunk_size)
    for x in memory.tensors().remembered:
        x.normal_()

    def run(size: int) -> None:
        for _, hidden in model.run_chunks(ids[:, :size], memory, size, start=position):
            model.lm_head(hidden[:, -1])

    yield "prefill", _timed(lambda: run(chunk_size))
    yield "decode", min(_timed(lambda: run(1)) for _ in range(TOKENS))


def _timed(run: Callable[[], None]) -> float:
    """Seconds of this process, all its threads: others on the machine lengthen the time on the wall."""
    began = time.process_time()
    run()
    return time.process_time() - began
