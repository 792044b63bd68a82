"""The exercises: solutions pass their checks, skeletons fail them, and typical mistakes are named in words."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tutorials.exercises.checks import EXERCISES
from tutorials.exercises.diagnose import Exercise, compare, explain, load

from .exercise_mistakes import MISTAKES, Edit

ROOT = Path(__file__).parent.parent
SKELETONS = ROOT / "tutorials" / "exercises"
SOLUTIONS = SKELETONS / "solutions"
BY_NAME = {exercise.name: exercise for exercise in EXERCISES}
each_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=list(BY_NAME))

# The same edits, but as right as the solution.
OTHER_WAYS = [
    ("attention", "scores.masked_fill(future, -torch.inf).softmax(-1) @ values",
     "torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=~future)"),
    ("attention", "scores.masked_fill(future, -torch.inf)", "(scores + torch.where(future, -torch.inf, 0.0))"),
    ("merge", "share_a, share_b = (lse_a - lse).exp()[..., None], (lse_b - lse).exp()[..., None]",
     "share_a, share_b = (lse_a - lse_b).sigmoid()[..., None], (lse_b - lse_a).sigmoid()[..., None]"),
    ("merge", "torch.logaddexp(lse_a, lse_b)", "torch.stack([lse_a, lse_b]).logsumexp(0)"),
    ("loss", "        dlogits = logits.softmax(-1) - F.one_hot(t.clamp(min=0), len(weight))\n"
     "        dlogits[t == IGNORE] = 0",
     "        with torch.enable_grad():\n            leaf = logits.detach().requires_grad_()\n"
     "            F.cross_entropy(leaf, t, ignore_index=IGNORE, reduction='sum').backward()\n"
     "        dlogits = leaf.grad"),
    ("loss", "return list(targets.split(chunk_size, dim=1))", "return targets.split(chunk_size, dim=1)"),
    ("relay", "torch.autograd.backward([loss, memory], [None, memories[j].grad])",
     "(loss + (memory * memories[j].grad).sum()).backward()"),
    ("relay", "        m.grad = torch.zeros_like(m)\n", "    memories[-1].grad = torch.zeros_like(memories[-1])\n"),
    ("relay", "memories.append(f(x, memories, weights)[1])",
     "memories.append(f(x, tuple(memories), weights)[1].clone())"),
    ("seco", "torch.autograd.backward([loss, *written], [None, *received])",
     "sum([(m * g).sum() for m, g in zip(written, received)], loss).backward()"),
    ("seco", "torch.zeros(())", "0.0"),
    ("seco", "        total = total + loss.detach()\n",
     "        total = total + loss.detach()\n        del loss, written, received\n"),
    ("seco", "        torch.autograd.backward([loss, *written], [None, *received])\n",
     "        relayed = list(zip(written, received))\n"
     "        torch.autograd.backward([loss, *[m for m, _ in relayed]], [None, *[g for _, g in relayed]])\n"),
    ("seco", "OPTIONS = Options()", "OPTIONS = Options(fill_size=7, recompute=True, offload=True)"),
    ("samplers", "torch.rand(len(rates), generator=generator)",
     "(1 - torch.bernoulli(torch.tensor(rates), generator=generator))"),
    ("samplers", "torch.randperm(k, generator=generator)[:t]",
     "torch.multinomial(torch.ones(k), t, generator=generator)"),
    ("samplers", "return 0.0", "return 0"),
    ("lora", "list(model.named_modules())", "model.named_modules()"),
    ("window", "max(0, start - window + 1)", "start - window + 1"),
    ("relay", "        total = total + loss.detach()\n",
     "        total = total + loss.detach()\n        memories[j].grad = None\n"),
    ("lora", "        linear = copy.deepcopy(self.base)  # a copy: the base itself stays what it was\n",
     "        linear = nn.Linear(self.base.in_features, self.base.out_features, dtype=self.base.weight.dtype)\n"
     "        linear.weight.copy_(self.base.weight)\n        linear.bias = self.base.bias\n"),
    ("state", "decay * (h - h.detach())", "(decay * h - (decay * h).detach() - h.detach() * (decay - decay.detach()))"),
    ("state", "end - decay * (h - h.detach())",
     "end.detach() + (end - decay.detach() * h) - (end - decay * h).detach()"),
    ("state", "[loss, hand_on(h, end, decay)], [None, weight.relay * adjoint]",
     "loss + (hand_on(h, end, decay) * weight.relay * adjoint).sum()"),
    ("lora", "self.scale * (x @ self.lora_A.T @ self.lora_B.T)", "x @ (self.scale * self.lora_B @ self.lora_A).T"),
]  # fmt: skip


@each_exercise
def test_the_solution_passes(exercise):
    assert explain(exercise, SOLUTIONS) == ""


@each_exercise
def test_the_skeleton_is_not_done_yet_and_offers_what_the_solution_has(exercise):
    words = explain(exercise, SKELETONS)
    assert "is not done yet. Wanted is" in words

    def signatures(directory):
        module = load(directory / exercise.file)
        own = [x for x in vars(module).items() if inspect.isroutine(x[1]) or inspect.isclass(x[1])]
        return {name: str(inspect.signature(x)) for name, x in own if x.__module__ == module.__name__}

    assert signatures(SKELETONS) == signatures(SOLUTIONS)
    assert str(exercise.number) in words and exercise.file in words


@pytest.mark.parametrize(("name", "right", "wrong", "words"), MISTAKES)
def test_a_typical_mistake_is_named(name, right, wrong, words, tmp_path):
    found = " ".join(_explain_edited(BY_NAME[name], right, wrong, tmp_path).split())
    assert words in found
    assert "by no mistake known here" not in found and "Which factor is that?" not in found


@each_exercise
def test_many_mistakes_of_each_exercise_are_known(exercise):
    assert len([name for name, *_ in MISTAKES if name == exercise.name]) >= 25


def _explain_edited(exercise: Exercise, old: Edit, new: Edit, directory: Path) -> str:
    edited = (SOLUTIONS / exercise.file).read_text()
    for a, b in [(old, new)] if isinstance(old, str) else zip(old, new, strict=True):
        assert a in edited and a != b
        edited = edited.replace(a, b)
    (directory / exercise.file).write_text(edited)
    return explain(exercise, directory)


@pytest.mark.parametrize(("name", "right", "other"), OTHER_WAYS)
def test_another_right_way_passes(name, right, other, tmp_path):
    assert _explain_edited(BY_NAME[name], right, other, tmp_path) == ""


def test_an_unknown_mistake_is_shown_by_its_place_and_values(tmp_path):
    found = _explain_edited(BY_NAME["attention"], "keys.mT /", "keys.mT.sin() /", tmp_path)
    assert "differs first at batch 0, head 0, position 0, channel 0: got " in found
    targets = "targets.split(chunk_size, dim=1)"
    found = _explain_edited(BY_NAME["loss"], targets, f"(targets + 1){targets[7:]}", tmp_path)
    assert "the targets of chunk 0 are wrong, and by no mistake known here. They differ first at row 0" in found


def test_one_factor_on_everything_is_shown_as_such():
    names = [f"the gradient of {name}" for name in "abcde"]
    expected = {name: torch.ones(2) for name in names}
    with pytest.raises(AssertionError, match=r"^the gradient of a and all the others: exactly 3 times"):
        compare({name: 3 * value for name, value in expected.items()}, expected)


def test_an_exception_is_shown_with_its_line_and_without_a_traceback(tmp_path):
    found = _explain_edited(BY_NAME["relay"], "total = total + loss.detach()", "total = totl + loss", tmp_path)
    assert "stopped with NameError: name 'totl'" in found and ": total = totl + loss" in found
    found = _explain_edited(BY_NAME["relay"], "for x in chunks:", "for x in chunks", tmp_path)
    assert "not valid Python" in found and "in line" in found


@pytest.mark.parametrize(
    ("got", "words"),
    [
        (None, "has the function a return?"),
        (torch.ones(2, 3), "is a tensor of shape [2, 3], but must be a tensor of shape [3]"),
        (torch.ones(3), "where did the dtype"),
        (torch.tensor([1.0, torch.nan, 3.0]).double(), "is nan at index (1,)"),
        (torch.tensor([2.0, 4.0, 6.0]).double(), "exactly 2 times"),
        (torch.zeros(3).double(), "all zero"),
        (torch.tensor([1.0, 2.0, 4.0]).double(), "first at index (2,): got 4, expected 3"),
    ],
)
def test_every_difference_has_its_words(got, words):
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
