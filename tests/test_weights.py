"""Checkpoint directories: every kind that is read, and every way in which one can be wrong."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import minichunk as mc
from minichunk.chunks import Chunk, cut
from minichunk.files import atomic
from minichunk.files import checkpoint as checkpoint_module
from minichunk.files.atomic import open_tensors
from minichunk.training.load import check_host_room, load_to_train
from minichunk.training.options import TrainOptions

from .strategies import build, tiny


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    build(tiny(), seed=0).save_pretrained(tmp_path)
    return tmp_path


def shard(directory: Path) -> dict[str, str]:
    """Turn a checkpoint into two shards with an index; returns the index's weight_map."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: f"model-{1 + (i % 2)}-of-2.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, directory / file)
    (directory / "model.safetensors").unlink()
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def change_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(directory / "model.safetensors")
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, directory / "model.safetensors")


NORM, FILE = "model.norm.weight", "model.safetensors"


def index_with(file: str) -> Callable[[Path], None]:
    """Of two shards, one tensor put into this file."""
    return lambda directory: write_index(directory, {**shard(directory), NORM: file})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / FILE).write_bytes((d / FILE).read_bytes()[:-7]), "model.safetensors is not a whole safe"),
        (lambda d: (d / FILE).write_bytes(b"\xff" * 64), "model.safetensors is not a whole safetensors file"),
        (lambda d: (d / FILE).rename(d / "pytorch_model.bin"), "pytorch_model.bin is pickled.*save_pretrained"),
        (index_with("/model-1-of-2.safetensors"), "index.json puts model.norm.weight into.*a file name alone"),
        (index_with("../model-1-of-2.safetensors"), "index.json puts model.norm.weight into.*a file name alone"),
        (index_with("model-3-of-2.safetensors"), "model-3-of-2.safetensors is not a whole"),
        (index_with("model-2-of-2.safetensors"), "model-.-of-2.safetensors is not a whole .*model.norm.weight"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda d: (d / "config.json").unlink(), "config.json cannot be read"),
        (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda d: change_tensors(d, **{NORM: None}), "the tensor model.norm.weight is missing"),
        (lambda d: change_tensors(d, **{NORM: torch.ones(9)}), r"norm.weight has the shape \[9\].*makes it \[8\]"),
        (lambda d: change_tensors(d, extra=torch.ones(9)), "has the tensor extra"),
        (lambda d: change_tensors(d, **{NORM: torch.ones(8, dtype=torch.int8)}), "must be floating point"),
        (lambda d: (shard(d), write_index(d, [])), "lacks the object weight_map"),
    ],
)
def test_a_damaged_checkpoint_is_named(checkpoint: Path, damage: object, words: str) -> None:
    damage(checkpoint)  # type: ignore[operator]
    with pytest.raises(mc.InputError, match=words) as error:
        mc.Llama.from_pretrained(checkpoint)
    assert str(checkpoint) in str(error.value)
    assert "\n" not in str(error.value)


def test_saving_over_shards_leaves_the_new_weights(checkpoint: Path) -> None:
    shard(checkpoint)
    model = mc.Llama.from_pretrained(checkpoint)
    torch.nn.init.constant_(model.model.norm.weight, 7.0)
    model.save_pretrained(checkpoint)
    assert not (checkpoint / "model.safetensors.index.json").exists()
    assert (mc.Llama.from_pretrained(checkpoint).model.norm.weight == 7).all()


def test_mixed_dtypes_become_one(checkpoint: Path) -> None:
    change_tensors(checkpoint, **{NORM: torch.ones(8, dtype=torch.float32)})
    model = mc.Llama.from_pretrained(checkpoint)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    ids = torch.arange(9)[None]
    mc.seco(model, ids, ids, 4)
    half = mc.Llama.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_model_that_no_config_describes_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(mc.InputError, match=r"no config\.json describes this model"):
        build(tiny(qk_norm=True), seed=0).save_pretrained(tmp_path)
    with pytest.raises(mc.InputError, match=r"no config\.json describes this model"):  # stock models would see it all
        build(tiny(1, sliding_window=5, layer_types=("sliding_attention",)), seed=0).save_pretrained(tmp_path)
    with pytest.raises(mc.InputError, match="nowhere is not a directory"):
        mc.Llama.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("tied", [False, True])
def test_loading_holds_one_tensor_at_a_time_and_a_rank_reads_its_own_alone(
    tied: bool, model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read in the file's dtype is gone when the next tensor is read."""
    alive: list[weakref.ref[torch.Tensor]] = []
    names, most = list[str](), 0

    @contextmanager
    def opened(*arguments: Any) -> Iterator[Mock]:
        def get_tensor(name: str) -> torch.Tensor:
            nonlocal most
            most = max(most, sum(ref() is not None for ref in alive))
            tensor = file.get_tensor(name)
            alive.append(weakref.ref(tensor))
            names.append(name)
            return tensor

        with open_tensors(*arguments) as file:
            yield Mock(keys=file.keys, get_slice=file.get_slice, get_tensor=get_tensor)

    build(tiny(4, tie_word_embeddings=tied), 0).save_pretrained(tmp_path)
    monkeypatch.setattr(checkpoint_module, "open_tensors", opened)
    mc.load_model(tmp_path, dtype=torch.float32)
    assert len(names) == len(set(names)) == len(load_file(tmp_path / FILE)) > 10
    embedding = "model.embed_tokens.weight"
    ends = [{embedding}, set(), {NORM, embedding if tied else "lm_head.weight"}]
    shutil.copy(model_directory / "tokenizer.json", tmp_path)
    options, layers = TrainOptions(model=str(tmp_path), device="cpu").resolved(), list[str]()
    for rank in range(3):
        names.clear()
        load_to_train(options, Mock(ranks=3, rank=rank, is_first=rank == 0, is_last=rank == 2))
        assert {name for name in names if ".layers." not in name} == ends[rank]
        layers += {name.split(".")[2] for name in names if ".layers." in name}
    assert sorted(layers) == ["0", "1", "2", "3"]
    assert most <= 1  # the one that the loop's variable still names


def test_a_model_that_does_not_fit_is_refused_before_anything_is_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(p.numel() for p in build(tiny(), seed=0).parameters())
    monkeypatch.setattr(checkpoint_module, "open_tensors", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(atomic, "free_memory", lambda _: 4 * size - 1)
    with pytest.raises(mc.InputError, match=r"needs .* on cpu, but only .* free there: take --dtype bfloat16, "):
        mc.Llama.from_pretrained(checkpoint, dtype=torch.float32)
    monkeypatch.setattr(atomic, "free_memory", lambda _: 1)
    with pytest.raises(mc.InputError, match="free there: take --dtype bfloat16, --load-in-4bit, a smaller model"):
        mc.Llama.from_pretrained(checkpoint, dtype=torch.bfloat16)


def test_the_host_memory_of_offload_is_checked_first(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mc.Llama.from_pretrained(checkpoint, dtype=torch.float32)
    needed = (model.config.num_hidden_layers - 1) * 3 * 10 * model.config.hidden_size * 4  # not the last one's output
    monkeypatch.setattr(atomic, "free_memory", lambda _: needed)
    told = TrainOptions(seq_len=10, chunk_size=6, batch_size=3, offload=True)
    check_host_room(model, told)
    monkeypatch.setattr(atomic, "free_memory", lambda _: needed - 1)
    with pytest.raises(mc.InputError, match=r"--offload of 3 times 10 tokens .* a larger --layers-at-once"):
        check_host_room(model, told)
    check_host_room(model, replace(told, layers_at_once="99"))  # one block
    opened = TrainOptions(model=str(checkpoint), seq_len=18, chunk_size=4, method="spaco", budget=2, sampler="fixed")
    assert opened.chunks(18)[1] == [Chunk(12, 16), Chunk(16, 18)]
    assert TrainOptions(chunk_size=4).chunks(18)[1] == cut(18, 4)
