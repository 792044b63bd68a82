"""A parser made of a dataclass of options, see training/options.py."""

import argparse
import inspect
from dataclasses import MISSING, Field, fields
from typing import Any, NoReturn, get_type_hints

from ..errors import InputError
from ..training.options import flag, form

METAVARS = {int: "N", float: "X"}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as for every other mistake; `--help` shows the rest."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def add_command(commands: "argparse._SubParsersAction[Parser]", name: str, options: type) -> None:
    """A command whose options are the fields of this dataclass, and whose help begins with its docstring.

    What is not said stays absent, so that the defaults live in the dataclass alone.
    """
    words = inspect.cleandoc(options.__doc__ or "")
    parser = commands.add_parser(
        name,
        help=words.splitlines()[0].rstrip("."),
        description=words,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    described: dict[str, str] = getattr(options, "GROUPS", {})
    groups: dict[str, Any] = {"": parser}
    annotations, title = get_type_hints(options), ""
    for field in fields(options):
        title = field.metadata["group"] or title
        if title not in groups:
            groups[title] = parser.add_argument_group(title, described.get(title))
        _add_option(groups[title], field, annotations[field.name])


def _add_option(parser: Any, field: Field[Any], annotation: Any) -> None:
    rule, (kind, several) = field.metadata, form(annotation)
    shown: dict[str, Any] = {"help": _help(field)}
    if kind is bool and field.default is None:
        parser.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, **shown)
    elif kind is bool:
        name = flag(f"no_{field.name}" if field.default else field.name)
        parser.add_argument(name, dest=field.name, action=f"store_{not field.default}".lower(), **shown)
    else:
        among = "{" + ",".join(rule["choices"]) + "}" if rule["choices"] else field.name.upper()
        shown["metavar"] = rule["metavar"] or METAVARS.get(kind, among)
        if several:
            shown["nargs"] = "*" if rule["none"] else "+"
        if not rule["positional"]:
            shown["required"] = field.default is MISSING
        parser.add_argument(field.name if rule["positional"] else flag(field.name), type=kind, **shown)


def _help(field: Field[Any]) -> str:
    """What the option means, and its default."""
    default, absent = field.default, field.metadata["absent"]
    if not absent and default not in (None, MISSING, ()) and not isinstance(default, bool):
        values = default if isinstance(default, tuple) else [default]
        absent = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return (field.metadata["help"] + (f" (default: {absent})" if absent else "")).replace("%", "%%")
