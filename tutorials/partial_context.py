"""What a hybrid learns, on the shipped small Llama: figures to be drawn elsewhere, as JSON in results/.

python tutorials/partial_context.py job [CASE ...] [SEED ...]      the main job: 256 tokens of context become 2,048
python tutorials/partial_context.py repeat [CASE ...] [SEED ...]   320 random tokens, and the same once more

`job` is what `minichunk train --partial-context` does. It hardly needs the far past: windows in all layers do as well.
`repeat` needs nothing else: on the second half each token is known from the one 320 positions before, which a layer of
full attention can fetch, and windows could only hand on from layer to layer. Cases are named in JOB and in REPEAT;
without any, all of them run, with seeds 0 and 1. What has been measured before is kept, and replaced case by case.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import minichunk as mc
from minichunk.files.documents import SHIPPED_MODEL
from minichunk.training.options import TrainOptions
from minichunk.training.train import train

RESULTS = Path(__file__).parent / "results"
LAST_THIRD = (4, 5)  # of six layers
WINDOW, ALONE = {"window": 256, "sinks": 16}, {"window": 256, "sinks": 0}
STRIDED = {"block": 32, "local": 8, "stride": 8}
JOB: dict[str, dict[str, Any]] = {  # options of `minichunk train`
    "full attention": {},
    "window and sinks, middle third full": {"partial_context": "window", **WINDOW},
    "window alone, middle third full": {"partial_context": "window", **ALONE},
    "strided, middle third full": {"partial_context": "strided", **STRIDED},
    "window alone in all layers": {"partial_context": "window", **ALONE, "full_layers": ()},
}
SHORT = mc.Window(128, 16)  # the repeat lies 320 positions back
REPEAT: dict[str, tuple[Any, tuple[int, ...] | None]] = {
    "full attention": (None, None),
    "window, last third full": (SHORT, LAST_THIRD),
    "window, middle third full": (SHORT, None),
    "strided, middle third full": (mc.Strided(32, 4, 4), None),
    "strided in all layers": (mc.Strided(32, 4, 4), ()),
    "window in all layers": (SHORT, ()),
}
HALF, BATCH, LR, EVERY = 320, 4, 1e-3, 25
STEPS = {"full attention": 300, "window, last third full": 450, "window, middle third full": 700}  # else 400
SEEDS = (0, 1)


def job(case: str, seed: int) -> Iterator[dict[str, Any]]:
    """Mean loss on the held-out novel, before and after: within 256 tokens, and from there to 2,048."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as directory:
        run = train(TrainOptions(seed=seed, output=f"{directory}/run", **JOB[case]), say=lambda _: None)
        found = json.loads((run / "loss_by_position.json").read_text())
    losses = {}
    for when in ("before", "after"):
        inside, *beyond = found[when]  # all eight documents reach 2,048: spans weigh as many positions as they have
        weights = [span["stop"] - span["start"] for span in beyond]
        mean = sum(w * span["loss"] for w, span in zip(weights, beyond, strict=True)) / sum(weights)
        losses[when] = {"inside": inside["loss"], "beyond": mean, "spans": found[when]}
    yield {"case": case, "seed": seed, "cpu_seconds": round(time.process_time() - began), **losses}


def repeat(case: str, seed: int) -> Iterator[dict[str, Any]]:
    """Mean loss on the repeated half over the last EVERY steps, by step, while all parameters are trained.

    Yields what there is every EVERY steps, so that a run that is stopped leaves its curve.
    """
    began = time.process_time()
    pattern, full_layers = REPEAT[case]
    model = mc.Llama.from_pretrained(SHIPPED_MODEL, torch.float32)
    if pattern is not None:
        mc.partial_context(model, pattern, full_layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    curve, total = [], 0.0
    for step in range(1, STEPS.get(case, 400) + 1):
        optimizer.param_groups[0]["lr"] = LR * min(1.0, step / 20)
        first = torch.randint(1, model.config.vocab_size, (BATCH, HALF), generator=generator)
        labels = torch.cat([torch.full_like(first, -100), first], 1)
        total += float(mc.full(model, torch.cat([first, first], 1), labels))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            curve.append([step, round(total / EVERY, 4)])
            total = 0.0
            yield {"case": case, "seed": seed, "cpu_seconds": round(time.process_time() - began), "curve": curve}


def main(which: str, *words: str) -> None:
    """Run the named cases with the named seeds, and keep what they find."""
    run, known = {"job": (job, JOB), "repeat": (repeat, REPEAT)}[which]
    seeds = [int(word) for word in words if word.isdigit()] or SEEDS
    path = RESULTS / f"partial_context_{which}.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    for seed in seeds:
        for case in [word for word in words if not word.isdigit()] or known:
            for found in run(case, seed):
                runs = [one for one in runs if (one["case"], one["seed"]) != (case, seed)] + [found]
                told = {"command": f"python tutorials/partial_context.py {which}", "runs": runs}
                path.write_text(json.dumps(told) + "\n")
                print({**found, "curve": found["curve"][-1]} if "curve" in found else found, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
