"""The README's schedule of a pipeline, from the trace of a real step.

`torchrun --nproc-per-node 3 tutorials/pipeline_picture.py` writes figures/pipeline.png, in which every piece of work
takes as long as any other; with `--times FILE.png` also what the clocks said, of the shortest of a few steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import torch
import torch.distributed as dist
from matplotlib import pyplot as plt
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

import minichunk as mc
from minichunk.walk.merge import merge
from minichunk.walk.schedule import COLORS, HEIGHT, Work, draw_schedule, schedule

FIGURES = Path(__file__).parent / "figures"
CHUNKS, CHUNK_SIZE, STEPS = 6, 512, 5
SHAPE = {
    "model_type": "llama", "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CHUNKS * CHUNK_SIZE,
}  # fmt: skip
WORDS = {"fill": "fill: forward, no graph", "rebuild": "rebuild: forward again, with its graph", "backward": "backward"}
INK = "#444444"


def trace_steps() -> list[list[dict[str, Any]]]:
    """The log of all ranks, of each step."""
    torch.manual_seed(0)
    stage = mc.PipelineStage(mc.Llama(mc.LlamaConfig.from_dict(SHAPE)))
    ids = torch.randint(SHAPE["vocab_size"], (1, CHUNKS * CHUNK_SIZE))
    logs = [mc.trace(mc.pipeline_seco, stage, ids, ids, CHUNK_SIZE) for _ in range(STEPS)]
    return [merge(ranks) for ranks in zip(*stage.links.everyones(logs), strict=True)]


def draw(works: list[Work], path: Path, unit: str) -> None:
    """The schedule, with a legend, and the way of one chunk through the ranks and back."""
    ranks = 1 + max(work.rank for work in works)
    figure, axes = plt.subplots(figsize=(11, 1.3 + 0.68 * ranks), layout="constrained")
    draw_schedule(axes, works)
    at = {(work.rank, work.what, work.chunks): work for work in works}
    style = {"arrowstyle": "-|>", "color": INK, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    last = (CHUNKS - 1,)
    for low in range(ranks - 1):
        for what, a, b, words in (
            ("rebuild", low, low + 1, "hidden state"),
            ("backward", low + 1, low, "its gradient"),
        ):
            start, stop = at[a, what, last].stop, at[b, what, last].start
            side = HEIGHT / 2 if b > a else -HEIGHT / 2
            axes.annotate("", xy=(stop, b - side), xytext=(start, a + side), arrowprops=style, zorder=5)
            axes.annotate(
                words, ((start + stop) / 2, low + 0.5), (6, 0), textcoords="offset points", va="center", fontsize=8,
                color=INK, zorder=6,
            )  # fmt: skip
    axes.set(xlabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    places = {0: "\nfirst layers", ranks - 1: "\nlast layers, loss"}
    axes.set_yticks(range(ranks), [f"rank {rank}{places.get(rank, '')}" for rank in range(ranks)])
    handles = [Patch(color=COLORS[what], label=words) for what, words in WORDS.items()]
    handles.append(Patch(facecolor="white", edgecolor="#bbbbbb", label="waiting"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=10)
    figure.savefig(path, dpi=120, facecolor="white", metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the schedule of a step on several ranks; started by torchrun.")
    parser.add_argument("--output", type=Path, default=FIGURES / "pipeline.png")
    parser.add_argument("--times", type=Path, help="also write this picture, of what the clocks said")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    logs = trace_steps()
    if dist.get_rank() == 0:
        draw(schedule(logs[0], equal=True), options.output, "time, if each piece of work takes as long as any other")
        if options.times:
            best = min((schedule(log) for log in logs), key=lambda works: max(work.stop for work in works))
            draw(best, options.times, "seconds")
    dist.destroy_process_group()
