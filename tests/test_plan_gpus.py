"""The forecast for several GPUs is the memory of the fullest rank of a real pipeline, counted the same way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import minichunk as mc
from minichunk.chunks import cut
from minichunk.command.main import main
from minichunk.costs.forecast import forecast, most
from minichunk.costs.fullest import Fullest, describe_rank, forecast_on
from minichunk.costs.plan import gpus_table
from minichunk.costs.setting import Setting, Share
from minichunk.models.shapes import layer_memory_bytes, random_model
from minichunk.pipeline.split_layers import layer_costs, split_layers

from . import ranks as tasks
from .ranks import Ranks
from .strategies import tiny

GIB = 2**30


def write(directory: Path, config: Any) -> str:
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    return str(directory)


def llama(layers: int, **changes: Any) -> mc.LlamaConfig:
    fields = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return tiny(layers, **(fields | changes))


def hybrid() -> mc.StateSpaceConfig:
    attention = {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    kinds = ("state", "full_attention", "state", "state", "state")
    return mc.StateSpaceConfig(512, 64, 8, len(kinds), kinds, **attention)  # type: ignore[arg-type]


LORA = {"rank": 4, "dtype": torch.float32}
ALL = {"rank": 0, "dtype": torch.float32}


@pytest.mark.parametrize(
    ("config", "counts", "options"),
    [
        (llama(7), (1, 5, 1), {"method": "seco", **LORA}),
        (llama(3), (2, 1), {"method": "spaco", **ALL, "recompute": False}),
        (llama(3, tie_word_embeddings=True), (1, 1, 1), {"method": "spaco", **ALL, "sampler": "fixed"}),
        (llama(3), (2, 1), {"method": "seco", **LORA, "chunk_size": 256, "fill_size": 1024}),
        (llama(3), (2, 1), {"method": "seco", **LORA, "offload": True, "recompute": True}),
        (hybrid(), (2, 2, 1), {"method": "seco", **ALL}),
    ],
)
def test_the_forecast_of_each_rank_is_its_peak(
    ranks: Ranks, tmp_path: Path, config: Any, counts: tuple[int, ...], options: dict[str, Any]
) -> None:
    """But for 12 bytes: the loss, and the number of targets, which is a number in the forecast."""
    setting = Setting(write(tmp_path, config), **{"chunk_size": 512, "budget": 4, "device": "cpu", **options})
    shares = [replace(setting, share=Share(counts, rank)) for rank in range(len(counts))]
    counted = ranks.ask(len(counts), tasks.counted, shares[0], 6656)
    for share, peak in zip(shares, counted, strict=True):
        line = forecast(share)
        assert line.base < 6656
        found = line.at(6656)
        assert 0 <= peak - found.peak - found.host <= 16, f"{peak} on {share.share}, forecast {found}"


@pytest.mark.parametrize(("config", "tokens"), [(llama(9), 8192), (llama(8), 262_144), (hybrid(), 8192)])
def test_the_fullest_is_the_fullest_of_all_ranks(tmp_path: Path, config: Any, tokens: int) -> None:
    setting = Setting(write(tmp_path, config), "seco", 512, 3, 0, dtype=torch.float32, device="cpu")
    found = Fullest(setting, 4)
    counts = found.counts(tokens)
    peaks = [forecast(replace(setting, share=Share(counts, rank))).at(tokens).peak for rank in range(4)]
    assert found.at(tokens).peak == max(peaks) == peaks[found.fullest(tokens)]


def test_the_longest_that_fits_all_ranks(tmp_path: Path) -> None:
    setting = Setting(write(tmp_path, llama(3)), "seco", 512, 3, 4, dtype=torch.float32, device="cpu")
    one, three = (forecast_on(setting, gpus).longest(32 * 2**20, 512) for gpus in (1, 3))
    assert 2 * one < three
    found = Fullest(setting, 3)
    assert found.at(three).peak <= 32 * 2**20 < found.at(three + 512).peak
    assert found.longest(2**10, 512) == 0


def test_host_memory_is_that_of_all_ranks(tmp_path: Path) -> None:
    """Keys and values of 4 layers, 2 heads of 16, in bfloat16, their gradients in float32; not of the last chunk."""
    found = Fullest(Setting(write(tmp_path, llama(4)), chunk_size=512, device="cpu", offload=True), 2)
    token = 4 * 2 * 2 * 16 * (2 + 4)
    assert found.at(10_240).host == token * (10_240 - 512)
    assert found.growth(10_240) == (16, token)
    assert found.longest(2**30, 512, host=token * 16_000) == 16_384  # the last chunk remembers nothing


@pytest.mark.parametrize("near", [0, 1, 37, 1000, 1001, 1500, 10**6])
@pytest.mark.parametrize("answer", [0, 1, 38, 1000])
def test_the_most_that_fits_is_found_from_anywhere(near: int, answer: int) -> None:
    assert most(lambda n: n <= answer, near) == answer


def test_what_a_layer_costs() -> None:
    """Its weights, here in float32; for what learns, a gradient and two moments; what it remembers."""
    model = random_model(llama(3), torch.float32, rank=4)
    layers: Any = model.layers
    bare = sum(p.numel() for p in layers[0].parameters() if not p.requires_grad)
    learnt = sum(p.numel() for p in layers[0].parameters() if p.requires_grad)
    layer = 4 * bare + 4 * learnt + 12 * learnt
    assert layer_costs(model) == [layer + 512 * 64 * 4, layer, layer + 64 * 4 + 512 * 64 * 4]
    assert layer_costs(model, [1, 20, 300])[1] == layer + 20
    half = random_model(llama(3), torch.bfloat16, device="meta")
    assert layer_costs(half)[1] == bare * (2 + 4 + 8 + 4)  # also a float32 copy
    assert layer_costs(half.requires_grad_(False))[1] == bare * 2


def test_long_texts_are_dealt_otherwise(tmp_path: Path) -> None:
    """By weights the ends have fewer layers, for the embedding and the LM head; by what they remember, as many."""
    setting = Setting(cache_grad_dtype=torch.bfloat16)
    found = Fullest(setting, 4)
    assert found.counts(512) == (7, 9, 9, 7)
    assert found.counts(300_032) == (8, 8, 8, 8)
    assert Fullest(replace(setting, offload=True), 4).counts(300_032) == (7, 9, 9, 7)


def test_a_training_deals_as_the_forecast_does(tmp_path: Path) -> None:
    """From a model in memory, and the chunks that it keeps."""
    config = llama(9, vocab_size=4096)
    found = Fullest(Setting(write(tmp_path, config), "spaco", 64, 3, 4, dtype=torch.float32, device="cpu"), 3)
    model, dealt = random_model(config, torch.float32, 4), set()
    for tokens in (512, 2048, 65536):
        chunks = cut(tokens, 64)
        kept = chunks[-found.setting.kept(len(chunks)) :]
        held = layer_memory_bytes(model.config, torch.float32, kept, found.setting.options())
        counts = tuple(split_layers(model, 3, [sum(layer) for layer in held]))
        assert counts == found.counts(tokens)
        dealt.add(counts)
    assert len(dealt) > 1


def test_a_4bit_layer_costs_what_is_stored() -> None:
    pytest.importorskip("bitsandbytes")
    config = llama(3, hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64)
    whole, packed = (
        layer_costs(random_model(config, torch.bfloat16, device="meta", load_in_4bit=four).requires_grad_(False))
        for four in (False, True)
    )
    assert packed[1] / whole[1] == pytest.approx(0.28, abs=0.01)


def test_an_8b_llama_on_two_cards() -> None:
    """LoRA of rank 8 on q and v, bfloat16, chunks of 512, 24 GiB less 1 GiB of reserve on each."""
    setting = Setting(cache_grad_dtype=torch.bfloat16)
    assert Fullest(setting, 2).longest(23 * GIB, 512) >= 120_000


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write(tmp_path, llama(6))
    common = ["plan", "--model", directory, "--memory", "64MiB", "--reserve", "1MiB", "--chunk-size", "512"]
    assert main([*common, "--gpus", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gpus"], sum(found["layers_per_rank"])) == (3, 6)
    assert found["methods"].keys() == {"seco", "spaco"}
    assert sum(found["breakdown"].values()) == found["peak_bytes"] <= 63 * 2**20
    assert main([*common, "--gpus", "3"]) == 0
    words = capsys.readouterr().out
    assert f"on the fullest of 3 GPUs ({describe_rank(found['layers_per_rank'], found['fullest_rank'])})" in words
    assert "layers of each rank: 2, 2, 2" in words


def test_what_a_rank_has_in_words() -> None:
    assert describe_rank([8, 8, 8, 8], 0) == "rank 0: layers 0 to 7 and the embedding"
    assert describe_rank([2, 1, 1], 1) == "rank 1: layer 2"
    assert describe_rank([2, 1, 3], 2) == "rank 2: layers 3 to 5 and the LM head"


def test_the_table_of_gpus(tmp_path: Path) -> None:
    setting = Setting(write(tmp_path, llama(2)), chunk_size=512, budget=2)
    header, _, *rows = gpus_table(setting, GIB, 2).splitlines()
    assert header == "| GPUs | method | 12 GiB | 16 GiB | 24 GiB | 48 GiB | 80 GiB | 141 GiB |"
    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 1", "| 2", "| 2"]
    assert rows[2].split(" | ")[4] == f"{Fullest(setting, 2).longest(23 * GIB, 512) / 1000:,.0f}k"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "0"], "--gpus is 0, but must be at least 1"),
        (["--gpus", "4"], "has 3 layers, and each GPU needs one at least"),
        (["--gpus", "4", "--table"], "has 3 layers, and each GPU needs one at least"),
        (["--gpus", "2", "--method", "full"], "--method is 'full', but on several GPUs must be one of seco, spaco"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", write(tmp_path, llama(3)), *arguments]) == 2
    assert words in capsys.readouterr().err
