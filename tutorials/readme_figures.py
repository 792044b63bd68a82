"""Drawn figures: `python tutorials/readme_figures.py` writes seco.png, memory.png and state-memory.png.

It also prints tutorial 8's table of a state-space model.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from minichunk.costs.forecast import forecast
from minichunk.costs.setting import Setting

FIGURES = Path(__file__).parent / "figures"
GRAPH, CACHE, GRADS, EMPTY = "#d95f4b", "#4878b0", "#4a9c5d", "#e6e6e6"
COLUMNS = 4


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str, text: str) -> None:
    """A rounded box with a word in it."""
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.04", color=color, lw=0)
    axes.add_patch(shape)
    ink = "#555555" if color == EMPTY else "white"
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink, fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, bend: float = 0.0) -> None:
    """From here to there, bent by a part of its length."""
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.6, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def draw_seco() -> None:
    """One row per step: which chunk runs, what is in memory, which way the gradients go."""
    figure, axes = plt.subplots(figsize=(10.5, 5.2))
    rows = [
        ("fill, without gradients", None),
        ("rebuild chunk 3", 3),
        ("rebuild chunk 2", 2),
        ("rebuild chunk 1", 1),
        ("rebuild chunk 0", 0),
    ]
    for r, (title, at) in enumerate(rows):
        y = (len(rows) - r) * 1.5
        axes.text(-0.25, y + 0.45, title, ha="right", va="center", fontsize=11)
        for i in range(COLUMNS):
            x = i * 2.4
            if at is None:
                last = i == COLUMNS - 1
                box(axes, x, y + 0.5, 2.0, 0.4, EMPTY, "not needed" if last else f"chunk {i} forward")
                box(axes, x, y, 2.0, 0.4, EMPTY if last else CACHE, "" if last else "keys, values")
                if i < COLUMNS - 2:
                    arrow(axes, (x + 2.0, y + 0.2), (x + 2.4, y + 0.6), CACHE)
            elif i == at:
                box(axes, x, y + 0.5, 2.0, 0.4, GRAPH, f"graph of chunk {i}")
                if i < COLUMNS - 1:
                    box(axes, x, y, 2.0, 0.4, GRADS, "relayed gradient")
                    arrow(axes, (x + 1.0, y + 0.36), (x + 1.0, y + 0.56), "black")
            elif i < at:
                box(axes, x, y + 0.04, 0.98, 0.4, CACHE, "k and v")
                box(axes, x + 1.02, y + 0.04, 0.98, 0.4, GRADS, "+ grads")
        if at:
            for i in range(at):
                arrow(axes, (at * 2.4 + 0.1, y + 0.9), (i * 2.4 + 1.5, y + 0.46), GRADS, bend=0.12)
    axes.set_xlim(-3.6, COLUMNS * 2.4)
    axes.set_ylim(1.2, len(rows) * 1.5 + 1.6)
    axes.axis("off")
    axes.set_title("SeCO: the exact gradient with one chunk's graph in memory", fontsize=13)
    figure.savefig(FIGURES / "seco.png", dpi=110, facecolor="white", bbox_inches="tight")


def draw_memory() -> None:
    """Peak memory of a training step of an 8B Llama against the length, by forecast."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    lengths = [512 * n for n in range(7, 129)]  # from a length that is counted
    for method, label, options in (
        ("full", "full", {}),
        ("full-recompute", "full, layers checkpointed", {}),
        ("full-recompute-tiled", "the same, loss in tiles", {}),
        ("full-recompute-offload", "the same, layers' inputs\nin host memory", {}),
        ("seco", "SeCO, sums in float32", {}),
        ("seco", "SeCO, sums in bfloat16", {"cache_grad_dtype": "bfloat16"}),
        ("spaco", "SpaCO, 8 chunks kept,\nsums in bfloat16", {"cache_grad_dtype": "bfloat16"}),
        ("seco", "SeCO, 8 layers at once,\nsums in bfloat16", {"cache_grad_dtype": "bfloat16", "layers_at_once": "8"}),
    ):
        line = forecast(Setting(method=method, **options))
        axes.plot(lengths, [line.at(tokens).peak / 2**30 for tokens in lengths], label=label, lw=2)
    axes.axhline(23, color="gray", ls="--", lw=1, label="24 GiB, 1 of them reserved")
    axes.set(xlabel="tokens", ylabel="GiB", ylim=(14, 48), xlim=(0, 66000))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title("An 8B Llama in bfloat16 with LoRA, chunks of 512:\nwhat a training step needs", loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)
    axes.grid(alpha=0.3)
    figure.savefig(FIGURES / "memory.png", dpi=110, facecolor="white", bbox_inches="tight")


def draw_state_memory() -> None:
    """The same for a state-space model of 1.27 billion parameters, all of them trained; and tutorial 8's table."""
    figure, axes = plt.subplots(figsize=(8, 4.2))
    lengths = [16384 * n for n in range(1, 17)]
    rows = {
        "full": Setting(model="state-space-1.27b", method="full", rank=0),
        "full, layers recomputed": Setting(model="state-space-1.27b", method="full-recompute", rank=0),
        "SeCO, chunks of 1,024": Setting(model="state-space-1.27b", method="seco", chunk_size=1024, rank=0),
        "SeCO, chunks of 4,096": Setting(model="state-space-1.27b", method="seco", chunk_size=4096, rank=0),
        "SpaCO, 8 chunks of 4,096": Setting(model="state-space-1.27b", method="spaco", chunk_size=4096, rank=0),
    }
    backpropagation = forecast(rows["full, layers recomputed"]).at(35_000).peak
    print("| | 35,000 tokens | 100,000 | 1,000,000 | the longest where backpropagation has 35,000 |")
    print("|---|---:|---:|---:|---:|")
    for label, setting in rows.items():
        line = forecast(setting)
        axes.plot(lengths, [line.at(tokens).peak / 2**30 for tokens in lengths], label=label, lw=2)
        cells = [f"{line.at(tokens).peak / 2**30:,.0f} GiB" for tokens in (35_000, 100_000, 1_000_000)]
        longest = line.longest(backpropagation)
        print(f"| {label} | {' | '.join(cells)} | {f'{longest:,}' if longest < 10**9 else 'over a billion'} |")
    axes.set(xlabel="tokens", ylabel="GiB", ylim=(0, 400), xlim=(0, lengths[-1]))
    axes.set_title("A state-space model of 1.27 billion parameters, all trained: what a training step needs")
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)
    figure.savefig(FIGURES / "state-memory.png", dpi=110, facecolor="white", bbox_inches="tight")


if __name__ == "__main__":
    draw_seco()
    draw_memory()
    draw_state_memory()
