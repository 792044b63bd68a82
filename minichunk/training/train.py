"""`minichunk train`: everything around the training loop, from options to files."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..chunks import cut
from ..errors import InputError
from ..files.atomic import human_bytes, write_tensors
from ..models.partial import describe
from ..pipeline.links import RankLost, linked, local_device, started
from .evaluate import loss_by_position, spans_for
from .load import check_host_room, load_data, load_teacher, load_to_train, make_gradient
from .loop import NonFiniteLoss, Ranks, Schedule, Trainer
from .options import PREFERENCES, TrainOptions, flag
from .preferences import measure_pairs, score_reference
from .run_directory import Measured, Run, peak_memory, table, write_results

LARGE = 10**9  # parameters from which on a chunk's activations are recomputed unless told otherwise


def train(
    options: TrainOptions, say: Callable[[str], object] = print,
    on_step: Callable[[dict[str, Any]], object] = lambda metrics: None,
) -> Path:  # fmt: skip
    """Run the training that `options` describe; with `resume` continue the one in `options.output`.

    Under torchrun, called on all processes; the first one speaks and writes. Of a run that is continued, only
    `pipeline` and `timeout` may be said.
    on_step: called on the first process after each step, with what metrics.jsonl gets of it.
    Returns the run's directory. Raises InputError before training, NonFiniteLoss, KeyboardInterrupt, which says how to
    go on, after saving on Ctrl-C, and RankLost if another process ends or does not answer.
    """
    resumed: Run | None = None
    before: Measured = []
    if options.resume:
        theirs = ("output", "resume", "pipeline", "timeout")
        if extra := [f.name for f in fields(options) if f.name not in theirs and getattr(options, f.name) != f.default]:
            raise InputError(f"--resume continues with the run's own options: leave out {flag(min(extra))}")
        resumed = Run.existing(options.output)
        stored, before = resumed.read_info()
        options = replace(stored, pipeline=options.pipeline, timeout=options.timeout)
    options = options.resolved()
    if options.deterministic:  # until this process ends
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    with linked(options.pipeline, local_device(options.device), options.timeout) as links:
        return _train(options, resumed, before, links, say, on_step)


def _train(options: TrainOptions, resumed: Run | None, before: Measured, links: Any, say: Any, on_step: Any) -> Path:
    model, tokenizer = load_to_train(options, links)
    ranks = Ranks(model)
    say = say if ranks.is_first else lambda line: None
    if options.offload:
        check_host_room(model, options)
    teacher = load_teacher(options, tokenizer, model.config.vocab_size)
    training, validation, line = load_data(options, model, tokenizer)
    run = resumed or Run(ranks.everyones(Run.new(options.output).directory if ranks.is_first else Path())[0])
    total, trainable = ranks.count_parameters()
    recompute = total >= LARGE if options.recompute is None else options.recompute
    options = replace(options, output=str(run.directory), recompute=recompute)
    say(f"model   {options.model}: {total:,} parameters, {trainable:,} of them trained, {options.dtype}")
    rope = ", ".join(f"{name} {value}" for name, value in (ranks.model.rope or {}).items())
    for title, words in (("past", describe(model.config)), ("rope", rope), ("ranks", ranks.describe()), ("data", line)):
        if words:
            say(f"{title:7} {words}")
    num_chunks = 1 if options.method == "full" else len(cut(options.seq_len, options.chunk_size))
    say(f"method  {options.method}, {options.seq_len:,} tokens in {num_chunks} chunk{'s' if num_chunks > 1 else ''}")
    context = model.config.max_position_embeddings
    spans = spans_for(context, max(map(len, validation), default=0))
    reference: dict[str, Tensor] | None = None

    def measure(when: str) -> Measured:
        if reference is not None:
            return measure_pairs(model, validation, options, reference, f"held-out pairs {when}")
        return loss_by_position(model, validation, options.chunk_size, spans, f"loss by position {when}")

    if options.objective in PREFERENCES:  # no weight has changed yet, nor been restored
        known = run.read_reference() if resumed and run.reference.exists() else None
        reference = score_reference(model, training, validation, options) if known is None else known
    if not resumed:
        before = measure("before")
        if reference:
            write_tensors(run.reference, reference, {})
        if ranks.is_first:
            run.write_info(options, before)
    schedule = Schedule(options.steps, options.lr, options.warmup, options.weight_decay, options.clip)
    how = (make_gradient(options, reference, teacher), schedule, options.batch_size, options.accumulate, options.seed)
    trainer = Trainer(model, training, *how)
    if resumed:
        run.restore(trainer)
        say(f"resume  {run.directory} after step {trainer.step} of {options.steps}")
    try:
        _run_steps(trainer, run, options, on_step)
        try:
            write_results(ranks, run, options, before, after := measure("after"))
        except KeyboardInterrupt:  # the last step is saved
            raise KeyboardInterrupt(_how_to_resume(trainer, run)) from None
    except (NonFiniteLoss, RankLost) as error:
        last_good = f"; {run.checkpoint} is the last good one" if run.checkpoint.exists() else ""
        raise type(error)(f"{error}{last_good}") from None
    if before:
        say(f"\n{table(before, after, context, len(validation))}")
    peaks = ranks.everyones(peak_memory(trainer.device))
    of_ranks = f", on the fullest of {len(peaks)} processes" if len(peaks) > 1 else ""
    say(f"\npeak memory  {human_bytes(max(peaks))}{of_ranks}")
    say(f"written      {run.directory}")
    return run.directory


def _run_steps(trainer: Trainer, run: Run, options: TrainOptions, on_step: Any) -> None:
    """Ctrl-C lets the step at work end, and saves; a second one stops at once."""
    ranks, interrupted = trainer.ranks, list[int]()

    def on_interrupt(number: int, _: object) -> None:
        interrupted.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if ranks.is_first:
            tqdm.write("Ctrl-C: finishing this step, then saving (press it again to stop at once)")

    previous = signal.getsignal(signal.SIGINT)
    with suppress(ValueError):  # not in the main thread: there is no Ctrl-C to catch
        signal.signal(signal.SIGINT, on_interrupt)
    bar = tqdm(total=options.steps, initial=trainer.step, desc="train", unit="step", disable=not ranks.is_first)
    try:
        while trainer.step < options.steps:
            metrics: dict[str, Any] = trainer.run_step()
            peaks, interrupts = zip(*ranks.everyones((peak_memory(trainer.device), bool(interrupted))), strict=True)
            if ranks.is_first:
                metrics["peak_bytes"] = max(peaks)
                run.append_metrics(metrics)
                on_step(metrics)
            shown: dict[str, str] = {name: f"{metrics[name]:.3f}" for name in ("loss", "margin") if name in metrics}
            shown |= {"tokens/s": f"{metrics['tokens'] / metrics['seconds']:,.0f}", "peak": human_bytes(max(peaks))}
            bar.set_postfix(shown)
            bar.update()
            if any(interrupts) or trainer.step % options.save_every == 0 or trainer.step == options.steps:
                run.save(trainer)
            if any(interrupts):
                raise KeyboardInterrupt(_how_to_resume(trainer, run))
    finally:
        bar.close()
        with suppress(ValueError):
            signal.signal(signal.SIGINT, previous)


def _how_to_resume(trainer: Trainer, run: Run) -> str:
    links, command = trainer.ranks.links, "minichunk train"
    if links is not None:  # or with another number of processes
        command = f"torchrun --nproc-per-node {started().local_world} -m {command} --pipeline {links.ranks}"
    return f"saved after step {trainer.step}; go on with: {command} --output {run.directory} --resume"
