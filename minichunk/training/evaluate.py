"""Loss by position: how well a model predicts, near the start of a document and far into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from tqdm import tqdm

from ..batch import IGNORE, shift
from ..files.documents import Document, check_vocabulary, collate, cut_documents, read_documents
from ..models.stack import Stack
from .ranks import Ranks


@dataclass(frozen=True)
class Span:
    """Mean loss in nats per token of the targets predicted at positions `start` to `stop`."""

    start: int
    stop: int
    loss: float


@torch.no_grad()
def loss_by_position(
    model: Stack,
    documents: Sequence[Document],
    chunk_size: int,
    spans: Sequence[tuple[int, int]],
    on_document: Callable[[], object] = lambda: None,
) -> list[Span]:
    """Mean loss over the documents for each span of positions; spans without a target are left out.

    Runs chunk by chunk over the cache, so that a length that can be trained can be evaluated.
    model: or a `PipelineStage`, on all processes; the copies of a pipeline share the documents.
    on_document: called after each document (a progress bar).
    """
    ranks = Ranks(model)
    length = max(len(document) for document in documents)
    sums = torch.zeros(length, dtype=torch.float64)
    counts = torch.zeros(length, dtype=torch.float64)
    was_training = model.training
    model.eval()
    for _, document in ranks.mine(documents):
        input_ids, labels = collate([document], model.like.device)
        targets = shift(labels)
        for rows, losses in model.chunk_losses(input_ids, targets, chunk_size):
            sums[rows] += losses[0].double().cpu()
            counts[rows] += (targets[0, rows] != IGNORE).double().cpu()
        on_document()
    model.train(was_training)
    ranks.add_all(sums)
    ranks.add_all(counts)
    totals = [(start, stop, sums[start:stop].sum(), counts[start:stop].sum()) for start, stop in spans]
    return [Span(start, stop, (total / count).item()) for start, stop, total, count in totals if count > 0]


def spans_for(context: int, length: int) -> list[tuple[int, int]]:
    """The old context, then doublings beyond it, up to `length`; halvings where all is inside it."""
    if length <= context:
        edges = [0, *(length >> shift_ for shift_ in (3, 2, 1) if length >> shift_ > 0), length]
    else:
        edges = [0, context]
        while edges[-1] < length:
            edges.append(min(edges[-1] * 2, length))
    return list(pairwise(edges))


def evaluate_files(
    model: str | None,
    adapter: str | None,
    data: Sequence[str] | None,
    seq_len: int,
    documents: int,
    chunk_size: int,
    load_in_4bit: bool,
    dtype: str | None,
    device: str | None,
) -> None:
    """`minichunk evaluate`: print the loss by position. Raises InputError before anything is measured."""
    from ..files.chat import load_chat_template
    from ..files.shipped import MEASURED_ON, SHIPPED_MODEL, novel
    from ..models.partial import describe
    from .checks import check_least
    from .load import load_as_told

    check_least({"seq_len": (seq_len, 2), "documents": (documents, 1), "chunk_size": (chunk_size, 1)})
    chat = load_chat_template(model or SHIPPED_MODEL)
    language_model, tokenizer = load_as_told(model, adapter, dtype, device, load_in_4bit)
    found = read_documents(data or [novel(MEASURED_ON)], tokenizer, language_model.config.first_eos(), chat)
    check_vocabulary(found, language_model.config.vocab_size)
    pieces, line = cut_documents(found, seq_len)
    pieces = sorted(pieces, key=len, reverse=True)[:documents]
    spans = spans_for(language_model.config.max_position_embeddings, len(pieces[0]))
    with tqdm(total=len(pieces), desc="evaluate", unit="document", leave=False) as bar:
        losses = loss_by_position(language_model, pieces, chunk_size, spans, bar.update)
    if seen := describe(language_model.config):
        print(seen)
    print(f"{line}\n\nmean loss, nats per token ({len(pieces)} documents)")
    for span in losses:
        print(f"{f'{span.start:,} to {span.stop:,}':18} {span.loss:7.3f}")
