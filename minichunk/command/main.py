"""The `minichunk` command."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..costs.bench import BenchOptions, run_bench
from ..costs.plan import PlanOptions, run_plan
from ..errors import InputError
from ..pipeline.links import RankLost
from ..pipeline.start import is_one_of_several, speaks_first
from ..porting.compare import CompareOptions, run_compare
from ..training.evaluate import EvaluateOptions, evaluate_files
from ..training.generate import GenerateOptions, continue_text
from ..training.loop import NonFiniteLoss
from ..training.options import TrainOptions, options_of
from ..training.train import Interrupted, train
from ..walk.page import WalkOptions, run_walk
from .options import Parser, add_command

# A command's options, and what it does; False is a port that differs.
COMMANDS: dict[str, tuple[type, Callable[[Any], object]]] = {
    "train": (TrainOptions, train),
    "evaluate": (EvaluateOptions, evaluate_files),
    "generate": (GenerateOptions, lambda options: print(continue_text(options))),
    "plan": (PlanOptions, run_plan),
    "bench": (BenchOptions, run_bench),
    "compare": (CompareOptions, run_compare),
    "walk": (WalkOptions, run_walk),
}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="minichunk", description="Chunk-wise training of language models on long contexts (SeCO and SpaCO)."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (options, _) in COMMANDS.items():
        add_command(commands, name, options)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for a user's mistake, 1 for a training that failed or a port that differs, 130 after
    Ctrl-C."""
    try:
        values = vars(build_parser().parse_args(argv))
        options, carry_out = COMMANDS[values.pop("command")]
        return int(carry_out(options_of(options, values)) is False)
    except InputError as error:
        status, words = 2, str(error)
    except (NonFiniteLoss, RankLost) as error:
        status, words = 1, str(error)
    except (Interrupted, KeyboardInterrupt) as error:
        status, words = 130, str(error) or "stopped"
    several = is_one_of_several()
    if speaks_first():
        before = "\n" if several else ""  # another one's progress bar may stand there
        print(f"{before}minichunk: {words}", file=sys.stderr, flush=True)
    if several:
        sys.stdout.flush()
        os._exit(status)  # a process group that has lost a rank may never come to its end
    return status


if __name__ == "__main__":
    sys.exit(main())
