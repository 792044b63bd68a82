"""The schedule of a step on several ranks, from what each rank really does, and a drawing of it.

`torchrun --nproc-per-node 3 tutorials/pipeline_picture.py` writes figures/pipeline.png, in which every piece of work
takes as long as any other; with `--times FILE.png` also what the clocks said, of the shortest of a few steps.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import minichunk as mc

FIGURES = Path(__file__).parent / "figures"
CHUNKS, CHUNK_SIZE, STEPS = 6, 512, 5
SHAPE = {
    "model_type": "llama", "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CHUNKS * CHUNK_SIZE,
}  # fmt: skip
WORDS = {"fill": "fill: forward, no graph", "rebuild": "rebuild: forward again, with its graph", "backward": "backward"}
COLORS = {"fill": "#4878b0", "rebuild": "#e0a030", "backward": "#4a9c5d"}
INK, HEIGHT = "#444444", 0.74


class Work(NamedTuple):
    """What a rank does to a chunk ("fill", "rebuild" or "backward"), from when to when, in seconds or in pieces."""

    what: str
    chunk: int
    start: float
    stop: float


@contextmanager
def recorded(stage: mc.PipelineStage, chunk_size: int) -> Iterator[list[Work]]:
    """What this rank does in the block, in its order. From the moment that it has what it waited for, it is at work."""
    works, rebuilt, began = list[Work](), list[int](), 0.0
    take, run, fill, backward = stage.take, stage.run, stage.fill, torch.autograd.backward

    def done(what: str, chunk: int) -> None:
        nonlocal began
        works.append(Work(what, chunk, began, time.time()))
        began = time.time()

    def watched_take(input_ids: Tensor) -> Tensor:
        nonlocal began
        x = take(input_ids)
        began = time.time()
        return x

    def watched_run(x: Tensor, memory: Any, chunks: Any, *options: Any) -> Any:
        found = run(x, memory, chunks, *options)
        chunk = chunks[0].start // chunk_size
        if torch.is_grad_enabled():
            rebuilt.append(chunk)
        done("rebuild" if torch.is_grad_enabled() else "fill", chunk)
        return found

    def watched_fill(input_ids: Tensor, memory: Any, chunks: Any, *options: Any) -> Any:
        written = fill(input_ids, memory, chunks, *options)
        if stage.links.is_last:  # which does not run its last layer as a whole
            done("fill", chunks[0].start // chunk_size)
        return written

    def watched_backward(*arguments: Any) -> None:
        nonlocal began
        if not stage.links.is_last:  # which computes the loss in between, and waits for nothing
            began = time.time()
        backward(*arguments)
        done("backward", rebuilt.pop(0))

    stage.take, stage.run, stage.fill = watched_take, watched_run, watched_fill  # type: ignore[method-assign]
    torch.autograd.backward = watched_backward
    try:
        yield works
    finally:
        torch.autograd.backward = backward
        del stage.take, stage.run, stage.fill


def equal_times(ranks: Sequence[Sequence[Work]]) -> list[list[Work]]:
    """The same work in the same order, if each piece of it took one unit of time and each message none."""
    timed: list[dict[tuple[str, int], Work]] = [{} for _ in ranks]
    todo = [list(works) for works in ranks]
    while any(todo):
        for rank, works in enumerate(todo):
            if works:
                what, chunk = works[0][:2]
                source = rank + 1 if what == "backward" else rank - 1
                if 0 <= source < len(ranks) and (what, chunk) not in timed[source]:
                    continue  # what it needs is not there yet
                ready = timed[source][what, chunk].stop if 0 <= source < len(ranks) else 0
                start = max([ready, *(work.stop for work in timed[rank].values())])
                timed[rank][what, chunk] = Work(what, chunk, start, start + 1)
                works.pop(0)
    return [list(works.values()) for works in timed]


def draw_schedule(axes: Any, ranks: Sequence[Sequence[Work]]) -> None:
    """Ranks by time, on a matplotlib Axes: a box for each piece of work, with its chunk; what is blank is waiting."""
    begin = min(works[0].start for works in ranks)
    for rank, works in enumerate(ranks):
        for what, chunk, start, stop in works:
            left, long = start - begin, stop - start
            axes.barh(rank, long, left=left, height=HEIGHT, color=COLORS[what], edgecolor="white", lw=1.2)
            axes.text(
                left + long / 2, rank, str(chunk), ha="center", va="center", color="white", weight="bold", fontsize=9
            )
    shortest = min(work.stop - work.start for works in ranks for work in works)
    axes.set(yticks=range(len(ranks)), yticklabels=[f"rank {rank}" for rank in range(len(ranks))])
    axes.set(xlim=(-shortest / 4, None))
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)


def draw(ranks: Sequence[Sequence[Work]], path: Path, unit: str) -> None:
    """The schedule, with a legend, and the way of the last chunk through the ranks and back."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(11, 1.3 + 0.68 * len(ranks)), layout="constrained")
    draw_schedule(axes, ranks)
    begin, last = min(works[0].start for works in ranks), CHUNKS - 1
    at = {(rank, work.what, work.chunk): work for rank, works in enumerate(ranks) for work in works}
    style = {"arrowstyle": "-|>", "color": INK, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    for low in range(len(ranks) - 1):
        ways = [("rebuild", low, low + 1, "hidden state"), ("backward", low + 1, low, "its gradient")]
        for what, a, b, words in ways:
            start, stop = at[a, what, last].stop - begin, at[b, what, last].start - begin
            side = HEIGHT / 2 if b > a else -HEIGHT / 2
            axes.annotate("", xy=(stop, b - side), xytext=(start, a + side), arrowprops=style, zorder=5)
            axes.annotate(
                words, ((start + stop) / 2, low + 0.5), (6, 0), textcoords="offset points", va="center", fontsize=8,
                color=INK, zorder=6,
            )  # fmt: skip
    axes.set(xlabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    places = {0: "\nfirst layers", len(ranks) - 1: "\nlast layers, loss"}
    axes.set_yticks(range(len(ranks)), [f"rank {rank}{places.get(rank, '')}" for rank in range(len(ranks))])
    handles = [Patch(color=COLORS[what], label=words) for what, words in WORDS.items()]
    handles.append(Patch(facecolor="white", edgecolor="#bbbbbb", label="waiting"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=10)
    figure.savefig(path, dpi=120, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def record_steps() -> list[list[list[Work]]]:
    """Of each step the work of each rank."""
    torch.manual_seed(0)
    stage = mc.PipelineStage(mc.Llama(mc.LlamaConfig.from_dict(SHAPE)))
    ids = torch.randint(SHAPE["vocab_size"], (1, CHUNKS * CHUNK_SIZE))
    steps = []
    for _ in range(STEPS):
        with recorded(stage, CHUNK_SIZE) as works:
            mc.pipeline_seco(stage, ids, ids, CHUNK_SIZE)
        steps.append(stage.links.everyones(works))
    return steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the schedule of a step on several ranks; started by torchrun.")
    parser.add_argument("--output", type=Path, default=FIGURES / "pipeline.png")
    parser.add_argument("--times", type=Path, help="also write this picture, of what the clocks said")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    steps = record_steps()
    if dist.get_rank() == 0:
        draw(equal_times(steps[0]), options.output, "time, if each piece of work takes as long as any other")
        if options.times:
            shortest = min(steps, key=lambda ranks: max(works[-1].stop for works in ranks) - ranks[0][0].start)
            draw(shortest, options.times, "seconds")
    dist.destroy_process_group()
