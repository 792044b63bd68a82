"""Ctrl-C that lets the step at work end first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def interrupt_flag(speaks: bool = True) -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C: the step at work ends first. A second Ctrl-C stops at once.

    speaks: says so; of several processes, all of which are told, one does.
    """
    flag: list[int] = []

    def on_interrupt(number: int, _: object) -> None:
        if speaks:
            tqdm.write("Ctrl-C: finishing this step, then saving (press it again to stop at once)")
        flag.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        previous = signal.signal(signal.SIGINT, on_interrupt)
    except ValueError:  # not the main thread: there is no Ctrl-C to catch
        yield flag
        return
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
