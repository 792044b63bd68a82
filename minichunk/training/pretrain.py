"""How the shipped model was made: `python -m minichunk.training.pretrain DIR`.

Trains a byte-level BPE tokenizer and a small Llama on four of the shipped novels, at a context of
256 tokens, by ordinary backpropagation. The two other novels are kept for the main job: one to
extend the context on, one to measure it on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from ..files.atomic import write_json, write_text
from ..files.documents import cut_documents, read_documents
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
    model = Llama(config)
    # Pieces start at every half context, so that a token is seen at more than one position.
    documents = read_documents(paths, tokenizer)
    shifted = [type(d)(f"{d.name} (shifted)", d.input_ids[CONTEXT // 2 :], d.labels[CONTEXT // 2 :]) for d in documents]
    pieces, line = cut_documents([*documents, *shifted], CONTEXT)
    print(line)
    trainer = Trainer(
        model,
        pieces,
        lambda model, ids, labels, num_targets, _: full(model, ids, labels, num_targets=num_targets),
        Schedule(steps, lr, warmup=steps // 20, weight_decay=0.1),
        batch_size=batch_size,
        seed=seed,
    )
    with tqdm(total=steps, unit="step", desc="pretrain") as bar:
        for _ in range(steps):
            metrics = trainer.run_step()
            bar.set_postfix(loss=f"{metrics['loss']:.3f}")
            bar.update()
    model.to(torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_card(directory, model.float(), tokenizer, steps * batch_size * CONTEXT, seed, evaluate_every)


def write_card(
    directory: Path, model: Llama, tokenizer: Tokenizer, tokens: int, seed: int, evaluate_every: int
) -> None:
    """Measure the held-out loss and say in README.md and card.json what the model is."""
    held_out = {}
    for name in (EXTENDED_ON, MEASURED_ON):
        pieces, _ = cut_documents(read_documents([novel(name)], tokenizer), CONTEXT)
        ((span),) = loss_by_position(model, pieces[::evaluate_every], CONTEXT, [(0, CONTEXT)])
        held_out[name] = round(span.loss, 4)
        print(f"held-out loss on {name}: {span.loss:.4f} nats per token")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    card = {
        "parameters": parameters,
        "trained_on": list(TRAINED_ON),
        "context": CONTEXT,
        "tokens_seen": tokens,
        "seed": seed,
        "held_out_loss_nats_per_token": held_out,
    }
    write_json(directory / "card.json", card)
    losses = ", ".join(f"{loss:.2f} on *{name}*" for name, loss in held_out.items())
    write_text(
        directory / "README.md",
        f"""# A small Llama that knows Jane Austen up to {CONTEXT} tokens

{parameters:,} parameters in bfloat16, its own byte-level BPE tokenizer with {tokenizer.get_vocab_size():,} tokens.
Trained on {tokens:,} tokens of {", ".join(TRAINED_ON)} (public domain; {CONTEXT} tokens at a time, seed {seed}).
Loss on novels that it was not trained on, in nats per token, within its context: {losses}.

Made by `python -m minichunk.training.pretrain DIR`; the same seed on the same machine and PyTorch gives the same bits.
""",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where to write the checkpoint")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: 0)")
    arguments = parser.parse_args()
    pretrain(arguments.directory, steps=arguments.steps, seed=arguments.seed)
