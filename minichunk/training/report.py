"""What a run shows and leaves behind at its end: the losses by position, a plot, and the adapter or the model."""

import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..files.atomic import replacing, write_json
from ..models.adapter_files import save_adapter
from .evaluate import Span
from .options import TrainOptions, known
from .ranks import Ranks
from .run_directory import Run


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
    a, b, c, d, e = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(f"{p:<{a}}  {where:<{b}}  {x:>{c}}  {y:>{d}}  {z:>{e}}" for p, where, x, y, z in rows)


def write_results(
    ranks: Ranks, run: Run, options: TrainOptions, before: Sequence[Span], after: Sequence[Span]
) -> list[Path]:
    """Write them, called on all processes; returns the paths on the first one, which alone writes."""
    model = ranks.model
    context = model.config.max_position_embeddings
    if options.rank:
        save_adapter(model, run.adapter, known(options.model), ranks.whole)
    else:
        model.config = replace(model.config, max_position_embeddings=max(context, options.seq_len))
        model.save_pretrained(run.model, ranks.whole)
    if not ranks.is_first:
        return []
    written = [run.metrics, *sorted((run.adapter if options.rank else run.model).iterdir())]
    losses, plot = run.directory / "loss_by_position.json", run.directory / "loss.png"
    write_json(losses, {"before": [asdict(s) for s in before], "after": [asdict(s) for s in after], "context": context})
    if plot_run(plot, run.read_metrics(), before, after, context):
        written.append(plot)
    else:
        tqdm.write("no loss plot: pip install 'minichunk[plot]' adds matplotlib")
    return [*written, losses]


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure of so many inches, which needs no screen; None if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write it as a PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


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
    if beyond := [span for span in before if span.stop > context]:
        by_position.axvspan(context, beyond[-1].stop, alpha=0.1, color="tab:blue", label="beyond the old context")
    title = f"Farthest loss: {before[-1].loss:.2f} before, {after[-1].loss:.2f} after" if before else "No held-out text"
    by_position.set(xlabel="position", ylabel="held-out loss (nats per token)", title=title)
    by_position.legend()
    save_figure(figure, path)
    return True
