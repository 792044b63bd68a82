"""The schedule of a pipeline, in the order of a real step.

`torchrun --nproc-per-node 3 tutorials/pipeline_picture.py` writes figures/pipeline.png, in which every piece of work
takes as long as any other.
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

FIGURES = Path(__file__).parent / "figures"
CHUNKS, CHUNK_SIZE, HEIGHT, INK = 6, 16, 0.74, "#444444"
SHAPE = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 12,
    "num_attention_heads": 2,
}  # fmt: skip
COLORS = {"fill": "#4878b0", "rebuild": "#e0a030", "backward": "#4a9c5d"}
WORDS = {"fill": "fill: forward, no graph", "rebuild": "rebuild: forward again, with its graph", "backward": "backward"}
Work = tuple[str, int]  # what is done, and with which chunk


def order_of_work(stage: mc.PipelineStage, ids: torch.Tensor) -> list[Work]:
    """What this rank does in a step, in its order."""
    seen, waiting = list[Work](), list[int]()
    run, fill, backward = stage.run, stage.fill, torch.autograd.backward

    def watched_run(x: torch.Tensor, memory: Any, chunks: Any, options: Any) -> Any:
        if torch.is_grad_enabled():  # else it is part of a fill
            waiting.append(chunks[0].start // CHUNK_SIZE)
            seen.append(("rebuild", waiting[-1]))
        return run(x, memory, chunks, options)

    def watched_fill(x: torch.Tensor, memory: Any, chunks: Any, options: Any) -> Any:
        seen.append(("fill", chunks[0].start // CHUNK_SIZE))
        return fill(x, memory, chunks, options)

    def watched_backward(*arguments: Any) -> None:
        seen.append(("backward", waiting.pop(0)))
        backward(*arguments)

    stage.run, stage.fill, torch.autograd.backward = watched_run, watched_fill, watched_backward  # type: ignore
    mc.pipeline_seco(stage, ids, ids, CHUNK_SIZE)
    torch.autograd.backward = backward
    return seen


def schedule(orders: list[list[Work]]) -> dict[tuple[int, str, int], int]:
    """When each (rank, what, chunk) begins, if each piece of work takes one unit of time and a message none."""
    starts, free, left = dict[tuple[int, str, int], int](), [0] * len(orders), [list(order) for order in orders]
    while any(left):
        for rank, (what, chunk) in [(rank, order[0]) for rank, order in enumerate(left) if order]:
            other = rank + 1 if what == "backward" else rank - 1  # whose hidden state, or gradient of one, it needs
            if other in range(len(orders)) and (other, what, chunk) not in starts:
                continue
            starts[rank, what, chunk] = max(free[rank], starts.get((other, what, chunk), -1) + 1)
            free[rank] = starts[rank, what, chunk] + 1
            left[rank].pop(0)
    return starts


def draw(starts: dict[tuple[int, str, int], int], ranks: int, path: Path) -> None:
    """Ranks by time, a box for each piece of work, and the way of one chunk through the ranks and back."""
    figure, axes = plt.subplots(figsize=(11, 1.3 + 0.68 * ranks), layout="constrained")
    for (rank, what, chunk), start in starts.items():
        axes.barh(rank, 1, left=start, height=HEIGHT, color=COLORS[what], edgecolor="white", lw=1.2)
        style = {"ha": "center", "va": "center", "color": "white", "weight": "bold", "fontsize": 9}
        axes.text(start + 0.5, rank, str(chunk), **style)
    for low in range(ranks - 1):
        for what, a, b, words in (
            ("rebuild", low, low + 1, "hidden state"),
            ("backward", low + 1, low, "its gradient"),
        ):
            begin, end = starts[a, what, CHUNKS - 1] + 1, starts[b, what, CHUNKS - 1]
            side = HEIGHT / 2 if b > a else -HEIGHT / 2
            arrow = {"arrowstyle": "-|>", "color": INK, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", xy=(end, b - side), xytext=(begin, a + side), arrowprops=arrow, zorder=5)
            at = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 8, "color": INK}
            axes.annotate(words, ((begin + end) / 2, low + 0.5), zorder=6, **at)
    axes.set(xlabel="time, if each piece of work takes as long as any other", xlim=(-0.25, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    places = {0: "\nfirst layers", ranks - 1: "\nlast layers, loss"}
    axes.set_yticks(range(ranks), [f"rank {rank}{places.get(rank, '')}" for rank in range(ranks)])
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [Patch(color=COLORS[what], label=words) for what, words in WORDS.items()]
    handles.append(Patch(facecolor="white", edgecolor="#bbbbbb", label="waiting"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=10)
    figure.savefig(path, dpi=120, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the schedule of a step on several ranks; started by torchrun.")
    parser.add_argument("--output", type=Path, default=FIGURES / "pipeline.png")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    stage = mc.PipelineStage(mc.Llama(mc.LlamaConfig.from_dict(SHAPE)))
    orders = stage.links.everyones(order_of_work(stage, torch.randint(64, (1, CHUNKS * CHUNK_SIZE))))
    if dist.get_rank() == 0:
        draw(schedule(orders), len(orders), output)
    dist.destroy_process_group()
