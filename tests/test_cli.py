"""The command line: a user's mistake is one line on standard error and exit status 2."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import pytest
import torch

import minichunk as mc
from minichunk.command.main import COMMANDS, main
from minichunk.models.load import class_of
from minichunk.training import load, run_directory
from minichunk.training.evaluate import loss_by_position
from minichunk.training.options import BOUNDS, ReadOptions, TrainOptions, flag, form, options_of


@pytest.fixture
def train(model_directory: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A small training command; changes at its end override what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_directory, "plot_run", lambda *_: True)  # drawing takes longer than training
    return [
        "train", "--model", str(model_directory), "--data", str(text), "--device", "cpu",
        "--seq-len", "40", "--chunk-size", "8", "--steps", "2", "--rank", "2",
    ]  # fmt: skip


ATTENTION = {"intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
HYBRID = mc.StateSpaceConfig(300, 8, 4, 2, ("state", "full_attention"), **ATTENTION)
MAMBA = mc.Mamba2Config(300, 8, 4, 2, num_heads=2, head_dim=8, n_groups=1)
BLOCKS, PART = "--method spaco --budget 2 --offload --layers-at-once 2", "--partial-context window --window 4 --sinks"
STRIDED = "--partial-context strided --block 2 --local 2 --stride 3 --full-layers"
# A base of another kind, how it is trained, how the other commands read it, what is said, what the adapter has.
RUNS = [
    (HYBRID, BLOCKS, "", "", {"a_proj", "b_proj", "c_proj"}),
    (HYBRID, "--rank 0", "", "", None),
    (MAMBA, BLOCKS, "", "", {"in_proj"}),
    (MAMBA, "--rank 0", "", "", None),
    (None, "", "--load-in-4bit", "", {"q_proj"}),
    (None, "--load-in-4bit", "", "", {"v_proj"}),
    (None, f"{PART} 2 --full-layers 1 --method spaco --budget 2 --dropout 0.1", "", "the last 4 positions", ()),
    (None, f"{PART} 0 --full-layers 1 --method full --rank 0", "", "the last 4 positions, in all", None),
    (None, STRIDED, "", "the last 2 blocks of 2 positions", ()),
    (None, "--rope yarn:4 --rope-theta 500", "", "rope_theta 500.0, rope_type yarn", ()),
    (None, "--rope yarn:4 --rope-theta 500 --rank 0", "", "rope_theta 500.0, rope_type yarn", None),
]


@pytest.mark.parametrize(("config", "trained", "used", "said", "adapted"), RUNS)
def test_what_was_trained_is_what_the_other_commands_read(
    train: list[str], model_directory: Path, text: Path, config: Any, trained: str, used: str, said: str, adapted: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The losses after training are those of the model that is read again; for a resume in the same words."""
    if "4bit" in trained + used:
        pytest.importorskip("bitsandbytes")
    if config is not None:
        class_of(config)(config).save_pretrained("model")
        shutil.copy(model_directory / "tokenizer.json", "model")
        train = [*train, "--model", "model"]
    assert main([*train, "--lr", "0.1", *trained.split()]) == 0
    assert main(["train", "--resume"]) == 0
    assert (shown := capsys.readouterr().out).count(said) >= 2 and "runs/1 after step 2 of 2" in shown
    base, adapter = ("runs/1/model", None) if adapted is None else (train[-1] if config else train[2], "runs/1/adapter")
    read = ["--model", base, *(["--adapter", adapter] if adapter else []), *used.split()]
    assert main(["plan", "--model", base, "--seq-len", "4096", "--memory", "1GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["breakdown"]["cache"] > 0
    if adapter:
        assert set(json.loads(Path(adapter, "adapter_config.json").read_text())["target_modules"]) >= {*adapted}
    assert main(["evaluate", *read, "--data", str(text), "--seq-len", "40", "--chunk-size", "8"]) == 0
    assert "nats per token" in (shown := capsys.readouterr().out) and said * said.startswith("the") in shown
    assert main(["generate", "It is", *read, "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("It is")
    info = options_of(TrainOptions, json.loads(Path("runs/1/run.json").read_text())["options"])
    model, tokenizer = load.load_as_told(ReadOptions(model=base, adapter=adapter, device="cpu"))
    after = json.loads(Path("runs/1/loss_by_position.json").read_text())["after"]
    spans = [(span["start"], span["stop"]) for span in after]
    again = loss_by_position(model, load.load_data(info, model, tokenizer)[1], 8, spans)
    close = pytest.approx([span["loss"] for span in after], rel=1e-2 if "4bit" in trained else 1e-6)
    assert [span.loss for span in again] == close


MISTAKES = {
    "TRAIN --budget 2": "--budget, --sampler and --cap belong to --method spaco",
    "TRAIN --method full --offload": "and --offload belong to --method seco and spaco",
    "TRAIN --method full --layers-at-once 2": "--layers-at-once and --offload belong to --method seco and spaco",
    "TRAIN --layers-at-once 0": "--layers-at-once is '0', but must be a whole number of at least 1, or auto",
    "TRAIN --graphs 2 --layers-at-once 2": "--graphs is for seco with all layers at once",
    "TRAIN --layers-at-once some": "--layers-at-once is 'some', but must be",
    "plan --gpus 2 --offload": "--layers-at-once, --offload, --graphs and --objective are for one GPU",
    "TRAIN --fill-size 7": "--fill-size is 7, but must be at least 8",
    "TRAIN --load-in-4bit --rank 0": "--load-in-4bit freezes the base",
    "plan --load-in-4bit --rank 0": "--load-in-4bit freezes the base",
    f"TRAIN {PART} 2 --full-layers 2": "full layers are [2], but must be some, not all, of 0 to 1",
    f"plan {PART} 2 --full-layers 32": "full layers are [32], but must be some, not all, of 0 to 31",
    **{
        f"TRAIN --rope {rope}": f"--rope is '{rope}', but must be yarn:FACTOR or linear:FACTOR"
        for rope in ("yarn", "yarn:1", "yarn:x", "yarn:-4", "su:4", "yarn:4:4")
    },
    "walk --seq-len 40 --chunk-size 1": "--chunk-size 1 makes 40 chunks, but the page has room for 32",
    "walk --seq-len 40 --method full --output {text}/x.html": "cannot make the directory",
    "TRAIN --targets q": "LoRA targets are ['q']",
    "TRAIN --device cuda:99": "--device is 'cuda:99', but PyTorch sees only cpu",
    "TRAIN --model nowhere": "nowhere",
    "TRAIN --data nowhere.txt": "nowhere.txt cannot be read (No such file or directory)",
    "TRAIN --output {text}": "cannot make the directory ",
    "TRAIN --bogus 1": "unrecognized arguments: --bogus 1",
    "train --resume": "found no run in runs/",
    "train --resume --output x": "x holds no run",
    "train --resume --lr 1": "leave out --lr",
    "evaluate --data nowhere.txt": "nowhere.txt cannot be read",
    "evaluate --adapter nowhere": "nowhere",
    "evaluate --recall --seq-len 40 --documents 1": "--recall in 40 tokens: passkey and question alone take more",
    "evaluate --recall --seq-len 200000": "--recall in 200,000 tokens needs as many: the data has 135,237",
    "generate x --adapter nowhere": "nowhere is not a directory",
    "generate ''": "the prompt is empty",
    "TRAIN --output here": "here holds a run already: add --resume",
    "": "the following arguments are required: COMMAND",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_named_in_one_line(
    train: list[str], text: Path, command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Before a training begins. What one option alone may be is tested below."""
    Path("here").mkdir()
    Path("here/run.json").touch()
    words = shlex.split(command.format(text=text))
    assert main([*train, *words[1:]] if "TRAIN" in words else words) == 2
    error = capsys.readouterr().err
    assert MISTAKES[command] in error
    assert error.count("\n") == 1
    assert error.startswith("minichunk: ")
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_failed_training_has_another_exit_status(train: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*train, "--lr", "1e30", "--rank", "0", "--steps", "9", "--clip", "0", "--warmup", "0"]) == 1
    assert "try a lower --lr" in capsys.readouterr().err


def wrong_values(options: type) -> Iterator[tuple[str, str, str]]:
    """For each rule of each option: a value that breaks it, and what is said of it."""
    annotations = get_type_hints(options)
    for field in fields(options):
        rule, (kind, _) = field.metadata, form(annotations[field.name])
        if kind in (int, float):
            yield field.name, "x", f"argument {flag(field.name)}: invalid {kind.__name__} value: 'x'"
        if kind is float:
            yield field.name, "nan", f"{flag(field.name)} is nan, but must be"
            yield field.name, "inf", f"{flag(field.name)} is inf, but must be"
        if rule["choices"]:
            yield field.name, "x", f"{flag(field.name)} is 'x', but must be one of {', '.join(rule['choices'])}"
        for bound, (word, _) in BOUNDS.items():
            if rule[bound] is not None:
                value = kind(rule[bound] + {"least": -1, "most": 1}.get(bound, 0))
                yield field.name, str(value), rf"{flag(field.name)} is {value}, but must be .*{word} {rule[bound]}"
        if rule["belongs"]:
            owner, allowed = rule["belongs"]
            yield field.name, "7", f"{flag(field.name)} belongs to {flag(owner)} {' or '.join(allowed)}".strip()


CASES = [(command, *case) for command, (options, _) in COMMANDS.items() for case in wrong_values(options)]


@pytest.mark.parametrize(("command", "name", "value", "words"), CASES)
def test_every_rule_of_every_option_is_kept(
    command: str, name: str, value: str, words: str, capsys: pytest.CaptureFixture[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By the command in one line, before anything is read; by the function that it calls in the same words."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load.documents, "load_tokenizer", lambda _: pytest.fail("went on"))
    options, carry_out = COMMANDS[command]
    told = {field.name: "x" for field in fields(options) if field.default is MISSING}  # which it cannot do without
    positional = {field.name for field in fields(options) if field.metadata["positional"]}
    words_of = [word for name in told for word in ([] if name in positional else [flag(name)]) + ["x"]]
    assert main([command, *words_of, f"{flag(name)}={value}"]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error)
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
    kind, several = form(get_type_hints(options)[name])
    if not words.startswith("argument"):
        told[name] = (kind(value),) if several else kind(value)
        with pytest.raises(mc.InputError, match=words):
            carry_out(options(**told))
        told[name] = "a word" if kind is not str else 5
        with pytest.raises(mc.InputError, match=f"{flag(name)} is {told[name]!r}, but must be"):
            carry_out(options(**told))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    options, _ = COMMANDS[command]
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = "".join(capsys.readouterr().out.split())  # the lines break where they may
    for field in fields(options):
        default, absent = field.default, field.metadata["absent"]
        if not absent and type(default) in (int, float, str):
            absent = default if isinstance(default, str) else f"{default:g}"
        words = field.metadata["help"] + (f" (default: {absent})" if absent else "")
        assert "".join(words.split()) in shown


@pytest.mark.parametrize("command", ["train", "evaluate", "generate x"])
def test_every_command_chooses_device_and_dtype_alike(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(directory: Path, dtype: torch.dtype, device: str, load_in_4bit: bool, prepare: object) -> NoReturn:
        raise LookupError(f"{device} {dtype} {load_in_4bit}")

    monkeypatch.setattr(load, "load_model", ask)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)
    told = ("--device", "cpu", "--dtype", "float64", "--load-in-4bit")
    for cuda, more, asked in ((0, (), "cpu torch.float32 False"), (1, (), "cuda torch.bfloat16 False"),
                              (1, told, "cpu torch.float64 True")):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: bool(cuda))
        monkeypatch.setattr(torch.cuda, "device_count", lambda cuda=cuda: cuda)
        with pytest.raises(LookupError, match=asked):
            main([*command.split(), *more])
