"""`minichunk train` over several processes writes, to the last bit, the files that one process writes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import minichunk as mc
from minichunk.pipeline.links import local_device, started

from . import train_ranks as tasks
from .ranks import Ranks
from .strategies import build, tiny, tiny_state
from .train_ranks import files


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, model_directory: Path) -> dict[str, Path]:
    """Checkpoints of four layers: a Llama, one whose embedding is also its head, and a hybrid with states."""
    common, paths = {"vocab_size": 300, "max_position_embeddings": 16}, {}
    for number, (name, config) in enumerate((
        ("llama", tiny(4, **common)),
        ("tied", tiny(4, tie_word_embeddings=True, **common)),
        ("hybrid", tiny_state("sasa", **common)),
    )):  # fmt: skip
        paths[name] = tmp_path_factory.mktemp(name)
        build(config, number).float().save_pretrained(paths[name])
        shutil.copy(model_directory / "tokenizer.json", paths[name])
    return paths


@pytest.fixture
def values(models: dict[str, Path], text: Path) -> dict[str, Any]:
    return {
        "model": str(models["llama"]), "data": [str(text)], "seq_len": 40, "chunk_size": 8, "steps": 3,
        "save_every": 2, "rank": 2, "eval_documents": 3, "device": "cpu",
    }  # fmt: skip


CLOSE = 1e-10  # a step of AdamW is a quotient of gradients: rounding stays rounding, with room for three steps of it


def run(ranks: Ranks, world: int, values: dict[str, Any], output: Path, pipeline: int | None = None) -> dict[str, Any]:
    told = values | {"output": str(output)} | ({"pipeline": pipeline or world} if world > 1 else {})
    answers = ranks.ask(world, tasks.train_here, world, told)
    assert not any(error for _, error in answers), answers
    assert not any(lines for lines, _ in answers[1:]), "one process speaks for all"
    return files(output)


OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {  # on how many ranks
    "spaco, dropout, accumulation, partial context": (3, {
        "method": "spaco", "budget": 2, "dropout": 0.2, "accumulate": 3, "batch_size": 2, "partial_context": "window",
        "window": 4, "sinks": 2, "full_layers": [1],
    }),
    "all parameters, bfloat16": (2, {
        "rank": 0, "dtype": "bfloat16", "recompute": True, "weight_decay": 0.1, "clip": 0.01,
    }),
    "tied": (4, {"model": "tied", "fill_size": 16, "cache_grad_dtype": "bfloat16"}),
    "an adapter on some ranks of a hybrid": (3, {"model": "hybrid", "targets": ["q_proj"], "dropout": 0.1}),
    "4 bits": (2, {"load_in_4bit": True, "dtype": "bfloat16"}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_several_ranks_write_what_one_process_writes(
    ranks: Ranks, models: dict[str, Path], values: dict[str, Any], tmp_path: Path, name: str
) -> None:
    world, options = OPTIONS[name]
    values |= options
    values["model"] = str(models.get(values["model"], values["model"]))
    expected = run(ranks, 1, values, tmp_path / "one")
    assert {"checkpoint.safetensors", "metrics.jsonl", "loss_by_position.json"} < set(expected)
    assert run(ranks, world, values, tmp_path / str(world)) == expected


def test_copies_take_the_batches_in_turn(ranks: Ranks, values: dict[str, Any], tmp_path: Path) -> None:
    """Three batches for two copies: one of them has nothing to do at the end of a step. The sum has another order."""
    values |= {"accumulate": 3, "dtype": "float64", "dropout": 0.2, "method": "spaco", "budget": 3, "clip": 0.1}
    expected = run(ranks, 1, values, tmp_path / "one")
    found = run(ranks, 4, values, tmp_path / "copies", pipeline=2)
    for got, one in zip(found["metrics.jsonl"], expected["metrics.jsonl"], strict=True):
        assert got == pytest.approx(one, rel=CLOSE)
    assert found["metrics.jsonl"][0]["loss"] == expected["metrics.jsonl"][0]["loss"]
    del values["accumulate"]  # by default as many batches as copies
    assert [line["tokens"] for line in run(ranks, 2, values, tmp_path / "2", 1)["metrics.jsonl"]] == [80, 80, 80]


def test_a_weight_on_two_ranks_counts_once(
    ranks: Ranks, models: dict[str, Path], values: dict[str, Any], tmp_path: Path
) -> None:
    """An embedding that is also the head, and learns: in the norm, in the files, and after a resume."""
    values |= {"model": str(models["tied"]), "rank": 0, "dtype": "float64", "clip": 0.1, "lr": 0.01}
    expected = run(ranks, 1, values, tmp_path / "one")
    told = {"output": str(tmp_path / "several"), "pipeline": 2}
    ranks.ask(2, tasks.train_here, 2, values | told, False, 2)
    ranks.ask(2, tasks.train_here, 2, told, True)
    found = files(tmp_path / "several")
    for name in ("checkpoint.safetensors", "model/model.safetensors"):
        assert found[name].keys() == expected[name].keys()
    after = [[span["loss"] for span in each["loss_by_position.json"]["after"]] for each in (found, expected)]
    steps = [[number for line in each["metrics.jsonl"] for number in line.values()] for each in (found, expected)]
    assert after[0] + steps[0] == pytest.approx(after[1] + steps[1], rel=CLOSE)


@pytest.mark.parametrize(("worlds", "model"), [((2, 1), "llama"), ((1, 3), "tied"), ((4, 2), "llama")])
def test_a_run_goes_on_with_another_number_of_ranks(
    ranks: Ranks, models: dict[str, Path], values: dict[str, Any], tmp_path: Path, worlds: tuple[int, int], model: str
) -> None:
    """Ctrl-C on one rank ends the step of all; what is resumed ends as what was never stopped."""
    values |= {"model": str(models[model]), "rank": 0 if model == "llama" else 2, "steps": 4, "dropout": 0.1}
    expected = run(ranks, 1, values, tmp_path / "one")
    first, then = worlds
    told = values | {"output": str(tmp_path / "several"), "pipeline": first}
    stopped = ranks.ask(first, tasks.train_here, first, told, False, 3)
    torchrun = (f"torchrun --nproc-per-node {first} -m ", f" --pipeline {first}") if first > 1 else ("", "")
    words = f"after step 3; go on with: {torchrun[0]}minichunk train{torchrun[1]} --output {told['output']} --resume"
    assert [error for _, error in stopped] == [f"KeyboardInterrupt: saved {words}"] * first
    told = {"output": str(tmp_path / "several"), "pipeline": then}
    answers = ranks.ask(then, tasks.train_here, then, told, True)
    assert not any(error for _, error in answers)
    assert any("after step 3 of 4" in line for line in answers[0][0])
    assert files(tmp_path / "several") == expected


@pytest.mark.parametrize(
    ("world", "changes", "words"),
    [
        (2, {"pipeline": None}, "torchrun has started 2 processes: say with --pipeline"),
        (3, {"pipeline": 2}, "--pipeline is 2, but must divide the number of processes, 3"),
        (1, {"pipeline": 4}, "--pipeline is 4, but must divide the number of processes, 1: start torchrun --nproc-pe"),
        (2, {"pipeline": 2, "method": "full"}, "--method full, --layers-at-once, --offload and --graphs are for"),
        (2, {"pipeline": 1, "accumulate": 1}, "--accumulate is 1, but 2 copies of the model need a batch each"),
        (3, {"pipeline": 3, "model": "shallow"}, "the model has 2 layers, too few for 3 ranks"),
        (2, {"pipeline": 2, "lr": 1e30, "steps": 20}, "try a lower --lr"),
    ],
)
def test_mistakes(
    ranks: Ranks, values: dict[str, Any], model_directory: Path, tmp_path: Path, world: int, changes: Any, words: str
) -> None:
    values |= changes | {"output": str(tmp_path / "run")}
    values["model"] = str(model_directory) if changes.get("model") else values["model"]
    for _, error in ranks.ask(world, tasks.train_here, world, values):
        assert words in error


def test_the_variables_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")  # as in a cluster that says so to every job
    assert started() == (0, 1, 0, 1)
    with tasks.under_torchrun(1, 2):
        assert started() == (1, 2, 1, 2)
        del os.environ["MASTER_PORT"]
        with pytest.raises(mc.InputError, match="MASTER_PORT is None, though RANK is there: start with torchrun"):
            started()
        os.environ["WORLD_SIZE"] = "two"
        with pytest.raises(mc.InputError, match="WORLD_SIZE is 'two'"):
            started()


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_device("cuda") == "cuda"
    with tasks.under_torchrun(1, 2):
        assert (local_device("cuda"), local_device("cuda:0"), local_device("cpu")) == ("cuda:1", "cuda:1", "cpu")
    with tasks.under_torchrun(1, 4), pytest.raises(mc.InputError, match=r"4 processes here, but .* 2 GPUs"):
        local_device("cuda")


def torchrun(arguments: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    where = {"PYTHONPATH": str(Path(mc.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*start, *arguments], cwd=directory, env=os.environ | where, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


def words_of(values: dict[str, Any]) -> list[str]:
    words = []
    for name, value in values.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return words


def test_the_command(values: dict[str, Any], tmp_path: Path) -> None:
    """As torchrun starts it, to its end; then a mistake that all processes make, which is said once."""
    command = ["train", "--pipeline", "2"]
    first, last = [*command, *words_of(values)], [*command, "--resume", "--output", "runs/2"]
    both = f"from minichunk.command.main import main\nassert main({first}) == 0\nmain({last})\n"
    (tmp_path / "both.py").write_text(both)
    done = torchrun(["both.py"], tmp_path)
    assert "ranks   over 2 ranks with 2, 2 layers" in done.stdout, done.stderr
    assert done.stdout.count("peak memory") == 1
    assert (tmp_path / "runs/1/adapter/adapter_model.safetensors").is_file()
    assert done.returncode != 0
    assert done.stderr.count("minichunk: --resume: runs/2 holds no run (run.json is missing)") == 1


def test_the_script_of_the_tutorial(ranks: Ranks) -> None:
    """Both ranks print the same two losses."""
    page = Path(mc.__file__).parents[1] / "tutorials" / "10_seco_on_several_gpus.md"
    (script,) = [code for code in page.read_text().split("```python\n") if "PipelineStage.load" in code]
    code = script.partition("```")[0].replace('"minichunk/assets', f'"{Path(mc.__file__).parent}/assets')
    code = code.replace("2048", "128").replace("range(3)", "range(2)")
    said = [re.findall(r"rank \d: (loss [\d.]+)\n", text) for text in ranks.ask(2, tasks.run_script, code)]
    assert said[0] == said[1] and len(said[0]) == 2 and said[0][0] != said[0][1]


LOST = """
import os, sys
from minichunk.command.main import main
from minichunk.training.loop import Trainer
step = Trainer.run_step
def run_step(trainer):
    os.kill(os.getpid(), 9 * (trainer.step == 3 and os.environ["RANK"] == "1"))
    return step(trainer)
Trainer.run_step = run_step
sys.exit(main())
"""


def test_a_rank_that_is_killed_ends_all_with_one_line(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "lost.py").write_text(LOST)
    done = torchrun(["lost.py", "train", "--pipeline", "2", *words_of(values | {"steps": 5})], tmp_path)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("minichunk: ")]
    assert len(lines) == 1
    assert "rank 0 hears nothing from" in lines[0] or "rank 0 was told to end" in lines[0]
    assert lines[0].endswith("runs/1/checkpoint.safetensors is the last good one")
    assert "exitcode  : -9" in done.stderr
    answers = tasks.train_here(0, 1, {"output": str(tmp_path / "runs/1")}, resume=True)
    assert any("after step 2 of 5" in line for line in answers[0])
