"""Loss by position: how well a model predicts, near the start of a document and far into it; and recall beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..batch import IGNORE, shift
from ..errors import InputError
from ..files.atomic import replacing
from ..files.chat import load_chat_template
from ..files.documents import MEASURED_ON, SHIPPED_MODEL, Document, collate, novel
from ..models.lora import without_dropout
from ..models.partial import describe
from ..models.stack import Stack
from .load import load_as_told, read_pieces
from .loop import Ranks
from .options import ReadOptions, TrainOptions, changed, check_options, option
from .recall import Cell, draw_recall, recall, recall_table


@dataclass(frozen=True)
class Span:
    """Mean loss in nats per token of the targets predicted at positions `start` to `stop`."""

    start: int
    stop: int
    loss: float


@torch.no_grad()
def loss_by_position(
    model: Stack, documents: Sequence[Document], chunk_size: int, spans: Sequence[tuple[int, int]], title: str = ""
) -> list[Span]:
    """Mean loss over the documents for each span of positions; spans without a target are left out.

    Runs chunk by chunk. model: or a `PipelineStage`, on all processes; the copies of a pipeline share the documents.
    title: of a progress bar; empty for none.
    """
    ranks = Ranks(model)
    sums = torch.zeros(2, max(map(len, documents), default=1), dtype=torch.float64)  # losses; targets
    hidden = not (title and ranks.is_first)
    with without_dropout(model):
        for _, document in tqdm(ranks.mine(documents), title, unit="document", leave=False, disable=hidden):
            input_ids, labels = collate([document], model.like.device)
            targets = shift(labels)
            for rows, losses in model.chunk_losses(input_ids, targets, chunk_size):
                sums[:, rows] += torch.stack([losses[0], targets[0, rows] != IGNORE]).double().cpu()
    ranks.add(sums)
    totals = [(start, stop, *sums[:, start:stop].sum(1).tolist()) for start, stop in spans]
    return [Span(start, stop, total / count) for start, stop, total, count in totals if count]


def spans_for(context: int, length: int) -> list[tuple[int, int]]:
    """The old context, then doublings beyond it, up to `length`; halvings where all is inside it."""
    if length <= context:
        return list(pairwise([0, *(part for part in (length // 8, length // 4, length // 2) if part), length]))
    edges = [0, context]
    while edges[-1] < length:
        edges.append(min(edges[-1] * 2, length))
    return list(pairwise(edges))


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ReadOptions):
    """Measure the loss by position: how well a model predicts texts, near their start and far into them.

    Cuts the texts into pieces of at most --seq-len tokens and prints the mean loss, in nats per token,
    for each span of positions: inside the length that the model was made for, and beyond it.

      minichunk evaluate
      minichunk evaluate --model DIR --data heldout.txt --seq-len 16384 --adapter runs/1/adapter
      minichunk evaluate --model DIR --data heldout.txt --seq-len 16384 --recall --plot recall.png

    A low loss far into a text does not show that its beginning is used. --recall hides passkeys of five digits in your
    texts, at several depths and lengths up to --seq-len, and counts how often the model's likeliest answer is one.

    DIR and FILE are as `minichunk train` takes them: of a JSONL line, what would be learnt is measured.
    """

    data: tuple[str, ...] = option((), "text or JSONL files", metavar="FILE", absent="a shipped novel", group="texts")
    seq_len: int = option(2048, "tokens per piece", least=2)
    documents: int = option(8, "pieces, the longest", least=1)
    chunk_size: int = option(512, "tokens per forward pass: costs memory, changes no result", least=1)
    chat_template: bool = changed(TrainOptions, "chat_template", help="take the model's chat template", group=None)
    plot: str | None = option(None, "draw what is measured", absent="no picture", metavar="FILE.png")
    recall: bool = option(False, "also hide passkeys in the texts, and ask for them", group="recall")
    depths: int = option(5, "places of the passkey, from the text's first to its last", least=2, belongs=("recall", ()))
    trials: int = option(4, "passkeys for each depth and length", least=1, belongs=("recall", ()))
    seed: int = option(0, "another one, other passkeys in other places", least=0, belongs=("recall", ()))


def evaluate_files(options: EvaluateOptions) -> None:
    """`minichunk evaluate`: print the loss by position, and recall. Raises InputError before anything is measured."""
    check_options(options)
    if options.plot is not None and new_figure(1, 1) is None:
        raise InputError("--plot needs matplotlib: pip install 'minichunk[plot]'")
    chat = load_chat_template(options.model or SHIPPED_MODEL) if options.chat_template else None
    model, tokenizer = load_as_told(options)
    pieces, line = read_pieces(options.data or [novel(MEASURED_ON)], model, tokenizer, chat, options.seq_len)
    context, cells = model.config.max_position_embeddings, list[Cell]()
    text_ids = torch.cat([piece.input_ids for piece in pieces])
    pieces = sorted(pieces, key=len, reverse=True)[: options.documents]
    if options.recall:
        lengths = [stop for _, stop in spans_for(context, options.seq_len) if stop >= min(128, options.seq_len)]
        depths = [i / (options.depths - 1) for i in range(options.depths)]
        how = options.trials, options.chunk_size, chat, options.seed
        cells = recall(model, tokenizer, text_ids, lengths, depths, *how)
    losses = loss_by_position(model, pieces, options.chunk_size, spans_for(context, len(pieces[0])), "evaluate")
    if seen := describe(model.config):
        print(f"seen of the past: {seen}")
    print(f"{line}\n\nmean loss, nats per token ({len(pieces)} documents)")
    for span in losses:
        print(f"{f'{span.start:,} to {span.stop:,}':18} {span.loss:7.3f}")
    if cells:
        print(f"\npasskeys found by depth and tokens (and their log-probability, nats)\n{recall_table(cells)}")
    if options.plot is not None:
        figure = new_figure(10 if cells else 5, 3.8)
        by_position, *others = figure.subplots(1, 2 if cells else 1, squeeze=False)[0]
        draw_losses(by_position, {"loss": losses}, context)
        for axes in others:
            draw_recall(axes, cells)
        save_figure(figure, Path(options.plot))


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure of so many inches, which needs no screen; None if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write it as a PNG, whole or not at all. Raises InputError where that is impossible."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def draw_losses(axes: Any, losses: Mapping[str, Sequence[Span]], context: int) -> None:
    for label, spans in losses.items():
        axes.plot([(span.start + span.stop) / 2 for span in spans], [span.loss for span in spans], "o-", label=label)
    axes.axvline(context, linestyle=":", color="tab:gray", label="the old context")
    axes.set(xlabel="position", ylabel="held-out loss (nats per token)")
    axes.legend()
