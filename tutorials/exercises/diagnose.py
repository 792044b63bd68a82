"""Running an exercise, and saying in words what is wrong with it."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

Values = dict[str, Tensor]  # results by the name that they have in a sentence
Mistakes = Iterable[tuple[str, Values]]  # what a known mistake is, and the results that it leads to

# What PyTorch says, and what it means here.
HINTS = {
    "backward through the graph a second time": (
        "A chunk's loss and its memory share one graph. Can both go into one call of torch.autograd.backward?"
    ),
    "can be implicitly created only for scalar outputs": (
        "Only the loss is a scalar. Which gradient belongs to the chunk's memory?"
    ),
    **dict.fromkeys(
        ("does not require grad and does not have a grad_fn", "differentiated Tensors does not require grad"),
        "What ran under torch.no_grad(), or was detached, although it needs its graph?",
    ),
    "Mismatch in shape: grad_output": (
        "The gradients stand in the order of the tensors that they belong to: None for the loss, which is a scalar, "
        "and for what a chunk has written what was sent back to it. Which of yours stand in each other's place?"
    ),
    **dict.fromkeys(
        ("leaf Variable that requires grad", "Cannot assign non-leaf Tensor to parameter"),
        "In-place changes of parameters need torch.no_grad().",
    ),
    **dict.fromkeys(
        ("shapes cannot be multiplied", "first two dimensions of batch2"),
        "The two factors of a product do not fit: as many columns as the first has, the second must have rows. Write "
        "both shapes down, and that of the result: which factor has to be transposed (.mT), or which comes first?",
    ),
    "returned an invalid gradient": (
        "backward returns its gradients in the order of forward's arguments, each of its argument's shape. Which of "
        "them is at the wrong place?"
    ),
    "before Module.__init__() call": "Which line has to be the first in a module's __init__?",
    "'NoneType' object has no attribute": (
        "A skipped chunk's entry is None, and has no factors. What is to be done for it?"
    ),
    "and 'NoneType'": (
        "Something that takes part in a product or a sum is None. If nothing has been sent back yet, which number of "
        "the same meaning can be multiplied and added?"
    ),
    "incorrect number of gradients": "backward returns one gradient for each argument of forward, or None.",
    **dict.fromkeys(
        ("-100 is out of bounds", "Class values must be non-negative"),
        "An ignored position has the target -100, which is no token. What are its loss and its gradient, and which "
        "index can stand there meanwhile?",
    ),
}
AMBIGUOUS = "Boolean value of Tensor with more than one value"  # two causes, told apart by the line
PLURALS = ("the targets", "the logits")  # how a name may begin


class Exercise(NamedTuple):
    """One file to be written, and the function that checks it."""

    number: int
    name: str
    check: Callable[[ModuleType], None]

    @property
    def file(self) -> str:
        return f"e{self.number}_{self.name}.py"


def load(path: Path) -> ModuleType:
    """Import a file by its path, so that skeletons and solutions may have the same names."""
    spec = importlib.util.spec_from_file_location(f"exercise_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def explain(exercise: Exercise, directory: Path) -> str:
    """What is wrong with the exercise's file in `directory`; empty if nothing is."""
    path = directory / exercise.file
    title = f"Exercise {exercise.number}, {exercise.name} ({exercise.file})"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for tensors as small as these, a second thread costs more than it saves
    try:
        with torch.enable_grad():  # also undoes what a student's file may have switched off
            exercise.check(load(path))
    except NotImplementedError as error:
        return f"{title} is not done yet. Wanted is\n    {error}"
    except AssertionError as error:
        return f"{title}:\n{error}" if str(error) else f"{title} {_stopped(error, path)}"
    except SyntaxError as error:
        return f"{title} is not valid Python: {error.msg} in line {error.lineno}."
    except Exception as error:
        return f"{title} {_stopped(error, path)}"
    finally:
        torch.set_num_threads(threads)
    return ""


def _stopped(error: Exception, path: Path) -> str:
    """Where the student's code stopped, why, and what PyTorch's words mean here."""
    words = f"stopped with {type(error).__name__}: {error}"
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    if own:
        words += f"\nin line {own[-1].lineno}: {own[-1].line}"
    hints = [hint for symptom, hint in HINTS.items() if symptom in str(error)]
    if AMBIGUOUS in str(error):
        hints.append(_ambiguous(own[-1].line or "" if own else ""))
    return "\n".join([words, *dict.fromkeys(hints), *getattr(error, "__notes__", [])])


def _ambiguous(line: str) -> str:
    if "backward(" in line or "grad(" in line:
        return "A gradient has another shape than the tensor that it belongs to. Whose is it?"
    return "A tensor of many numbers is neither true nor false. Is the question whether there is one: `is not None`?"


def require(condition: bool, words: str) -> None:
    """Raise AssertionError with `words` unless the condition holds."""
    if not condition:
        raise AssertionError(words)


@contextmanager
def within(function: str) -> Iterator[None]:
    """Around the check of one of several functions: says which of them the words are about."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"In {function}: {error}") from error


@contextmanager
def hint(symptom: str, words: str) -> Iterator[None]:
    """Around a call of the student's function: as HINTS, for a symptom that means something here only."""
    try:
        yield
    except Exception as error:
        if symptom in str(error) and not isinstance(error, AssertionError):
            error.add_note(words)
        raise


def count(number: int, one: str, many: str) -> str:
    """How many there are of something, in words that fit one of it, too."""
    return f"{number} {one if number == 1 else many}"


def take(result: Any, *wanted: str) -> list[Any]:
    """The parts of what a function returned; `wanted` says what each of them is."""
    if not isinstance(result, tuple | list) or len(result) != len(wanted):
        parts = f"{len(result)} parts" if isinstance(result, tuple | list) else _kind(result)
        raise AssertionError(f"{parts} came back, but the function has to return {len(wanted)}: {', '.join(wanted)}.")
    return list(result)


def compare(got: dict[str, Any], expected: Values, mistakes: Mistakes = (), axes: str = "") -> None:
    """Raise AssertionError, in words, unless all results are right.

    mistakes: tried one after the other, and computed only if something is wrong.
    axes: names of the results' dimensions, "batch head position channel"; else they are numbered.
    """
    for name, e in expected.items():
        _check_kind(name, got[name], e)
    if all(close(got[name], e) for name, e in expected.items()):
        return
    for words, wrong in mistakes:
        if all(close(got[name], wrong[name]) for name in expected):
            raise AssertionError(words)
    factor = _common_factor(got, expected)
    names = " and ".join(expected) if len(expected) < 4 else f"{next(iter(expected))} and all the others"
    require(factor != 0, f"{names}: all zero.")
    if factor is not None:
        raise AssertionError(f"{names}: exactly {factor:.6g} times what it has to be. Which factor is that?")
    for name, e in expected.items():
        if not close(got[name], e):
            differs = "They differ" if name.startswith(PLURALS) else "It differs"
            raise AssertionError(
                f"{name} {_is(name)} wrong, and by no mistake known here. "
                f"{differs} {_first_difference(got[name], e, axes)}"
            )


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two results agree up to rounding; never if their shapes differ."""
    if a.shape != b.shape:
        return False
    a, b = a.detach().double(), b.detach().double()
    return bool((a - b).norm() <= 1e-9 * b.norm() + 1e-12)


def _is(name: str) -> str:
    return "are" if name.startswith(PLURALS) else "is"


def _kind(value: Any) -> str:
    if value is None:
        return "None (has the function a return?)"
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _check_kind(name: str, got: Any, expected: Tensor) -> None:
    shape = list(expected.shape)
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        raise AssertionError(f"{name} {_is(name)} {_kind(got)}, but must be a tensor of shape {shape}.")
    require(
        got.dtype == expected.dtype,
        f"{name} {_is(name)} {got.dtype}, but must be {expected.dtype}: where did the dtype of the inputs get lost?",
    )
    wrong = (~torch.isfinite(got)).nonzero().tolist()
    if wrong:
        raise AssertionError(
            f"{name} {_is(name)} {got[tuple(wrong[0])].item()} at index {tuple(wrong[0])}. "
            "Is there the exponential of something large, or a row of scores that is -inf throughout?"
        )


def _common_factor(got: Values, expected: Values) -> float | None:
    """c, if got = c · expected in all results."""
    g = torch.cat([got[name].detach().double().flatten() for name in expected])
    e = torch.cat([value.detach().double().flatten() for value in expected.values()])
    if not e.any():
        return None
    factor = float(g @ e / (e @ e))
    if abs(factor) < 1e-12:
        return 0.0 if not g.any() else None
    return factor if close(g, factor * e) else None


def _first_difference(got: Tensor, expected: Tensor, axes: str) -> str:
    difference = (got - expected).abs()
    first = (difference > 1e-6 * difference.max()).nonzero()[0].tolist()  # not where it is mere rounding
    where = f"index {tuple(first)}"
    if axes:
        where = ", ".join(f"{axis} {i}" for axis, i in zip(axes.split(), first, strict=True))
    g, e = got[tuple(first)].item(), expected[tuple(first)].item()
    return f"first at {where}: got {g:.12g}, expected {e:.12g}."
