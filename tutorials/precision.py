"""How exact is a half-precision gradient? `python tutorials/precision.py [DIR]`.

Attention over pasts of up to 128 blocks, in bfloat16 against float64. With a model beside it: on its weights and a
text, the bfloat16 gradient of `full` and of SeCO, with the cache's gradients summed in float32 and in bfloat16,
against the gradient of `full` in float64. Of more than 2,048 tokens `full`, whose logits are all there at once, is left
out, and the gradient is compared with that of SeCO in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minichunk.chunks import Chunk
from minichunk.files.documents import load_tokenizer, novel, read_documents
from minichunk.full import full
from minichunk.memory.attention import BLOCK
from minichunk.memory.cache import LayerCache
from minichunk.models.load import Llama
from minichunk.models.lora import default_targets
from minichunk.seco import seco

WHOLE = 2048  # tokens that `full` is run on, at most
REFERENCE_CHUNK = 512  # tokens, of SeCO in float32
PASTS = (2048, 16384, 131072, 262144)


def gradients(model: Llama) -> Tensor:
    """The gradients of all weight matrices in the layers as one float64 vector; clears them."""
    linear = default_targets(model)
    parameters = [p for name, p in model.named_parameters() if name.split(".")[-2] in linear]
    found = [p.grad.double().flatten() for p in parameters if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(found)


def measure(directory: str, ids: Tensor, num_chunks: Sequence[int]) -> list[tuple[str, str, float]]:
    """(method, chunks, ‖gradient - reference‖ / ‖reference‖) for each way to compute the gradient in bfloat16.

    ids: int64 (1, T).
    """
    whole = ids.shape[1] <= WHOLE
    with tqdm(total=1 + whole + 2 * len(num_chunks), desc="gradients") as bar:
        model = Llama.from_pretrained(directory, torch.float64 if whole else torch.float32)
        if whole:
            full(model, ids, ids, recompute=True)
        else:
            seco(model, ids, ids, REFERENCE_CHUNK, recompute=True)
        reference = gradients(model)
        del model
        bar.update()
        half = Llama.from_pretrained(directory, torch.bfloat16)

        def error() -> float:
            bar.update()
            return float((gradients(half) - reference).norm() / reference.norm())

        rows = []
        if whole:
            full(half, ids, ids)
            rows.append(("full", "", error()))
        for count in num_chunks:
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
                seco(half, ids, ids, -(-ids.shape[1] // count), cache_grad_dtype=dtype)
                rows.append((f"SeCO, sums in {name}", str(count), error()))
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
            memory.write([Chunk(0, past)], (draw(1, past), draw(1, past)))
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
    parser.add_argument("--chunks", type=int, nargs="+", default=(4, 16, 64), help="how many (default: 4 16 64)")
    arguments = parser.parse_args()
    print("| past | blocks | out | dq | dk | dv |\n|---:|---:|---:|---:|---:|---:|")
    for past, blocks, errors in attention_errors():
        print(f"| {past:,} | {blocks} | " + " | ".join(f"{error:.4f}" for error in errors) + " |")
    if arguments.model is not None:
        (document,) = read_documents([arguments.text], load_tokenizer(arguments.model))
        ids = document.input_ids[None, : arguments.tokens]
        reference = "full in float64" if ids.shape[1] <= WHOLE else f"SeCO in float32, chunks of {REFERENCE_CHUNK}"
        print(f"\n{ids.shape[1]:,} tokens, against {reference}\n")
        print("| bfloat16 gradient | chunks | relative error |\n|---|---:|---:|")
        for name, chunks, error in measure(arguments.model, ids, arguments.chunks):
            print(f"| {name} | {chunks} | {error:.4f} |")
