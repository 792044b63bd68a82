# %% [markdown]
# # 4. SpaCO and unbiasedness
#
# SeCO spends most of its time on rebuilding chunks. SpaCO rebuilds only a random few of them and multiplies what it
# finds by factors, so that the *expected* gradient is right. That can be checked without statistics: with 5 chunks, 31
# subsets keep something. We run them all. That settles it for the published estimator and for two others, of which one
# is exactly unbiased.
#
# ## Chains
#
# By the chain rule the gradient is a sum over *chains* (eq. 3 of the paper): from a chunk's loss straight to the
# parameters, or through the cache of one earlier chunk, or of two, and so on. A chain survives when every chunk that
# it visits is rebuilt. Keep t of k chunks without replacement, and a chain through p chunks survives with probability
#
# $$\frac{t}{k} \cdot \frac{t-1}{k-1} \cdots \frac{t-p+1}{k-p+1}$$
#
# The paper takes it for $(t/k)^p$ and so gives each hop the factor $k/t$. That would be right for independent coins.
# Drawn without replacement, one chunk kept makes the next less likely:

# %%
from itertools import combinations
from math import comb, prod
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tokenizers import Tokenizer

import minichunk as mc
from minichunk.batch import prepare
from minichunk.chunks import cut
from minichunk.protocol import Options
from minichunk.seco import fill, new_memory, rebuild

k = 5
print("weight that a chain through p chunks gets on average (1 is right), 5 chunks:")
print("t   p=1   p=2   p=3   p=4   p=5")
for t in range(1, k + 1):
    survival = [comb(k - p, t - p) / comb(k, t) if p <= t else 0.0 for p in range(1, k + 1)]
    print(f"{t}" + "".join(f"{s * (k / t) ** p:6.2f}" for p, s in enumerate(survival, start=1)))

# %% [markdown]
# Direct chains (p = 1) are right. All others are too light, the longer the worse; with t = 1 none of them is left.
# A chain that dies: [the walk, step 9: backward](walk.html#method=spaco&chunk=128&step=9), where chunk 3 sends to chunk 1.
#
# ## How much does it matter? On a trained model
#
# Measure it on the shipped model and real text: 5 chunks of 24 tokens, gradient of all query and value projections.

# %%
ASSETS = Path(mc.__file__).parent / "assets"
model = mc.Llama.from_pretrained(ASSETS / "austen-llama", dtype=torch.float64)
tokenizer = Tokenizer.from_file(str(ASSETS / "austen-llama" / "tokenizer.json"))
text = (ASSETS / "austen" / "persuasion.txt").read_text()
for name, parameter in model.named_parameters():
    parameter.requires_grad_("q_proj" in name or "v_proj" in name)
C = 24
tokens = torch.tensor(tokenizer.encode(text[5000:15000]).ids)
ids = tokens[None, : k * C]


def gradient(run):
    """All trained parameters' gradients after `run()`, as one long vector."""
    model.zero_grad(set_to_none=True)
    run()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    return torch.cat([grad.flatten() for grad in grads])


def spaco(entries, ids=ids):
    return gradient(lambda: mc.spaco(model, ids, ids, C, sampler=lambda *_: entries))


exact = gradient(lambda: mc.full(model, ids, ids))

# %% [markdown]
# ## Algorithm 2 beside Algorithm 1
#
# Without what is marked NEW this is Algorithm 1, the loop of tutorial 2 with minichunk's parts. A skipped chunk is filled
# but not rebuilt; a kept one has a factor on its own loss and one on what is relayed to it.


# %%
def walk(draw):
    batch, chunks, options = prepare(model, ids, ids, None), cut(k * C, C), Options()
    memory = new_memory(model, ids, chunks, options)
    fill(model, ids, chunks[:-1], memory, options)  # lines 1-3
    for chunk, weight in reversed(list(zip(chunks, draw, strict=True))):  # line 4
        if weight is None:  # NEW
            continue
        loss, written, received = rebuild(model, batch, chunk, memory, options)  # lines 5, 6
        loss, received = weight.loss * loss, [weight.relay * g for g in received]  # NEW
        torch.autograd.backward([loss, *written], [None, *received])  # line 7


draw = [mc.Weight(1.5, 2.0), None, mc.Weight(1.25, 3.0), mc.Weight(1.75, 2.5), None]
assert float((gradient(lambda: walk(draw)) - spaco(draw)).norm() / exact.norm()) < 1e-10
assert float((gradient(lambda: walk([mc.Weight(1.0, 1.0)] * k)) - exact).norm() / exact.norm()) < 1e-10

# %% [markdown]
# | published, and ours | draw | factor on the loss | on the relay |
# |---|---|---|---|
# | Algorithm 2 as printed | t of k, without replacement | 1 | k/t |
# | `PaperBudget(t)` | the same | k/t | k/t |
# | `FixedBudget(t)` | the same | k/t | (k-1)/(t-1) |
# | `Bernoulli(t/k)` | a coin for each chunk | k/t | k/t |
#
# ## Every chain by itself
#
# What a draw finds is the sum of the chains that survive it. So run each of the 31 subsets once, with all factors 1.
# Take off what the smaller subsets within it have found: the chains through exactly these chunks are left. Factors only
# multiply them, the last chunk's by its loss, the others' by their relay. So no draw needs to be run any more:

# %%
chains = {}
for s in [s for p in range(1, k + 1) for s in combinations(range(k), p)]:  # the small ones first
    found = spaco([mc.Weight(1.0, 1.0) if i in s else None for i in range(k)])
    chains[s] = found - sum(part for smaller, part in chains.items() if set(smaller) < set(s))


def estimate(draw):
    """The gradient that SpaCO finds with these factors, put together from chains."""
    total = torch.zeros_like(exact)
    for (*others, last), part in chains.items():
        if all(draw[i] for i in (*others, last)):
            total += draw[last].loss * prod(draw[i].relay for i in others) * part
    return total


assert float((estimate(draw) - spaco(draw)).norm() / exact.norm()) < 1e-10
by_length = [sum(part for s, part in chains.items() if len(s) == p) for p in range(1, k + 1)]
print("chunks visited:      " + "".join(f"{p:8}" for p in range(1, k + 1)))
print("norm / whole norm:   " + "".join(f"{float(part.norm() / exact.norm()):8.4f}" for part in by_length))
assert float((sum(by_length) - exact).norm() / exact.norm()) < 1e-10

# %% [markdown]
# ## All draws
#
# A sampler's `outcomes` are its draws and their probabilities.


# %%
def moments(sampler):
    """Relative bias of the expected gradient, and root-mean-square distance of a single estimate."""
    mean, square = torch.zeros_like(exact), 0.0
    for probability, entries in sampler.outcomes(k):
        found = estimate(entries)
        mean += probability * found
        square += probability * float((found - exact).norm() ** 2)
    return float((mean - exact).norm() / exact.norm()), square**0.5 / float(exact.norm())


table = {}
for t in range(1, k):
    for name, sampler in (
        ("paper", mc.PaperBudget(t)),
        ("fixed", mc.FixedBudget(t)),
        ("bernoulli", mc.Bernoulli(t / k)),
    ):
        table[name, t] = moments(sampler)
print("         paper           fixed           bernoulli")
print("t of 5   bias    rms     bias    rms     bias    rms")
for t in range(1, k):
    cells = [f"{'0' if table[n, t][0] < 1e-10 else f'{table[n, t][0]:.3f}':8}{table[n, t][1]:<8.2f}"
             for n in ("paper", "fixed", "bernoulli")]  # fmt: skip
    print(f"{t}        " + "".join(cells).rstrip())
assert all(table["bernoulli", t][0] < 1e-10 for t in range(1, k))

# %% [markdown]
# - **Bernoulli** is unbiased, up to rounding (below 1e-10): the p coins of a chain are independent, and p factors of
#   k/t undo exactly their product. But the number of kept chunks varies, and a draw that keeps many has large factors.
# - **PaperBudget**, as published but for the scaled loss: biased, and heavily so for small budgets.
# - **FixedBudget** makes chains through one and two chunks exactly right, and those are most of the gradient. Every step
#   rebuilds the same number of chunks; at t = 2 it is noisier than coins. (At t = 1 no relay is used: paper's factors.)
#
# Is the first formula right? The bias predicted from the chains' strengths, against that of all subsets:


# %%
def predicted_bias(t, loss, relay):
    weights = [comb(k - p, t - p) / comb(k, t) * loss * relay ** (p - 1) if p <= t else 0.0 for p in range(1, k + 1)]
    return float(sum((w - 1) * part for w, part in zip(weights, by_length, strict=True)).norm() / exact.norm())


for t in (2, 3):
    assert abs(predicted_bias(t, k / t, k / t) - table["paper", t][0]) < 1e-9
    assert abs(predicted_bias(t, k / t, (k - 1) / (t - 1)) - table["fixed", t][0]) < 1e-9
print("predicted = enumerated for t = 2, 3")

# %% [markdown]
# ## Bias against noise at equal cost

# %%
figure, axes = plt.subplots(figsize=(6.4, 4))
for name, marker in (("paper", "s"), ("fixed", "^"), ("bernoulli", "o")):
    points = [table[name, t] for t in range(1, k)]
    axes.plot([p[1] for p in points], [p[0] for p in points], marker + "-", label=name)
    for t, (bias, rms) in enumerate(points, start=1):
        axes.annotate(f"t={t}", (rms, bias), textcoords="offset points", xytext=(4, 4), fontsize=7)
axes.set(xlabel="rms distance of one estimate from the exact gradient", ylabel="bias of the expected gradient")
axes.set_title("Bernoulli has no bias; the published factors trade bias for less noise")
axes.legend()
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# A relative rms of 1 is an error as large as the gradient itself. Useless? A gradient of *one document* is an estimate
# too, of that over all documents. How different are the exact gradients of different passages?

# %%
others = [gradient(lambda n=n: mc.full(model, tokens[None, n * 150 : n * 150 + k * C], tokens[None, n * 150 : n * 150 + k * C]))
          for n in range(12)]  # fmt: skip
mean = torch.stack(others).mean(0)
spread = (torch.stack([(g - mean).norm() ** 2 for g in others]).sum() / (len(others) - 1)).sqrt()
size = torch.stack([g.norm() for g in others]).mean()
print(f"between passages: rms deviation {float(spread / size):.2f} of a passage's own gradient norm")
print(f"Bernoulli(3/5) adds {table['bernoulli', 3][1]:.2f}, FixedBudget(3) {table['fixed', 3][1]:.2f}")

# %% [markdown]
# The text itself brings a deviation of about that size. Averaging over steps takes care of noise, but not of bias.
#
# ## When is a cap worth it?
#
# The paper advises to cap the factor at 2. For t = 1 and 2 of 5, where the relay's factors are 5 and 2.5:

# %%
print("t   cap     bias    rms")
for t in (1, 2):
    for cap in (1.0, 1.5, 2.0, None):
        bias, rms = moments(mc.PaperBudget(t, cap))
        print(f"{t}   {cap or 'none':<5}   {bias:.3f}   {rms:.2f}")

# %% [markdown]
# With t = 1 a cap changes nothing: no later chunk has sent anything. With t = 2 it trades a little noise for more bias.
# If steps are so noisy that training diverges, a smaller learning rate or a larger batch helps too, without the bias.
#
# ## Other rates
#
# Unbiasedness asks only that a kept chunk's factor is 1 over its own rate. So the rates may differ: the same cost on
# average, spent elsewhere. The last chunk sends but never receives, the first one receives most.


# %%
def rates(first, last, t=3):
    return [first, *[(t - first - last) / (k - 2)] * (k - 2), last]


for label, rate in (
    ("all the same", [3 / k] * k), ("last less", rates(0.65, 0.4)), ("first more", rates(0.8, 0.55)),
    ("first less", rates(0.45, 0.6)), ("first always", rates(1.0, 0.4)),
):  # fmt: skip
    bias, rms = moments(mc.Bernoulli(rate))
    assert bias < 1e-10
    print(f"{label:13} 3 of 5 on average: bias 0, rms {rms:.2f}")

# %% [markdown]
# Here there is little to gain. That need not be so on another model: measure where its gradient is.
#
# ## Exercises
#
# 1. Prove that Bernoulli is unbiased: follow one chain through $p$ chunks and multiply probabilities and factors.
# 2. Show that `FixedBudget`'s factors make chains through one and two chunks right. Why does no pair make three right?
# 3. Write a sampler that always keeps a chunk and enumerate its bias. (For each chunk it returns a `Weight` or None.)
# 4. Search for the rates with the smallest rms at 3 of 5 on average. How much is there to gain?
# 5. Write the samplers and their factors: `tutorials/exercises/`, exercise 6.
