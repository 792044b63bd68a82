"""What the commands read, from their options: the model and, for a training, its data and its gradient."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..batch import make_batch
from ..chunks import Documents
from ..errors import InputError
from ..files import documents
from ..files.atomic import check_room
from ..files.chat import ChatTemplate, load_chat_template
from ..full import full
from ..models.adapter_files import load_adapter
from ..models.config import first_eos
from ..models.load import change_rope, load_model
from ..models.lora import add_lora, default_targets
from ..models.partial import partial_context
from ..models.shapes import layer_memory_bytes, random_model
from ..models.stack import Stack
from ..pipeline.links import Links, local_device, started
from ..pipeline.pipeline_seco import pipeline_seco, pipeline_spaco
from ..pipeline.stage import PipelineStage, split_layers
from ..seco import seco
from ..spaco import spaco
from .loop import Gradient
from .options import DTYPES, PREFERENCES, ModelOptions, TrainOptions, check_device, default_dtype
from .preferences import Compared, distillation, shares_prompts, takes


def load_as_told(options: ModelOptions, prepare: Callable[[Stack], object] = lambda _: None) -> tuple[Stack, Tokenizer]:
    """The model and the tokenizer that the options name. prepare: see `load_model`. Raises InputError."""
    device, directory = check_device(options.device), options.model or documents.SHIPPED_MODEL
    dtype, tokenizer = DTYPES[options.dtype or default_dtype(device)], documents.load_tokenizer(directory)
    model = load_model(directory, dtype, device, getattr(options, "load_in_4bit", False), prepare)
    if (adapter := getattr(options, "adapter", None)) is not None:
        load_adapter(model, adapter)
    return model, tokenizer


def load_to_train(options: TrainOptions, links: Links | None = None) -> tuple[Any, Tokenizer]:
    """The model to train, or the `PipelineStage` of this rank's links, and the tokenizer. Raises InputError."""
    torch.manual_seed(options.seed)  # the adapter's initial weights
    stages: list[PipelineStage] = []

    def prepare(model: Stack) -> None:
        if not isinstance(model, Stack) and (links is not None or options.offload or options.layers_at_once):
            raise InputError(
                "--pipeline, --layers-at-once and --offload need a model of minichunk's own: leave them out"
            )
        if (pattern := options.pattern()) is not None:
            partial_context(model, pattern, options.full_layers)
        if rope := options.rope_parameters():
            change_rope(model, rope)
        if links is not None:
            shaped = model.config, DTYPES[options.dtype], options.rank, options.targets or default_targets(model)
            how = options.chunks(options.seq_len)[1], options.options(), options.batch_size
            memory = [sum(both) for both in layer_memory_bytes(model.config, DTYPES[options.dtype], *how)]
            split = split_layers(random_model(*shaped, "meta", options.load_in_4bit), links.ranks, memory)
            stages.append(PipelineStage(model, split, links=links))

    model, tokenizer = load_as_told(replace(options, device=local_device(options.device)), prepare)
    if options.rank:
        add_lora(model, options.rank, options.alpha, options.targets or default_targets(model), options.dropout)
    trained = stages[0] if stages else model
    if options.pack == "apart" and options.method != "full" and not takes(trained, Documents((0, 1))):
        raise InputError("--pack: the model's layers or its rope do not take several documents; take --pack open")
    return trained, tokenizer


def check_host_room(model: Stack, options: TrainOptions) -> None:
    """Raise InputError unless the host has room for what goes from block to block with `--offload`."""
    borders = math.ceil(len(model.layers) / int(options.layers_at_once or 1)) - 1
    rows = options.batch_size * options.rows
    numbers = borders * rows * options.seq_len * model.config.hidden_size * started().local_world
    what = f"--offload of {rows} times {options.seq_len:,} tokens between {borders + 1} blocks of layers"
    advice = "take a larger --layers-at-once, a smaller --batch-size, a shorter --seq-len, or free memory"
    check_room(what, numbers * model.hidden_dtype.itemsize, torch.device("cpu"), advice)


def read_pieces(
    paths: Sequence[str | Path], model: Stack, tokenizer: Tokenizer, chat: ChatTemplate | None, seq_len: int,
    objective: str | None = None,
) -> tuple[list[Any], str]:  # fmt: skip
    """Pieces, or pairs for an objective of `PREFERENCES`, and a line that says what was kept. Raises InputError."""
    if objective in PREFERENCES:
        told = tokenizer, first_eos(model.config), chat
        pairs, line = documents.read_pairs(paths, *told, with_labels=objective == "kto", seq_len=seq_len)
        documents.check_vocabulary([row for pair in pairs for row in pair.rows], model.config.vocab_size)
        return pairs, line
    texts = documents.read_documents(paths, tokenizer, first_eos(model.config), chat)
    documents.check_vocabulary(texts, model.config.vocab_size)
    return documents.cut_documents(texts, seq_len)


def load_data(options: TrainOptions, model: Stack, tokenizer: Tokenizer) -> tuple[list[Any], list[Any], str]:
    """Training and validation pieces, or pairs, and a line that says what was kept. Raises InputError."""
    chat = load_chat_template(options.model) if options.chat_template else None
    told = (model, tokenizer, chat, options.seq_len, options.objective)
    training, line = read_pieces(options.data or [documents.novel(documents.EXTENDED_ON)], *told)
    if options.val_data or not options.data:
        validation, val_line = read_pieces(options.val_data or [documents.novel(documents.MEASURED_ON)], *told)
        line += f"\n        held out: {val_line}"
    else:  # the last pieces: what comes before them is trained on, what comes after nobody has seen
        count = min(round(len(training) * options.val_fraction) or int(options.val_fraction > 0), len(training) - 1)
        training, validation = training[: len(training) - count], training[len(training) - count :]
        line += f"\n        held out: the last {count:,} of them"
    if options.pack:
        training, how = documents.pack_documents(training, options.seq_len, options.pack == "apart")
        line += f"\n        {how}"
    longest_first = sorted(validation, key=len, reverse=True)  # stable: those that reach the far positions
    return training, longest_first[: options.eval_documents], line


def load_teacher(options: TrainOptions, tokenizer: Tokenizer, vocab_size: int) -> Stack | None:
    """The model of `--teacher`, frozen; None without it. Raises InputError for one of another vocabulary."""
    if options.teacher is None:
        return None
    teacher = load_model(options.teacher, DTYPES[options.dtype], check_device(options.device))
    same = documents.load_tokenizer(options.teacher).get_vocab() == tokenizer.get_vocab()
    if not same or teacher.lm_head.weight.shape[0] != vocab_size:
        raise InputError(f"--teacher is {options.teacher}, whose vocabulary is not the model's, as it has to be")
    teacher.requires_grad_(False)
    return teacher


def make_gradient(options: TrainOptions, reference: Mapping[str, Any] | None = None, teacher: Any = None) -> Gradient:
    """The method and the objective of the options. reference: see `preferences.score_pairs`; None: no preference."""
    keywords = options.keywords()

    def gradient(model: Any, batch: Sequence[Any], num_targets: int, generator: torch.Generator) -> Tensor:
        input_ids, labels = documents.collate(batch, next(model.parameters()).device)
        compared, told = None, {**keywords}
        if reference is not None:
            compared = Compared(options, batch, labels, reference)
            told |= {"objective": lambda log_probs: compared(log_probs) / options.accumulate}
            told |= {"share": True} if shares_prompts(model, options) else {}
        elif teacher is not None:
            whole = make_batch(input_ids, labels, num_targets)
            told["chunk_loss"] = distillation(teacher, model, whole, options.chunk_size)
        else:
            told |= {"num_targets": num_targets, "starts": batch[0].starts}
        over_ranks, given = isinstance(model, PipelineStage), (model, input_ids, labels)
        if options.method == "full":
            loss = full(*given, **{name: x for name, x in told.items() if name not in keywords or name == "recompute"})
        elif options.method == "seco":
            loss = (pipeline_seco if over_ranks else seco)(*given, options.chunk_size, **told)
        else:
            told |= {"sampler": options.make_sampler(), "generator": generator}
            loss = (pipeline_spaco if over_ranks else spaco)(*given, options.chunk_size, **told)
        return loss if compared is None else torch.tensor([float(loss), *compared.measures()], dtype=torch.float64)

    return gradient
