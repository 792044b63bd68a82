"""What the `minichunk` command understands: every option, and the words that explain it.

The options of `train`, `plan`, `walk`, and of those for ports are in files of their own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .parser import Parser
from .plan_arguments import add_plan
from .porting_arguments import add_compare, add_golden
from .train_arguments import add_train
from .walk_arguments import add_walk

EVALUATE_HELP = """\
Measure how well a model predicts texts, near the start of a document and far into it.

Cuts the texts into pieces of at most --seq-len tokens and prints the mean loss, in nats per token
(lower is better), for each span of positions: inside the length that the model was made for, and
beyond it. Run it with and without --adapter to see what a training has changed.

  minichunk evaluate
  minichunk evaluate --model DIR --data heldout.txt --seq-len 16384
  minichunk evaluate --model DIR --data heldout.txt --seq-len 16384 --adapter runs/1/adapter

DIR and FILE are as `minichunk train` takes them: of a JSONL line, what would be learnt is measured.
"""

GENERATE_HELP = """\
Continue a text, and print it with its continuation.

The prompt is continued as it stands: no chat template is put around it.

  minichunk generate "It is a truth"
  minichunk generate "It is a truth" --model DIR --adapter runs/1/adapter
  minichunk generate "$(cat chapter.txt)" --model DIR --max-new-tokens 500 --load-in-4bit

DIR is a Hugging Face checkpoint; one that was trained with --rank 0 is in runs/N/model.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="minichunk", description="Chunk-wise training of language models on long contexts (SeCO and SpaCO)."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_train(commands)
    _add_evaluate(commands)
    _add_generate(commands)
    _add_bench(commands)
    add_plan(commands)
    add_walk(commands)
    add_golden(commands)
    add_compare(commands)
    return parser


def _add_evaluate(commands: argparse._SubParsersAction[Parser]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    evaluate = commands.add_parser(
        "evaluate", help="measure the loss by position", description=EVALUATE_HELP, formatter_class=raw
    )
    _add_model(evaluate)
    evaluate.add_argument("--data", nargs="+", metavar="FILE", help="text or JSONL files (default: a shipped novel)")
    evaluate.add_argument("--seq-len", type=int, default=2048, metavar="N", help="tokens per piece (default: 2048)")
    evaluate.add_argument("--documents", type=int, default=8, metavar="N", help="pieces, the longest (default: 8)")
    evaluate.add_argument("--chunk-size", type=int, default=512, metavar="C",
                          help="tokens per forward pass: costs memory, changes no result (default: 512)")  # fmt: skip


def _add_generate(commands: argparse._SubParsersAction[Parser]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    generate = commands.add_parser(
        "generate", help="read what a model writes", description=GENERATE_HELP, formatter_class=raw
    )
    generate.add_argument("prompt", help="the text to continue, in quotes")
    _add_model(generate)
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="write up to N (default: 128)")
    generate.add_argument("--temperature", type=float, default=0.8, metavar="X",
                          help="0: always the likeliest token; higher: more varied (default: 0.8)")  # fmt: skip
    generate.add_argument("--top-p", type=float, default=0.95, metavar="X",
                          help="among the likeliest tokens that together have this chance (default: 0.95)")  # fmt: skip
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="another one, another text (default: 0)")


def _add_model(parser: Parser) -> None:
    """The options that say which model, as `load_as_told` takes them."""
    parser.add_argument("--model", metavar="DIR", help="checkpoint directory (default: the shipped small Llama)")
    parser.add_argument("--adapter", metavar="DIR", help="adapter of this model, runs/N/adapter (default: none)")
    parser.add_argument("--load-in-4bit", action="store_true", help="store the base in 4 bits (bitsandbytes)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float64 (default: bfloat16 on CUDA, else float32)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")


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
