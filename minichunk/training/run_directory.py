"""A run's directory: its options, metrics, checkpoint, and at the end its losses, a plot, the adapter or the model."""

import json
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from ..files.atomic import make_directory, open_tensors, read_json, write_json, write_tensors, write_text
from ..files.checkpoint import BESIDE, digest
from ..files.documents import SHIPPED_MODEL
from ..models.adapter_files import save_adapter
from ..models.stack import Stack
from .evaluate import Span, draw_losses, new_figure, save_figure
from .loop import Ranks, Trainer
from .options import TrainOptions, check_options, options_of

Measured = list[Span] | dict[str, Any]  # what is held out: loss by position; or, of pairs, what `measure_pairs` says


def digests(options: TrainOptions) -> dict[str, str]:
    """By path, of the files of data that were named, and of the base: config, tokenizer, template and weights."""
    patterns = ("config.json", *BESIDE, "*.safetensors*")
    bases = [Path(base) for base in (options.model or SHIPPED_MODEL, options.teacher) if base]
    of_base = [str(path) for base in bases for pattern in patterns for path in sorted(base.glob(pattern))]
    return {path: digest(Path(path)) for path in [*options.data, *options.val_data, *of_base]}


class Run:
    """The files of one training run in `directory`.

    run.json: options, digests of what is read, and what was measured before training. metrics.jsonl: a line per step.
    reference.safetensors: of preferences, see `score_pairs`. checkpoint.safetensors: what `Trainer.state` says.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = path = Path(directory)
        self.info, self.metrics = path / "run.json", path / "metrics.jsonl"
        self.checkpoint, self.reference = path / "checkpoint.safetensors", path / "reference.safetensors"
        self.adapter, self.model = path / "adapter", path / "model"

    @classmethod
    def new(cls, directory: str | Path | None) -> "Run":
        """A fresh run: in `directory`, or in the first free one of runs/1, runs/2, … Raises InputError."""
        run = cls(directory or next(path for n in count(1) if not (path := Path("runs", str(n))).exists()))
        if run.info.exists():
            raise InputError(f"{directory} holds a run already: add --resume to continue it, or name another --output")
        make_directory(run.directory)
        return run

    @classmethod
    def existing(cls, directory: str | Path | None) -> "Run":
        """The run in `directory`, or the newest one in runs/. Raises InputError if there is none."""
        if directory is None:
            found = [path for path in Path("runs").glob("*/run.json") if path.parent.name.isdigit()]
            if not found:
                raise InputError("--resume found no run in runs/: name its directory with --output")
            directory = max(found, key=lambda path: int(path.parent.name)).parent
        run = cls(directory)
        if not run.info.is_file():
            raise InputError(f"--resume: {directory} holds no run (run.json is missing)")
        return run

    def write_info(self, options: TrainOptions, before: Measured) -> None:
        info = {"options": asdict(options), "digests": digests(options), "before": as_json(before)}
        write_json(self.info, info)

    def read_info(self) -> tuple[TrainOptions, Measured]:
        """What was written. Raises InputError for another version's, and if data or base are not what they were."""
        info = read_json(self.info)
        try:
            stored = options_of(TrainOptions, info["options"])
            check_options(stored)
            before, then = info["before"], dict(info["digests"])
            before = before if isinstance(before, dict) else [Span(**span) for span in before]
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise InputError(f"{self.info} is not of this version of minichunk: {error}") from None
        now = digests(stored)
        if changed := [name for name in {**then, **now} if then.get(name) != now.get(name)]:
            raise InputError(f"--resume: {changed[0]} is not what it was: bring it back, or begin another run")
        return stored, before

    def read_reference(self) -> dict[str, Tensor]:
        """Raises InputError for a damaged one."""
        with open_tensors(self.reference) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The steps' metrics, up to the first line that is not whole."""
        metrics = list[dict[str, Any]]()
        with suppress(FileNotFoundError, ValueError):  # a power cut may leave anything behind the last whole line
            metrics.extend(map(json.loads, self.metrics.read_bytes().split(b"\n")[:-1]))
        return metrics

    def save(self, trainer: Trainer) -> None:
        """Called on all processes; the first one writes what all have, whatever their number: one file."""
        whole = trainer.ranks.whole(trainer.state())
        if trainer.ranks.is_first and whole is not None:
            write_tensors(self.checkpoint, whole, {"step": str(trainer.step)})

    def restore(self, trainer: Trainer) -> None:
        """Bring the trainer, and metrics.jsonl, back to the last save; to the start if there was none."""
        there = trainer.ranks.everyones(self.checkpoint.exists())
        if any(there) and not all(there):
            raise InputError(f"not all processes see {self.checkpoint}: it must be on a disk that all of them share")
        if all(there):
            with open_tensors(self.checkpoint, str(trainer.device)) as file:
                trainer.load_state(set(file.keys()), file.get_tensor, int(file.metadata()["step"]))
        if trainer.ranks.is_first:
            lines = [json.dumps(metrics) + "\n" for metrics in self.read_metrics() if metrics["step"] <= trainer.step]
            write_text(self.metrics, "".join(lines))


def peak_memory(device: torch.device) -> int:
    """Bytes: the device allocator's peak on CUDA, else the largest size that this process has had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def as_json(measured: Measured) -> Any:
    return measured if isinstance(measured, dict) else [asdict(span) for span in measured]


def table(before: Any, after: Any, context: int, count: int) -> str:
    """What was measured before and after training, of so many documents or pairs, as aligned text."""
    if isinstance(before, dict):
        lines = [f"{f'{count} held-out pairs':21} {'before':>9} {'after':>9}"]
        return "\n".join([*lines, *(f"{name:21} {x:9.3f} {after[name]:9.3f}" for name, x in before.items())])
    title = f"mean loss on held-out text, nats per token ({count} documents)"
    lines = [title, f"{'positions':38}  loss before  after  change"]
    for old, new in zip(before, after, strict=True):
        where = "inside the old context" if old.stop <= context else "beyond it"
        losses = f"{old.loss:11.3f}  {new.loss:5.3f}  {new.loss - old.loss:+.3f}"
        lines.append(f"{f'{old.start:,} to {old.stop:,}':14}  {where:22}  {losses}")
    return "\n".join(lines)


def write_results(ranks: Ranks, run: Run, options: TrainOptions, before: Measured, after: Measured) -> None:
    """Called on all processes; the first one writes."""
    model, context = ranks.model, ranks.model.config.max_position_embeddings
    if options.rank:
        save_adapter(model, run.adapter, options.model, ranks.whole)
    else:
        config, longest = model.config, max(context, options.seq_len)
        rule = getattr(config, "rope_scaling", None)
        if not isinstance(model, Stack):  # transformers'
            config.max_position_embeddings = longest
        elif rule is None or rule.rope_type != "dynamic":  # which stretches by the old length
            model.config = replace(config, max_position_embeddings=longest)
        model.save_pretrained(run.model, ranks.whole)
    if not ranks.is_first:
        return
    name = "preferences.json" if options.rows == 2 else "loss_by_position.json"
    write_json(run.directory / name, {"before": as_json(before), "after": as_json(after), "context": context})
    plot_run(run.directory / "loss.png", run.read_metrics(), before, after, context)


def plot_run(path: Path, metrics: Sequence[dict[str, Any]], before: Any, after: Any, context: int) -> None:
    """Draw the loss by step, and by position or the margin of pairs, into a PNG, if matplotlib is installed."""
    if (figure := new_figure(10, 3.8)) is None:
        tqdm.write("no loss plot: pip install 'minichunk[plot]' adds matplotlib")
        return
    by_step, right = figure.subplots(1, 2)
    by_step.plot([m["step"] for m in metrics], [m["loss"] for m in metrics])
    by_step.set(xlabel="step", ylabel=f"training loss{'' if isinstance(before, dict) else ' (nats per token)'}")
    if isinstance(before, dict):
        seen = [m for m in metrics if "margin" in m]
        right.plot([m["step"] for m in seen], [m["margin"] for m in seen], label="trained on")
        right.plot([0, len(metrics)], [before.get("margin"), after.get("margin")], "o-", label="held out")
        right.set(xlabel="step", ylabel="margin of the rewards")
        right.legend()
    else:
        draw_losses(right, {"before": before, "after": after}, context)
    save_figure(figure, path)
