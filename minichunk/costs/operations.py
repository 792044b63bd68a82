"""How many operations a training step takes, to say what share of a device's peak it reaches.

`python -m minichunk.costs.operations llama-3-8b 131072` prints them for SeCO with LoRA, by what is recomputed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from ..chunks import Chunk, cut
from ..memory.pattern import Part
from ..models.llama import Llama

# Dense bfloat16 matrix peak in operations per second, from the makers' data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def peak_operations(device_name: str) -> float | None:
    """The bfloat16 peak of a GPU by its name; None if it is not in the list."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


def operations(model: Llama, filled: Sequence[Chunk], rebuilt: Sequence[Chunk], recompute: bool) -> dict[str, float]:
    """Multiplications and additions of a step, in linear layers and in attention, as executed.

    filled: what runs forward once, without the LM head. rebuilt: what runs forward and backward; for
    `full` the whole sequence as one chunk. recompute: as in `seco`: True keeps what attention returned.
    A frozen weight has no gradient of its own, and flash attention's backward takes 5 products where the
    forward takes 2. Embeddings, norms and the like are left out; logits count once.
    """
    c = model.config
    layers = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    forward = 2.0 * sum(p.numel() for p in layers)
    backward = forward + 2.0 * sum(p.numel() for p in layers if p.requires_grad)
    head = model.lm_head.weight
    head_operations = 2.0 * head.numel() * (3 if head.requires_grad else 2)
    linear_again = float(recompute)

    def pairs(chunks: Sequence[Chunk]) -> float:
        return sum(seen(part) for pattern in c.patterns() for chunk in chunks for part in pattern.parts(*chunk))

    def count(chunks: Sequence[Chunk]) -> int:
        return sum(stop - start for start, stop in chunks)

    per_pair = 4.0 * c.num_attention_heads * c.head_dim
    linear = count(filled) * forward + count(rebuilt) * ((1 + linear_again) * forward + backward + head_operations)
    attention = per_pair * (pairs(filled) + pairs(rebuilt) * (1 + 2.5))
    return {"linear": linear, "attention": attention}


def seen(part: Part) -> float:
    """(query, key) pairs of a part."""
    in_band = part.reach + (part.length + 1) / 2 if part.window >= part.reach + part.length else part.window
    return (part.stop - part.start) * (part.pinned + in_band)


def _print_table(name: str, tokens: int, chunk_size: int = 512, rank: int = 8) -> None:
    from ..models.shapes import random_model

    model = random_model(name, torch.bfloat16, rank, device="meta")
    assert isinstance(model, Llama)
    chunks = cut(tokens, chunk_size)
    print(f"{name}, {tokens:,} tokens, chunk {chunk_size}, LoRA rank {rank} on q and v; 10^15 operations a step")
    print("| recompute | linear layers | attention | all |\n|---|---:|---:|---:|")
    rows = {"nothing": False, "all but attention": True}
    for label, recompute in rows.items():
        found = operations(model, chunks[:-1], chunks, recompute)
        numbers = [found["linear"], found["attention"], sum(found.values())]
        print(f"| {label} | " + " | ".join(f"{n / 1e15:.1f}" for n in numbers) + " |")


if __name__ == "__main__":
    _print_table(sys.argv[1], int(sys.argv[2]))
