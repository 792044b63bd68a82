"""How the shipped model was made: `python -m minichunk.training.pretrain DIR`.

Trains a byte-level BPE tokenizer and a small Llama on four of the shipped novels, at a context of
256 tokens, by ordinary backpropagation. The two other novels are kept for the main job: one to
extend the context on, one to measure it on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from ..files.atomic import write_json, write_text
from ..files.documents import Document, cut_documents, read_documents
from ..files.shipped import EXTENDED_ON, MEASURED_ON, TRAINED_ON, novel
from ..full import full
from ..models.config import LlamaConfig
from ..models.llama import Llama
from .evaluate import loss_by_position
from .loop import Schedule, Trainer

CONTEXT = 256
END = "<|endoftext|>"


def train_tokenizer(paths: Sequence[Path], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(path) for path in paths], trainer)
    return tokenizer


def overlapping_pieces(paths: Sequence[Path], tokenizer: Tokenizer, context: int) -> list[Document]:
    """One starts at every half context, so that a token is seen at more than one position."""
    documents = read_documents(paths, tokenizer)
    half = context // 2
    shifted = [Document(f"{d.name} (shifted)", d.input_ids[half:], d.labels[half:]) for d in documents]
    pieces, line = cut_documents([*documents, *shifted], context)
    print(line)
    return pieces


def train(trainer: Trainer) -> None:
    """All steps of its schedule, with a progress bar."""
    steps = trainer.schedule.steps
    with tqdm(total=steps, unit="step", desc="pretrain") as bar:
        for _ in range(steps):
            metrics = trainer.run_step()
            bar.set_postfix(loss=f"{metrics['loss']:.3f}")
            bar.update()


def pretrain(
    directory: Path, steps: int = 2000, batch_size: int = 16, lr: float = 2e-3, seed: int = 0, evaluate_every: int = 1
) -> None:
    """Train the shipped model and write it, its tokenizer and its card to `directory`.

    evaluate_every: measure the held-out loss on every so-manieth piece of the held-out novels.
    """
    paths = [novel(name) for name in TRAINED_ON]
    tokenizer = train_tokenizer(paths, vocab_size=2048)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    trainer = Trainer(
        Llama(config),
        overlapping_pieces(paths, tokenizer, CONTEXT),
        lambda model, ids, labels, num_targets, _: full(model, ids, labels, num_targets=num_targets),
        Schedule(steps, lr, warmup=steps // 20, weight_decay=0.1),
        batch_size=batch_size,
        seed=seed,
    )
    train(trainer)
    card = write_model(directory, trainer, tokenizer, evaluate_every)
    what = f"its own byte-level BPE tokenizer with {tokenizer.get_vocab_size():,} tokens"
    write_readme(directory, card, f"A small Llama that knows Jane Austen up to {CONTEXT} tokens", what, "pretrain")


def write_model(directory: Path, trainer: Trainer, tokenizer: Tokenizer, evaluate_every: int) -> dict[str, Any]:
    """Write the trained model in bfloat16 and its tokenizer; measure the held-out loss, write and return its card."""
    model = trainer.model.to(torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    model.float()
    context, held_out = model.config.max_position_embeddings, {}
    for name in (EXTENDED_ON, MEASURED_ON):
        pieces, _ = cut_documents(read_documents([novel(name)], tokenizer), context)
        (span,) = loss_by_position(model, pieces[::evaluate_every], context, [(0, context)])
        held_out[name] = round(span.loss, 4)
        print(f"held-out loss on {name}: {span.loss:.4f} nats per token")
    card = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_on": list(TRAINED_ON),
        "context": context,
        "tokens_seen": trainer.step * trainer.batch_size * context,
        "seed": trainer.seed,
        "held_out_loss_nats_per_token": held_out,
    }
    write_json(directory / "card.json", card)
    return card


def write_readme(
    directory: Path, card: Mapping[str, Any], title: str, tokenizer: str, script: str, beside: str = ""
) -> None:
    """Say in words what the card says; beside: what to compare its losses with."""
    losses = ", ".join(f"{loss:.2f} on *{name}*" for name, loss in card["held_out_loss_nats_per_token"].items())
    write_text(
        directory / "README.md",
        f"""# {title}

{card["parameters"]:,} parameters in bfloat16, {tokenizer}.
Trained on {card["tokens_seen"]:,} tokens of {", ".join(card["trained_on"])} (public domain; {card["context"]} tokens at a time, seed {card["seed"]}).
Loss on novels that it was not trained on, in nats per token, within its context: {losses}.{beside}

Made by `python -m minichunk.training.{script} DIR`; the same seed on the same machine and PyTorch gives the same bits.
""",  # noqa: E501
    )


def run_as_command(make: Callable[..., None], what: str | None, steps: int) -> None:
    """`python -m` of a script like this one; what: its docstring. steps: by default."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where to write the checkpoint")
    parser.add_argument("--steps", type=int, default=steps, help=f"optimizer steps (default: {steps})")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: 0)")
    arguments = parser.parse_args()
    make(arguments.directory, steps=arguments.steps, seed=arguments.seed)


if __name__ == "__main__":
    run_as_command(pretrain, __doc__, steps=2000)
