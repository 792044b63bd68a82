"""A long context out of short texts: three ways to choose positions, against training at full length.

python tutorials/short_texts.py     four minutes on one CPU core; writes results/short_texts.json and the picture

The shipped Llama knows 256 tokens and is to read 2,048. Rope sees nothing but the difference of two positions: so a
text of 256 tokens can show it a distance of 2,000, if its positions leave some out.
"""

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import minichunk as mc
from minichunk.files.documents import EXTENDED_ON, MEASURED_ON, SHIPPED_MODEL, Document, collate, load_tokenizer, novel
from minichunk.models.load import change_rope
from minichunk.training.evaluate import loss_by_position, new_figure, save_figure
from minichunk.training.loop import Schedule, Trainer

HERE = Path(__file__).parent
SHORT, LONG, SENTENCE, STEPS, EDGES = 256, 2048, 16, 40, (0, 256, 512, 1024, 1536, 2048)


def pose(generator: torch.Generator) -> Tensor:
    """PoSE, arXiv 2309.10400: the text has two parts, and one gap of random length lies between them."""
    cut = torch.randint(1, SHORT, (), generator=generator)
    gap = torch.randint(LONG - SHORT + 1, (), generator=generator)
    return torch.arange(SHORT) + gap * (torch.arange(SHORT) >= cut)


def longrecipe(generator: torch.Generator) -> Tensor:
    """LongRecipe, arXiv 2409.00509: a gap before every sentence but the first; here a sentence is 16 tokens."""
    before = torch.randint(LONG - SHORT + 1, (SHORT // SENTENCE,), generator=generator).sort().values
    before[0] = 0
    return torch.arange(SHORT) + before.repeat_interleave(SENTENCE)


def e2(generator: torch.Generator) -> Tensor:
    """E2-LLM, arXiv 2401.06951: a random scale and offset, under a rope that divides positions by 8 (`linear:8`).

    With a stride of 8 the angles are those of the first training, with 1 as dense as they are in a long text. The
    offset changes no difference, and so nothing.
    """
    stride = 2 ** torch.randint(4, (), generator=generator)
    return torch.randint(int(LONG - stride * SHORT) + 1, (), generator=generator) + stride * torch.arange(SHORT)


LINEAR = {"rope_type": "linear", "factor": 8.0}
ARMS: dict[str, tuple[int, int, int, Any, dict[str, Any]]] = {  # steps, texts a step, tokens of a text, positions, rope
    "untrained": (0, 1, LONG, None, {}),
    "untrained, linear:8": (0, 1, LONG, None, LINEAR),
    "full length": (STEPS, 1, LONG, None, {}),
    "full length, 1/8 of the steps": (STEPS // 8, 1, LONG, None, {}),
    "short, as they are": (STEPS, 8, SHORT, None, {}),
    "PoSE": (STEPS, 8, SHORT, pose, {}),
    "LongRecipe": (STEPS, 8, SHORT, longrecipe, {}),
    "E2-LLM": (STEPS, 8, SHORT, e2, LINEAR),
    "PoSE, 1/8 of the tokens": (STEPS, 1, SHORT, pose, {}),
    "LongRecipe, 1/8 of the tokens": (STEPS, 1, SHORT, longrecipe, {}),
    "E2-LLM, 1/8 of the tokens": (STEPS, 1, SHORT, e2, LINEAR),
}


def pieces(name: str, tokens: int) -> list[Document]:
    """A shipped novel in pieces of so many tokens."""
    ids = torch.tensor(load_tokenizer(SHIPPED_MODEL).encode(novel(name).read_text()).ids)
    return [Document(name, piece, piece) for piece in ids.split(tokens) if len(piece) == tokens]


def run(name: str, seed: int = 0) -> dict[str, Any]:
    """Train one arm by LoRA and SeCO; returns what it cost, and the loss by position on another novel."""
    steps, texts, tokens, sampler, rope = ARMS[name]
    torch.manual_seed(seed)
    model = mc.Llama.from_pretrained(SHIPPED_MODEL)
    if rope:
        change_rope(model, rope)
    mc.add_lora(model, rank=8, alpha=16)

    def gradient(model: Any, batch: Any, num_targets: int, generator: torch.Generator) -> Tensor:
        input_ids, labels = collate(batch)
        positions = None if sampler is None else torch.stack([sampler(generator) for _ in batch])
        return mc.seco(model, input_ids, labels, 256, num_targets=num_targets, positions=positions)

    began, schedule = time.process_time(), Schedule(steps, 4e-3, steps // 10)
    trainer = Trainer(model, pieces(EXTENDED_ON, tokens), gradient, schedule, batch_size=texts, seed=seed)
    for _ in range(steps):
        trainer.run_step()
    seconds, held_out = time.process_time() - began, pieces(MEASURED_ON, LONG)[:4]
    losses = [span.loss for span in loss_by_position(model, held_out, 512, list(pairwise(EDGES)))]
    # The same targets with all of their past, and with 128 to 255 tokens of it: what is the far past worth?
    starts = range(LONG // 2, LONG, SHORT)
    far = loss_by_position(model, held_out, 512, [(start + SHORT // 2, start + SHORT) for start in starts])
    ends = [
        Document("", *(x[start : start + SHORT] for x in (d.input_ids, d.labels))) for d in held_out for start in starts
    ]
    near = loss_by_position(model, ends, 512, [(SHORT // 2, SHORT)])[0].loss
    worth = near - sum(span.loss for span in far) / len(far)
    return {"arm": name, "tokens": steps * texts * tokens, "cpu_seconds": seconds, "losses": losses, "worth": worth}


def draw(runs: list[dict[str, Any]]) -> None:
    """Loss by position: lines for as many tokens as at full length, dots for an eighth of them."""
    if (figure := new_figure(8, 3.8)) is None:
        return
    axes = figure.subplots()
    colours = {
        "full length": "k",
        "short": "tab:gray",
        "PoSE": "tab:blue",
        "LongRecipe": "tab:green",
        "E2-LLM": "tab:red",
    }
    for one in runs:
        if colour := colours.get(one["arm"].partition(",")[0]):
            where, style = [(a + b) / 2 for a, b in pairwise(EDGES)], "o:" if "1/8" in one["arm"] else "o-"
            axes.plot(where, one["losses"], style, ms=4, color=colour, label=one["arm"])
    axes.set(xlabel="position", ylabel="held-out loss, nats per token")
    axes.axvline(SHORT, color="gray", ls=":")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, HERE / "figures" / "short_texts.png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = [run(name) for name in ARMS]
    (HERE / "results" / "short_texts.json").write_text(json.dumps(runs) + "\n")
    print(
        f"{'loss at positions':30} tokens  CPU s", *(f"{f'{a:,}-{b:,}':>11}" for a, b in pairwise(EDGES)), "  far past"
    )
    for one in runs:
        losses = " ".join(f"{loss:11.3f}" for loss in one["losses"])
        print(f"{one['arm']:30}{one['tokens']:7,}{one['cpu_seconds']:7.0f} {losses}{one['worth']:11.3f}")
    draw(runs)
