"""What the commands read, from their options: the model and, for a training, its data and its gradient."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..errors import InputError
from ..files.atomic import check_room
from ..files.chat import ChatTemplate, load_chat_template
from ..files.documents import Document, check_vocabulary, cut_documents, load_tokenizer, read_documents
from ..files.shipped import EXTENDED_ON, MEASURED_ON, SHIPPED_MODEL, novel
from ..full import full
from ..models.adapter_files import load_adapter
from ..models.load import change_rope, load_model
from ..models.lora import add_lora, default_targets
from ..models.partial import partial_context
from ..models.shapes import layer_memory_bytes, random_model
from ..models.stack import Stack
from ..pipeline.links import Links
from ..pipeline.pipeline_seco import pipeline_seco, pipeline_spaco
from ..pipeline.split_layers import split_layers
from ..pipeline.stage import PipelineStage
from ..pipeline.start import local_device, started
from ..seco import seco
from ..spaco import spaco
from .loop import Gradient
from .options import DTYPES, ModelOptions, TrainOptions, check_device, default_dtype


def load_as_told(
    options: ModelOptions, prepare: Callable[[Stack], object] = lambda model: None
) -> tuple[Stack, Tokenizer]:
    """The model and the tokenizer that the options name. prepare: see `load_model`. Raises InputError."""
    device, directory = check_device(options.device), options.model or SHIPPED_MODEL
    dtype, tokenizer = DTYPES[options.dtype or default_dtype(device)], load_tokenizer(directory)
    model = load_model(directory, dtype, device, getattr(options, "load_in_4bit", False), prepare)
    if (adapter := getattr(options, "adapter", None)) is not None:
        load_adapter(model, adapter)
    return model, tokenizer


def load_to_train(options: TrainOptions, links: Links | None = None) -> tuple[Any, Tokenizer]:
    """The model to train, or the `PipelineStage` of this rank's links, and the tokenizer. Raises InputError."""
    torch.manual_seed(options.seed)  # the adapter's initial weights
    stages: list[PipelineStage] = []

    def prepare(model: Stack) -> None:
        if not isinstance(model, Stack) and (links is not None or options.offload):
            raise InputError("--pipeline and --offload need a model of minichunk's own: leave them out")
        if (pattern := options.pattern()) is not None:
            partial_context(model, pattern, options.full_layers)
        if rope := options.rope_parameters():
            change_rope(model, rope)
        if links is not None:
            shaped = model.config, DTYPES[options.dtype], options.rank, options.targets or default_targets(model)
            memory = memory_of_layers(options, model.config, DTYPES[options.dtype])
            split = split_layers(random_model(*shaped, "meta", options.load_in_4bit), links.ranks, memory)
            stages.append(PipelineStage(model, split, links=links))

    model, tokenizer = load_as_told(replace(options, device=local_device(options.device)), prepare)
    if options.rank:
        add_lora(model, options.rank, options.alpha, options.targets or default_targets(model), options.dropout)
    return (stages[0] if stages else model), tokenizer


def memory_of_layers(options: TrainOptions, config: Any, dtype: torch.dtype) -> list[int]:
    """Bytes that each layer remembers of a batch of pieces, with the gradients sent back to that."""
    how = options.chunks(options.seq_len)[1], options.options(), options.batch_size
    return [sum(both) for both in layer_memory_bytes(config, dtype, *how)]


def check_host_room(model: Stack, options: TrainOptions) -> None:
    """Raise InputError unless the host has room for what goes from block to block with `--offload`."""
    borders = math.ceil(len(model.layers) / int(options.layers_at_once or 1)) - 1
    numbers = borders * options.batch_size * options.seq_len * model.config.hidden_size * started().local_world
    what = f"--offload of {options.batch_size} times {options.seq_len:,} tokens between {borders + 1} blocks of layers"
    advice = "take a larger --layers-at-once, a smaller --batch-size, a shorter --seq-len, or free memory"
    check_room(what, numbers * model.hidden_dtype.itemsize, torch.device("cpu"), advice)


def read_pieces(
    paths: Sequence[str | Path], model: Stack, tokenizer: Tokenizer, chat: ChatTemplate | None, seq_len: int
) -> tuple[list[Document], str]:
    """The texts cut into pieces of at most `seq_len` tokens, and a line that says what was kept. Raises InputError."""
    documents = read_documents(paths, tokenizer, model.config.first_eos(), chat)
    check_vocabulary(documents, model.config.vocab_size)
    return cut_documents(documents, seq_len)


def load_data(options: TrainOptions, model: Stack, tokenizer: Tokenizer) -> tuple[list[Document], list[Document], str]:
    """Training and validation pieces, and a line that says what was kept. Raises InputError."""
    chat = load_chat_template(options.model) if options.chat_template else None
    training, line = read_pieces(options.data or [novel(EXTENDED_ON)], model, tokenizer, chat, options.seq_len)
    if options.val_data or not options.data:
        texts = options.val_data or [novel(MEASURED_ON)]
        validation, val_line = read_pieces(texts, model, tokenizer, chat, options.seq_len)
        line += f"\n        held out: {val_line}"
    else:  # the last pieces: what comes before them is trained on, what comes after nobody has seen
        count = min(round(len(training) * options.val_fraction) or int(options.val_fraction > 0), len(training) - 1)
        training, validation = training[: len(training) - count], training[len(training) - count :]
        line += f"\n        held out: the last {count:,} of them"
    longest_first = sorted(validation, key=len, reverse=True)  # stable: those that reach the far positions
    return training, longest_first[: options.eval_documents], line


def make_gradient(options: TrainOptions) -> Gradient:
    """The method of the options as a function of model or stage, input_ids, labels, num_targets, generator."""
    keywords = options.keywords()

    def gradient(model: Any, input_ids: Tensor, labels: Tensor, num_targets: int, generator: torch.Generator) -> Tensor:
        if options.method == "full":
            return full(model, input_ids, labels, num_targets=num_targets, recompute=keywords["recompute"])
        over_ranks, told = isinstance(model, PipelineStage), {**keywords, "num_targets": num_targets}
        if options.method == "seco":
            return (pipeline_seco if over_ranks else seco)(model, input_ids, labels, options.chunk_size, **told)
        told |= {"sampler": options.make_sampler(), "generator": generator}
        return (pipeline_spaco if over_ranks else spaco)(model, input_ids, labels, options.chunk_size, **told)

    return gradient
