"""How the shipped models were made: `python tutorials/pretrain.py austen-llama DIR`, and austen-state.

Both learn from four of the shipped novels. The two other novels are kept for the main job: one to extend the context
on, one to measure it on.

austen-llama: a byte-level BPE tokenizer and a small Llama, at a context of 256 tokens, by ordinary backpropagation.
austen-state: a small StateSpace on bytes, by SeCO: chunks hand on a state, and its adjoint comes back.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

import minichunk as mc
from minichunk.files.atomic import write_json, write_text
from minichunk.files.documents import (
    EXTENDED_ON,
    MEASURED_ON,
    TRAINED_ON,
    Document,
    collate,
    cut_documents,
    novel,
    read_documents,
)
from minichunk.training.evaluate import loss_by_position
from minichunk.training.loop import Gradient, Schedule, Trainer

LLAMA = mc.LlamaConfig(
    vocab_size=2048,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    eos_token_id=0,
)
STATE = mc.StateSpaceConfig(
    vocab_size=257,
    hidden_size=192,
    state_size=16,
    num_hidden_layers=4,
    max_position_embeddings=512,
    eos_token_id=0,
)
END = "<|endoftext|>"


def train_tokenizer(paths: Sequence[Path], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer. Without a text nothing is merged: one token for each byte, and the end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(paths))
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


def unigram_losses() -> dict[str, float]:
    """Of the held-out novels, nats per byte: of a model that knows nothing but how frequent each byte is."""

    def read(names: Sequence[str]) -> Tensor:
        return torch.tensor(list(b"".join(novel(name).read_bytes() for name in names)))

    counts = torch.bincount(read(TRAINED_ON), minlength=256) + 1.0  # as if all had been seen once more
    losses = -(counts / counts.sum()).log()
    return {name: float(losses[read([name])].double().mean()) for name in (EXTENDED_ON, MEASURED_ON)}


def pretrain_llama(
    directory: Path, steps: int = 2000, batch_size: int = 16, lr: float = 2e-3, seed: int = 0, evaluate_every: int = 1
) -> None:
    """Train the shipped Llama and write it, its tokenizer and its card to `directory`.

    evaluate_every: measure the held-out loss on every so-manieth piece of the held-out novels.
    """
    tokenizer = train_tokenizer([novel(name) for name in TRAINED_ON], LLAMA.vocab_size)
    torch.manual_seed(seed)

    def gradient(model: Any, batch: list[Document], num_targets: int, _: torch.Generator) -> Tensor:
        return mc.full(model, *collate(batch), num_targets=num_targets)

    trainer = train(mc.Llama(LLAMA), tokenizer, gradient, steps, batch_size, lr, seed)
    title = f"A small Llama that knows Jane Austen up to {LLAMA.max_position_embeddings} tokens"
    what = f"its own byte-level BPE tokenizer with {tokenizer.get_vocab_size():,} tokens"
    write_model(directory, trainer, tokenizer, evaluate_every, title, what, "austen-llama")


def pretrain_state(
    directory: Path, steps: int = 1000, batch_size: int = 8, lr: float = 1e-2, seed: int = 0, evaluate_every: int = 1
) -> None:
    """Train the shipped state-space model and write it, its tokenizer and its card to `directory`."""
    tokenizer = train_tokenizer([], STATE.vocab_size)
    torch.manual_seed(seed)

    def gradient(model: Any, batch: list[Document], num_targets: int, _: torch.Generator) -> Tensor:
        return mc.seco(model, *collate(batch), chunk_size=128, num_targets=num_targets)

    trainer = train(mc.StateSpace(STATE), tokenizer, gradient, steps, batch_size, lr, seed)
    title, what = (
        "A small state-space model that knows Jane Austen byte by byte",
        "a token for each byte and an end token",
    )
    beside = " and ".join(f"{loss:.2f}" for loss in unigram_losses().values())
    beside = f"\nFrequencies of bytes alone give {beside}."
    write_model(directory, trainer, tokenizer, evaluate_every, title, what, "austen-state", beside)


def train(
    model: Any, tokenizer: Tokenizer, gradient: Gradient, steps: int, batch_size: int, lr: float, seed: int
) -> Trainer:
    """The trainer of this model after all its steps, with a progress bar."""
    context = model.config.max_position_embeddings
    pieces = overlapping_pieces([novel(name) for name in TRAINED_ON], tokenizer, context)
    schedule = Schedule(steps, lr, warmup=steps // 20, weight_decay=0.1)
    trainer = Trainer(model, pieces, gradient, schedule, batch_size=batch_size, seed=seed)
    with tqdm(total=steps, unit="step", desc="pretrain") as bar:
        for _ in range(steps):
            metrics = trainer.run_step()
            bar.set_postfix(loss=f"{metrics['loss']:.3f}")
            bar.update()
    return trainer


def write_model(
    directory: Path, trainer: Trainer, tokenizer: Tokenizer, evaluate_every: int, title: str, what: str, name: str,
    beside: str = "",
) -> None:  # fmt: skip
    """Write the trained model in bfloat16 and its tokenizer; measure its held-out loss, and say both in a card.

    title, what: of the model, and of its tokenizer, in words. beside: what to compare its losses with.
    """
    model = trainer.model.to(torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    model.float()
    context, held_out = model.config.max_position_embeddings, {}
    for novel_name in (EXTENDED_ON, MEASURED_ON):
        pieces, _ = cut_documents(read_documents([novel(novel_name)], tokenizer), context)
        (span,) = loss_by_position(model, pieces[::evaluate_every], context, [(0, context)])
        held_out[novel_name] = round(span.loss, 4)
        print(f"held-out loss on {novel_name}: {span.loss:.4f} nats per token")
    card = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_on": list(TRAINED_ON),
        "context": context,
        "tokens_seen": trainer.step * trainer.batch_size * context,
        "seed": trainer.seed,
        "held_out_loss_nats_per_token": held_out,
    }
    write_json(directory / "card.json", card)
    losses = ", ".join(f"{loss:.2f} on *{novel_name}*" for novel_name, loss in held_out.items())
    write_text(
        directory / "README.md",
        f"""# {title}

{card["parameters"]:,} parameters in bfloat16, {what}.
Trained on {card["tokens_seen"]:,} tokens of {", ".join(TRAINED_ON)} (public domain; {context} tokens at a time, seed {card["seed"]}).
Loss on novels that it was not trained on, in nats per token, within its context: {losses}.{beside}

Made by `python tutorials/pretrain.py {name} DIR`; the same seed on the same machine and PyTorch gives the same bits.
""",  # noqa: E501
    )


MODELS = {"austen-llama": (pretrain_llama, 2000), "austen-state": (pretrain_state, 1000)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("directory", type=Path, help="where to write the checkpoint")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 2000, and 1000 for austen-state)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: 0)")
    arguments = parser.parse_args()
    make, steps = MODELS[arguments.model]
    make(arguments.directory, steps=arguments.steps or steps, seed=arguments.seed)


if __name__ == "__main__":
    main()
