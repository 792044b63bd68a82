"""Recall: the passkey stands where it is said to, and what is counted is what the whole model would write."""

from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minichunk.batch import IGNORE
from minichunk.command.main import main
from minichunk.files.documents import MEASURED_ON, Document, novel
from minichunk.training.recall import Cell, hide, recall_table, score, wilson
from tutorials.recall import HOP, VALUES, texts

from .strategies import VOCAB, build, examples, tiny
from .test_chat import KINDS, UNTAGGED, checkpoint

TEXT = novel(MEASURED_ON).read_text()[:9000]


@given(
    kind=st.sampled_from(sorted(KINDS)), in_chat=st.booleans(), length=st.integers(220, 600),
    depth=st.floats(0, 1), seed=st.integers(0, 99),
)  # fmt: skip
@examples(60)
def test_a_passkey_is_hidden_where_it_is_said(
    tmp_path_factory: pytest.TempPathFactory, kind: str, in_chat: bool, length: int, depth: float, seed: int
) -> None:
    tokenizer, text_ids = KINDS[kind], torch.tensor(KINDS[kind].encode(TEXT, add_special_tokens=False).ids)
    chat = checkpoint(tmp_path_factory.getbasetemp() / kind, UNTAGGED, kind) if in_chat else None
    document = hide(text_ids, tokenizer, chat, length, depth, Random(seed))
    assert length - 9 <= len(document) <= length
    labels = document.labels[document.labels != IGNORE]
    # The bytes of these tokenizers, and with them the digits, are special tokens.
    key, text = (tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in (labels, document.input_ids))
    text = text.replace("<s>", "").replace("</s>", "")
    assert key == document.name[-5:]
    assert text.count(key) == 3
    assert text.endswith(f"The pass key is {key}.")
    before, after = text.split(f"The pass key is {key}. Remember it. {key} is the pass key.")
    own = after[: after.index("What is the pass key?")]
    before = before.split("user\n")[-1].strip()
    whole = tokenizer.decode(text_ids.tolist())
    assert before in whole
    assert own.strip() in whole
    assert len(before) / (len(before) + len(own)) == pytest.approx(depth, abs=0.15)
    assert chat is None or "assistant" in after


@given(data=st.data(), chunk_size=st.integers(1, 30), asked=st.integers(1, 5), changed=st.booleans())
@examples(60)
def test_found_is_what_greedy_decoding_writes(data: st.DataObject, chunk_size: int, asked: int, changed: bool) -> None:
    model = build(tiny(), seed=data.draw(st.integers(0, 99)))
    prompt = torch.randint(1, VOCAB, (1, data.draw(st.integers(1, 20))))
    for _ in range(asked):  # greedy, by the whole model
        prompt = torch.cat([prompt, model(prompt)[:, -1:].argmax(-1)], 1)
    if changed:
        at = -1 - data.draw(st.integers(0, asked - 1))
        prompt[0, at] = (prompt[0, at] + 1) % VOCAB
    ids = torch.cat([prompt[0], torch.tensor([3])])  # something follows
    labels = torch.full_like(ids, IGNORE)
    labels[-1 - asked : -1] = ids[-1 - asked : -1]
    found, log_prob = score(model, Document("", ids, labels), chunk_size)
    assert found is not changed
    log_probs = model(ids[None])[0].detach().log_softmax(-1)
    expected = sum(float(log_probs[i - 1, ids[i]]) for i in range(len(ids) - 1 - asked, len(ids) - 1))
    assert log_prob == pytest.approx(expected, rel=1e-9)


def test_an_interval_holds_the_shares_that_do_not_contradict_what_was_found() -> None:
    """Wilson's: its ends are where what was found is 1.96 standard deviations from what a share would give."""
    for trials in (1, 4, 20, 1000):
        for found in {0, 1, trials // 3, trials - 1, trials}:
            for end in wilson(found, trials):
                assert (found / trials - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / trials, abs=1e-12)
    cells = [Cell(200, 0.0, [True] * 3, [-0.5] * 3), Cell(200, 1.0, [False, True, True], [-1.0, -2.0, -3.0])]
    assert [" ".join(line.split()) for line in recall_table(cells).splitlines()] == [
        "depth 200", "0% 3 of 3 (-0.50)", "100% 2 of 3 (-2.00)", "95 % 44% to 97%",
    ]  # fmt: skip


def test_the_command_measures_loss_and_recall_and_draws_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    asked = ["evaluate", "--recall", "--data", str(tmp_path / "text.txt"), "--seq-len", "300", "--trials", "2"]
    shown = []
    for more in (["--plot", str(tmp_path / "there" / "recall.png")], ["--depths", "2"], ["--seed", "1"]):
        assert main([*asked, "--depths", "2", *more]) == 0
        shown.append(capsys.readouterr().out)
    assert "256 to 300" in shown[0]
    assert "0 of 2" in shown[0]
    assert shown[0] == shown[1] != shown[2]
    assert (tmp_path / "there" / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_questions_of_two_hops_are_answered_by_two_facts() -> None:
    input_ids, labels, place = texts(5, 6, torch.Generator().manual_seed(0))
    for ids, answers, places in zip(input_ids.tolist(), labels.tolist(), place.tolist(), strict=True):
        facts = {a: b - VALUES for a, b in zip(ids[:12:2], ids[1:12:2], strict=True)}
        assert len(facts) == 6
        assert answers[:13] == [IGNORE] * 13
        for i, at in zip(range(12, 24, 2), places, strict=True):
            once = facts[ids[i]]
            assert [ids[2 * at], ids[i + 1]] == [ids[i], HOP]
            assert answers[i + 1 : i + 3] == [VALUES + once, VALUES + facts[once]]
