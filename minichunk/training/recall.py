"""Recall: whether a model finds a passkey again, by how long the text is and how deep in it the passkey stands."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import exp, sqrt
from random import Random
from statistics import fmean
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from ..batch import IGNORE, shift
from ..errors import InputError
from ..files.chat import ChatTemplate
from ..files.documents import Document, Row, collate, encode
from ..models.lora import without_dropout
from ..models.stack import Stack

# As in arXiv 2305.16300. The answer is begun for the model: so a chat model, too, says the passkey and nothing before.
NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION, ANSWER = "\n\nWhat is the pass key?", "The pass key is "


@dataclass(frozen=True)
class Cell:
    """What was found in the texts of `length` tokens with the passkey at `depth`, from 0, the beginning, to 1."""

    length: int
    depth: float
    found: list[bool]  # for each text, whether a greedy continuation begins with the passkey
    log_probs: list[float]  # of the passkey, in nats


def recall(
    model: Stack, tokenizer: Tokenizer, text_ids: Tensor, lengths: Sequence[int], depths: Sequence[float],
    trials: int, chunk_size: int, chat: ChatTemplate | None = None, seed: int = 0,
) -> list[Cell]:  # fmt: skip
    """A cell for each length and depth, each of so many passkeys in as many places of the user's own text.

    text_ids: int64 (T,), at least as long as the longest text. seed: of passkeys and places, which do not depend on
    the model. Raises InputError.
    """
    for length in lengths:
        hide(text_ids, tokenizer, chat, length, 0.0, Random(seed))  # refuses before anything is measured
    cells = [Cell(length, depth, [], []) for length in lengths for depth in depths]
    with without_dropout(model):
        for cell, trial in tqdm([*product(cells, range(trials))], "recall", unit="text", leave=False):
            random = Random(f"{seed} {cell.length} {cell.depth} {trial}")
            document = hide(text_ids, tokenizer, chat, cell.length, cell.depth, random)
            found, log_prob = score(model, document, chunk_size)
            cell.found.append(found)
            cell.log_probs.append(log_prob)
    return cells


def hide(
    text_ids: Tensor, tokenizer: Tokenizer, chat: ChatTemplate | None, length: int, depth: float, random: Random
) -> Document:
    """A text of at most `length` tokens, hardly fewer, with a passkey in it and the question at its end.

    Its labels are the passkey in the answer. Raises InputError where there is no room, or too little text.
    """
    if len(text_ids) < length:
        raise InputError(f"--recall in {length:,} tokens needs as many: the data has {len(text_ids):,}; add --data")
    key, start = str(random.randrange(10_000, 100_000)), random.randrange(len(text_ids) - length + 1)
    room = length  # for the user's own text: what remains beside the rest
    while room >= 0:
        middle = start + round(depth * room)
        before, after = (tokenizer.decode(text_ids[a:b].tolist()) for a, b in ((start, middle), (middle, start + room)))
        text = before + NEEDLE.format(key=key) + after + QUESTION
        asks = [{"role": "user", "content": text}]
        text = f"{text} " if chat is None else chat.render(asks, add_generation_prompt=True)
        asked = len(text + ANSWER)
        row = Row(f"{text}{ANSWER}{key}.", [(asked, asked + len(key))], template=chat is not None)
        ids, labels = encode(row, tokenizer, None)
        if len(ids) <= length:
            return Document(f"passkey {key}", torch.tensor(ids), torch.tensor(labels))
        room -= len(ids) - length
    raise InputError(f"--recall in {length:,} tokens: passkey and question alone take more; take a longer --seq-len")


@torch.no_grad()
def score(model: Stack, document: Document, chunk_size: int) -> tuple[bool, float]:
    """Whether each label is the likeliest token, so that greedy decoding writes them, and their log-probability."""
    input_ids, labels = collate([document], model.like.device)
    targets = shift(labels)[0]
    chunks = model.run_chunks(input_ids, None, chunk_size)
    asked = torch.cat([hidden[0, targets[rows] != IGNORE] for rows, hidden in chunks])
    expected, log_probs = targets[targets != IGNORE], model.lm_head(asked).double().log_softmax(-1)  # (n), (n, V)
    return bool((log_probs.argmax(-1) == expected).all()), float(log_probs.gather(1, expected[:, None]).sum())


def wilson(found: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score (1927), which holds for few trials, and for none or all found."""
    z, share = 1.959964, found / trials
    middle, scale = (share + z**2 / (2 * trials)) / (1 + z**2 / trials), z / (1 + z**2 / trials)
    width = scale * sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return max(0.0, middle - width), min(1.0, middle + width)


def _axes(cells: Sequence[Cell]) -> tuple[list[int], list[float]]:
    return list(dict.fromkeys(cell.length for cell in cells)), list(dict.fromkeys(cell.depth for cell in cells))


def recall_table(cells: Sequence[Cell]) -> str:
    """A line for each depth, a column for each length: how many were found, and the passkey's mean log-probability."""
    lengths, depths = _axes(cells)
    lines = [f"{'depth':8}" + "".join(f"{length:>18,}" for length in lengths)]
    of = {(cell.length, cell.depth): cell for cell in cells}
    for depth in depths:
        row = [of[length, depth] for length in lengths]
        words = [f"{sum(cell.found)} of {len(cell.found)} ({fmean(cell.log_probs):.2f})" for cell in row]
        lines.append(f"{depth:<8.0%}" + "".join(f"{word:>18}" for word in words))
    columns = [[one for depth in depths for one in of[length, depth].found] for length in lengths]
    intervals = ["{:.0%} to {:.0%}".format(*wilson(sum(found), len(found))) for found in columns]
    return "\n".join([*lines, f"{'95 %':8}" + "".join(f"{word:>18}" for word in intervals)])


def draw_recall(axes: Any, cells: Sequence[Cell]) -> None:
    """Draw the share of passkeys found as a map of lengths and depths, each with the passkey's mean probability."""
    lengths, depths = _axes(cells)
    grid = torch.tensor([fmean(cell.found) for cell in cells]).view(len(lengths), len(depths)).T
    axes.imshow(grid, cmap="Greens", vmin=0, vmax=1.5, aspect="auto")
    for i, cell in enumerate(cells):
        words = f"{sum(cell.found)}/{len(cell.found)}\n{exp(fmean(cell.log_probs)):.0%}"
        axes.text(i // len(depths), i % len(depths), words, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="tokens", ylabel="depth of the passkey", title="passkeys found; geometric mean probability")
