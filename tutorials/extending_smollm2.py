"""SmolLM2-135M from 8,192 tokens to 16,384: its rope unchanged, YaRN, and a larger theta; a hundred steps of each.

python tutorials/extending_smollm2.py MODEL context    where its own context ends: the loss of every 2,048 positions
python tutorials/extending_smollm2.py MODEL gaps       what each rope says of a gap in a short text, without training
python tutorials/extending_smollm2.py MODEL ARM        train one arm and measure it before and after, on one CPU core
python tutorials/extending_smollm2.py draw             the picture, of what was measured

MODEL is the directory that get_smollm2.py writes. Results are kept in results/extending_smollm2.json.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import minichunk as mc
from minichunk.chunks import Chunk
from minichunk.files.documents import EXTENDED_ON, MEASURED_ON, Document, collate, load_tokenizer, novel
from minichunk.loss import token_losses
from minichunk.models.load import change_rope
from minichunk.protocol import Options
from minichunk.training.evaluate import loss_by_position, new_figure, save_figure
from minichunk.training.loop import Schedule, Trainer

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "extending_smollm2.json"
LONG, SHORT, STEPS, PIECE = 16_384, 1024, 100, 2048
ARMS: dict[str, dict[str, Any]] = {  # what `minichunk train` would be told: nothing, --rope yarn:2, --rope-theta 5e5
    "unchanged": {},
    "yarn:2": {"rope_type": "yarn", "factor": 2.0},
    "theta 5e5": {"rope_theta": 5e5},
}
NEEDLE = "\n\nThe pass key of the {box} box is {key}. Remember it: the pass key of the {box} box is {key}.\n\n"
QUESTION = "\n\nWhat is the pass key of the {box} box? The pass key of the {box} box is "
BOXES = ("red", "blue", "green", "white", "black", "silver", "yellow", "brown")  # one in every piece of the text
KEYS = ("48213", "70526", "19384", "62907", "35741", "84069", "27158", "51630")


def far_apart(tokens: int, generator: torch.Generator) -> Tensor:
    """PoSE, arXiv 2309.10400: int64 (tokens,), the positions of a short text in two parts with a gap between them."""
    cut = int(torch.randint(1, tokens, (), generator=generator))
    gap = int(torch.randint(LONG - tokens + 1, (), generator=generator))
    return torch.arange(tokens) + gap * (torch.arange(tokens) >= cut)


def train(model: Any, tokenizer: Any) -> list[list[float]]:
    """A hundred steps of SpaCO on 1,024 tokens each; returns the steps' loss estimates, gradient norms and seconds."""
    ids = torch.tensor(tokenizer.encode(novel(EXTENDED_ON).read_text()).ids)
    texts = [Document("persuasion", piece, piece) for piece in ids.split(SHORT)[:-1]]

    def gradient(model: Any, batch: Any, num_targets: int, generator: torch.Generator) -> Tensor:
        input_ids, labels = collate(batch)
        positions = torch.stack([far_apart(SHORT, generator) for _ in batch])
        how = {"num_targets": num_targets, "positions": positions, "fill_size": SHORT}
        return mc.spaco(model, input_ids, labels, 256, sampler=mc.Bernoulli(1 / 4), generator=generator, **how)

    trainer, steps = Trainer(model, texts, gradient, Schedule(STEPS, 3e-4, STEPS // 10)), list[list[float]]()
    for _ in range(STEPS):
        done = trainer.run_step()
        steps.append([round(done[name], 4) for name in ("loss", "grad_norm", "seconds")])
        if trainer.step % 10 == 0:
            print(f"step {trainer.step}: {steps[-1]}", file=sys.stderr, flush=True)
    return steps


@torch.no_grad()
def measure(model: Any, tokenizer: Any) -> dict[str, Any]:
    """One way through 16,384 tokens of a novel with a pass key in every 2,048 of them.

    "losses": the mean of every 1,024 tokens. "recall": [tokens read, where the key stands, whether the likeliest
    continuation of the question is the key, the key's log-probability]: after every 2,048 tokens all keys so far are
    asked for, on top of the same memory, which a question does not write.
    """
    model.eval()
    began, ids, places = time.process_time(), list[int](), []
    story = tokenizer.encode(novel(MEASURED_ON).read_text()).ids
    for box, key in zip(BOXES, KEYS, strict=True):
        places.append(len(ids) + 64)
        needle = tokenizer.encode(NEEDLE.format(box=box, key=key)).ids
        piece, story = story[: PIECE - len(needle)], story[PIECE - len(needle) :]
        ids += piece[:64] + needle + piece[64:]
    text, losses, recall = torch.tensor([ids]), list[float](), []
    memory = model.new_memory(1, LONG + 64)
    for start in range(0, LONG, PIECE):
        here = [Chunk(start, start + PIECE)]
        hidden, written = model.run(text[:, start : start + PIECE], memory, here)
        memory.write(here, written)
        targets = text[:, start + 1 : start + PIECE + 1]
        found = token_losses(hidden[:, : targets.shape[1]], model.lm_head.weight, targets)[0]
        losses += [round(float(part.mean()), 4) for part in found.split(PIECE // 2)]
        stop = start + PIECE
        for box, key, place in zip(BOXES, KEYS, places, strict=True):
            if place < stop:
                asked = torch.tensor([tokenizer.encode(QUESTION.format(box=box) + key).ids])
                hidden, _ = model.run(asked[:, :-1], memory, [Chunk(stop, stop + asked.shape[1] - 1)])
                log_probs = model.lm_head(hidden[0, -len(key) :]).double().log_softmax(-1)  # a digit is a token
                answer = asked[0, -len(key) :]
                right = bool((log_probs.argmax(-1) == answer).all())
                recall.append([stop, place, right, round(float(log_probs.gather(1, answer[:, None]).sum()), 3)])
        print(stop, losses[-1], recall[-(stop // PIECE) :], file=sys.stderr, flush=True)
    return {"losses": losses, "recall": recall, "cpu_seconds": round(time.process_time() - began)}


def context(directory: str) -> None:
    """Print the mean loss of every 2,048 positions of one text, which is not trained on."""
    ids = torch.tensor(load_tokenizer(directory).encode(novel(MEASURED_ON).read_text()).ids)[:LONG]
    model = mc.Llama.from_pretrained(directory, dtype=torch.bfloat16)
    spans = [(start, start + PIECE) for start in range(0, LONG, PIECE)]
    for span in loss_by_position(model, [Document("", ids, ids)], PIECE, spans):
        print(f"{span.start:6,} to {span.stop:6,} {span.loss:7.3f}")


@torch.no_grad()
def gaps(directory: str) -> None:
    """Print the loss of the second halves of two texts of 1,024 tokens, a gap of so many positions before them."""
    ids = torch.tensor(load_tokenizer(directory).encode(novel(MEASURED_ON).read_text()).ids)[20_000:22_048].view(
        2, SHORT
    )
    half = SHORT // 2
    for arm, rope in {**ARMS, "yarn:4": {"rope_type": "yarn", "factor": 4.0}, "theta 2e5": {"rope_theta": 2e5}}.items():
        model = mc.Llama.from_pretrained(directory, dtype=torch.bfloat16)
        if rope:
            change_rope(model, rope)
        losses = []
        for gap in (0, 7000, 11_000, 15_000):
            positions = torch.arange(SHORT) + gap * (torch.arange(SHORT) >= half)
            hidden, _ = model.run(ids, options=Options(positions=positions))
            losses.append(float(token_losses(hidden[:, half:-1], model.lm_head.weight, ids[:, half + 1 :]).mean()))
        print(f"{arm:10}", *(f"{loss:7.3f}" for loss in losses), flush=True)


def by_distance(recall: list[list[Any]]) -> dict[int, list[list[Any]]]:
    """What was asked by how many pieces of the text are between the key's beginning and the question: 1 to 8."""
    groups: dict[int, list[list[Any]]] = {}
    for one in recall:
        groups.setdefault(-(-(one[0] - one[1]) // PIECE), []).append(one)
    return groups


def draw() -> None:
    """Print tables of what was measured; draw the loss by position, and the keys' probability by distance."""
    known = json.loads(RESULTS.read_text())
    figure, colours = new_figure(9.6, 3.8), dict(zip(ARMS, ("k", "tab:blue", "tab:red"), strict=True))
    left, right = figure.subplots(1, 2)
    for arm, colour in colours.items():
        for when, style in (("before", ":"), ("after", "-")):
            if (found := known[arm].get(when)) is None:
                continue
            losses = torch.tensor(found["losses"]).view(8, 2).mean(1)
            groups = by_distance(found["recall"])
            asked = {distance: [one[3] for one in group] for distance, group in groups.items()}
            counts = [f"{sum(one[2] for one in group)}/{len(group)}" for group in groups.values()]
            print(f"{arm:10} {when:7} loss  ", *(f"{loss:7.3f}" for loss in losses.tolist()))
            print(f"{'':18} recall", *(f"{count:>7}" for count in counts))
            print(f"{'':18} nats  ", *(f"{sum(x) / len(x):7.2f}" for x in asked.values()))
            left.plot([PIECE * (i + 0.5) for i in range(8)], losses, style, color=colour, label=f"{arm}, {when}")
            means = [sum(x) / len(x) for x in asked.values()]
            right.plot([PIECE * distance for distance in asked], means, style, color=colour)
    left.axvline(8192, color="tab:gray", ls="--", lw=0.8)
    left.set(xlabel="position", ylabel="loss, nats per token")
    right.axhline(-len(KEYS[0]) * math.log(10), color="tab:gray", ls="--", lw=0.8)  # five digits at random
    right.set(xlabel="tokens from the key to the question", ylabel="log-probability of the key, nats")
    left.legend(fontsize=8)
    save_figure(figure, HERE / "figures" / "extending_smollm2.png")


def main(directory: str, arm: str, *what: str) -> None:
    """what: "before", "train", "after"; all of them if none is named."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, tokenizer = mc.Llama.from_pretrained(directory, dtype=torch.bfloat16), load_tokenizer(directory)
    if ARMS[arm]:
        change_rope(model, ARMS[arm])
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = known.setdefault(arm, {})
    adapter = f"runs/smollm2-{arm.replace(' ', '-').replace(':', '-')}"
    what = what or ("before", "train", "after")
    if "before" in what:
        found["before"] = measure(model, tokenizer)
    mc.add_lora(model, rank=8, alpha=16)
    if "train" in what:
        began = time.process_time()
        found["train"] = {"steps": train(model, tokenizer), "cpu_seconds": round(time.process_time() - began)}
        mc.save_adapter(model, adapter)
    elif "after" in what:
        mc.load_adapter(model, adapter)
    if "after" in what:
        found["after"] = measure(model, tokenizer)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[arm] = {**known.get(arm, {}), **found}
    RESULTS.write_text(json.dumps(known) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["draw"]:
        draw()
    elif sys.argv[2:] in (["context"], ["gaps"]):
        (context if sys.argv[2] == "context" else gaps)(sys.argv[1])
    else:
        main(*sys.argv[1:])
