"""The bench: every method runs in its process, and what is written can be drawn again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minichunk.chunks import cut
from minichunk.command.main import main
from minichunk.costs import bench as bench_module
from minichunk.costs.bench import PRESETS, bench
from minichunk.costs.measure import METHODS, Case, measure
from minichunk.costs.operations import operations, peak_operations
from minichunk.costs.precision import attention_errors
from minichunk.costs.results import Result, plot, ratios, read_results, table
from minichunk.models.lora import add_lora
from minichunk.models.shapes import random_model


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about its checkpointing
def test_all_methods_compute_the_same_loss(model_directory: Path) -> None:
    losses = {}
    for method in METHODS:
        if method == "transformers":
            pytest.importorskip("transformers")
        if method == "seco-parts":  # only parts of a step: no loss
            continue
        budget = 4 if "spaco" in method else None
        sample = measure(Case(method, 32, 8, budget, model=str(model_directory)))
        assert sample["seconds"] > 0
        assert sample["peak_bytes"] > 0
        losses[method] = sample["loss"]
    # With every chunk kept SpaCO is SeCO; all have the same weights and tokens.
    assert all(loss == pytest.approx(losses["full"], rel=1e-5) for loss in losses.values()), losses


def test_parts_of_a_step_are_its_fill_and_chunks_at_four_positions(model_directory: Path) -> None:
    case = Case("seco-parts", 64, 8, model=str(model_directory), offload=True, rank=2, recompute=True, fill_size=16)
    sample = measure(case)
    assert [stop for stop, _ in sample["parts"]] == [0, 64, 48, 32, 16]
    fill, _, three_quarters, _, quarter = (seconds for _, seconds in sample["parts"])
    assert sample["seconds"] == pytest.approx(fill + 8 * (quarter + three_quarters) / 2)


def test_operations_by_hand(model_directory: Path) -> None:
    """A model of which every product can be counted: V 300, E 8, inner 12, 2 layers, 4/2 heads of 4."""
    model = random_model(str(model_directory), torch.float32)
    linear = 2 * (8 * 16 + 2 * 8 * 8 + 16 * 8 + 3 * 8 * 12)  # weights of the layers
    found = operations(model, cut(10, 10), cut(10, 10), recompute=False)
    assert found["linear"] == 10 * 2 * linear + 10 * (2 + 4) * linear + 10 * 6 * 300 * 8
    pairs = 10 * 11 / 2
    assert found["attention"] == pairs * 4 * 4 * 4 * 2 * (1 + 1 + 2.5)
    add_lora(model, 2)
    adapter = 2 * 2 * ((8 + 16) + (8 + 8))
    frozen = operations(model, [], cut(10, 10), recompute=True)
    assert frozen["attention"] == pairs * 4 * 4 * 4 * 2 * (1 + 2.5)  # its output is kept
    assert frozen["linear"] == 10 * (6 * linear + 8 * adapter + 4 * 300 * 8)
    model.config = replace(model.config, sliding_window=4, layer_types=("full_attention", "sliding_attention"))
    windowed = operations(model, [], cut(10, 3), recompute=True)["attention"]
    assert windowed == (pairs + 4 * 5 / 2 + 6 * 4) * 4 * 4 * 4 * (1 + 2.5)
    assert peak_operations("NVIDIA H200") == 989e12
    assert peak_operations("an abacus") is None


def test_attention_is_as_exact_over_many_blocks() -> None:
    (_, one, few), (_, many, more) = attention_errors((64, 8192))
    assert (one, many) == (1, 4)
    assert all(error < 0.005 for error in (*few, *more))


def test_bench_writes_results_that_can_be_read_and_drawn(model_directory: Path, tmp_path: Path) -> None:
    cases = [Case("full", 16, 8, model=str(model_directory)), Case("seco", 16, 8, model=str(model_directory))]
    path = tmp_path / "results.json"
    bench(cases, 1, path, quiet=True)
    written = json.loads(path.read_text())
    assert {"command", "machine", "results"} <= written.keys()
    assert written["machine"]["torch"]
    results = read_results(path)
    assert [r.case for r in results] == cases
    assert all(r.median("seconds") for r in results)
    assert plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_the_table_shows_medians_ratios_and_failures() -> None:
    results = [
        Result(Case("full", 1024, 512), [{"seconds": 2.0, "peak_bytes": 2**30}]),
        Result(Case("seco", 1024, 512), [{"seconds": s, "peak_bytes": 2**29} for s in (3.0, 1.0, 2.0)]),
        Result(Case("spaco", 1024, 512, budget=1), [{"out_of_memory": True}]),
        Result(Case("forward", 1024, 512), [{"error": "x"}]),
    ]
    text = table(results)
    assert "| 1,024 | 512 | seco | 2.00 (1.00 to 3.00) | 1.00 | 512 MiB |" in text
    assert "| 1,024 | 512 | spaco 1 of 2 | out of memory |  | out of memory |" in text
    assert "| 1,024 | 512 | forward | failed |  | failed |" in text


def test_ratios_compare_the_same_round_and_growth_is_in_units_of_the_cache() -> None:
    def samples(*seconds: float, peak: int = 0, cache: int = 0) -> list[dict[str, float]]:
        return [{"seconds": s, "peak_bytes": peak, "cache_bytes": cache} for s in seconds]

    results = [
        Result(Case("seco", 16384, 512), samples(6.0, 14.0, peak=900, cache=300)),
        Result(Case("concatenating-seco", 16384, 512), samples(10.0, 20.0)),
        Result(Case("seco", 8192, 512), samples(1.0, peak=500, cache=100)),
        Result(Case("spaco", 16384, 512, budget=4), [{"out_of_memory": True}]),
    ]
    assert ratios(results).splitlines()[2:] == [
        "| time, seco / concatenating-seco, 16,384 tokens | 0.65 (0.60 to 0.70) |",
        "| growth of the peak / growth of the cache, seco, 8,192 to 16,384 tokens | 2.00 |",
    ]
    assert ratios(results[1:2]) == ""


def test_a_failed_measurement_is_a_sample(tmp_path: Path) -> None:
    (result,) = bench([Case("seco", 16, 8, model="nowhere")], 1, tmp_path / "r.json", quiet=True)
    assert "nowhere" in result.samples[0]["error"]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_measurable(preset: str) -> None:
    cases = PRESETS[preset][0]()
    assert len(set(cases)) == len(cases)
    for case in cases:
        assert case.method in METHODS
        assert (case.budget is not None) == ("spaco" in case.method)
        assert case.tokens % case.chunk_size == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--repeats", "0"], "--repeats is 0"),
        (["--preset", "cpu", "--device", "cuda"], "--preset cpu does not run on --device cuda"),
        (["--redraw", "nowhere.json"], "nowhere.json is missing"),
    ],
)
def test_mistakes(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_redraw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [Result(Case("full", 1024, 512), [{"seconds": 2.0, "peak_bytes": 2**30}])]
    bench_module._write(results, tmp_path / "r.json")
    assert main(["bench", "--redraw", str(tmp_path / "r.json")]) == 0
    assert "| 1,024 |  | full | 2.00 | 1.00 | 1.00 GiB |" in capsys.readouterr().out
    assert (tmp_path / "r.png").is_file()
