"""A parser made of a dataclass of options, see training/options.py."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import MISSING, Field, fields
from typing import Any, NoReturn, get_type_hints

from ..errors import InputError
from ..training.options import flag, form


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as for every other mistake; `--help` shows the rest."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def add_command(commands: argparse._SubParsersAction[Parser], name: str, options: type) -> None:
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
    for title in [*described, *(field.metadata["group"] for field in fields(options))]:
        if title not in groups:
            groups[title] = parser.add_argument_group(title, described.get(title) or None)
    annotations = get_type_hints(options)
    for field in fields(options):
        _add_option(groups[field.metadata["group"]], field, annotations[field.name])


def _add_option(parser: Any, field: Field[Any], annotation: Any) -> None:
    rule = field.metadata
    kind, several = form(annotation)
    shown: dict[str, Any] = {"help": _help(field)}
    if kind is bool and field.default is None:
        parser.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, **shown)
    elif kind is bool:
        name = flag(f"no_{field.name}" if field.default else field.name)
        action = "store_false" if field.default else "store_true"
        parser.add_argument(name, dest=field.name, action=action, **shown)
    else:
        if rule["metavar"] or not rule["choices"]:
            shown["metavar"] = rule["metavar"] or field.name.upper()
        else:
            shown["metavar"] = "{" + ",".join(rule["choices"]) + "}"
        if several:
            shown["nargs"] = "*" if rule["none"] else "+"
        if not rule["positional"] and field.default is MISSING:
            shown["required"] = True
        parser.add_argument(field.name if rule["positional"] else flag(field.name), type=kind, **shown)


def _help(field: Field[Any]) -> str:
    """What the option means, and its default."""
    default = field.metadata["absent"]
    if not default and field.default not in (None, MISSING, ()) and not isinstance(field.default, bool):
        values = field.default if isinstance(field.default, tuple) else [field.default]
        default = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    words = field.metadata["help"] + (f" (default: {default})" if default else "")
    return words.replace("%", "%%")
