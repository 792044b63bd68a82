"""`minichunk walk`: one training step, by several methods, to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..chunks import cut, span
from ..errors import InputError
from ..files.atomic import make_directory
from ..files.chat import load_chat_template
from ..files.documents import Document, check_vocabulary, cut_documents, read_documents
from ..files.shipped import EXTENDED_ON, SHIPPED_MODEL, novel
from ..full import full
from ..models.lora import add_lora
from ..models.stack import Stack
from ..samplers import Bernoulli
from ..seco import seco
from ..spaco import spaco
from ..training.checks import check_choice, check_least
from ..training.load import load_as_told
from ..training.options import ModelOptions
from .events import Event, compare, read_events, write_events
from .merge import merge
from .page import write_page
from .trace import trace

METHODS = ("seco", "spaco", "full", "full-recompute")
CHUNK_SIZES = (128, 64, 256)
MOST_CHUNKS = 32  # narrower columns cannot be read


def run_walk(
    events: Sequence[str] | None = None,
    compare: Sequence[str] | None = None,
    tolerance: float = 1e-4,
    output: str = "walk.html",
    log: str | None = None,
    **step: Any,
) -> None:
    """Write the page of a step, or of the logs `events`; or say where two logs differ. Raises InputError."""
    if compare is not None:
        print(difference(compare[0], compare[1], tolerance))
        return
    logs, names = read_logs(events) if events else (record(**step), None)
    if log is not None:
        folder = make_directory(log)
        for one in logs:
            write_events(folder / f"{title(one)}.jsonl", one)
    write_page(output, logs, names)
    print(f"written  {output}  (open it in a browser)")


def read_logs(paths: Sequence[str]) -> tuple[list[list[Event]], list[str | None]]:
    """The logs in these files, and their names; those of the ranks of a pipeline are one, without a name."""
    logs = [(path, read_events(path)) for path in paths]
    found: list[tuple[str | None, list[Event]]] = [(Path(path).stem, log) for path, log in logs if "rank" not in log[0]]
    if ranks := {path: log for path, log in logs if "rank" in log[0]}:
        try:
            found.insert(0, (None, merge(list(ranks.values()))))
        except InputError as error:
            raise InputError(f"{', '.join(ranks)}: {error}") from None
    return [log for _, log in found], [name for name, _ in found]


def difference(a: str, b: str, tolerance: float = 1e-4) -> str:
    """What `--compare` prints; raises InputError where the logs differ, so that a script sees it."""
    found = compare(read_events(a), read_events(b), tolerance)
    if found is not None:
        raise InputError(f"{a} and {b} differ: {found}")
    return f"no event differs by more than {tolerance:g}"


def title(log: Sequence[Event]) -> str:
    """A log's method, and the size of its chunks."""
    begin = log[0]
    name = begin["method"] + ("-recompute" if begin.get("recompute") else "")
    return name if begin["method"] == "full" else f"{name}-{begin['chunks'][0][1] - begin['chunks'][0][0]}"


def record(
    model: str | None = None,
    data: Sequence[str] | None = None,
    seq_len: int = 512,
    chunk_size: Sequence[int] | None = None,
    method: Sequence[str] | None = None,
    budget: int | None = None,
    rank: int = 0,
    recompute: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    seed: int = 17,
) -> list[list[Event]]:
    """The logs of one step by each method, and by each chunk size. Raises InputError.

    budget: chunks that SpaCO keeps on average; None: half of them.
    """
    sizes, methods = chunk_size or CHUNK_SIZES, method or METHODS
    for name in methods:
        check_choice("method", name, METHODS)
    check_least({"seq_len": (seq_len, 2), "chunk_size": (min(sizes), 1), "rank": (rank, 0), "seed": (seed, 0)})
    check_least({"budget": (budget, 1)})
    language_model, tokenizer = load_as_told(ModelOptions(model=model, dtype=dtype, device=device))
    chat, eos = load_chat_template(model or SHIPPED_MODEL), language_model.config.first_eos()
    documents = read_documents(data or [novel(EXTENDED_ON)], tokenizer, eos, chat)
    check_vocabulary(documents, language_model.config.vocab_size)
    text = cut_documents(documents, seq_len)[0][0]
    if (most := len(cut(len(text), min(sizes)))) > MOST_CHUNKS:
        raise InputError(
            f"--chunk-size {min(sizes)} cuts {len(text):,} tokens into {most} chunks, but the page has room for "
            f"{MOST_CHUNKS}"
        )
    if rank:
        add_lora(language_model, rank, 2 * rank)
    logs = []
    for name in methods:
        for size in [len(text)] if name.startswith("full") else sizes:
            events = step_of(language_model, text, name, size, budget, recompute, seed)
            chunks = cut(len(text), size)
            events[0]["text"] = [tokenizer.decode(text.input_ids[span([chunk])].tolist()) for chunk in chunks]
            events[0]["model"] = Path(model or SHIPPED_MODEL).resolve().name
            logs.append(events)
    return logs


def step_of(
    model: Stack, text: Document, method: str, size: int, budget: int | None, recompute: bool, seed: int
) -> list[Event]:
    """One step, with the parameters' gradients there from the beginning, as in all but the first of a training."""
    device = model.lm_head.weight.device
    ids, labels = (x[None].clone().to(device) for x in (text.input_ids, text.labels))  # of the page alone
    model.zero_grad(set_to_none=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    torch.manual_seed(seed)
    if method.startswith("full"):
        return trace(full, model, ids, labels, recompute=method == "full-recompute")
    if method == "seco":
        return trace(seco, model, ids, labels, size, recompute=recompute)
    num_chunks = len(cut(len(text), size))
    coins = Bernoulli(min(1.0, (budget or num_chunks / 2) / num_chunks))
    generator = torch.Generator().manual_seed(seed)
    return trace(spaco, model, ids, labels, size, sampler=coins, generator=generator, recompute=recompute)
