"""How a wrong command line is answered."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ..errors import InputError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as for every other mistake; `--help` shows the rest."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")
