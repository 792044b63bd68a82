"""What a run trains, on what and how: model, data and gradient, made from its options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..files.chat import load_chat_template
from ..files.documents import Document, check_vocabulary, cut_documents, read_documents
from ..files.shipped import EXTENDED_ON, MEASURED_ON, novel
from ..full import full
from ..models.lora import add_lora, linear_layers
from ..models.partial import partial_context
from ..models.shapes import layer_memory_bytes, random_model
from ..models.stack import Stack
from ..pipeline.links import Links
from ..pipeline.pipeline_seco import pipeline_seco, pipeline_spaco
from ..pipeline.split_layers import split_layers
from ..pipeline.stage import PipelineStage
from ..pipeline.start import local_device
from ..protocol import Options
from ..seco import seco
from ..spaco import spaco
from .load import load_as_told
from .options import DTYPES, TrainOptions, known


def load_model(options: TrainOptions, links: Links | None = None) -> tuple[Any, Tokenizer]:
    """The model that is to be trained, with its adapter or all parameters, and its tokenizer. Raises InputError.

    links: of this rank, whose `PipelineStage` is returned then; it reads its own tensors alone.
    """
    torch.manual_seed(options.seed)  # the adapter's initial weights
    stages: list[PipelineStage] = []

    def prepare(model: Stack) -> None:
        if (pattern := options.pattern()) is not None:
            partial_context(model, pattern, options.full_layers)
        if links is not None:
            stages.append(PipelineStage(model, layers_of_ranks(options, model, links.ranks), links=links))

    model, tokenizer = load_as_told(replace(options, device=local_device(known(options.device))), prepare)
    if options.rank:
        add_lora(model, options.rank, options.alpha, options.targets or linear_layers(model), options.dropout)
    return (stages[0] if stages else model), tokenizer


def layers_of_ranks(options: TrainOptions, model: Stack, ranks: int) -> list[int]:
    """How many layers each rank gets, with their adapters and their memory of a piece; as `minichunk plan --gpus` does.

    Raises InputError for fewer layers than ranks.
    """
    config, dtype = model.config, DTYPES[known(options.dtype)]
    targets = options.targets or linear_layers(model)
    shaped = random_model(config, dtype, options.rank, targets, "meta", options.load_in_4bit)
    sums = DTYPES.get(options.cache_grad_dtype or "")
    kept, how = options.most_kept(), Options(options.fill_size, bool(options.recompute), sums)
    memory = [sum(both) for both in layer_memory_bytes(config, dtype, kept, how, options.batch_size)]
    return split_layers(shaped, ranks, None if options.offload else memory)


def load_data(
    options: TrainOptions, model: Stack | PipelineStage, tokenizer: Tokenizer
) -> tuple[list[Document], list[Document], str]:
    """Training and validation pieces, and a line that says what was kept. Raises InputError."""
    chat = load_chat_template(known(options.model)) if options.chat_template else None

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


def make_gradient(options: TrainOptions) -> Callable[[Any, Tensor, Tensor, int, torch.Generator], Tensor]:
    """The method of the options as a function of model or stage, input_ids, labels, num_targets, generator."""

    def gradient(model: Any, input_ids: Tensor, labels: Tensor, num_targets: int, generator: torch.Generator) -> Tensor:
        arguments: dict[str, Any] = {"num_targets": num_targets, "recompute": bool(options.recompute)}
        if options.method == "full":
            return full(model, input_ids, labels, **arguments)
        grad_dtype = DTYPES[options.cache_grad_dtype] if options.cache_grad_dtype else None
        arguments |= {"chunk_size": options.chunk_size, "fill_size": options.fill_size, "cache_grad_dtype": grad_dtype}
        arguments["offload"] = options.offload
        over_ranks = isinstance(model, PipelineStage)
        if options.method == "seco":
            return (pipeline_seco if over_ranks else seco)(model, input_ids, labels, **arguments)
        arguments |= {"sampler": options.make_sampler(), "generator": generator}
        return (pipeline_spaco if over_ranks else spaco)(model, input_ids, labels, **arguments)

    return gradient
