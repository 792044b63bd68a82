# %% [markdown]
# # 11. Any loss
#
# SeCO's loss is a mean over tokens, and so it falls apart into the shares of the chunks. A preference loss does not: DPO
# puts the log-probabilities of two whole answers into a logistic function. This tutorial shows why SeCO computes its
# gradient exactly all the same, with one number a token; what answers to one prompt share; and what coins do to a pair.
# It needs [tutorial 2](02_seco_by_hand.md) and [tutorial 4](04_spaco_unbiased.md).

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import minichunk as mc
from minichunk.losses import dpo

torch.manual_seed(0)
config = mc.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8,
)  # fmt: skip
model = mc.Llama(config).double()
T, C, PROMPT = 12, 2, 8
ids = torch.randint(64, (1, T)).repeat(2, 1)
ids[1, PROMPT:] = torch.randint(64, (T - PROMPT,))  # two answers to one prompt: the chosen one, and the rejected
labels = ids.clone()
labels[:, :PROMPT] = -100  # nobody is to learn the prompt


def gradient():
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def distance(found, exact):
    return float((found - exact).norm() / exact.norm())


# %% [markdown]
# ## One number a token
#
# Let $l_t$ be the log-probability of label $t$. Whatever the loss $J$ makes of them, it reaches the model through them
# alone:
#
# $$\frac{dJ}{d\Theta} = \sum_t w_t \frac{dl_t}{d\Theta}, \qquad w_t = \frac{\partial J}{\partial l_t}$$
#
# The $w_t$ are numbers, one for each token. With them at hand the gradient is that of $\sum_t w_t l_t$, a weighted
# cross-entropy, and that is a sum over tokens again. By hand, for DPO (eq. 7 of [arXiv
# 2305.18290](https://arxiv.org/abs/2305.18290)) with a reference that is the model itself, as at the start of LoRA:

# %%
reference = mc.log_probs(model, ids, labels, C)  # (2, T), at each label's own position, 0 where there is none


def log_probs_of(logits):
    found = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return F.pad(found, (1, 0)) * (labels != -100)


def preference(log_probs, beta=0.1):
    chosen, rejected = (log_probs - reference).sum(1)
    return -F.logsigmoid(beta * (chosen - rejected))


model.zero_grad()
preference(log_probs_of(model(ids))).backward()  # ordinary autograd, all logits
exact = gradient()

leaf = log_probs_of(model(ids)).detach().requires_grad_()
(weights,) = torch.autograd.grad(preference(leaf), leaf)
model.zero_grad()
(weights * log_probs_of(model(ids))).sum().backward()
print("the numbers w_t of the chosen answer  ", [f"{w:+.3f}" for w in weights[0, PROMPT:].tolist()])
print("and of the rejected one               ", [f"{w:+.3f}" for w in weights[1, PROMPT:].tolist()])
print(f"gradient by one number a token, off by {distance(gradient(), exact):.0e}")
assert distance(gradient(), exact) < 1e-13

# %% [markdown]
# At a margin of 0 the logistic function has the slope 1/2, so every $w_t$ is 0.1 / 2, with the sign of its answer. (The
# margin is exactly 0 only if policy and reference are computed with the same chunks: in half precision others round
# otherwise.)
#
# SeCO's fill runs the whole text anyway. If the last chunk and the LM head join it, it yields the $l_t$; autograd makes
# the $w_t$ of them; and the walk back is the ordinary one. So `objective=` is a function of the log-probabilities, and
# nothing else changes ([`objective.py`](../minichunk/objective.py)):

# %%
model.zero_grad()
loss = mc.seco(model, ids, labels, C, objective=preference)
print(f"mc.seco(..., objective=preference): loss {loss:.4f}, gradient off by {distance(gradient(), exact):.0e}")
model.zero_grad()
mc.seco(model, ids, labels, C, objective=dpo(reference))  # the same, of losses.py
assert distance(gradient(), exact) < 1e-13

# %% [markdown]
# ## A tree of chunks
#
# Both rows begin with the same prompt, and there nothing in them differs: neither keys nor values, nor hidden states;
# only what the last of these tokens has to predict. With `share=True` they become one row: the prompt but for that last
# token, then the one answer from there on, then the other, each of which sees the prompt and itself. What both send back
# to the keys and values of the prompt is added up, as the chain rule has it for whatever is used twice
# ([`tree.py`](../minichunk/tree.py)). Watched:


# %%
def watch(share):
    """(rows, chunk) of what the first layer is given in the walk back, in order."""
    seen, run = [], model._layer

    def watched(layer, chunks, options, x, *more):
        if torch.is_grad_enabled() and layer is model.layers[0]:
            seen.append((x.shape[0], chunks[0]))
        return run(layer, chunks, options, x, *more)

    model._layer = watched
    model.zero_grad()
    mc.seco(model, ids, labels, C, objective=preference, share=share)
    del model._layer
    return seen


figure, axes = plt.subplots(1, 2, figsize=(9, 2.2), layout="constrained", sharey=True)
for panel, share in zip(axes, (False, True), strict=True):
    runs = watch(share)
    tokens = sum(rows * (chunk.stop - chunk.start) for rows, chunk in runs)
    way = "as a tree  " if share else "as two rows"
    print(f"{way} {tokens} tokens are rebuilt, gradient off by {distance(gradient(), exact):.0e}")
    assert distance(gradient(), exact) < 1e-13
    for _, (start, stop) in runs:
        answer, behind = divmod(start - (PROMPT - 1), T - PROMPT)  # in the one row
        places = [(answer, PROMPT - 1 + behind)] if answer >= 0 else [(0.5, start)]
        for y, left in places if share else [(0, start), (1, start)]:
            color = "tab:gray" if stop <= PROMPT else ("tab:green", "tab:red")[y]
            panel.barh(y, stop - start, left=left, height=0.5, color=color, edgecolor="white")
    panel.set(
        title="a tree" if share else "two rows", yticks=(0, 1), yticklabels=("chosen", "rejected"), xlabel="position"
    )
figure.suptitle("Chunks of a pair: two rows, or a tree")
plt.show()

# %% [markdown]
# With a prompt of thousands of tokens and short answers that is half of all work for a pair, and 7/8 for a group of
# eight.
#
# ## What it costs
#
# | a step of | over one of | CPU time |
# |---|---|---|
# | an objective, all of 1,024 tokens are targets | plain SeCO | 1.11 |
# | DPO, a pair of 768 + 256 tokens, LoRA | plain SeCO | 1.12 |
# | DPO, a pair of 896 + 128 tokens | plain SeCO that runs the LM head on all tokens | 1.01 |
# | a prompt of 2,048 tokens with 2 answers of 32, each by itself | the prompt shared | 1.81 |
# | the same with 8 answers, GRPO | the prompt shared | 6.00 |
#
# What an objective adds is the LM head and the last chunk in the fill; in the third row the head is spared where nobody is
# to learn, which makes up for it. Medians of seven rounds in which both steps run in turns: CPU time of one thread on an
# AMD EPYC that had other work too, chunks of 256, float32, by `python tutorials/step_times.py`.
#
# ## What a coin does to a pair
#
# SpaCO backpropagates through some chunks alone. The $w_t$ must not come from these: a loss that is no sum over tokens
# is not estimated by its value at an estimate. So with an objective SpaCO's fill goes to the end of the text; the $w_t$
# are exact, and what is estimated is the sum over tokens, as ever. All draws, enumerated, with coins for the prompt's
# chunks alone, or for all:

# %%
chunks = len(watch(False))
answers = {i for i in range(chunks) if (i + 1) * C > PROMPT}


def mean_and_deviation(tossed):
    mean, squares = torch.zeros_like(exact), 0.0
    for draw in range(2 ** len(tossed)):
        kept = {j for i, j in enumerate(sorted(tossed)) if draw >> i & 1}
        coin = {j: mc.Weight(2.0, 2.0) if j in kept else None for j in tossed}
        factors = [coin.get(j, mc.Weight(1.0, 1.0)) for j in range(chunks)]
        model.zero_grad()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        mc.spaco(model, ids, labels, C, sampler=lambda *_, factors=factors: factors, objective=preference)
        mean += gradient() / 2 ** len(tossed)
        squares += distance(gradient(), exact) ** 2 / 2 ** len(tossed)
    return distance(mean, exact), squares**0.5


for words, tossed in (("the prompt's chunks", set(range(chunks)) - answers), ("all chunks", set(range(chunks)))):
    bias, deviation = mean_and_deviation(tossed)
    print(f"coins of 1/2 for {words:20} mean off by {bias:.0e}, a draw off by {deviation:.1f}")
    assert bias < 1e-12

# %% [markdown]
# Both are unbiased. But what is learnt stands in the answers, and a coin that skips one of them skips most of the
# gradient. Where answers are short, keep them, and toss coins for the prompt.
#
# What needs more of a token than the probability of its label, as distillation does, is still a sum over chunks:
# `chunk_loss=` is given what the LM head is given, chunk by chunk; `minichunk.losses.divergence` makes of that the
# distance from a teacher, a part of the vocabulary at a time. Training from the command line:
# [`minichunk train --objective dpo`](training.md).
#
# ## Exercises
#
# [Exercise 10](exercises/e10_objective.py) is to write a focal loss and a DPO with a margin. On paper:
#
# 1. Write an objective for the focal loss, $-\sum_t (1 - p_t)^2 \log p_t$, in one line. What are its $w_t$?
# 2. A packed batch of pairs of different lengths: what would be wrong if DPO's sums were means over all tokens of the
#    batch?
# 3. The prompt's last token is run once for each answer. Why is it not shared, and what would that take?
