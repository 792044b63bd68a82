"""A run's directory: its options, its metrics, and the checkpoint that a resume continues from."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files.atomic import digest, make_directory, open_tensors, read_json, write_json, write_tensors, write_text
from ..files.shipped import SHIPPED_MODEL
from .evaluate import Span
from .loop import Trainer
from .options import TrainOptions, check_options, options_of


def digests(options: TrainOptions) -> dict[str, str]:
    """By path, of the files of data that were named, and of the base: config, tokenizer, template and weights.

    All of a file counts but of weights, of which 64 MiB do, from all over a file.
    """
    base = Path(options.model or SHIPPED_MODEL)
    patterns = ("config.json", "tokenizer*.json", "chat_template*", "*.safetensors*")
    of_base = [str(path) for pattern in patterns for path in sorted(base.glob(pattern))]
    return {path: digest(Path(path)) for path in [*options.data, *options.val_data, *of_base]}


class Run:
    """The files of one training run in `directory`.

    run.json: options, digests of what is read, and the losses before training. metrics.jsonl: a line per step.
    checkpoint.safetensors: weights, optimizer state and step, replaced as a whole at every save.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.info = self.directory / "run.json"
        self.metrics = self.directory / "metrics.jsonl"
        self.checkpoint = self.directory / "checkpoint.safetensors"
        self.adapter, self.model = self.directory / "adapter", self.directory / "model"

    @classmethod
    def new(cls, directory: str | Path | None) -> "Run":
        """A fresh run: in `directory`, or in the first free one of runs/1, runs/2, … Raises InputError."""
        if directory is None:
            number = 1
            while Path("runs", str(number)).exists():
                number += 1
            directory = Path("runs", str(number))
        run = cls(directory)
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

    def write_info(self, options: TrainOptions, before: Sequence[Span]) -> None:
        spans = [asdict(span) for span in before]
        info = {"options": options.to_dict(), "digests": digests(options), "loss_by_position_before": spans}
        write_json(self.info, info)

    def read_info(self) -> tuple[TrainOptions, list[Span]]:
        """What was written. Raises InputError for another version's, and if data or base are not what they were."""
        info = read_json(self.info)
        try:
            stored = options_of(TrainOptions, info["options"])
            check_options(stored)
            before, then = [Span(**span) for span in info["loss_by_position_before"]], dict(info["digests"])
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise InputError(f"{self.info} is not of this version of minichunk: {error}") from None
        now = digests(stored)
        if changed := [name for name in {**then, **now} if then.get(name) != now.get(name)]:
            raise InputError(
                f"--resume: {changed[0]} is not what it was when this run began: bring it back, or begin another run"
            )
        return stored, before

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The steps' metrics, up to the first line that is not whole."""
        if not self.metrics.exists():
            return []
        metrics = []
        for line in self.metrics.read_bytes().split(b"\n")[:-1]:
            try:
                metrics.append(json.loads(line))
            except ValueError:  # a power cut may leave anything behind the last line that reached the disk
                break
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
            device = str(trainer.device)
            with open_tensors(self.checkpoint, device) as file:
                step = int((file.metadata() or {}).get("step", -1))
                if step < 0:
                    raise InputError(f"{self.checkpoint} does not say its step: it is not a checkpoint of minichunk")
                trainer.load_state(set(file.keys()), file.get_tensor, step)
        if not trainer.ranks.is_first:
            return
        lines = [json.dumps(metrics) for metrics in self.read_metrics() if metrics["step"] <= trainer.step]
        write_text(self.metrics, "".join(line + "\n" for line in lines))
