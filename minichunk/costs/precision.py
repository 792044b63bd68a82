"""How exact is a half-precision gradient? `python -m minichunk.costs.precision DIR`.

Compares, on a real model and text, the bfloat16 gradient of `full` and of SeCO, with the cache's
gradients summed in float32 and in bfloat16, with the gradient of `full` in float64.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..files.documents import load_tokenizer, read_documents
from ..files.shipped import novel
from ..full import full
from ..models.llama import Llama
from ..models.lora import PROJECTIONS
from ..seco import seco

NUM_CHUNKS = (4, 16, 64)


def gradients(model: Llama) -> Tensor:
    """The gradients of all weight matrices in the layers as one float64 vector; clears them."""
    found = [p.grad.double().flatten() for name, p in model.named_parameters() if name.split(".")[-2] in PROJECTIONS
             and p.grad is not None]  # fmt: skip
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint directory, for example of `minichunk get smollm2`")
    parser.add_argument("--text", type=Path, default=novel("prideprejudice"), help="default: a shipped novel")
    parser.add_argument("--tokens", type=int, default=1024, help="length (default: 1024)")
    arguments = parser.parse_args()
    print("| bfloat16 gradient | chunks | relative error |\n|---|---:|---:|")
    for name, chunks, error in measure(arguments.model, arguments.text, arguments.tokens):
        print(f"| {name} | {chunks} | {error:.4f} |")
