"""The options of `minichunk compare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Parser

COMPARE_HELP = """\
Compare a port's tensors with a golden file's, up to the first difference, and say what it usually means.

Your port reads a golden file (they lie in tests/golden, and its README.md describes them), begins
with its weights and input_ids, runs SeCO and SpaCO as the file's metadata says, and writes what it
has computed into a safetensors file of its own, by the golden file's names. From NumPy, JAX,
PyTorch, ...:

  from safetensors.numpy import save_file
  save_file({"seco.chunk.0.layer.0.keys": keys, ...}, "mine.safetensors")

  minichunk compare mine.safetensors --golden tests/golden/plain.safetensors

Begin with a few tensors and add more: what is there is compared in the order in which a port is
built (the forward pass chunk after chunk, the losses, then back from the last chunk), and what
comes next is named. What lies within a layer (hidden, attention, residual, logits), rope and full
may be left out for good.

A tensor is equal if it is off by no more than rounding can do, relative to its norm: about 1e-14 in
float64 and 1e-5 in float32. In bfloat16 only calm.safetensors shows more than rounding.

Exit status 0: all is there and equal. 1: something differs or is missing. 2: a file cannot be used.
"""


def add_compare(commands: argparse._SubParsersAction[Parser]) -> None:
    compare = commands.add_parser(
        "compare",
        help="find a port's first mistake",
        description=COMPARE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("mine", type=Path, metavar="MINE", help="safetensors file that your port has written")
    compare.add_argument("--golden", type=Path, required=True, metavar="FILE", help="the golden file that it has read")
    compare.add_argument(
        "--precision",
        choices=["float64", "float32", "bfloat16", "float16"],
        help="what your port computes in (default: the coarsest dtype in MINE)",
    )
