"""The command line: a user's mistake is one line on standard error and exit status 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NoReturn

import pytest
import torch

import minichunk as mc
from minichunk.command.main import build_parser, main
from minichunk.models.load import class_of


@pytest.fixture
def train(model_directory: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A small training command; changes at its end override what it says."""
    monkeypatch.chdir(tmp_path)
    return [
        "train", "--model", str(model_directory), "--data", str(text), "--device", "cpu",
        "--seq-len", "40", "--chunk-size", "8", "--steps", "2", "--rank", "2",
    ]  # fmt: skip


def test_train_then_resume_then_generate(
    train: list[str], tmp_path: Path, model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*train, "--method", "spaco", "--budget", "2"]) == 0
    assert main([*train, "--targets", "q_proj", "--rank", "1"]) == 0
    assert (tmp_path / "runs/1/adapter/adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "runs/2/adapter/adapter_config.json").read_text())["target_modules"] == ["q_proj"]
    assert main(["train", "--resume"]) == 0
    assert "runs/2 after step 2 of 2" in capsys.readouterr().out
    assert main(["train", "--resume", "--output", "runs/1"]) == 0
    assert "runs/1 after step 2 of 2" in capsys.readouterr().out
    words = ["--model", str(model_directory), "--adapter", "runs/1/adapter", "--max-new-tokens", "5"]
    assert main(["generate", "It is", *words]) == 0
    assert capsys.readouterr().out.startswith("It is")


KINDS = ("state", "full_attention")
OTHERS = {
    "states": mc.StateSpaceConfig(300, 8, 4, 2),
    "hybrid": mc.StateSpaceConfig(
        300, 8, 4, 2, KINDS, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1, head_dim=4
    ),
    "mamba2": mc.Mamba2Config(300, 8, 4, 2, num_heads=2, head_dim=8, n_groups=1),
    "gemma 3": mc.Gemma3Config(
        300, 8, 12, 2, 2, 1, 4, sliding_window=9, layer_types=("sliding_attention", "full_attention")
    ),
}
ADAPTED = {"mamba2": {"in_proj", "out_proj"}, "gemma 3": {"q_proj", "up_proj"}}


@pytest.mark.parametrize("kind", OTHERS)
def test_all_commands_take_models_of_other_kinds(
    train: list[str], model_directory: Path, text: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, directory = OTHERS[kind], tmp_path / "states"
    class_of(config)(config).save_pretrained(directory)
    shutil.copy(model_directory / "tokenizer.json", directory)
    train = [*train, "--model", str(directory)]
    assert main([*train, "--method", "spaco", "--budget", "2", "--offload"]) == 0
    trained = json.loads((tmp_path / "runs/1/adapter/adapter_config.json").read_text())["target_modules"]
    assert set(trained) >= ADAPTED.get(kind, {"a_proj", "b_proj", "c_proj"})
    assert main([*train, "--rank", "0", "--output", "all"]) == 0
    assert main(["train", "--resume", "--output", "all"]) == 0
    adapted = ["--model", str(directory), "--adapter", "runs/1/adapter"]
    for model in (adapted, ["--model", "all/model"]):
        assert main(["evaluate", *model, "--data", str(text), "--seq-len", "40", "--chunk-size", "8"]) == 0
        assert "nats per token" in capsys.readouterr().out
        assert main(["generate", "It is", *model, "--max-new-tokens", "5"]) == 0
        assert capsys.readouterr().out.startswith("It is")
    assert main(["plan", "--model", str(directory), "--seq-len", "4096", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["breakdown"]["cache"] > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--chunk-size 0", "--chunk-size is 0, but must be at least 1"),
        ("--seq-len 1", "--seq-len is 1"),
        ("--method naive", "--method is 'naive', but must be one of seco, spaco, full"),
        ("--method spaco --budget 0", "--budget is 0"),
        ("--method spaco --sampler dice", "--sampler is 'dice'"),
        ("--budget 2", "--budget, --sampler and --cap belong to --method spaco"),
        ("--method spaco --cap 2", "--cap belongs to --sampler paper"),
        ("--fill-size 7", "--fill-size is 7, but must be at least 8"),
        ("--lr 0", "--lr is 0.0"),
        ("--lr nan", "--lr is nan"),
        ("--steps 0", "--steps is 0"),
        ("--rank -1", "--rank is -1"),
        ("--dropout 1", "--dropout is 1.0"),
        ("--no-recompute --recompute-attention", "--recompute-attention is a kind of --recompute"),
        ("--method full --recompute-attention", "--recompute-attention belongs to --method seco and spaco"),
        ("--targets q", "LoRA targets are ['q']"),
        ("--dtype int8", "--dtype is 'int8'"),
        ("--device cuda:99", "--device is 'cuda:99', but PyTorch sees only cpu"),
        ("--device tpu", "--device is 'tpu'"),
        ("--seed 4294967296", "must be below 2^32"),
        ("--cache-grad-dtype int8", "--cache-grad-dtype is 'int8', but must be one of"),
        ("--method full --offload", "--offload belongs to --method seco and spaco"),
        ("--sampler fixed", "--budget, --sampler and --cap belong to --method spaco"),
        ("--steps abc", "argument --steps: invalid int value: 'abc'"),
        ("--bogus 1", "unrecognized arguments: --bogus 1"),
        ("--model nowhere", "nowhere"),
        ("--data nowhere.txt", "nowhere.txt cannot be read (No such file or directory)"),
        ("--val-data nowhere.txt", "nowhere.txt cannot be read (No such file or directory)"),
        ("--output {text}", "is a file, but must be a directory"),
    ],
)
def test_mistakes_are_named_before_training(
    train: list[str], text: Path, change: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*train, *change.format(text=text).split()]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert error.startswith("minichunk: ")
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--resume"], "found no run in runs/"),
        (["train", "--resume", "--output", "x"], "x holds no run"),
        (["train", "--resume", "--lr", "1"], "leave out --lr"),
        (["generate", ""], "the prompt is empty"),
        (["generate", "x", "--adapter", "nowhere"], "nowhere/adapter_config.json is missing"),
        (["generate", "x", "--top-p", "2"], "0 < top_p <= 1"),
        (["generate", "x", "--device", "tpu"], "--device is 'tpu'"),
        (["generate", "x", "--dtype", "int8"], "--dtype is 'int8'"),
        (["generate", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["generate", "x", "--temperature", "-1"], "--temperature is -1.0"),
        (["generate", "x", "--seed", "99999999999999999999"], "must be below 2^32"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_other_mistakes(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_run_is_not_overwritten(train: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*train, "--output", "here"]) == 0
    assert main([*train, "--output", "here"]) == 2
    assert "here holds a run already: add --resume" in capsys.readouterr().err


def test_a_failed_training_has_another_exit_status(train: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*train, "--lr", "1e30", "--rank", "0", "--steps", "9", "--clip", "0", "--warmup", "0"]) == 1
    assert "try a lower --lr" in capsys.readouterr().err


def test_defaults_in_the_help_are_the_defaults() -> None:
    """Each `(default: X)` of `minichunk train --help` against TrainOptions."""
    from minichunk.training.options import TrainOptions

    (commands,) = build_parser()._subparsers._group_actions  # type: ignore[union-attr]
    actions = {a.dest: a.help or "" for a in commands.choices["train"]._actions}  # type: ignore[attr-defined]
    assert set(actions) - {"help", "resume"} == set(TrainOptions.__dataclass_fields__)
    for name, value in TrainOptions().to_dict().items():
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            text = value if isinstance(value, str) else f"{value:g}"
            assert f"(default: {text}" in actions[name], name


@pytest.mark.parametrize(("cuda", "expected"), [(False, ("cpu", "float32")), (True, ("cuda", "bfloat16"))])
@pytest.mark.parametrize("command", ["train", "evaluate", "generate"])
def test_every_command_chooses_device_and_dtype_alike(
    command: str, cuda: bool, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Asked(Exception):
        pass

    def ask(directory: Path, dtype: torch.dtype, device: str, load_in_4bit: bool, prepare: object) -> NoReturn:
        raise Asked(device, str(dtype).removeprefix("torch."), load_in_4bit)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)
    monkeypatch.setattr(mc.Llama, "from_pretrained", ask)
    arguments = [command, *(["x"] if command == "generate" else [])]
    with pytest.raises(Asked, match=str((*expected, False)).replace("(", r"\(").replace(")", r"\)")):
        main(arguments)
    with pytest.raises(Asked, match="'cpu', 'float64', True"):
        main([*arguments, "--device", "cpu", "--dtype", "float64", "--load-in-4bit"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--seq-len 1", "--seq-len is 1"),
        ("--documents 0", "--documents is 0"),
        ("--dtype int8", "--dtype is 'int8'"),
        ("--model nowhere", "nowhere"),
        ("--data nowhere.txt", "nowhere.txt cannot be read"),
        ("--adapter nowhere", "nowhere"),
    ],
)
def test_mistakes_of_evaluate(change: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *change.split()]) == 2
    assert words in capsys.readouterr().err
