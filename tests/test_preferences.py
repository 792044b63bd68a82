"""`--objective`: rows with two answers, the gradients that a run takes of them, and that a run continues."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shutil import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import minichunk as mc
from minichunk.batch import make_batch
from minichunk.costs.count import CountBytes
from minichunk.files.documents import Document, Pair, read_pairs
from minichunk.models.rope import RopeRule
from minichunk.training import preferences
from minichunk.training.load import make_gradient
from minichunk.training.options import TrainOptions
from minichunk.training.preferences import distillation, score_pairs
from minichunk.training.run_directory import Run
from minichunk.training.train import train

from .rounding import exactly, outcome
from .strategies import build, tiny, with_adapter
from .test_chat import KINDS, TEMPLATES, checkpoint
from .test_data import write
from .test_train import Stopped, at_batch, quiet, stop
from .test_train import options as options  # a fixture
from .train_ranks import files

PROMPT, YES, NO = "the sea is ", "calm and blue", "calm as iron"
ASKED, *SAID = [
    {"role": role, "content": text} for role, text in (("user", PROMPT), ("assistant", YES), ("assistant", NO))
]
FORMS: dict[str, dict[str, Any]] = {
    "text": {"prompt": PROMPT, "chosen": YES, "rejected": NO, "score": 1},
    "the prompt in both texts": {"chosen": PROMPT + YES, "rejected": PROMPT + NO},
    "text by the template": {"prompt": PROMPT, "chosen": YES, "rejected": NO},
    "messages": {"prompt": [ASKED], "chosen": SAID[:1], "rejected": SAID[1:]},
    "the prompt in both lists": {"chosen": [ASKED, SAID[0]], "rejected": [ASKED, SAID[1]]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_rows_have_one_prompt_and_their_answers(form: str, kind: str, tmp_path: Path) -> None:
    tokenizer, end = KINDS[kind], KINDS[kind].token_to_id("</s>")
    templated = form not in ("text", "the prompt in both texts")
    chat = checkpoint(tmp_path, (TEMPLATES / "zephyr.jinja").read_text(), kind) if templated else None
    (pair,), line = read_pairs([write(tmp_path / "a.jsonl", FORMS[form])], tokenizer, end, chat, seq_len=200)
    starts = [int((row.labels != -100).nonzero()[0]) for row in pair.rows]
    assert starts[0] == starts[1] and torch.equal(*(row.input_ids[: starts[0]] for row in pair.rows))
    assert line == f"1 pairs of {len(pair)} tokens"
    for row, answer in zip(pair.rows, (YES, NO), strict=True):
        learnt = tokenizer.decode(row.input_ids[starts[0] :].tolist())
        shared = "calm " if form == "the prompt in both texts" else ""  # what both texts begin with
        assert learnt.strip().startswith(answer.removeprefix(shared)) and row.labels[-1] != -100
        assert templated or int(row.input_ids[-1]) == end


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_goes_on_with_a_word_takes_all_of_its_tokens(kind: str, tmp_path: Path) -> None:
    """Or one row would learn what the other one has been given: of "which" and "wh s" the beginning, too."""
    path = write(tmp_path / "a.jsonl", {"prompt": "he had wh", "chosen": "ich", "rejected": " s"})
    (pair,), _ = read_pairs([path], KINDS[kind], seq_len=99)
    learnt = [KINDS[kind].decode(row.input_ids[row.labels != -100].tolist()).strip() for row in pair.rows]
    assert learnt == ["which", "wh s"]


def test_a_label_goes_with_its_answer_and_another_one(tmp_path: Path) -> None:
    rows = [{"prompt": PROMPT, "completion": text, "label": text == YES} for text in (YES, NO)]
    pairs, _ = read_pairs([write(tmp_path / "a.jsonl", *rows)], KINDS["bytes"], with_labels=True, seq_len=99)
    assert [pair.desirable for pair in pairs] == [True, False]
    assert all(torch.equal(pairs[0].rows[i].input_ids, pairs[1].rows[1 - i].input_ids) for i in (0, 1))


PAIR = FORMS["text"]
REFUSED: dict[str, tuple[Any, str]] = {
    "nothing to compare": ({"prompt": PROMPT, "chosen": YES}, "line 2: must be an object with 'prompt', 'chosen' and"),
    "the same": ({**PAIR, "rejected": YES}, "line 2: 'chosen' and 'rejected' are the same"),
    "an empty answer": ({**PAIR, "rejected": ""}, "line 2: 'rejected' has no token that can be predicted"),
    "a number": ({**PAIR, "chosen": 5}, "line 2: 'chosen': 'prompt' must be a list of messages|'completion' is 5"),
    "two meanings": ({**PAIR, "completion": YES}, "line 2: has a 'completion' too"),
    "not understood": ({**PAIR, "system": "x"}, "line 2: 'chosen': the field 'system' would change what is learnt"),
    "no label": ({"prompt": PROMPT, "completion": YES, "label": 1}, "must be .* 'label', which is true or false"),
    "too long": ({**PAIR, "prompt": PROMPT * 30}, "0 pairs of 0 tokens; 2 with a row .* left out: .*line 1, .*line 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_are_refused_are_named(case: str, tmp_path: Path) -> None:
    row, words = REFUSED[case]
    labelled = {"prompt": PROMPT, "completion": YES, "label": True}
    first = labelled if case == "no label" else row if case == "too long" else PAIR
    path = write(tmp_path / "a.jsonl", first, row)
    with pytest.raises(mc.InputError, match=words):
        read_pairs([path], KINDS["bytes"], with_labels=case == "no label", seq_len=60)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"objective": "dpo"}, "--objective dpo needs --data"),
        ({"objective": "distill"}, "--objective distill needs a --teacher"),
        ({"beta": 0.2}, "--beta belongs to --objective dpo or ipo or simpo or orpo or kto"),
        ({"gamma": 0.2, "objective": "dpo"}, "--gamma belongs to --objective simpo"),
        ({"teacher": "x", "objective": "dpo"}, "--teacher belongs to --objective distill"),
    ],
)
def test_options_that_do_not_go_together(told: dict[str, Any], words: str) -> None:
    with pytest.raises(mc.InputError, match=words):
        TrainOptions(**told).resolved()


def rows(start: int, *answers: int) -> tuple[Document, Document]:
    """Of a prompt of so many tokens and two answers, of lengths that chunks do not divide."""
    prompt = torch.randint(23, (start,))
    ids = [torch.cat([prompt, torch.tensor([i]), torch.randint(23, (n,))]) for i, n in enumerate(answers)]
    first, second = (Document("", row, row.where(torch.arange(len(row)) >= start, -100)) for row in ids)
    return first, second


def test_scores_are_without_dropout() -> None:
    """Or a reference would be a random one, and no margin be 0 before the first step."""
    pairs, options = [Pair("0", rows(9, 3, 6))], TrainOptions(objective="dpo", chunk_size=4)
    model = with_adapter(build(tiny(), seed=1), dropout=0.5)
    first, second = (score_pairs(model, pairs, options, "") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first) and model.training


WINDOW = {"sliding_window": 3, "layer_types": ("full_attention", "sliding_attention")}
NOT_SHARED: Any = {"spaco": WINDOW, "blocks": {"rope_scaling": RopeRule("dynamic", factor=2.0)}}  # prompts


@pytest.mark.parametrize("kind", ["dpo", "simpo", "kto", "distill"])
@pytest.mark.parametrize("method", ["seco", "blocks", "full", "spaco"])
def test_a_step_is_that_of_ordinary_backpropagation(kind: str, method: str) -> None:
    """Of full logits, row by row without padding or a shared prompt; two batches of a step, of two pairs each."""
    pairs = [Pair(f"{i}", rows(*sizes), i < 2) for i, sizes in enumerate([(9, 3, 6), (5, 7, 1), (9, 4, 4), (6, 2, 8)])]
    config, teacher, beta = tiny(**NOT_SHARED.get(method, {})), build(tiny(), seed=2), 0.3
    model = with_adapter(build(config, seed=1))
    how = {"layers_at_once": "1"} if method == "blocks" else {"budget": 99} if method == "spaco" else {}
    told = {"method": "seco" if method == "blocks" else method, "chunk_size": 4, "seq_len": 20, "accumulate": 2, **how}
    how_told = TrainOptions(
        objective=kind, beta=None if kind == "distill" else beta, gamma=0.2, desirable_weight=1.5, **told
    )
    with mc.without_adapter(model):
        reference = score_pairs(model, pairs, how_told, "")

    def of_tokens(of: Any, row: Document) -> Tensor:
        start = int((row.labels != -100).nonzero()[0])
        return of(row.input_ids[None])[0].log_softmax(-1)[start - 1 : -1]

    def answer(of: Any, row: Document) -> Tensor:
        found = of_tokens(of, row)
        return found.gather(1, row.input_ids[-len(found) :, None])[:, 0]

    def loss() -> Tensor:
        if kind == "distill":
            both = [(of_tokens(teacher, row).detach(), of_tokens(model, row)) for pair in pairs for row in pair.rows]
            return sum((t.exp() * (t - p)).sum() for t, p in both) / sum(len(t) for t, _ in both)
        losses = []
        for batch in (pairs[:2], pairs[2:]):
            ours = [[answer(model, row) for row in pair.rows] for pair in batch]
            with mc.without_adapter(model), torch.no_grad():
                theirs = [[answer(model, row) for row in pair.rows] for pair in batch]
            away = [[(l - r).sum() for l, r in zip(*both, strict=True)] for both in zip(ours, theirs, strict=True)]  # noqa: E741
            if kind == "kto":
                kl = torch.stack([other for _, other in away]).mean().detach().clamp(min=0)
                each = [1.5 * torch.sigmoid(-beta * (x - kl)) if pair.desirable else torch.sigmoid(beta * (x - kl))
                        for pair, (x, _) in zip(batch, away, strict=True)]  # fmt: skip
            elif kind == "dpo":
                each = [-F.logsigmoid(beta * (c - r)) for c, r in away]
            else:
                each = [-F.logsigmoid(beta * (c.mean() - r.mean()) - 0.2) for c, r in ours]
            losses.append(sum(each) / 2)
        return sum(losses) / 2

    def oracle() -> Tensor:
        found = loss()
        found.backward()
        return found.detach()

    def step() -> Tensor:
        gradient = make_gradient(how_told, None if kind == "distill" else reference, teacher)
        targets = sum(pair.num_targets() for pair in pairs)
        batches = (pairs[:2], pairs[2:])
        return sum(gradient(model, batch, targets, torch.Generator()).reshape(-1)[0] for batch in batches)

    exactly(model, oracle).check(outcome(model, step))


RUNS: dict[str, dict[str, Any]] = {
    "dpo": {"objective": "dpo", "batch_size": 1, "dropout": 0.0},
    "dpo of all parameters": {"objective": "dpo", "rank": 0, "batch_size": 1, "dtype": "bfloat16"},
    "orpo, spaco": {"objective": "orpo", "method": "spaco", "budget": 2},
    "kto": {"objective": "kto", "desirable_weight": 2.0},
    "distill": {"objective": "distill"},
    "dpo, transformers": {"objective": "dpo", "batch_size": 1, "rank": 0, "model": "granite"},
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_measures_and_continues_bit_for_bit(
    case: str, options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is the model before the first step, and is not computed again."""
    kind, path, lines = RUNS[case]["objective"], tmp_path / "rows.jsonl", list[str]()
    text = Path(options.data[0]).read_text()
    parts = [text[i : i + 60] for i in range(0, 1200, 60)]
    for i in range(0, 20, 2):
        if kind == "kto":
            row: dict[str, Any] = {"prompt": parts[i], "completion": parts[i + 1][:20], "label": i % 4 == 0}
        else:
            row = {"prompt": parts[i], "chosen": parts[i + 1][:20], "rejected": parts[i + 1][20:50]}
        path.open("a").write(json.dumps(row if kind != "distill" else {"text": parts[i]}) + "\n")
    told = {**RUNS[case], **({"teacher": options.model} if kind == "distill" else {})}
    if "model" in told:
        tiny_transformer = pytest.importorskip("tests.tiny_transformers").tiny_transformer
        tiny_transformer(told["model"], vocab_size=300).float().save_pretrained(tmp_path / "model")
        copy(Path(options.model) / "tokenizer.json", tmp_path / "model")
        told["model"] = str(tmp_path / "model")
    options = replace(options, data=(str(path),), val_fraction=0.2, seq_len=80, lr=3e-3, **told)
    whole = train(replace(options, output=str(tmp_path / "whole")), say=lines.append)
    metrics = Run(whole).read_metrics()
    if kind == "distill":
        assert metrics[0]["loss"] == pytest.approx(0, abs=1e-5)  # its own teacher
    else:
        assert any(line.startswith("\n2 held-out pairs ") and "\nmargin " in line for line in lines)
        assert json.loads((whole / "preferences.json").read_text())["after"]["loss"] > 0
        assert {"accuracy", "reward_chosen", "reward_rejected", "margin"} & metrics[-1].keys() >= {"accuracy"}
    if kind == "dpo":
        assert metrics[0]["margin"] == 0.0 and metrics[-1]["margin"] != 0.0
    with monkeypatch.context() as patch:
        at_batch(10, stop, patch)
        with pytest.raises(Stopped):
            train(options, say=quiet)
    once = lambda *told: pytest.fail("the reference is there") if told[-1] == "reference" else score_pairs(*told)  # noqa: E731
    monkeypatch.setattr(preferences, "score_pairs", once)
    resumed = train(TrainOptions(output=options.output, resume=True), say=quiet)
    assert files(whole) == files(resumed)


def test_a_teacher_leaves_its_last_hidden_states_alone() -> None:
    """64 bytes a token, where its cache has 1,024."""
    teacher, ids = build(tiny(8), seed=1), torch.randint(23, (1, 1000))
    with CountBytes() as count:
        chunk_loss = distillation(teacher, teacher, make_batch(ids, ids, 1), 100)
    assert callable(chunk_loss) and 64 < count.live / 1000 < 200 < count.peak / 1000


def test_a_teacher_of_another_vocabulary_is_refused(options: TrainOptions) -> None:
    with pytest.raises(mc.InputError, match=r"--teacher is .*austen-llama, whose vocabulary is not the model's"):
        train(replace(options, objective="distill", teacher="minichunk/assets/austen-llama"), say=quiet)
