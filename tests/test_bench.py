"""The bench: all methods do the same step, each row in a process of its own."""

import json
from pathlib import Path

import pytest

from minichunk.command.main import main
from minichunk.costs.bench import METHODS, BenchOptions, Row, bench, describe_machine, measure, table


@pytest.mark.parametrize("method", METHODS)
def test_all_methods_compute_the_same_loss(model_directory: Path, method: str) -> None:
    """With every chunk kept SpaCO is SeCO; all have the same weights and tokens."""
    options = BenchOptions(model=str(model_directory), chunk_size=8, budget=4)
    seconds, peak, loss = measure(options, method, 32)
    assert seconds > 0 and peak > 2**20
    assert loss == pytest.approx(measure(options, "full", 32)[2], rel=1e-5)


def test_the_command(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A process for each row; seconds, bytes and machine as JSON; a plot."""
    plot = tmp_path / "plot.png"
    model = ["--model", str(model_directory), "--chunk-size", "8", "--repeats", "1", "--json"]
    assert main(["bench", *model, "--methods", "seco", "spaco", "--seq-len", "16", "--plot", str(plot)]) == 0
    written = json.loads(capsys.readouterr().out)
    assert [(row["method"], row["seq_len"]) for row in written["results"]] == [("seco", 16), ("spaco", 16)]
    assert all(len(row["seconds"]) == 1 and row["peak_bytes"][0] > 2**20 for row in written["results"])
    assert written["machine"] == describe_machine()
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_the_table_has_medians_ratios_and_failures() -> None:
    rows = [
        Row("full", 1024, [2.0], [2**30]),
        Row("seco", 1024, [3.0, 1.0, 1.5], [2**29]),
        Row("full", 2048, error="out of memory"),
        Row("seco", 2048, [4.0], [2**29]),
    ]
    assert table(rows).splitlines()[2:] == [
        "| 1,024 | full | 2.00 | 1.00 | 1.00 GiB | 1.00 |",
        "| 1,024 | seco | 1.50 (1.00 to 3.00) | 0.75 | 512 MiB | 0.50 |",
        "| 2,048 | full | out of memory |  |  |  |",
        "| 2,048 | seco | 4.00 |  | 512 MiB |  |",
    ]


def test_a_row_that_fails_says_why(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its process raises, here of chunks without tokens; it is not tried again."""
    monkeypatch.setattr("minichunk.costs.bench.check_options", lambda options: None)
    options = BenchOptions(model=str(model_directory), chunk_size=0, methods=("seco",), seq_len=(16,))
    (row,) = bench(options)
    assert row.error is not None and "InputError: input_ids has 0 token" in row.error
    assert not row.seconds
