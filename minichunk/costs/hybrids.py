"""What a hybrid of `partial_context` saves in a model that is too large to be timed here: counted, not measured.

`python -m minichunk.costs.hybrids llama-3-8b 131072` prints operations, bytes read and memory, beside those of full
attention and what LongGen (arXiv 2410.01485) measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from ..chunks import Chunk, cut
from ..memory.pattern import Pattern
from ..models.config import LlamaConfig
from ..models.llama import Llama
from ..models.partial import partial_config
from ..models.shapes import memory_bytes, random_model, shape
from ..protocol import Options
from .operations import operations
from .positions import HYBRIDS

CHUNKS = (512, 2048, 8192)
STEP, PREFILL = "10^15 operations of a SeCO step", "10^15 operations of the prefill"
TOKEN, READ = "10^9 operations of a token", "gigabytes read for a token"
CACHE = "GiB of keys and values, inference"
# Theirs at 128K tokens: how many times as fast, where the time should go by these, and how much smaller.
LONGGEN = {STEP: "1.55", PREFILL: "1.67", READ: "1.41", CACHE: "-62%"}


def work(config: LlamaConfig, tokens: int) -> dict[str, float]:
    """What is to be done: in a SeCO step with LoRA that recomputes all but attention, in the prefill, and to decode
    the token after it, which reads all weights, and of the keys and values what it sees (bfloat16)."""
    model = random_model(config, torch.bfloat16, rank=8, device="meta")
    assert isinstance(model, Llama)
    chunks, token = cut(tokens, CHUNKS[0]), Chunk(tokens, tokens + 1)
    head = model.lm_head.weight.numel()
    decoding = operations(model, [token], [], False)
    keys = sum(part.pinned + part.reach + 1 for pattern in config.patterns() for part in pattern.parts(*token))
    numbers = decoding["linear"] / 2 + head + 2 * keys * config.num_key_value_heads * config.head_dim
    return {
        STEP: sum(operations(model, chunks[:-1], chunks, True).values()) / 1e15,
        PREFILL: sum(operations(model, chunks, [], False).values()) / 1e15,
        TOKEN: (sum(decoding.values()) + 2 * head) / 1e9,
        READ: 2 * numbers / 1e9,
    }


def remembered(config: LlamaConfig, tokens: int) -> dict[str, float]:
    """GiB, all in bfloat16: keys and values of a text that is read; of one that is learnt, with their gradients."""
    options = Options(cache_grad_dtype=torch.bfloat16)
    found = {CACHE: sum(memory_bytes(config, torch.bfloat16, [Chunk(tokens, tokens)]))}
    for size in CHUNKS:
        training = f"GiB with gradients, training, chunks of {size:,}"
        found[training] = sum(memory_bytes(config, torch.bfloat16, cut(tokens, size), options))
    return {what: number / 2**30 for what, number in found.items()}


def table(
    count: Callable[[LlamaConfig, int], dict[str, float]],
    compare: Callable[[float, float], str],
    name: str,
    tokens: int,
    hybrids: dict[str, Pattern] = HYBRIDS,
) -> str:
    """A Markdown table of what `count` finds; in brackets how `compare` sees full attention and a hybrid. Raises
    InputError."""
    full = shape(name)
    found = [count(full, tokens), *(count(partial_config(full, pattern), tokens) for pattern in hybrids.values())]
    lines = [f"| | full | {' | '.join(hybrids)} | LongGen |", "|---|" + "---:|" * (len(hybrids) + 2)]
    for what, whole in found[0].items():
        cells = [f"{one[what]:.2f} ({compare(whole, one[what])})" for one in found[1:]]
        lines.append(f"| {what} | {whole:.2f} | {' | '.join(cells)} | {LONGGEN.get(what, '')} |")
    return "\n".join(lines)


def less(full: float, hybrid: float) -> str:
    """How much of it is saved."""
    return f"{hybrid / full - 1:.0%}"


def times(full: float, hybrid: float) -> str:
    """How many times as much full attention takes."""
    return f"{full / hybrid:.2f}"


if __name__ == "__main__":
    name, tokens = sys.argv[1], int(sys.argv[2])
    print(f"{name}, {tokens:,} tokens; in brackets how many times as much full attention takes\n")
    print(table(work, times, name, tokens))
    print("\nand how much less is remembered\n")
    print(table(remembered, less, name, tokens))
