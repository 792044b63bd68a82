"""`minichunk train`: everything around the training loop, from options to files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from ..chunks import cut
from ..files.atomic import write_json
from ..files.chat import load_chat_template
from ..files.documents import Document, check_vocabulary, cut_documents, read_documents
from ..files.room import human_bytes
from ..files.shipped import EXTENDED_ON, MEASURED_ON, novel
from ..full import full
from ..models.adapter_files import save_adapter
from ..models.lora import add_lora, linear_layers
from ..models.partial import describe, partial_context
from ..models.pretrained import Pretrained
from ..models.quantize import count_parameters
from ..seco import seco
from ..spaco import spaco
from .evaluate import Span, loss_by_position, spans_for
from .interrupt import interrupt_flag
from .load import check_host_room, load_as_told
from .loop import NonFiniteLoss, Schedule, Trainer, deterministic_kernels
from .options import DTYPES, TrainOptions
from .report import loss_table, peak_memory, plot_run
from .run_directory import Run

T = TypeVar("T")
LARGE = 10**9  # parameters from which on a chunk's activations are recomputed unless told otherwise


class Interrupted(Exception):
    """Ctrl-C: the run is saved, and the message says how to go on."""


def train(options: TrainOptions, resume: bool = False, say: Callable[[str], object] = print) -> Path:
    """Run the training that `options` describe, or continue the one in `options.output`.

    Returns the run's directory. Raises InputError before training for anything wrong in the
    options, the model or the data, NonFiniteLoss, and Interrupted after saving on Ctrl-C.
    """
    before: list[Span] | None = None
    if resume:
        run = Run.existing(options.output)
        options, stored = run.read_info()
        options = options.resolved()
        before = [Span(**span) for span in stored]
    else:
        options = options.resolved()
    with deterministic_kernels(options.deterministic):
        return _train(options, run if resume else None, before, say)


def _train(options: TrainOptions, resumed: Run | None, before: list[Span] | None, say: Callable[[str], object]) -> Path:
    model, tokenizer = load_model(options)
    if options.offload:
        check_host_room(model, options.batch_size, options.most_kept(), DTYPES.get(options.cache_grad_dtype or ""))
    training, validation, line = load_data(options, model, tokenizer)
    run = resumed or Run.new(options.output)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = count_parameters(model)
    large = options.recompute_attention or total >= LARGE
    recompute = large if options.recompute is None else options.recompute
    options = replace(options, output=str(run.directory), recompute=recompute)
    say(f"model   {options.model}: {total:,} parameters, {trainable:,} of them trained, {options.dtype}")
    if seen := describe(model.config):
        say(f"past    {seen}")
    say(f"data    {line}")
    num_chunks = 1 if options.method == "full" else len(cut(options.seq_len, options.chunk_size))
    say(f"method  {options.method}, {options.seq_len:,} tokens in {num_chunks} chunk{'s' if num_chunks > 1 else ''}")

    evaluate = partial(_evaluate, model, validation, options)
    if before is None:
        before = evaluate("loss by position before")
        run.write_info(options, [asdict(span) for span in before])
    trainer = Trainer(
        model,
        training,
        make_gradient(options),
        Schedule(options.steps, _known(options.lr), _known(options.warmup), options.weight_decay, options.clip),
        options.batch_size,
        options.accumulate,
        options.seed,
    )
    if resumed:
        run.restore(trainer)
        say(f"resume  {run.directory} after step {trainer.step} of {options.steps}")
    _run_steps(trainer, run, options)
    try:
        after = evaluate("loss by position after")
    except KeyboardInterrupt:
        raise Interrupted(_how_to_resume(trainer, run)) from None
    context = model.config.max_position_embeddings
    written = _write_results(model, run, options, before, after)

    if before:
        say(f"\nmean loss on held-out text, nats per token ({len(validation)} documents)")
        say(loss_table(before, after, context))
    say(f"\npeak memory  {human_bytes(peak_memory(trainer.device))}")
    say("written      " + "\n             ".join(str(path) for path in written))
    return run.directory


def load_model(options: TrainOptions) -> tuple[Pretrained, Tokenizer]:
    """The model that is to be trained, with its adapter or all parameters, and its tokenizer. Raises InputError."""
    torch.manual_seed(options.seed)  # the adapter's initial weights
    model, tokenizer = load_as_told(options.model, None, options.dtype, options.device, options.load_in_4bit)
    if (pattern := options.pattern()) is not None:
        partial_context(model, pattern, options.full_layers)
    if options.rank:
        add_lora(model, options.rank, options.alpha, options.targets or linear_layers(model), options.dropout)
    return model, tokenizer


def load_data(
    options: TrainOptions, model: Pretrained, tokenizer: Tokenizer
) -> tuple[list[Document], list[Document], str]:
    """Training and validation pieces, and a line that says what was kept. Raises InputError."""
    chat = load_chat_template(_known(options.model)) if options.chat_template else None

    def read(paths: Sequence[str | Path]) -> tuple[list[Document], str]:
        documents = read_documents(paths, tokenizer, model.config.first_eos(), chat)
        check_vocabulary(documents, model.config.vocab_size)
        return cut_documents(documents, options.seq_len)

    training, line = read(options.data or [novel(EXTENDED_ON)])
    if options.val_data or not options.data:
        validation, val_line = read(options.val_data or [novel(MEASURED_ON)])
        line += f"\n        held out: {val_line}"
    else:  # the last pieces: what comes before them is trained on, what comes after nobody has seen
        count = min(round(len(training) * options.val_fraction) or int(options.val_fraction > 0), len(training) - 1)
        training, validation = training[: len(training) - count], training[len(training) - count :]
        line += f"\n        held out: the last {count:,} of them"
    longest_first = sorted(validation, key=len, reverse=True)  # stable: those that reach the far positions
    return training, longest_first[: options.eval_documents], line


def make_gradient(options: TrainOptions) -> Callable[[Pretrained, Tensor, Tensor, int, torch.Generator], Tensor]:
    """The method of the options as a function of model, input_ids, labels, num_targets, generator."""

    def gradient(
        model: Pretrained, input_ids: Tensor, labels: Tensor, num_targets: int, generator: torch.Generator
    ) -> Tensor:
        arguments: dict[str, Any] = {"num_targets": num_targets, "recompute": bool(options.recompute)}
        if options.method == "full":
            return full(model, input_ids, labels, **arguments)
        grad_dtype = DTYPES[options.cache_grad_dtype] if options.cache_grad_dtype else None
        if options.recompute_attention:
            arguments["recompute"] = "all"
        arguments |= {"chunk_size": options.chunk_size, "fill_size": options.fill_size, "cache_grad_dtype": grad_dtype}
        arguments["offload"] = options.offload
        if options.method == "seco":
            return seco(model, input_ids, labels, **arguments)
        return spaco(model, input_ids, labels, sampler=options.make_sampler(), generator=generator, **arguments)

    return gradient


def _evaluate(model: Pretrained, documents: Sequence[Document], options: TrainOptions, title: str) -> list[Span]:
    if not documents:
        return []
    spans = spans_for(model.config.max_position_embeddings, max(len(document) for document in documents))
    with tqdm(total=len(documents), desc=title, unit="document", leave=False) as bar:
        return loss_by_position(model, documents, options.chunk_size, spans, bar.update)


def _run_steps(trainer: Trainer, run: Run, options: TrainOptions) -> None:
    with (
        interrupt_flag() as interrupted,
        tqdm(total=options.steps, initial=trainer.step, desc="train", unit="step") as bar,
    ):
        while trainer.step < options.steps:
            try:
                metrics = trainer.run_step()
            except NonFiniteLoss as error:
                kept = f"; {run.checkpoint} is the last good one" if run.checkpoint.exists() else ""
                raise NonFiniteLoss(f"{error}: try a lower --lr{kept}") from None
            peak = peak_memory(trainer.device)
            run.append_metrics({**metrics, "peak_bytes": peak})
            speed = f"{metrics['tokens'] / metrics['seconds']:,.0f}"
            bar.set_postfix({"loss": f"{metrics['loss']:.3f}", "tokens/s": speed, "peak": human_bytes(peak)})
            bar.update()
            if interrupted or trainer.step % options.save_every == 0 or trainer.step == options.steps:
                run.save(trainer)
            if interrupted:
                raise Interrupted(_how_to_resume(trainer, run))


def _how_to_resume(trainer: Trainer, run: Run) -> str:
    return f"saved after step {trainer.step}; go on with: minichunk train --output {run.directory} --resume"


def _write_results(
    model: Pretrained, run: Run, options: TrainOptions, before: list[Span], after: list[Span]
) -> list[Path]:
    context = model.config.max_position_embeddings
    written = [run.metrics]
    if options.rank:
        directory = run.directory / "adapter"
        save_adapter(model, directory, base_model=_known(options.model))
        written += [directory / "adapter_model.safetensors", directory / "adapter_config.json"]
    else:
        directory = run.directory / "model"
        model.config = replace(model.config, max_position_embeddings=max(context, options.seq_len))
        model.save_pretrained(directory)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            if (path := Path(_known(options.model)) / name).is_file():
                shutil.copy(path, directory)
        written += sorted(directory.iterdir())
    path = run.directory / "loss_by_position.json"
    write_json(path, {"before": [asdict(s) for s in before], "after": [asdict(s) for s in after], "context": context})
    plot = run.directory / "loss.png"
    if plot_run(plot, run.read_metrics(), before, after, context):
        written.append(plot)
    else:
        tqdm.write("no loss plot: pip install 'minichunk[plot]' adds matplotlib")
    return [*written, path]


def _known(value: T | None) -> T:
    assert value is not None, "TrainOptions.resolved() fills this in"
    return value
