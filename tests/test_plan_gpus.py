"""The forecast for several GPUs is the memory of the rank of a real pipeline that needs most, counted the same way."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minichunk.command.main import main
from minichunk.costs.forecast import bytes_of_share, forecast
from minichunk.costs.setting import Setting, Share
from minichunk.models.shapes import layer_memory_bytes, random_model
from minichunk.pipeline.split_layers import split_layers

from . import ranks as tasks
from .ranks import Ranks
from .test_plan import llama, of, state_space, write


def setting_of(directory: Path, config: Any, **options: Any) -> Setting:
    return of(write(directory, config), **{"size": 256, "budget": 4, **options})


HYBRID = state_space("state", "full_attention", "state", "state", "state")


@pytest.mark.parametrize(
    ("config", "counts", "options"),
    [
        (llama(7), (1, 5, 1), {}),
        (llama(3, tie_word_embeddings=True), (2, 1), {"method": "spaco", "rank": 0, "recompute": False}),
        (llama(3), (2, 1), {"fill_size": 1024}),
        (HYBRID, (2, 2, 1), {"rank": 0}),
    ],
)
def test_the_forecast_of_each_rank_is_its_peak(
    ranks: Ranks, tmp_path: Path, config: Any, counts: tuple[int, ...], options: dict[str, Any]
) -> None:
    """But for 12 bytes: the loss, and the number of targets, which is a number in the forecast."""
    setting, tokens = setting_of(tmp_path, config, **options), 5376  # whole passes of the large fill
    counted = ranks.ask(len(counts), tasks.counted, setting, counts, tokens)
    for rank, (peak, host) in enumerate(counted):
        share = Share(counts, rank)
        assert setting.even_from(share) < tokens
        found = bytes_of_share(setting, tokens, share)
        assert host == found.host
        assert 0 <= peak - found.peak <= 16, f"{peak} on {share}, forecast {found}"


@pytest.mark.parametrize(("config", "tokens"), [(llama(6), 4096), (llama(8), 262_144), (HYBRID, 4096)])
def test_no_rank_needs_more_than_the_forecast(tmp_path: Path, config: Any, tokens: int) -> None:
    setting = setting_of(tmp_path, config, rank=0)
    found = forecast(setting, 4)
    peaks = [bytes_of_share(setting, tokens, Share(found.counts(tokens), rank)).peak for rank in range(4)]
    share = found.largest_share(tokens)
    assert share is not None
    assert found.at(tokens).peak == max(peaks) == peaks[share.rank]


def test_the_longest_that_fits_all_ranks(tmp_path: Path) -> None:
    found = forecast(setting_of(tmp_path, llama(3)), 3)
    longest = found.longest(32 * 2**20)
    assert longest > 2 * forecast(found.setting).longest(32 * 2**20)
    assert found.at(longest).peak <= 32 * 2**20 < found.at(longest + 256).peak
    assert found.longest(2**10) == 0


def test_a_training_splits_the_layers_as_the_forecast_does(tmp_path: Path) -> None:
    """From a model in memory, and the chunks that it keeps."""
    config = llama(9, vocab_size=4096)
    found = forecast(setting_of(tmp_path, config, method="spaco", size=64, budget=3), 3)
    model, seen = random_model(config, torch.float32, 4), set()
    for tokens in (512, 2048, 65536):
        _, kept = found.setting.chunks(tokens)
        remembered = layer_memory_bytes(model.config, torch.float32, kept, found.setting.options())
        counts = tuple(split_layers(model, 3, [sum(layer) for layer in remembered]))
        assert counts == found.counts(tokens)
        seen.add(counts)
    assert len(seen) > 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setting = setting_of(tmp_path, llama(3))
    common = ["plan", "--model", setting.model, "--memory", "64MiB", "--reserve", "1MiB", "--gpus", "3"]
    assert main([*common, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gpus"], found["layers_per_rank"]) == (3, [1, 1, 1])
    assert sum(found["breakdown"].values()) == found["peak_bytes"] <= 63 * 2**20
    assert main(common) == 0
    words = capsys.readouterr().out
    rank = found["largest_rank"]
    assert f"of 3 GPUs which needs most (rank {rank}, layers {rank} to {rank})" in words
    assert "layers of each rank: 1, 1, 1" in words
