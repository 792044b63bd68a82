"""Reading, cutting and batching documents."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

import minichunk as mc
from minichunk.files.documents import (
    SHIPPED_MODEL,
    Document,
    check_vocabulary,
    collate,
    cut_documents,
    load_tokenizer,
    pack_documents,
    read_documents,
    step_documents,
)
from minichunk.training.load import make_gradient
from minichunk.training.options import TrainOptions

from .rounding import exactly, outcome
from .strategies import build, examples, tiny
from .test_chat import KINDS

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(SHIPPED_MODEL)


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def test_what_is_a_row_is_told_by_content(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Text, JSON lines, an array, one object over several lines: whatever the file is called."""
    rows = [{"text": TEXT}, {"prompt": TEXT, "completion": " must be\u2028in want", "id": 7, "messages": None}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    written = {"lines": lines, "array": json.dumps(rows, indent=1)}
    for suffix in (".txt", ".json", ".jsonl", ""):
        for name, content in written.items():
            path = tmp_path / f"{name}{suffix}"
            path.write_text(content, encoding="utf-8-sig")
            text, pair = read_documents([path], tokenizer, eos_token_id=0)
            assert text.input_ids.tolist() == text.labels.tolist() == [*tokenizer.encode(TEXT).ids, 0]  # rows end
            learnt = pair.input_ids[pair.labels != -100].tolist()
            assert learnt[-1] == 0
            assert tokenizer.decode(learnt[:-1]) == " must be\u2028in want"
            assert (pair.labels[: len(text) - 1] == -100).all()
            assert text.name.endswith(f"{path.name}, {'line' if name == 'lines' else 'item'} 1")
        (tmp_path / f"one{suffix}").write_text(json.dumps(rows[0], indent=1))
        (one,) = read_documents([tmp_path / f"one{suffix}"], tokenizer, eos_token_id=0)
        assert one.labels.tolist() == text.labels.tolist()
    for content in (TEXT, f"[Illustration]\n{TEXT}", f"{{{TEXT}", f"[1, 2]\n{TEXT}"):
        (tmp_path / "a.txt").write_text(content)
        (plain,) = read_documents([tmp_path / "a.txt"], tokenizer, eos_token_id=0)
        assert plain.labels.tolist() == tokenizer.encode(content).ids  # a file of text does not end


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_is_encoded_as_the_text_that_it_is(kind: str, tmp_path: Path) -> None:
    """No blank before the completion, no end token before it, and one after it, the tokenizer's own or ours."""
    tokenizer = KINDS[kind]
    end = tokenizer.token_to_id("</s>")
    for prompt, completion in (("f(x)=", "x"), ("a truth", " universally"), ("", "x y"), ("Caf", "\u00e9 \u2603")):
        given = ("<s>" + prompt, completion + "</s>") if prompt == "f(x)=" else (prompt, completion)  # has its ends
        path = write(tmp_path / "p.jsonl", {"prompt": given[0], "completion": given[1]})
        (document,) = read_documents([path], tokenizer, end)
        whole = tokenizer.encode("".join(given)).ids
        whole = whole[int(whole[:2] == [1, 1]) : len(whole) - int(whole[-2:] == [end, end])]
        assert document.input_ids.tolist() == (whole if whole[-1] == end else [*whole, end])
        learnt = tokenizer.decode(document.input_ids[document.labels != -100][:-1].tolist(), skip_special_tokens=False)
        assert learnt.removeprefix("<s>").strip() == completion.strip()


def test_a_blank_whose_offsets_a_tokenizer_trims_is_where_it_was(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(KINDS["bytes"].to_str())
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    path = write(tmp_path / "p.jsonl", {"prompt": "Q: ", "completion": "\nyes it "})
    (document,) = read_documents([path], tokenizer)
    assert tokenizer.decode(document.input_ids[document.labels != -100].tolist()) == "\nyes it "


def test_long_documents_are_cut_and_the_line_says_what_was_kept(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    documents = read_documents([tmp_path / "a.txt"], tokenizer)
    total = len(documents[0])
    pieces, line = cut_documents(documents, total - 2)
    assert [len(piece) for piece in pieces] == [total - 2, 2]
    assert "all tokens kept" in line
    pieces, line = cut_documents(documents, total - 1)
    assert [len(piece) for piece in pieces] == [total - 1]
    assert "1 tokens without a target left out" in line
    assert pieces[0].name.endswith(f"a.txt, tokens 0 to {total - 1}")
    prompt = write(tmp_path / "p.jsonl", {"prompt": TEXT, "completion": ""})
    with pytest.raises(mc.InputError, match="nothing to predict"):
        cut_documents(read_documents([prompt], tokenizer), 8)


def test_padding(tokenizer: Tokenizer, tmp_path: Path) -> None:
    long, short = read_documents([write(tmp_path / "b.jsonl", {"text": TEXT}, {"text": TEXT[:20]})], tokenizer)
    input_ids, labels = collate([long, short])
    assert input_ids.shape == labels.shape == (2, len(long))
    assert labels[1].tolist() == short.labels.tolist() + [-100] * (len(long) - len(short))


def test_every_epoch_has_every_document_once_in_another_order() -> None:
    documents = [object() for _ in range(10)]
    seen = [step_documents(documents, 4, step, seed=3) for step in range(5)]  # type: ignore[arg-type]
    flat = [document for batch in seen for document in batch]
    assert set(flat[:10]) == set(flat[10:]) == set(documents)
    assert flat[:10] != flat[10:]
    assert step_documents(documents, 25, 0, seed=3)[:20] == flat  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b" \n", "a.txt is empty"),
        ("a.txt", None, "No such file"),
        ("", None, "Is a directory"),
        ("a.txt", b"x", "a document of 1 tokens"),
        ("a.txt", b"caf\xe9", "not UTF-8 text .byte 3"),
        ("a.jsonl", b'{"text": "abc def"}\n{"txt": 1}\n', "line 2: must be an object"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: 'text' is 5, but must be an object"),
        ("a.jsonl", b'["text"]\n', "item 1: must be an object"),
        ("a.jsonl", b'{"text": "a b", "prompt": "c", "completion": "d"}\n', "has 'text' and 'prompt' and 'completion'"),
        ("a.jsonl", b'{"text": "a b c", "weight": 0}\n', "line 1: the field 'weight' would change what is learnt"),
        ("a.jsonl", b'{"instruction": "a", "output": "b"}\n', "line 1: must be an object"),
        ("a.jsonl", b'{"text": 1' + b"0" * 5000 + b"}\n", "line 1: not JSON"),
        ("a.txt", b"PAR1....", "a.txt is a Parquet or"),
        ("a.json", b"\x1f\x8b....", "a.json is a Parquet or a compressed"),
        ("a.jsonl", b'{"text": ""}\n', "line 1: a document of 0 tokens"),
        ("a.jsonl", b'{"prompt": "a"}\n', "line 1: must be an object"),
        ("a.JSONL", b"{text}\n", "line 1: not JSON"),
        ("a.jsonl", b'{"text": "abc \\ud83d def"}\n', "line 1: the text has half of a surrogate pair"),
        ("a.jsonl", b"[" * 200_000 + b"\n", "line 1: not JSON"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, tokenizer: Tokenizer, name: str, content: Any, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(mc.InputError, match=words):
        read_documents([tmp_path / name], tokenizer)


def test_a_tokenizer_of_another_model_is_noticed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = read_documents([write(tmp_path / "a.txt", TEXT)], tokenizer)
    highest = int(documents[0].input_ids.max())
    with pytest.raises(mc.InputError, match=f"a.txt has the token id {highest}"):
        check_vocabulary(documents, highest)
    check_vocabulary(documents, highest + 1)


def test_a_tokenizers_truncation_and_padding_are_off(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As left in tokenizer.json by a training that cut and padded its texts."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.enable_truncation(16)
    copy.enable_padding(pad_to_multiple_of=64)
    copy.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text(TEXT)
    (document,) = read_documents([tmp_path / "a.txt"], load_tokenizer(tmp_path))
    assert document.input_ids.tolist() == tokenizer.encode(TEXT).ids


def test_bad_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(mc.InputError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(mc.InputError, match=r"tokenizer\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    KINDS["bytes"].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|fin|>"}}')
    with pytest.raises(mc.InputError, match=r"eos_token is '<\|fin\|>', which is no token of tokenizer\.json"):
        load_tokenizer(tmp_path)


@examples(25)
@given(
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=12), room=st.integers(12, 30), apart=st.booleans(),
    method=st.sampled_from(["seco", "full"]),
)  # fmt: skip
def test_packed_rows_have_each_document_once_and_train_as_it_does(
    lengths: list[int], room: int, apart: bool, method: str
) -> None:
    model, generator = build(tiny(), 3), torch.Generator().manual_seed(5)
    texts = [torch.randint(23, (length,), generator=generator) for length in lengths]
    texts = [Document(str(n), ids, ids.clone()) for n, ids in enumerate(texts)]
    packed, line = pack_documents(texts, room, apart)
    assert line.startswith(f"packed into {len(packed)} rows of at most {room} tokens")
    assert sum(map(len, packed)) == sum(lengths) and max(map(len, packed)) <= room
    assert max(map(len, packed)) > room / 2 or len(packed) == 1  # two half-empty rows would be one
    if not apart:
        assert all(row.starts == () and (row.labels == row.input_ids).all() for row in packed)
        return
    count = sum(text.num_targets() for text in texts)
    assert sum(row.num_targets() for row in packed) == count
    gradient = make_gradient(TrainOptions(method=method, chunk_size=5, pack="apart"))
    exact = exactly(model, lambda: sum(mc.full(model, *collate([text]), num_targets=count) for text in texts))
    exact.check(outcome(model, lambda: sum(gradient(model, [row], count, generator) for row in packed)))
