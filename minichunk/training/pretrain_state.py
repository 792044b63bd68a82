"""How the shipped state-space model was made: `python -m minichunk.training.pretrain_state DIR`.

Trains a small StateSpace on bytes of the four novels that pretrain.py takes, by SeCO: a state is handed on from chunk
to chunk, and its adjoint comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor

from ..files.shipped import EXTENDED_ON, MEASURED_ON, TRAINED_ON, novel
from ..models.ssm import StateSpace, StateSpaceConfig
from ..seco import seco
from .loop import Schedule, Trainer
from .pretrain import overlapping_pieces, run_as_command, train, train_tokenizer, write_model, write_readme

CONTEXT, CHUNK_SIZE = 512, 128
CONFIG = StateSpaceConfig(
    vocab_size=257,
    hidden_size=192,
    state_size=16,
    num_hidden_layers=4,
    max_position_embeddings=CONTEXT,
    eos_token_id=0,
)


def bytes_tokenizer() -> Tokenizer:
    """One token for each byte, and the end token."""
    tokenizer = train_tokenizer([], CONFIG.vocab_size)  # on no text: nothing is merged
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # so nothing is split
    return tokenizer


def unigram_losses() -> dict[str, float]:
    """Of the held-out novels, nats per byte: of a model that knows nothing but how frequent each byte is."""

    def read(names: Sequence[str]) -> Tensor:
        return torch.tensor(list(b"".join(novel(name).read_bytes() for name in names)))

    counts = torch.bincount(read(TRAINED_ON), minlength=256) + 1.0  # as if all had been seen once more
    losses = -(counts / counts.sum()).log()
    return {name: float(losses[read([name])].double().mean()) for name in (EXTENDED_ON, MEASURED_ON)}


def pretrain_state(
    directory: Path, steps: int = 1000, batch_size: int = 8, lr: float = 1e-2, seed: int = 0, evaluate_every: int = 1
) -> None:
    """Train the shipped state-space model and write it, its tokenizer and its card to `directory`.

    evaluate_every: measure the held-out loss on every so-manieth piece of the held-out novels.
    """
    paths, tokenizer = [novel(name) for name in TRAINED_ON], bytes_tokenizer()
    torch.manual_seed(seed)
    model = StateSpace(CONFIG)
    trainer = Trainer(
        model,
        overlapping_pieces(paths, tokenizer, CONTEXT),
        lambda model, ids, labels, num_targets, _: seco(model, ids, labels, CHUNK_SIZE, num_targets=num_targets),
        Schedule(steps, lr, warmup=steps // 20, weight_decay=0.1),
        batch_size=batch_size,
        seed=seed,
    )
    train(trainer)
    card = write_model(directory, trainer, tokenizer, evaluate_every)
    beside = " and ".join(f"{loss:.2f}" for loss in unigram_losses().values())
    write_readme(
        directory,
        card,
        "A small state-space model that knows Jane Austen byte by byte",
        "a token for each byte and an end token",
        "pretrain_state",
        f"\nFrequencies of bytes alone give {beside}.",
    )


if __name__ == "__main__":
    run_as_command(pretrain_state, __doc__, steps=1000)
