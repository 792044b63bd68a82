"""A job whose loss needs the far past: `python tutorials/recall.py` trains six kinds of memory on it.

A text is facts, `a b` for a -> b, and then questions. `a` asks for one hop, b; `+` behind it for two: of a -> b and
b -> c the answer is c. The facts make a circle through all symbols, in random order, anew in each text, so that weights
cannot know them, and no answer is written in the text. One hop has to fetch one fact from far back. Two hops fetch
twice, the second time with what the first has found: a layer of full attention for each, if windows are all the rest.

All learn from scratch, by SeCO, the same texts. It takes some minutes on two CPU cores, one for each of two processes,
prints a table, and writes results/recall.json and figures/recall.png: by kind and number of hops, a map of how many
facts there are and how deep among them the (first) fact stands. `python tutorials/recall.py SEED ...` for other seeds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import minichunk as mc
from minichunk.training.evaluate import new_figure, save_figure
from minichunk.training.recall import wilson

HERE = Path(__file__).parent
SYMBOLS, FACTS, LAYERS, STEPS, BATCH, LR = 32, 16, 4, 1100, 24, 3e-3
CHUNK, WINDOW = 32, 4  # a layer of windows sees 3 positions before its own: four of them reach 12
KEYS, VALUES, HOP = 0, SYMBOLS, 2 * SYMBOLS  # of 65 tokens: symbols asked for, symbols answered, and +
LENGTHS, BINS, TEXTS = (4, 8, 12, 16), 4, 64
KINDS = (
    "full attention", "windows, one layer full", "states of 8, one layer full", "states of 8",
    "states of 2, one layer full", "states of 2",
)  # fmt: skip
FOUR = KINDS[0], KINDS[1], KINDS[3], KINDS[5]


def make_model(kind: str) -> Any:
    """Four layers, 64 wide. A state has so many numbers for each of the 64 channels."""
    attention = {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    shape = {"vocab_size": HOP + 1, "hidden_size": 64, "num_hidden_layers": LAYERS}
    if kind.startswith("states"):
        layers = tuple("full_attention" if "full" in kind and i == 2 else "state" for i in range(LAYERS))
        more = attention if "full" in kind else {}
        return mc.StateSpace(
            mc.StateSpaceConfig(**shape, state_size=int(kind.split()[2].strip(",")), layer_types=layers, **more)
        )
    model = mc.Llama(mc.LlamaConfig(**shape, **attention, max_position_embeddings=4 * FACTS + 1))
    if kind.startswith("windows"):
        mc.partial_context(model, mc.Window(WINDOW, 0), [2])
    return model


def texts(count: int, facts: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids and labels, int64 (B, 4 * facts + 1), and which fact, counted from the first, each question is about.

    A label is what is asked for at the token before it, and not what the text has there: (B, facts) of each hop.
    """
    circle = torch.rand(count, SYMBOLS, generator=generator).argsort(1)[:, :facts]
    place, asked = (torch.rand(count, facts, generator=generator).argsort(1) for _ in range(2))
    one, two = circle.roll(-1, 1), circle.roll(-2, 1)
    told = torch.stack([circle.gather(1, place), VALUES + one.gather(1, place)], 2).flatten(1)
    hop = torch.full_like(asked, HOP)
    questions = torch.stack([circle.gather(1, asked), hop], 2).flatten(1)
    answers = torch.stack([one.gather(1, asked), two.gather(1, asked)], 2).flatten(1) + VALUES
    input_ids = torch.cat([told, questions, hop[:, :1]], 1)
    labels = torch.cat([torch.full_like(told, -100), hop[:, :1] * 0 - 100, answers], 1)
    return input_ids, labels, place.argsort(1).gather(1, asked)


def train(kind: str, seed: int) -> tuple[str, int, float, dict[str, Any]]:
    """Train one kind; returns kind, seed, CPU seconds, and [found, asked] by length, hops and depth."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    began, generator, model = time.process_time(), torch.Generator().manual_seed(seed), make_model(kind).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LR * min(1, (step + 1) / 50, 4 * (1 - step / STEPS))
        facts = int(torch.randint(2, FACTS // 2 + 1, (), generator=generator)) * 2
        facts = min(facts, max(4, FACTS * step // STEPS))  # few at first: two hops are learnt from them
        input_ids, labels, _ = texts(BATCH * FACTS // facts, facts, generator)
        loss = mc.seco(model, input_ids, labels, chunk_size=CHUNK)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"{kind}, seed {seed}: step {step + 1}, {facts} facts, loss {loss:.3f}", file=sys.stderr, flush=True)
    return kind, seed, time.process_time() - began, measure(model, torch.Generator().manual_seed(1000 + seed))


@torch.no_grad()
def measure(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """How many questions are answered rightly by the likeliest token: [found, asked] by length, hops and depth."""
    found = {}
    model.eval()
    for facts in LENGTHS:
        input_ids, labels, place = texts(TEXTS, facts, generator)
        right = (model(input_ids)[:, :-1].argmax(-1) == labels[:, 1:])[:, 2 * facts :].unflatten(1, (facts, 2))
        depth = place * BINS // facts  # (B, facts)
        for hops in (1, 2):
            cells = [right[..., hops - 1][depth == i] for i in range(BINS)]
            found[f"{facts} facts, hops {hops}"] = [[int(cell.sum()), cell.numel()] for cell in cells]
    return found


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Shares of right answers of the longest texts, with the 95 % interval of Wilson, for each run."""
    lines = [f"{FACTS} facts: {'':18} seed  {'one hop':18} {'two hops':18} CPU seconds (chance {1 / FACTS:.0%})"]
    for run in runs:
        words = []
        for hops in (1, 2):
            found, asked = map(sum, zip(*run["found"][f"{FACTS} facts, hops {hops}"], strict=True))
            low, high = wilson(found, asked)
            words.append(f"{found / asked:4.0%} ({low:.0%} to {high:.0%})")
        lines.append(f"{run['kind']:28} {run['seed']:4}  {words[0]:18} {words[1]:18} {run['cpu_seconds']:.0f}")
    return "\n".join(lines)


def shares(runs: Sequence[dict[str, Any]], kind: str, hops: int) -> Tensor:
    """Of right answers of one kind, all seeds together: (depths, lengths)."""
    counts = [[run["found"][f"{n} facts, hops {hops}"] for n in LENGTHS] for run in runs if run["kind"] == kind]
    found, asked = torch.tensor(counts).sum(0).unbind(-1)
    return (found / asked).T


def draw(runs: Sequence[dict[str, Any]]) -> None:
    """A column for each kind, a row for each number of hops; all seeds together. And a small one, of four kinds."""
    for name, kinds, size in (("recall", KINDS, (12, 4.2)), ("recall-small", FOUR, (5, 2.9))):
        if (figure := new_figure(*size)) is None:
            return
        axes = figure.subplots(2, len(kinds), sharex=True, sharey=True)
        for (column, kind), (row, hops) in product(enumerate(kinds), enumerate((1, 2))):
            share, here = shares(runs, kind, hops), axes[row, column]
            image = here.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for i, j in product(range(BINS), range(len(LENGTHS))) if name == "recall" else ():
                dark = share[i, j] > 0.6
                here.text(j, i, f"{share[i, j]:.0%}", ha="center", va="center", fontsize=7, color="w" if dark else "k")
            here.set_xticks(range(len(LENGTHS)), map(str, LENGTHS), fontsize=8)
            here.set_yticks(range(BINS), [f"{(i + 0.5) / BINS:.0%}" for i in range(BINS)], fontsize=8)
            here.set_title(kind.replace(", ", ",\n") if row == 0 else "", fontsize=12 if name == "recall" else 8)
            here.set_xlabel("facts" if row else "", fontsize=8)
        axes[0, 0].set_ylabel("one hop:\ndepth of the fact", fontsize=8)
        axes[1, 0].set_ylabel("two hops:\nof the first fact", fontsize=8)
        bar = figure.colorbar(image, ax=axes, format=lambda x, _: f"{x:.0%}")
        bar.set_label("answered rightly", fontsize=8)
        bar.ax.tick_params(labelsize=8)
        save_figure(figure, HERE / "figures" / f"{name}.png")


def main(*seeds: str) -> None:
    """Train all kinds with all seeds (0 if none is named), two at a time."""
    jobs = [(kind, seed) for seed in map(int, seeds or ("0",)) for kind in KINDS]
    with get_context("spawn").Pool(2) as pool:
        done = pool.starmap(train, jobs, chunksize=1)
    runs = [dict(zip(("kind", "seed", "cpu_seconds", "found"), one, strict=True)) for one in done]
    command = " ".join(["python tutorials/recall.py", *seeds])
    (HERE / "results" / "recall.json").write_text(json.dumps({"command": command, "runs": runs}) + "\n")
    print(table(runs))
    draw(runs)


if __name__ == "__main__":
    main(*sys.argv[1:])
