"""`minichunk train`: everything around the training loop, from options to files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ..chunks import cut
from ..files.atomic import human_bytes
from ..files.documents import Document
from ..models.partial import describe
from ..pipeline.links import Links, RankLost
from ..pipeline.start import linked, local_device, started
from .evaluate import Span, loss_by_position, spans_for
from .interrupt import interrupt_flag
from .job import load_data, load_model, make_gradient
from .load import check_host_room
from .loop import NonFiniteLoss, Schedule, Trainer, deterministic_kernels
from .options import DTYPES, TrainOptions, known
from .ranks import Ranks
from .report import loss_table, peak_memory
from .results import write_results
from .run_directory import Run

LARGE = 10**9  # parameters from which on a chunk's activations are recomputed unless told otherwise


class Interrupted(Exception):
    """Ctrl-C: the run is saved, and the message says how to go on."""


def train(options: TrainOptions, say: Callable[[str], object] = print) -> Path:
    """Run the training that `options` describe; with `resume` continue the one in `options.output`.

    Under torchrun, called on all processes; the first one speaks and writes. Of a run that is continued, only
    `pipeline` and `timeout` may be said: it may go on with another number of processes.

    Returns the run's directory. Raises InputError before training for anything wrong in the
    options, the model or the data, NonFiniteLoss, and Interrupted after saving on Ctrl-C; RankLost if another process
    ends or does not answer.
    """
    before: list[Span] | None = None
    resume = options.resume
    if resume:
        options.check_resume()
        run = Run.existing(options.output)
        stored_options, stored = run.read_info()
        options = replace(stored_options, pipeline=options.pipeline, timeout=options.timeout).resolved()
        before = [Span(**span) for span in stored]
    else:
        options = options.resolved()
    ranks, device = known(options.pipeline), local_device(known(options.device))
    with (
        deterministic_kernels(options.deterministic),
        linked(ranks, device, timedelta(seconds=options.timeout)) as links,
    ):
        return _train(options, run if resume else None, before, links, say)


def _train(
    options: TrainOptions,
    resumed: Run | None,
    before: list[Span] | None,
    links: Links | None,
    say: Callable[[str], object],
) -> Path:
    model, tokenizer = load_model(options, links)
    ranks = Ranks(model)
    say = say if ranks.is_first else lambda line: None
    if options.offload:
        check_host_room(model, options.batch_size, options.most_kept(), DTYPES.get(options.cache_grad_dtype or ""))
    training, validation, line = load_data(options, model, tokenizer)
    run = resumed or Run(ranks.everyones(Run.new(options.output).directory if ranks.is_first else Path())[0])
    total, trainable = ranks.count_parameters()
    large = total >= LARGE
    recompute = large if options.recompute is None else options.recompute
    options = replace(options, output=str(run.directory), recompute=recompute)
    say(f"model   {options.model}: {total:,} parameters, {trainable:,} of them trained, {options.dtype}")
    if seen := describe(model.config):
        say(f"past    {seen}")
    if where := ranks.describe():
        say(f"ranks   {where}")
    say(f"data    {line}")
    num_chunks = 1 if options.method == "full" else len(cut(options.seq_len, options.chunk_size))
    say(f"method  {options.method}, {options.seq_len:,} tokens in {num_chunks} chunk{'s' if num_chunks > 1 else ''}")

    evaluate = partial(_evaluate, ranks, validation, options)
    if before is None:
        before = evaluate("loss by position before")
        if ranks.is_first:
            run.write_info(options, [asdict(span) for span in before])
    trainer = Trainer(
        model,
        training,
        make_gradient(options),
        Schedule(options.steps, known(options.lr), known(options.warmup), options.weight_decay, options.clip),
        options.batch_size,
        known(options.accumulate),
        options.seed,
    )
    if resumed:
        run.restore(trainer)
        say(f"resume  {run.directory} after step {trainer.step} of {options.steps}")
    context = model.config.max_position_embeddings
    try:
        _run_steps(trainer, run, options)
        try:
            after = evaluate("loss by position after")
            written = write_results(ranks, run, options, before, after)
        except KeyboardInterrupt:  # the last step is saved
            raise Interrupted(_how_to_resume(trainer, run)) from None
    except RankLost as error:
        raise RankLost(f"{error}{_last_good(run)}") from None

    if before:
        say(f"\nmean loss on held-out text, nats per token ({len(validation)} documents)")
        say(loss_table(before, after, context))
    peaks = ranks.everyones(peak_memory(trainer.device))
    of_ranks = f", on the fullest of {len(peaks)} processes" if len(peaks) > 1 else ""
    say(f"\npeak memory  {human_bytes(max(peaks))}{of_ranks}")
    say("written      " + "\n             ".join(str(path) for path in written))
    return run.directory


def _evaluate(ranks: Ranks, documents: Sequence[Document], options: TrainOptions, title: str) -> list[Span]:
    if not documents:
        return []
    spans = spans_for(ranks.model.config.max_position_embeddings, max(len(document) for document in documents))
    mine = len(ranks.mine(documents))
    with tqdm(total=mine, desc=title, unit="document", leave=False, disable=not ranks.is_first) as bar:
        return loss_by_position(ranks.part, documents, options.chunk_size, spans, bar.update)


def _run_steps(trainer: Trainer, run: Run, options: TrainOptions) -> None:
    ranks = trainer.ranks
    with (
        interrupt_flag(speaks=ranks.is_first) as interrupted,
        tqdm(total=options.steps, initial=trainer.step, desc="train", unit="step", disable=not ranks.is_first) as bar,
    ):
        while trainer.step < options.steps:
            try:
                metrics = trainer.run_step()
            except NonFiniteLoss as error:
                raise NonFiniteLoss(f"{error}: try a lower --lr{_last_good(run)}") from None
            peaks, interrupts = zip(*ranks.everyones((peak_memory(trainer.device), bool(interrupted))), strict=True)
            peak, stops = max(peaks), any(interrupts)
            if ranks.is_first:
                run.append_metrics({**metrics, "peak_bytes": peak})
            speed = f"{metrics['tokens'] / metrics['seconds']:,.0f}"
            bar.set_postfix({"loss": f"{metrics['loss']:.3f}", "tokens/s": speed, "peak": human_bytes(peak)})
            bar.update()
            if stops or trainer.step % options.save_every == 0 or trainer.step == options.steps:
                run.save(trainer)
            if stops:
                raise Interrupted(_how_to_resume(trainer, run))


def _last_good(run: Run) -> str:
    return f"; {run.checkpoint} is the last good one" if run.checkpoint.exists() else ""


def _how_to_resume(trainer: Trainer, run: Run) -> str:
    links, command = trainer.ranks.links, "minichunk train"
    if links is not None:  # or with another number of processes
        command = f"torchrun --nproc-per-node {started().local_world} -m {command} --pipeline {links.ranks}"
    return f"saved after step {trainer.step}; go on with: {command} --output {run.directory} --resume"
