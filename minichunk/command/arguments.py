"""What the `minichunk` command understands: every option, and the words that explain it.

The options of `walk`, and of those for ports are in files of their own.
"""

from __future__ import annotations

import argparse

from .options import Parser
from .walk_arguments import add_walk


def add_others(commands: argparse._SubParsersAction[Parser]) -> None:
    add_walk(commands)
