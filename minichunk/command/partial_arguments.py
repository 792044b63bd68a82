"""The options that make of a model of full attention one whose layers see a part of the past."""

from __future__ import annotations

from .options import Parser

PARTIAL_HELP = """\
Make a hybrid of a model of full attention (LongGen, arXiv 2410.01485): the middle third of its layers
keeps seeing all of the past, the others see a part of it, which costs less, in training and when text
is written. That is another function, and the training has to teach it to the model. What is written
says so: `evaluate` and `generate` take it from the adapter or the checkpoint. Take chunks of at least
two windows: most of a chunk then needs nothing of what lies before it.
"""


def add_partial(parser: Parser) -> None:
    part = parser.add_argument_group("a part of the past", PARTIAL_HELP)
    part.add_argument("--partial-context", metavar="KIND", help="window: the last positions and the very first, the "
                      "sinks; strided: in blocks, the last ones and some of those before (default: none)")  # fmt: skip
    part.add_argument("--window", type=int, metavar="N", help="window: the last N positions, the own included "
                                                              "(default: 1024)")  # fmt: skip
    part.add_argument("--sinks", type=int, metavar="N", help="window: and the first N, 0 for none (default: 64)")
    part.add_argument("--block", type=int, metavar="N", help="strided: positions in a block (default: 64)")
    part.add_argument("--local", type=int, metavar="N", help="strided: the last N blocks, the own included "
                                                             "(default: 16)")  # fmt: skip
    part.add_argument("--stride", type=int, metavar="N", help="strided: and every Nth block, the first one included "
                                                              "(default: 16)")  # fmt: skip
    part.add_argument("--full-layers", nargs="*", type=int, metavar="N", help="layers that keep seeing all of the "
                      "past, counted from 0; no number: none (default: the middle third)")  # fmt: skip
