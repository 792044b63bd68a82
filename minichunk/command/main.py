"""The `minichunk` command; its parser is made of dataclasses of options, see training/options.py."""

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, NoReturn, get_type_hints

from ..costs.bench import BenchOptions, run_bench
from ..costs.forecast import fitted
from ..costs.plan import PlanOptions, run_plan
from ..errors import InputError
from ..pipeline.links import RankLost, is_one_of_several, speaks_first
from ..porting.compare import CompareOptions, run_compare
from ..training.evaluate import EvaluateOptions, evaluate_files
from ..training.generate import GenerateOptions, continue_text
from ..training.loop import NonFiniteLoss
from ..training.options import TrainOptions, flag, form, options_of
from ..training.train import train
from ..walk.page import WalkOptions, run_walk

# A command's options, and what it does; False is a port that differs.
COMMANDS: dict[str, tuple[type, Callable[[Any], object]]] = {
    "train": (TrainOptions, lambda options: train(fitted(options))),
    "evaluate": (EvaluateOptions, evaluate_files),
    "generate": (GenerateOptions, lambda options: print(continue_text(options))),
    "plan": (PlanOptions, run_plan),
    "bench": (BenchOptions, run_bench),
    "compare": (CompareOptions, run_compare),
    "walk": (WalkOptions, run_walk),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for a user's mistake, 1 for a training that failed or a port that differs, 130 after
    Ctrl-C."""
    parser = Parser("minichunk", description="Chunk-wise training of language models on long contexts (SeCO, SpaCO).")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (described, _) in COMMANDS.items():
        add_command(commands, name, described)
    try:
        values = vars(parser.parse_args(argv))
        options, carry_out = COMMANDS[values.pop("command")]
        return int(carry_out(options_of(options, values)) is False)
    except (InputError, OSError) as error:
        status, words = 2, str(error)
    except (NonFiniteLoss, RankLost) as error:
        status, words = 1, str(error)
    except KeyboardInterrupt as error:
        status, words = 130, str(error) or "stopped"
    several = is_one_of_several()
    if speaks_first():
        before = "\n" if several else ""  # another one's progress bar may stand there
        print(f"{before}minichunk: {words}", file=sys.stderr, flush=True)
    if several:
        sys.stdout.flush()
        os._exit(status)  # a process group that has lost a rank may never come to its end
    return status


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as for every other mistake; `--help` shows the rest."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def add_command(commands: Any, name: str, options: type) -> None:
    """A command whose options are the fields of this dataclass, which alone has the defaults, and whose help begins
    with its docstring."""
    words = inspect.cleandoc(options.__doc__ or "")
    how = {"formatter_class": argparse.RawDescriptionHelpFormatter, "argument_default": argparse.SUPPRESS}
    parser = commands.add_parser(name, help=words.splitlines()[0].rstrip("."), description=words, **how)
    groups, annotations, title = {"": parser}, get_type_hints(options), ""
    for field in fields(options):
        title = title if field.metadata["group"] is None else field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_option(groups[title], field, *form(annotations[field.name]))


def _add_option(parser: Any, field: Field[Any], kind: type, several: bool) -> None:
    rule, shown = field.metadata, {"help": _help(field)}
    if kind is bool:
        parser.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, **shown)
    else:
        among = "{" + ",".join(rule["choices"]) + "}" if rule["choices"] else field.name.upper()
        shown["metavar"] = rule["metavar"] or {int: "N", float: "X"}.get(kind, among)
        if several:
            shown["nargs"] = "*" if rule["none"] else "+"
        if rule["bare"]:
            shown |= {"nargs": "?", "const": rule["bare"]}
        needed = {} if rule["positional"] else {"required": field.default is MISSING}
        parser.add_argument(field.name if rule["positional"] else flag(field.name), type=kind, **shown, **needed)


def _help(field: Field[Any]) -> str:
    """What the option means, and its default."""
    default, absent = field.default, field.metadata["absent"]
    if not absent and default not in (None, MISSING, ()) and not isinstance(default, bool):
        values = default if isinstance(default, tuple) else [default]
        absent = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return (field.metadata["help"] + (f" (default: {absent})" if absent else "")).replace("%", "%%")


if __name__ == "__main__":
    sys.exit(main())
