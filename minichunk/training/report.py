"""What a training run shows at its end: the table of losses by position, and the plot."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..files.figures import new_figure, save_figure
from .evaluate import Span


def peak_memory(device: torch.device) -> int:
    """Bytes: the device allocator's peak on CUDA, else the largest size that this process has had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def loss_table(before: Sequence[Span], after: Sequence[Span], context: int) -> str:
    """Losses by position before and after training, as aligned text."""
    rows = [("positions", "", "loss before", "after", "change")]
    for old, new in zip(before, after, strict=True):
        where = "inside the old context" if old.stop <= context else "beyond it"
        change = f"{new.loss - old.loss:+.3f}"
        rows.append((f"{old.start:,} to {old.stop:,}", where, f"{old.loss:.3f}", f"{new.loss:.3f}", change))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1]), *(row[i].rjust(widths[i]) for i in (2, 3, 4))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def plot_run(
    path: Path, metrics: Sequence[dict[str, Any]], before: Sequence[Span], after: Sequence[Span], context: int
) -> bool:
    """Draw the loss by step and by position into a PNG; False if matplotlib is not installed."""
    figure = new_figure(10, 3.8)
    if figure is None:
        return False
    by_step, by_position = figure.subplots(1, 2)
    by_step.plot([m["step"] for m in metrics], [m["loss"] for m in metrics], color="tab:blue")
    by_step.set(xlabel="step", ylabel="training loss (nats per token)", title="Loss by step")
    for spans, label, color in ((before, "before", "tab:gray"), (after, "after", "tab:orange")):
        middles = [(span.start + span.stop) / 2 for span in spans]
        by_position.plot(middles, [span.loss for span in spans], "o-", label=label, color=color)
    if spans_beyond := [span for span in before if span.stop > context]:
        by_position.axvspan(context, spans_beyond[-1].stop, alpha=0.1, color="tab:blue", label="beyond the old context")
    by_position.set(xlabel="position", ylabel="held-out loss (nats per token)", title=_finding(before, after, context))
    by_position.legend()
    save_figure(figure, path)
    return True


def _finding(before: Sequence[Span], after: Sequence[Span], context: int) -> str:
    """A title that says what came out, at the farthest positions."""
    if not before:
        return "No held-out text"
    verb = "fell" if after[-1].loss < before[-1].loss else "did not fall"
    where = "beyond the old context" if before[-1].stop > context else "at the far end"
    return f"Loss {where} {verb}: {before[-1].loss:.2f} to {after[-1].loss:.2f}"
