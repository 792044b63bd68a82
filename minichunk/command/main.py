"""The `minichunk` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ..errors import InputError
from ..files.torchrun import is_one_of_several
from .arguments import build_parser


def run(arguments: argparse.Namespace) -> int:
    """Carry out one parsed command; returns the exit status."""
    values = vars(arguments)
    command = values.pop("command")
    if command == "train":
        from ..training.options import TrainOptions
        from ..training.train import train

        resume = values.pop("resume", False)
        if resume and (extra := sorted(values.keys() - {"output", "pipeline", "timeout"})):
            raise InputError(f"--resume continues with the run's own options: leave out --{extra[0].replace('_', '-')}")
        train(TrainOptions.from_dict(values), resume)
    elif command == "generate":
        from ..training.generate import continue_text

        print(continue_text(**values))
    elif command == "bench":
        from ..costs.bench import run_bench

        run_bench(**values)
    elif command == "plan":
        from ..costs.plan import run_plan

        run_plan(**values)
    elif command == "evaluate":
        from ..training.evaluate import evaluate_files

        evaluate_files(**values)
    elif command == "golden":
        from ..porting.golden import write_golden

        print("\n".join(f"written  {path}" for path in write_golden(**values)))
    elif command == "compare":
        from ..porting.compare import run_compare

        return 0 if run_compare(**values) else 1
    else:
        from ..walk.step import run_walk

        run_walk(**values)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for a user's mistake, 1 for a training that failed or a port that differs, 130 after
    Ctrl-C."""
    from ..pipeline.links import RankLost
    from ..pipeline.start import speaks_first
    from ..training.loop import NonFiniteLoss
    from ..training.train import Interrupted

    try:
        return run(build_parser().parse_args(argv))
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
