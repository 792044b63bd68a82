"""How exact is a half-precision gradient? `python tutorials/precision.py [DIR]`.

Attention over pasts of up to 128 blocks, in bfloat16 against float64. With a model beside it: on its weights and a
text, the bfloat16 gradient of `full` and of SeCO, with the cache's gradients summed in float32 and in bfloat16,
against the gradient of `full` in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minichunk.chunks import Chunk
from minichunk.files.documents import load_tokenizer, read_documents
from minichunk.files.shipped import novel
from minichunk.full import full
from minichunk.memory.attention import BLOCK
from minichunk.memory.cache import LayerCache
from minichunk.models.llama import Llama
from minichunk.models.lora import linear_layers
from minichunk.seco import seco

NUM_CHUNKS = (4, 16, 64)
PASTS = (2048, 16384, 131072, 262144)


def gradients(model: Llama) -> Tensor:
    """The gradients of all weight matrices in the layers as one float64 vector; clears them."""
    linear = linear_layers(model)
    parameters = [p for name, p in model.named_parameters() if name.split(".")[-2] in linear]
    found = [p.grad.double().flatten() for p in parameters if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(found)


def measure(directory: str, text: Path, tokens: int) -> list[tuple[str, str, float]]:
    """(method, chunks, ‖gradient - exact‖ / ‖exact‖) for each way to compute the gradient in bfloat16."""
    (document,) = read_documents([text], load_tokenizer(directory))
    ids = document.input_ids[None, :tokens]
    model = Llama.from_pretrained(directory, torch.float64)
    with tqdm(total=2 + 2 * len(NUM_CHUNKS), desc="gradients") as bar:
        full(model, ids, ids, recompute=True)
        exact = gradients(model)
        del model
        bar.update()
        half = Llama.from_pretrained(directory, torch.bfloat16)

        def error() -> float:
            bar.update()
            return float((gradients(half) - exact).norm() / exact.norm())

        full(half, ids, ids)
        rows = [("full", "", error())]
        for num_chunks in NUM_CHUNKS:
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
                seco(half, ids, ids, -(-ids.shape[1] // num_chunks), cache_grad_dtype=dtype)
                rows.append((f"SeCO, sums in {name}", str(num_chunks), error()))
    return rows


def attention_errors(pasts: Sequence[int] = PASTS) -> list[tuple[int, int, list[float]]]:
    """(positions of the past, blocks, relative errors of out, dq, dk, dv) of one chunk's bfloat16 attention.

    64 queries in 2 heads that share a key head, of random numbers; against the same kernel in float64.
    """
    rows = []
    for past in tqdm(pasts, desc="attention"):
        results = []
        for dtype in (torch.bfloat16, torch.float64):
            generator = torch.Generator().manual_seed(past)

            def draw(heads: int, n: int, dtype: torch.dtype = dtype, g: torch.Generator = generator) -> Tensor:
                return torch.randn(1, heads, n, 64, generator=g).bfloat16().to(dtype)

            q, k, v, grad = draw(2, 64), draw(1, 64), draw(1, 64), draw(2, 64)
            memory = LayerCache((1, 1, past, 64), [], q, torch.float64)
            memory.keys.copy_(draw(1, past))
            memory.values.copy_(draw(1, past))
            inputs = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
            out = memory.past([Chunk(past, past + 64)], save=False).attend(*inputs)
            results.append([out.detach(), *torch.autograd.grad(out, inputs, grad)])
        errors = [float((got - exact).norm() / exact.norm()) for got, exact in zip(*results, strict=True)]
        rows.append((past, -(-past // BLOCK), errors))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a checkpoint directory, for example of tutorials/get_smollm2.py")
    parser.add_argument("--text", type=Path, default=novel("prideprejudice"), help="default: a shipped novel")
    parser.add_argument("--tokens", type=int, default=1024, help="length (default: 1024)")
    arguments = parser.parse_args()
    print("| past | blocks | out | dq | dk | dv |\n|---:|---:|---:|---:|---:|---:|")
    for past, blocks, errors in attention_errors():
        print(f"| {past:,} | {blocks} | " + " | ".join(f"{error:.4f}" for error in errors) + " |")
    if arguments.model is not None:
        print("\n| bfloat16 gradient | chunks | relative error |\n|---|---:|---:|")
        for name, chunks, error in measure(arguments.model, arguments.text, arguments.tokens):
            print(f"| {name} | {chunks} | {error:.4f} |")
