"""Checks your files: python -m pytest tutorials/exercises (README.md says more)."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from .checks import EXERCISES
from .diagnose import Exercise, explain

HERE = Path(__file__).parent


@pytest.mark.parametrize("exercise", EXERCISES, ids=[exercise.name for exercise in EXERCISES])
def test_exercise(exercise: Exercise, pytestconfig: pytest.Config) -> None:
    """One exercise; fails with the words alone, for a traceback through the checks would not help."""
    solutions = pytestconfig.getoption("--solutions", default=False)
    words = explain(exercise, HERE / "solutions" if solutions else HERE)
    if words:
        pytest.fail("\n".join(textwrap.fill(line, 100) for line in words.splitlines()), pytrace=False)
