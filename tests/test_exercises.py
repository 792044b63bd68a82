"""The exercises: solutions pass their checks, skeletons fail them, and typical mistakes are named in words."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tutorials.exercises.checks import EXERCISES
from tutorials.exercises.diagnose import compare, explain, load

from .exercise_mistakes import MISTAKES, OTHER_WAYS

ROOT = Path(__file__).parent.parent
SKELETONS = ROOT / "tutorials" / "exercises"
SOLUTIONS = SKELETONS / "solutions"
BY_NAME = {exercise.name: exercise for exercise in EXERCISES}


@pytest.mark.parametrize("exercise", EXERCISES, ids=list(BY_NAME))
def test_the_solution_passes_and_the_skeleton_offers_what_it_has(exercise):
    assert explain(exercise, SOLUTIONS) == ""
    words = explain(exercise, SKELETONS)
    assert "is not done yet. Wanted is" in words and str(exercise.number) in words and exercise.file in words

    def signatures(directory):
        module = load(directory / exercise.file)
        own = [x for x in vars(module).items() if inspect.isroutine(x[1]) or inspect.isclass(x[1])]
        return {name: str(inspect.signature(x)) for name, x in own if x.__module__ == module.__name__}

    assert signatures(SKELETONS) == signatures(SOLUTIONS)


def explain_edited(name: str, old: str, new: str, directory: Path) -> str:
    solution = (SOLUTIONS / BY_NAME[name].file).read_text()
    assert old in solution and old != new
    (directory / BY_NAME[name].file).write_text(solution.replace(old, new))
    return explain(BY_NAME[name], directory)


CASES = [pytest.param(name, *edit, id=f"{name}: {edit[2]}") for name, edits in MISTAKES.items() for edit in edits]


@pytest.mark.parametrize(("name", "right", "wrong", "words"), CASES)
def test_a_typical_mistake_is_named(name, right, wrong, words, tmp_path):
    found = " ".join(explain_edited(name, right, wrong, tmp_path).split())
    assert words in found
    assert "by no mistake known here" not in found and "Which factor is that?" not in found


@pytest.mark.parametrize(("name", "right", "other"), OTHER_WAYS)
def test_another_right_way_passes(name, right, other, tmp_path):
    assert explain_edited(name, right, other, tmp_path) == ""


def test_an_unknown_mistake_is_shown_by_its_place_and_values(tmp_path):
    found = explain_edited("attention", "keys.mT /", "keys.mT.sin() /", tmp_path)
    assert "differs first at batch 0, head 0, position 0, channel 0: got " in found
    targets = "targets.split(chunk_size, dim=1)"
    found = explain_edited("loss", targets, f"(targets + 1){targets[7:]}", tmp_path)
    assert "the targets of chunk 0 are wrong, and by no mistake known here. They differ first at row 0" in found


def test_an_exception_is_shown_with_its_line_and_without_a_traceback(tmp_path):
    found = explain_edited("relay", "total = total + loss.detach()", "total = totl + loss", tmp_path)
    assert "stopped with NameError: name 'totl'" in found and ": total = totl + loss" in found
    found = explain_edited("relay", "for x in chunks:", "for x in chunks", tmp_path)
    assert "not valid Python" in found and "in line" in found


def test_every_difference_has_its_words():
    for got, words in (
        (None, "has the function a return?"),
        (torch.ones(2, 3), "is a tensor of shape [2, 3], but must be a tensor of shape [3]"),
        (torch.ones(3), "where did the dtype"),
        (torch.tensor([1.0, torch.nan, 3.0]).double(), "is nan at index (1,)"),
        (torch.tensor([2.0, 4.0, 6.0]).double(), "exactly 2 times"),
        (torch.zeros(3).double(), "all zero"),
        (torch.tensor([1.0, 2.0, 4.0]).double(), "first at index (2,): got 4, expected 3"),
    ):
        with pytest.raises(AssertionError) as raised:
            compare({"x": got}, {"x": torch.tensor([1.0, 2.0, 3.0]).double()})
        assert words in str(raised.value)


def test_a_student_sees_words_and_no_traceback():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tutorials/exercises", "-k", "merge or relay"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "Exercise 4, relay (e4_relay.py) is not done yet" in run.stdout
    assert "Traceback" not in run.stdout and "diagnose.py" not in run.stdout and "2 failed" in run.stdout
    run = subprocess.run([*command, "--solutions"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "2 passed" in run.stdout, run.stdout
