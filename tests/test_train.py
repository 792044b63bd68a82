"""Training runs: what they write, and that an interrupted one continues bit for bit."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import minichunk as mc
from minichunk.files.atomic import write_text
from minichunk.training import train as train_module
from minichunk.training.evaluate import loss_by_position, spans_for
from minichunk.training.load import load_data, load_to_train, make_gradient
from minichunk.training.loop import NonFiniteLoss, Schedule, Trainer, deterministic_kernels
from minichunk.training.options import TrainOptions
from minichunk.training.run_directory import Run
from minichunk.training.train import Interrupted, train

from .gradients import Tensors, take_gradients
from .rounding import measure


@pytest.fixture
def options(model_directory: Path, text: Path, tmp_path: Path) -> TrainOptions:
    return TrainOptions(
        model=str(model_directory), data=(str(text),), seq_len=40, chunk_size=8, steps=6, save_every=2, rank=2,
        dropout=0.1, batch_size=2, accumulate=2, output=str(tmp_path / "run"), device="cpu",
    )  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    "seco": {},
    "spaco": {"method": "spaco", "budget": 2},
    "spaco fixed": {"method": "spaco", "budget": 2, "sampler": "fixed"},
    "spaco paper": {"method": "spaco", "budget": 2, "sampler": "paper", "cap": 2.0},
    "full": {"method": "full"},
    "all parameters": {"rank": 0, "weight_decay": 0.1},
    "all parameters, bfloat16": {"rank": 0, "dtype": "bfloat16"},
    "bfloat16 adapter": {"dtype": "bfloat16", "recompute": True, "fill_size": 16},
    "bfloat16 sums, deterministic": {"dtype": "bfloat16", "cache_grad_dtype": "bfloat16", "deterministic": True},
    "offload": {"offload": True, "dropout": 0.1},
    "4 bits": {"load_in_4bit": True, "dtype": "bfloat16"},
    "partial context": {"partial_context": "window", "window": 4, "sinks": 2, "full_layers": (1,)},
}


def quiet(_: str) -> None:
    pass


def results(directory: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The trained tensors, and the metrics without what depends on the clock."""
    (file,) = [*directory.glob("adapter/*.safetensors"), *directory.glob("model/*.safetensors")]
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    steady = ("step", "loss", "grad_norm", "lr", "tokens")
    return load_file(file), [{key: json.loads(line)[key] for key in steady} for line in lines]


class Stopped(Exception):
    pass


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut in the middle of a step: its batches are half done and nothing is saved."""
    original = train_module.make_gradient

    def make(options: TrainOptions) -> Any:
        gradient, calls = original(options), 0

        def stopping(*arguments: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 2 * step:  # two batches a step
                raise Stopped
            return gradient(*arguments)

        return stopping

    monkeypatch.setattr(train_module, "make_gradient", make)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one(
    case: str, options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(options, **CASES[case])
    whole = results(train(replace(options, output=str(tmp_path / "whole")), say=quiet))
    with monkeypatch.context() as patch:
        stop_at(6, patch)  # after step 5; the last save was after step 4
        with pytest.raises(Stopped):
            train(options, say=quiet)
    assert len((Path(options.output or "") / "metrics.jsonl").read_text().splitlines()) == 5
    resumed = results(train(TrainOptions(output=options.output, resume=True), say=quiet))
    assert whole[1] == resumed[1]
    assert whole[0].keys() == resumed[0].keys()
    for name, tensor in whole[0].items():
        assert torch.equal(tensor, resumed[0][name]), name


def test_large_models_recompute_unless_told_otherwise(
    options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "LARGE", 1)
    for recompute in (None, False):
        directory = train(
            replace(options, steps=1, recompute=recompute, output=str(tmp_path / str(recompute))), say=quiet
        )
        stored = json.loads((directory / "run.json").read_text())["options"]["recompute"]
        assert stored is (recompute is None)


def test_offload_is_refused_where_the_host_has_no_room(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "load_data", lambda *_: pytest.fail("went on"))

    def refuse(*_: object) -> None:
        raise mc.InputError("no room")

    monkeypatch.setattr(train_module, "check_host_room", refuse)
    with pytest.raises(mc.InputError, match="no room"):
        train(replace(options, method="seco", budget=None, sampler="bernoulli", offload=True), say=quiet)


def test_deterministic_means_deterministic_kernels() -> None:
    with deterministic_kernels(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_resume_before_the_first_save_starts_over(
    options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = results(train(replace(options, output=str(tmp_path / "whole")), say=quiet))
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(Stopped):
            train(options, say=quiet)
    resumed = results(train(TrainOptions(output=options.output, resume=True), say=quiet))
    assert whole[1] == resumed[1]


def test_ctrl_c_saves_and_says_how_to_resume(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    original = train_module.make_gradient
    calls = 0

    def make(options: TrainOptions) -> Any:
        gradient = original(options)

        def interrupting(*arguments: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 5:  # the first batch of step 3
                signal.raise_signal(signal.SIGINT)
            return gradient(*arguments)

        return interrupting

    monkeypatch.setattr(train_module, "make_gradient", make)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"after step 3; go on with: minichunk train --output .* --resume"):
        train(options, say=quiet)
    assert signal.getsignal(signal.SIGINT) is handler
    said: list[str] = []
    train(TrainOptions(output=options.output, resume=True), say=said.append)
    assert any("after step 3 of 6" in line for line in said)


def test_a_second_ctrl_c_does_not_say_that_all_is_saved(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(trainer: Trainer) -> dict[str, float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "run_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(options, say=quiet)


def test_what_a_run_writes_and_says(options: TrainOptions) -> None:
    said: list[str] = []
    directory = train(options, say=said.append)
    written = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert written == {
        "run.json", "metrics.jsonl", "checkpoint.safetensors", "loss.png", "loss_by_position.json",
        "adapter/adapter_model.safetensors", "adapter/adapter_config.json",
    }  # fmt: skip
    text = "\n".join(said)
    for words in (
        "loss before",
        "0 to 16",
        "inside the old context",
        "beyond it",
        "peak memory",
        "loss.png",
        "all tokens kept",
    ):
        assert words in text
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(m["peak_bytes"] > 0 and m["seconds"] > 0 for m in metrics)


def test_training_learns(options: TrainOptions) -> None:
    options = replace(options, rank=0, steps=60, lr=0.02, dropout=0.0)
    directory = train(options, say=quiet)
    losses = json.loads((directory / "loss_by_position.json").read_text())
    assert all(new["loss"] < old["loss"] - 0.3 for old, new in zip(losses["before"], losses["after"], strict=True))


def test_the_full_model_comes_with_its_tokenizer_and_new_context(options: TrainOptions, tmp_path: Path) -> None:
    assert options.model is not None
    shutil.copytree(options.model, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text("x")
    said: list[str] = []
    directory = train(replace(options, model=str(tmp_path / "base"), rank=0), say=said.append) / "model"
    assert any("inside the old context" in line and "beyond it" in line for line in said)
    assert (directory / "tokenizer.json").is_file()
    assert (directory / "chat_template.jinja").is_file()
    assert mc.Llama.from_pretrained(directory).config.max_position_embeddings == 40


def test_accumulation_has_the_normaliser_of_the_whole_step(options: TrainOptions) -> None:
    """Four documents in four batches give the gradient of the mean over the targets of all four."""
    options = replace(options, dropout=0.0, dtype="float64").resolved()

    def gradients(batch_size: int, accumulate: int) -> Tensors:
        model, tokenizer = load_to_train(options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        documents, *_ = load_data(options, model, tokenizer)
        ragged = [
            replace(d, input_ids=d.input_ids[:n], labels=d.labels[:n])
            for d, n in zip(documents, (40, 9, 23, 2), strict=False)
        ]
        trainer = Trainer(model, ragged, make_gradient(options), Schedule(1, 1.0), batch_size, accumulate)
        trainer._update = lambda lr: None  # type: ignore[method-assign]
        trainer._collect_gradients = lambda: 0.0  # type: ignore[method-assign]
        trainer.run_step()
        return take_gradients(model)

    measure(lambda: gradients(4, 1)).check(gradients(1, 4))


def test_each_batch_has_random_numbers_of_its_own(options: TrainOptions) -> None:
    model, tokenizer = load_to_train(options)
    documents, *_ = load_data(options, model, tokenizer)
    drawn = []

    def gradient(*arguments: Any) -> torch.Tensor:
        drawn.append((float(torch.rand((), generator=arguments[-1])), float(torch.rand(()))))
        return torch.zeros(())

    trainer = Trainer(model, documents, gradient, Schedule(2, 1.0), 1, 3)
    for _ in range(2):
        trainer.run_step()
    assert len({sampler for sampler, _ in drawn}) == len({dropout for _, dropout in drawn}) == 6


def test_schedule() -> None:
    schedule = Schedule(steps=110, lr=1.0, warmup=10)
    assert [schedule.lr_at(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert schedule.lr_at(60) == pytest.approx(0.55)
    assert schedule.lr_at(109) == pytest.approx(0.1, abs=1e-3)


def test_clipping() -> None:
    model = mc.Llama(mc.LlamaConfig(11, 8, 8, 1, 2, 2, 4))
    trainer = Trainer(model, [], lambda *_: torch.zeros(()), Schedule(1, 1.0, clip=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    count = sum(p.numel() for p in model.parameters())
    assert trainer._collect_gradients() == pytest.approx(math.sqrt(count))
    clipped = math.sqrt(sum(float(p.grad.square().sum()) for p in trainer.masters.values() if p.grad is not None))
    assert clipped == pytest.approx(0.5, rel=1e-4)


def test_a_non_finite_loss_stops_and_keeps_the_last_checkpoint(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train_module.make_gradient

    def make(options: TrainOptions) -> Any:
        gradient, calls = original(options), 0

        def poisoned(*arguments: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return gradient(*arguments) * (math.nan if calls == 10 else 1)  # the second batch of step 5

        return poisoned

    monkeypatch.setattr(train_module, "make_gradient", make)
    with pytest.raises(NonFiniteLoss, match=r"at step 5 \(.*text.txt, tokens .*checkpoint.safetensors is the last"):
        train(options, say=quiet)
    tensors = load_file(Path(options.output or "") / "checkpoint.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_an_interrupted_save_leaves_the_last_one_whole(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train(options, say=quiet)
    path = Path(options.output or "") / "checkpoint.safetensors"
    before = path.read_bytes()

    def half(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(before[:100])
        raise Stopped

    monkeypatch.setattr("safetensors.torch.save_file", half)
    resolved = options.resolved()
    model, tokenizer = load_to_train(resolved)
    documents, *_ = load_data(resolved, model, tokenizer)
    trainer = Trainer(model, documents, make_gradient(resolved), Schedule(1, 1.0))
    with pytest.raises(Stopped):
        Run(path.parent).save(trainer)
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*"))


def test_a_kill_while_writing_leaves_a_whole_file(tmp_path: Path) -> None:
    """SIGKILL at a random moment of writing the same file again and again."""
    path = tmp_path / "checkpoint.safetensors"
    program = (
        "import sys, torch; from minichunk.files.atomic import write_tensors\n"
        "for i in range(10**6): write_tensors(sys.argv[1], {'x': torch.full((10**6,), float(i))}); print(i, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    x = load_file(path)["x"]
    assert (x == x[0]).all()
    assert x[0] >= 4


def test_a_file_is_replaced_and_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with path.open() as reader:
        write_text(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_a_metrics_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    for tail in (b'{"step": 2, "lo', b"\0\0\0\n", b"{\n\xff\n"):
        run = Run(tmp_path)
        run.metrics.unlink(missing_ok=True)
        run.append_metrics({"step": 1})
        with run.metrics.open("ab") as file:
            file.write(tail)
        assert run.read_metrics() == [{"step": 1}]


def test_a_damaged_run_file_is_named(options: TrainOptions) -> None:
    directory = train(replace(options, steps=1), say=quiet)
    info = json.loads((directory / "run.json").read_text())
    for name, value in (("steps", "1"), ("unknown", 1)):
        broken = {**info, "options": {**info["options"], name: value}}
        (directory / "run.json").write_text(json.dumps(broken))
        with pytest.raises(mc.InputError, match=r"run.json is not of this version"):
            train(TrainOptions(output=str(directory), resume=True), say=quiet)


def test_ctrl_c_in_the_last_evaluation_says_how_to_resume(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train_module.loss_by_position

    def interrupted(*arguments: Any) -> Any:
        if (Path(options.output or "") / "checkpoint.safetensors").exists():
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(train_module, "loss_by_position", interrupted)
    with pytest.raises(Interrupted, match=r"after step 6; go on with: minichunk train --output .* --resume"):
        train(options, say=quiet)


def test_loss_by_position_is_the_mean_of_the_token_losses(options: TrainOptions) -> None:
    resolved = replace(options, dtype="float64").resolved()
    model, tokenizer = load_to_train(resolved)
    documents, *_ = load_data(resolved, model, tokenizer)
    spans = loss_by_position(model, documents[:3], 7, [(0, 16), (16, 40), (40, 99)])
    model.eval()
    logits = torch.cat([model(d.input_ids[None]).detach() for d in documents[:3]])
    ids = torch.stack([d.input_ids for d in documents[:3]])
    each = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    each = each.view(3, -1)
    assert [(s.start, s.stop) for s in spans] == [(0, 16), (16, 40)]
    assert spans[0].loss == pytest.approx(float(each[:, :16].mean()), rel=1e-12)
    assert spans[1].loss == pytest.approx(float(each[:, 16:].mean()), rel=1e-12)


def test_spans() -> None:
    assert spans_for(256, 2048) == [(0, 256), (256, 512), (512, 1024), (1024, 2048)]
    assert spans_for(256, 700) == [(0, 256), (256, 512), (512, 700)]
    assert spans_for(8192, 2048) == [(0, 256), (256, 512), (512, 1024), (1024, 2048)]


def test_the_default_data_are_the_shipped_novels() -> None:
    options = TrainOptions(eval_documents=2).resolved()
    model, tokenizer = load_to_train(options)
    training, validation, line = load_data(options, model, tokenizer)
    assert {piece.name.split(",")[0].rpartition("/")[2] for piece in training} == {"persuasion.txt"}
    assert {piece.name.split(",")[0].rpartition("/")[2] for piece in validation} == {"northangerabbey.txt"}
    assert len(validation) == 2
    assert "all tokens kept" in line


def test_every_step_has_randomness_of_its_own() -> None:
    seeds: list[tuple[int, int]] = []

    def gradient(model: mc.Llama, ids: torch.Tensor, labels: torch.Tensor, n: int, generator: torch.Generator) -> Any:
        seeds.append((torch.initial_seed(), generator.initial_seed()))
        return torch.zeros(())

    model = mc.Llama(mc.LlamaConfig(11, 8, 8, 1, 2, 2, 4))
    documents = [train_module.Document("a", torch.arange(3), torch.arange(3))]
    for seed in (0, 1):
        trainer = Trainer(model, documents, gradient, Schedule(3, 1.0), seed=seed)
        for _ in range(3):
            trainer.run_step()
    assert len(set(seeds)) == 6
