"""The options of `minichunk plan` and `minichunk bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Parser
from .partial_arguments import add_partial


def add_plan(commands: argparse._SubParsersAction[Parser]) -> None:
    from ..models.shapes import NAMES

    plan = commands.add_parser(
        "plan",
        help="forecast whether a training fits into memory",
        description="Runs the real code on tensors without memory, needs no weights and no GPU, and says how much "
        "memory a training step needs, what it consists of, and the longest sequence that fits.",
    )
    plan.add_argument("--model", default="llama-3-8b", metavar="M", help=f"directory or one of {', '.join(NAMES)}")
    plan.add_argument("--memory", default="24GiB", help="of the device (default: 24GiB)")
    plan.add_argument("--reserve", default="1GiB", help="of it not to be planned with (default: 1GiB)")
    plan.add_argument("--gpus", type=int, default=1, metavar="N", help="of a pipeline: the fullest of so many GPUs is "
                      "forecast, each of which has --memory (default: 1)")  # fmt: skip
    plan.add_argument(
        "--method",
        default="seco",
        help="seco, spaco, full, full-recompute, full-recompute-tiled (the loss in tiles) or full-recompute-offload "
        "(and the layers' inputs in host memory) (default: seco)",
    )
    plan.add_argument("--seq-len", type=int, metavar="N", help="tokens to forecast (default: the most that fits)")
    plan.add_argument("--chunk-size", type=int, default=512, metavar="C", help="tokens per chunk (default: 512)")
    plan.add_argument("--fill-size", type=int, metavar="N", help="tokens per forward pass of the fill (default: C)")
    plan.add_argument("--budget", type=int, default=8, metavar="t", help="spaco: chunks kept, with bernoulli on "
                                                                         "average (default: 8)")  # fmt: skip
    plan.add_argument("--sampler", default="bernoulli", help="spaco: bernoulli (counted with as many chunks as 99.9 %% "
                      "of the steps do not exceed), fixed or paper (default: bernoulli)")  # fmt: skip
    plan.add_argument("--rank", type=int, default=8, metavar="R", help="of LoRA; 0 trains all (default: 8)")
    plan.add_argument(
        "--targets", nargs="+", metavar="NAME", help="of LoRA (default: q_proj v_proj; without attention, all layers)"
    )
    plan.add_argument("--dtype", default="bfloat16", help="of the model (default: bfloat16)")
    plan.add_argument("--cache-grad-dtype", help="of the cache's gradients (default: float32)")
    recompute = plan.add_mutually_exclusive_group()
    recompute.add_argument(
        "--no-recompute",
        action="store_true",
        help="keep all activations of a chunk. Without this option a chunk keeps each layer's input and what its "
        "attention returned (4 MiB a layer at 8B and 512 tokens), and the rest is run again",
    )
    plan.add_argument("--load-in-4bit", action="store_true", help="store the frozen base in 4 bits")
    plan.add_argument("--offload", action="store_true", help="keep the cache and its gradients in host memory")
    plan.add_argument("--host-memory", default="64GiB", help="for --offload, of all GPUs (default: 64GiB)")
    add_partial(plan)
    plan.add_argument("--device", default="cuda", choices=["cpu", "cuda"], help="whose kernels (default: cuda)")
    plan.add_argument("--table", action="store_true", help="the longest context by memory, model and method, instead; "
                      "with --gpus by memory, number of GPUs up to N, and method")  # fmt: skip
    plan.add_argument("--json", action="store_true", help="print one JSON object")


def add_bench(commands: argparse._SubParsersAction[Parser]) -> None:
    from ..costs.bench import METHODS, SHOWN

    bench = commands.add_parser(
        "bench",
        help="measure what each method costs",
        description="Time and peak memory of one training step by each method at each length, and both relative to "
        "the first method. Random weights; every measurement is a process of its own, and all are made once before "
        "any is repeated.",
    )
    bench.add_argument("--methods", nargs="+", metavar="M", default=list(SHOWN), help=f"of {', '.join(METHODS)} "
                       f"(default: {' '.join(SHOWN)})")  # fmt: skip
    bench.add_argument("--seq-len", nargs="+", type=int, metavar="N", default=[1024, 2048, 4096],
                       help="tokens (default: 1024 2048 4096)")  # fmt: skip
    bench.add_argument("--model", default="llama-47m", metavar="M", help="directory or a shape, as plan takes it "
                       "(default: llama-47m)")  # fmt: skip
    bench.add_argument("--chunk-size", type=int, default=512, metavar="C", help="tokens per chunk (default: 512)")
    bench.add_argument("--fill-size", type=int, metavar="N", help="tokens per forward pass of the fill (default: C)")
    bench.add_argument("--budget", type=int, metavar="t", help="spaco: chunks kept (default: a quarter)")
    bench.add_argument("--rank", type=int, default=0, metavar="R", help="of LoRA; 0 trains all (default: 0)")
    bench.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    bench.add_argument("--dtype", help="of the model (default: bfloat16 on CUDA, else float32)")
    bench.add_argument("--repeats", type=int, default=2, metavar="N", help="measurements of each (default: 2)")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory against the length, as a PNG")
    bench.add_argument("--json", action="store_true", help="print all samples as one JSON object")
