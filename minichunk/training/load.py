"""What the commands read, from their options: the model and, for a training, its data and its gradient."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..chunks import Chunk
from ..files.atomic import check_room
from ..files.chat import ChatTemplate, load_chat_template
from ..files.documents import Document, check_vocabulary, cut_documents, load_tokenizer, read_documents
from ..files.shipped import EXTENDED_ON, MEASURED_ON, SHIPPED_MODEL, novel
from ..full import full
from ..models.adapter_files import load_adapter
from ..models.load import load_model
from ..models.lora import add_lora, default_targets
from ..models.partial import partial_context
from ..models.shapes import layer_memory_bytes, memory_bytes, random_model
from ..models.stack import Stack
from ..pipeline.links import Links
from ..pipeline.pipeline_seco import pipeline_seco, pipeline_spaco
from ..pipeline.split_layers import split_layers
from ..pipeline.stage import PipelineStage
from ..pipeline.start import local_device, started
from ..protocol import Options
from ..seco import seco
from ..spaco import spaco
from .options import DTYPES, ModelOptions, TrainOptions, check_device, default_dtype, known


def load_as_told(
    options: ModelOptions, prepare: Callable[[Stack], object] = lambda model: None
) -> tuple[Stack, Tokenizer]:
    """The model of a checkpoint directory, with the adapter and the 4 bits that the options may name; its tokenizer.

    prepare: see `load_model` in models. Raises InputError, for a wrong device before anything is read.
    """
    device = check_device(options.device)
    dtype, in_4bit = DTYPES[options.dtype or default_dtype(device)], getattr(options, "load_in_4bit", False)
    directory = options.model or SHIPPED_MODEL
    tokenizer = load_tokenizer(directory)
    model = load_model(directory, dtype, device, in_4bit, prepare)
    if (adapter := getattr(options, "adapter", None)) is not None:
        load_adapter(model, adapter)
    return model, tokenizer


def load_to_train(options: TrainOptions, links: Links | None = None) -> tuple[Any, Tokenizer]:
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
        add_lora(model, options.rank, options.alpha, options.targets or default_targets(model), options.dropout)
    return (stages[0] if stages else model), tokenizer


def layers_of_ranks(options: TrainOptions, model: Stack, ranks: int) -> list[int]:
    """How many layers each rank gets, with their adapters and their memory of a piece; as `minichunk plan --gpus` does.

    Raises InputError for fewer layers than ranks.
    """
    config, dtype, how = model.config, DTYPES[known(options.dtype)], Options(**options.keywords())
    targets = options.targets or default_targets(model)
    shaped = random_model(config, dtype, options.rank, targets, "meta", options.load_in_4bit)
    memory = layer_memory_bytes(config, dtype, options.most_kept(), how, options.batch_size)
    return split_layers(shaped, ranks, None if options.offload else [sum(both) for both in memory])


def check_host_room(model: Stack, batch: int, kept: Sequence[Chunk], grad_dtype: torch.dtype | None) -> None:
    """Raise InputError unless the host has room for the memory of `--offload`.

    model: or this rank's part of it, where all ranks of this machine are taken to have as many layers.
    batch: sequences at a time. kept: the most chunks that a step backpropagates.
    """
    how = Options(cache_grad_dtype=grad_dtype, offload=True)
    remembered, gradients = memory_bytes(model.config, model.like.dtype, kept, how, batch)
    wide = grad_dtype is None or grad_dtype.itemsize > 2
    ways = ["--cache-grad-dtype bfloat16"] if gradients and wide else []
    ways += ["a smaller --batch-size"] if batch > 1 else []
    what = f"--offload of {kept[-1].start:,} tokens" + (f" in each of {batch} sequences" if batch > 1 else "")
    advice = "take " + ", ".join([*ways, "a shorter --seq-len"]) + ", or free memory"
    of_machine = len(model.layers) / model.config.num_hidden_layers * started().local_world
    check_room(what, (remembered + gradients) * of_machine, torch.device("cpu"), advice)


def read_pieces(
    paths: Sequence[str | Path], model: Stack, tokenizer: Tokenizer, chat: ChatTemplate | None, seq_len: int
) -> tuple[list[Document], str]:
    """The texts cut into pieces of at most `seq_len` tokens, and a line that says what was kept. Raises InputError."""
    documents = read_documents(paths, tokenizer, model.config.first_eos(), chat)
    check_vocabulary(documents, model.config.vocab_size)
    return cut_documents(documents, seq_len)


def load_data(options: TrainOptions, model: Stack, tokenizer: Tokenizer) -> tuple[list[Document], list[Document], str]:
    """Training and validation pieces, and a line that says what was kept. Raises InputError."""
    chat = load_chat_template(known(options.model)) if options.chat_template else None
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


def make_gradient(options: TrainOptions) -> Callable[[Any, Tensor, Tensor, int, torch.Generator], Tensor]:
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
