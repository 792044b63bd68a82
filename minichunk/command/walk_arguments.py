"""The options of `minichunk walk`."""

from __future__ import annotations

import argparse

from .options import Parser

WALK_HELP = """\
Watch one training step, event by event, in a browser.

Takes one real step by each method, writes down what happens, and makes one HTML file of it that needs
nothing else: the code with the current line, the chunks and layers, the memory, the numbers. With no
argument: the small Llama that ships with the package, on the first page of a novel.

  minichunk walk
  minichunk walk --model DIR --data notes.txt --seq-len 1024 --chunk-size 256
  minichunk walk --log logs                     # also write the logs, one JSON object a line
  minichunk walk --events mine.jsonl            # look at the log of another implementation
  minichunk walk --compare logs/seco-128.jsonl mine.jsonl   # the first event that differs

`python -c "import minichunk.walk.events as e; help(e)"` describes the log.
"""


def add_walk(commands: argparse._SubParsersAction[Parser]) -> None:
    # Absent options stay absent, so that the defaults live in walk/step.py alone.
    walk = commands.add_parser(
        "walk",
        help="watch one training step in a browser",
        description=WALK_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    walk.add_argument("--output", metavar="FILE", help="where to write the page (default: walk.html)")
    what = walk.add_argument_group("the step")
    what.add_argument("--model", metavar="DIR", help="checkpoint directory (default: the shipped small Llama)")
    what.add_argument("--data", nargs="+", metavar="FILE", help="text or JSONL files (default: a shipped novel)")
    what.add_argument("--seq-len", type=int, metavar="N", help="tokens (default: 512)")
    what.add_argument("--chunk-size", type=int, nargs="+", metavar="C",
                      help="tokens per chunk, one or more to choose from (default: 128 64 256)")  # fmt: skip
    what.add_argument("--method", nargs="+", metavar="M",
                      help="of seco, spaco, full and full-recompute (default: all)")  # fmt: skip
    what.add_argument("--budget", type=int, metavar="t",
                      help="spaco: chunks kept on average (default: half of them)")  # fmt: skip
    what.add_argument("--rank", type=int, metavar="R", help="of LoRA; 0 trains all (default: 0)")
    what.add_argument("--recompute", action="store_true", help="keep layers' inputs within a chunk, run the rest again")
    what.add_argument("--dtype", help="float32, bfloat16 or float64 (default: bfloat16 on CUDA, else float32)")
    what.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    what.add_argument("--seed", type=int, metavar="N", help="of SpaCO's coins (default: 17)")
    logs = walk.add_argument_group("logs")
    logs.add_argument("--log", metavar="DIR", help="write the log of each method and chunk size there too")
    either = logs.add_mutually_exclusive_group()
    either.add_argument("--events", nargs="+", metavar="FILE", help="take no step: make the page of these logs")
    either.add_argument(
        "--compare", nargs=2, metavar="FILE", help="take no step: say in which event two logs differ first"
    )
    logs.add_argument("--tolerance", type=float, metavar="X", help="of --compare, relative (default: 0.0001)")
