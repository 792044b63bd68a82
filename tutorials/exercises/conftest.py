"""`pytest tutorials/exercises --solutions` checks the solutions instead of your files."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Called by pytest for the directory that it is given."""
    parser.addoption("--solutions", action="store_true", help="exercises: check the solutions, not your files")
