"""What the `minichunk` command understands: every option, and the words that explain it.

The options of `train`, `plan`, and of those for ports are in files of their own.
"""

from __future__ import annotations

import argparse

from .options import Parser
from .plan_arguments import add_bench, add_plan


def add_others(commands: argparse._SubParsersAction[Parser]) -> None:
    add_bench(commands)
    add_plan(commands)
