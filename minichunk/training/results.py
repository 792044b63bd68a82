"""What a run leaves behind: the adapter or the model, the losses by position and the plot."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from ..files.atomic import write_json
from ..models.adapter_files import save_adapter
from .evaluate import Span
from .options import TrainOptions, known
from .ranks import Ranks
from .report import plot_run
from .run_directory import Run


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
    if not options.rank:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            if (path := Path(known(options.model)) / name).is_file():
                shutil.copy(path, run.model)
    written = [run.metrics, *sorted((run.adapter if options.rank else run.model).iterdir())]
    losses = run.directory / "loss_by_position.json"
    write_json(losses, {"before": [asdict(s) for s in before], "after": [asdict(s) for s in after], "context": context})
    plot = run.directory / "loss.png"
    if plot_run(plot, run.read_metrics(), before, after, context):
        written.append(plot)
    else:
        tqdm.write("no loss plot: pip install 'minichunk[plot]' adds matplotlib")
    return [*written, losses]
