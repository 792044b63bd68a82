"""What a loss of one's own costs, and what a shared prompt saves: CPU time of a step beside that of another step.

    python tutorials/step_times.py

In each of seven rounds both steps run, in turns the one and the other first, on one thread; what is printed is the
median of their ratios. CPU time is this process's own, so other work on the machine disturbs little. Weights are
random, which changes no time: a Llama of 20 million parameters, and for shared prompts the shape of the shipped one.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import minichunk as mc
from minichunk.losses import dpo, grpo

Step = Callable[[], Any]
ROUNDS, CHUNK = 7, 256
LARGE = mc.LlamaConfig(
    vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=11, num_attention_heads=6,
    num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
SMALL = mc.LlamaConfig(
    vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
    num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
)  # fmt: skip


def setting(config: Any, rank: int, rows: int, prompt: int, answer: int) -> tuple[mc.Llama, Tensor, Tensor]:
    """A model, and rows of one prompt and an answer each, of which the answer is learnt."""
    torch.manual_seed(0)
    model, ids = mc.Llama(config), torch.randint(config.vocab_size, (rows, prompt + answer))
    if rank:
        mc.add_lora(model, rank)
    ids[:, :prompt] = ids[0, :prompt].clone()
    return model, ids, ids.where(torch.arange(prompt + answer) >= prompt, -100)


def ratio(model: mc.Llama, one: Step, other: Step) -> float:
    """Of the one step's time over the other's."""
    ratios = []
    for n in range(ROUNDS + 1):
        times = {}
        for step in (one, other) if n % 2 else (other, one):
            model.zero_grad(set_to_none=True)
            began = time.process_time()
            step()
            times[step] = time.process_time() - began
        ratios.append(times[one] / times[other])
    return statistics.median(ratios[1:])  # the first round warms up


def show(words: str, one: Step, other: Step, model: mc.Llama) -> None:
    """Print the ratio of two steps of a model."""
    print(f"{words:76} {ratio(model, one, other):5.2f}", flush=True)


torch.set_num_threads(1)
model, ids, _ = setting(LARGE, 0, 1, 0, 1024)
step = partial(mc.seco, model, ids, ids, CHUNK)
objective = partial(step, objective=lambda log_probs: -log_probs.sum() / (log_probs != 0).sum())
show("an objective, over plain SeCO: all of 1,024 tokens are targets", objective, step, model)

model, ids, labels = setting(LARGE, 8, 2, 768, 256)
step = partial(mc.seco, model, ids, labels, CHUNK)
objective = partial(step, objective=dpo(mc.log_probs(model, ids, labels, CHUNK)))
show("DPO of a pair of 768 + 256 with LoRA, over plain SeCO", objective, step, model)

model, ids, labels = setting(LARGE, 0, 2, 896, 128)
step = partial(mc.seco, model, ids, ids, CHUNK)
objective = partial(mc.seco, model, ids, labels, CHUNK, objective=dpo(mc.log_probs(model, ids, labels, CHUNK)))
show("DPO of a pair of 896 + 128, over plain SeCO with the head on all tokens", objective, step, model)

for rows in (2, 8):
    model, ids, labels = setting(SMALL, 8, rows, 2048, 32)
    loss = dpo(mc.log_probs(model, ids, labels, CHUNK)) if rows == 2 else grpo(labels, torch.linspace(-1, 1, rows))
    step = partial(mc.seco, model, ids, labels, CHUNK, objective=loss)
    words = f"a prompt of 2,048 with {rows} answers of 32: each by itself, over shared"
    show(words, step, partial(step, share=True), model)
