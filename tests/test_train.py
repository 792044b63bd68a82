"""Training runs: what they write, and that an interrupted one continues bit for bit."""

import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

import minichunk as mc
from minichunk.files.documents import Document
from minichunk.training import run_directory
from minichunk.training import train as train_module
from minichunk.training.evaluate import loss_by_position, spans_for
from minichunk.training.load import load_data, load_to_train, make_gradient
from minichunk.training.loop import NonFiniteLoss, Schedule, Trainer
from minichunk.training.options import TrainOptions
from minichunk.training.run_directory import Run
from minichunk.training.train import train

from .gradients import Tensors
from .rounding import measure
from .strategies import build, tiny
from .train_ranks import files


@pytest.fixture
def options(model_directory: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainOptions:
    monkeypatch.setattr(run_directory, "plot_run", lambda *_: True)  # drawing takes longer than training
    return TrainOptions(
        model=str(model_directory), data=(str(text),), seq_len=40, chunk_size=8, steps=6, save_every=2, rank=2,
        dropout=0.1, batch_size=2, accumulate=2, output=str(tmp_path / "run"), device="cpu",
    )  # fmt: skip


def quiet(_: str) -> None:
    """Say nothing."""


def at_batch(number: int, happens: Callable[[], float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen in the gradient of a run's batch, counted from 1; its loss is multiplied by what returns."""
    original, batches = train_module.make_gradient, count(1)

    def make(*told: Any) -> Any:
        gradient = original(*told)
        return lambda *given: gradient(*given) * (happens() if next(batches) == number else 1)

    monkeypatch.setattr(train_module, "make_gradient", make)


class Stopped(Exception):
    pass


def stop() -> float:
    raise Stopped


def interrupt() -> float:
    signal.raise_signal(signal.SIGINT)
    return 1


CASES: dict[str, dict[str, Any]] = {
    "seco": {},
    "spaco": {"method": "spaco", "budget": 2},
    "spaco paper, offload": {"method": "spaco", "budget": 2, "sampler": "paper", "cap": 2.0, "offload": True},
    "blocks": {"layers_at_once": "2"},
    "full": {"method": "full"},
    "all parameters": {"rank": 0, "weight_decay": 0.1},
    "all parameters, bfloat16": {"rank": 0, "dtype": "bfloat16"},
    "bfloat16 adapter, bfloat16 sums, deterministic": {
        "dtype": "bfloat16", "cache_grad_dtype": "bfloat16", "recompute": True, "fill_size": 16, "deterministic": True,
    },
    "4 bits": {"load_in_4bit": True, "dtype": "bfloat16"},
    "partial context": {"partial_context": "window", "window": 4, "sinks": 2, "full_layers": (1,)},
}  # fmt: skip


@pytest.mark.parametrize(("case", "step"), [*((case, 6) for case in CASES), ("seco", 2)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    case: str, step: int, options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut in the middle of a step; the last save was after step 4, or there was none."""
    options = replace(options, **CASES[case])
    whole = files(train(replace(options, output=str(tmp_path / "whole")), say=quiet))
    with monkeypatch.context() as patch:
        at_batch(2 * step, stop, patch)  # two batches a step: the first one is done
        with pytest.raises(Stopped):
            train(options, say=quiet)
    assert len((Path(options.output or "") / "metrics.jsonl").read_text().splitlines()) == step - 1
    assert files(train(TrainOptions(output=options.output, resume=True), say=quiet)) == whole
    assert torch.are_deterministic_algorithms_enabled() == options.deterministic
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["text.txt", "model.safetensors", "tokenizer.json", "special_tokens_map.json"])
def test_a_run_does_not_go_on_with_other_data_or_another_base(name: str, options: TrainOptions, tmp_path: Path) -> None:
    """Known before anything is done; a file is another one if a byte of it is."""
    base, text = shutil.copytree(str(options.model), tmp_path / "base"), shutil.copy(options.data[0], tmp_path)
    (base / "special_tokens_map.json").write_text("{}")
    train(replace(options, model=str(base), data=(str(text),), steps=1), say=quiet)
    (path,) = [path for path in (Path(text), *base.iterdir()) if path.name == name]
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(mc.InputError, match=rf"--resume: .*{name} is not what it was: bring it back"):
        train(TrainOptions(output=options.output, resume=True), say=lambda line: pytest.fail(line))


def test_large_models_recompute_unless_told_otherwise(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "LARGE", 1)
    for recompute in (None, False):
        directory = train(replace(options, steps=1, recompute=recompute, output=f"{options.output}{recompute}"), quiet)
        assert json.loads((directory / "run.json").read_text())["options"]["recompute"] is (recompute is None)


def test_offload_is_refused_where_the_host_has_no_room(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "load_data", lambda *_: pytest.fail("went on"))
    monkeypatch.setattr(train_module, "check_host_room", Mock(side_effect=mc.InputError("no room")))
    with pytest.raises(mc.InputError, match="no room"):
        train(replace(options, offload=True), say=quiet)


def test_ctrl_c_saves_and_says_how_to_resume(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step, and in the last evaluation; a run that has ended may be resumed too."""
    handler, go_on, said = signal.getsignal(signal.SIGINT), r"go on with: minichunk train --output .* --resume", [""]
    with monkeypatch.context() as patch:
        at_batch(5, interrupt, patch)  # the first batch of step 3
        with pytest.raises(KeyboardInterrupt, match=f"after step 3; {go_on}"):
            train(options, say=quiet)
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.setattr(train_module, "loss_by_position", lambda *_: interrupt())
    with pytest.raises(KeyboardInterrupt, match=f"after step 6; {go_on}"):
        train(TrainOptions(output=options.output, resume=True), say=said.append)
    assert any("after step 3 of 6" in line for line in said)


def test_a_second_ctrl_c_does_not_say_that_all_is_saved(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "run_step", lambda _: (interrupt(), interrupt()))
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        train(options, say=quiet)


def test_what_a_run_writes_and_says(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    said, seen = list[str](), list[Any]()
    directory = train(options, say=said.append, on_step=seen.append)
    written = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert written == {
        "run.json", "metrics.jsonl", "checkpoint.safetensors", "loss.png", "loss_by_position.json",
        "adapter/adapter_model.safetensors", "adapter/adapter_config.json",
    }  # fmt: skip
    shown = "\n".join(said)
    assert re.search("all tokens kept(.|\n)*loss before(.|\n)*0 to 16 .*inside the old context(.|\n)*beyond it", shown)
    assert "peak memory" in shown and "written" in shown
    metrics = Run(directory).read_metrics()
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6] and metrics == seen
    assert all(m["peak_bytes"] > 0 and m["seconds"] > 0 for m in metrics)


def test_training_all_parameters_learns_and_writes_a_model_with_all_that_it_needs(
    options: TrainOptions, tmp_path: Path
) -> None:
    base = shutil.copytree(str(options.model), tmp_path / "base")
    (base / "chat_template.jinja").write_text("x")
    directory = train(replace(options, model=str(base), rank=0, steps=30, lr=0.03, dropout=0.0), say=quiet)
    losses = json.loads((directory / "loss_by_position.json").read_text())
    assert all(new["loss"] < old["loss"] - 0.3 for old, new in zip(losses["before"], losses["after"], strict=True))
    assert (directory / "model/tokenizer.json").is_file() and (directory / "model/chat_template.jinja").is_file()
    assert mc.Llama.from_pretrained(directory / "model").config.max_position_embeddings == 40  # the new context


def test_accumulation_has_the_normaliser_of_the_whole_step() -> None:
    """Four documents in four batches give the gradient of the mean over the targets of all four."""
    documents = [Document("", ids, ids) for ids in (torch.randint(23, (n,)) for n in (40, 9, 23, 2))]

    def gradients(batch_size: int, accumulate: int) -> Tensors:
        model, schedule = build(tiny(), seed=0).double(), Schedule(1, 1.0, clip=0)
        trainer = Trainer(model, documents, make_gradient(TrainOptions(chunk_size=8)), schedule, batch_size, accumulate)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "_update", lambda: None)
            trainer.run_step()
        return {name: master.grad for name, master in trainer.masters.items() if master.grad is not None}

    measure(lambda: gradients(4, 1)).check(gradients(1, 4))


def test_every_batch_of_every_step_has_random_numbers_of_its_own() -> None:
    """The sampler's and dropout's, which differ with the seed too."""
    drawn = []

    def gradient(*arguments: Any) -> torch.Tensor:
        drawn.append((float(torch.rand((), generator=arguments[-1])), float(torch.rand(()))))
        return torch.zeros(())

    documents = [Document("a", torch.arange(3), torch.arange(3))]
    for seed in (0, 1):
        trainer = Trainer(mc.Llama(tiny()), documents, gradient, Schedule(2, 1.0), 1, 3, seed)
        for _ in range(2):
            trainer.run_step()
    assert len({sampler for sampler, _ in drawn}) == len({dropout for _, dropout in drawn}) == 12


def test_schedule() -> None:
    schedule = Schedule(steps=110, lr=1.0, warmup=10)
    assert [schedule.lr_at(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert schedule.lr_at(60) == pytest.approx(0.55)
    assert schedule.lr_at(109) == pytest.approx(0.1, abs=1e-3)


def test_clipping() -> None:
    model = mc.Llama(tiny())
    trainer = Trainer(model, [], lambda *_: torch.zeros(()), Schedule(1, 1.0, clip=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    numbers = sum(p.numel() for p in model.parameters())
    assert trainer._collect_gradients() == pytest.approx(math.sqrt(numbers))
    clipped = math.sqrt(sum(float(p.grad.square().sum()) for p in trainer.masters.values() if p.grad is not None))
    assert clipped == pytest.approx(0.5, rel=1e-4)


def test_a_non_finite_loss_stops_and_keeps_the_last_checkpoint(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_batch(10, lambda: math.nan, monkeypatch)  # the second one of step 5
    with pytest.raises(NonFiniteLoss, match=r"at step 5 \(.*text.txt, tokens .*checkpoint.safetensors is the last"):
        train(options, say=quiet)
    tensors = load_file(Path(options.output or "") / "checkpoint.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_an_interrupted_save_leaves_the_last_one_whole(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    path = train(options, say=quiet) / "checkpoint.safetensors"
    before = path.read_bytes()
    monkeypatch.setattr("safetensors.torch.save_file", lambda _, path, __: Path(path).write_bytes(b"half") and stop())
    model, _ = load_to_train(options.resolved())
    with pytest.raises(Stopped):
        Run(path.parent).save(Trainer(model, [], lambda *_: torch.zeros(()), Schedule(1, 1.0)))
    assert path.read_bytes() == before and not list(path.parent.glob(".*"))


@pytest.mark.parametrize("tail", [b'{"step": 2, "lo', b"\0\0\0\n", b"{\n\xff\n"])
def test_a_metrics_line_cut_short_by_a_kill_is_left_out(tail: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + tail)
    assert Run(tmp_path).read_metrics() == [{"step": 1}]


@pytest.mark.parametrize("change", [{"steps": "1"}, {"unknown": 1}])
def test_a_damaged_run_file_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write_info(TrainOptions(), [])
    info = json.loads(run.info.read_text())
    run.info.write_text(json.dumps({**info, "options": info["options"] | change}))
    with pytest.raises(mc.InputError, match=r"run.json is not of this version"):
        train(TrainOptions(output=str(tmp_path), resume=True), say=quiet)


def test_loss_by_position_is_the_mean_of_the_token_losses(options: TrainOptions) -> None:
    resolved = replace(options, dtype="float64").resolved()
    model, tokenizer = load_to_train(resolved)
    documents, *_ = load_data(resolved, model, tokenizer)
    spans = loss_by_position(model, documents[:3], 7, [(0, 16), (16, 40), (40, 99)])
    ids = torch.stack([d.input_ids for d in documents[:3]])
    logits = model.eval()(ids).detach()
    each = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    for span, (start, stop) in zip(spans, [(0, 16), (16, 40)], strict=True):
        assert (span.start, span.stop) == (start, stop)
        assert span.loss == pytest.approx(float(each[:, start:stop].mean()), rel=1e-12)


def test_spans() -> None:
    assert spans_for(256, 700) == [(0, 256), (256, 512), (512, 700)]
    assert spans_for(8192, 2048) == [(0, 256), (256, 512), (512, 1024), (1024, 2048)]


def test_the_default_data_are_the_shipped_novels() -> None:
    options = TrainOptions(eval_documents=2).resolved()
    training, validation, line = load_data(options, *load_to_train(options))
    for pieces, novel in ((training, "persuasion"), (validation, "northangerabbey")):
        assert all(f"/{novel}.txt," in piece.name for piece in pieces)
    assert len(validation) == 2
    assert "all tokens kept" in line
