# %% [markdown]
# # 2. SeCO by hand
#
# Sequential Chunk-wise Optimization (Algorithm 1 of [arXiv 2505.16710](https://arxiv.org/abs/2505.16710)) computes the
# exact gradient of a long sequence while the graph of only one chunk exists. Here we derive it for three chunks, run
# every step by hand, print what is handed from chunk to chunk, and end with the loop of ten lines. (Without the
# derivation, but with a Llama, it is one page: [`minichunk/tiny.py`](../minichunk/tiny.py).)
#
# Algorithm 1, in our words; its line numbers are quoted below and in the code. The paper counts chunks from 1 to k; we
# count from 0, like the code and the golden files:
#
# ```text
# 1-3  for j = 0..k-1:  run chunk j without gradients, store its memory m'_j        (fill)
# 4    for j = k-1..0:
# 5        run chunk j again on top of m'_0 .. m'_(j-1), with its graph             (rebuild)
# 6        give m_j the gradient that has been collected at m'_j                    (relay)
# 7        backpropagate from J_j and m_j; gradients arrive at Θ and m'_0 .. m'_(j-1)
# ```
#
# ## On paper
#
# Cut the sequence into chunks $x_0, x_1, x_2$. Running chunk $j$ on top of what the earlier ones left behind gives its
# loss and its own *memory*, in a Llama its keys and values (eq. 1 of the paper):
#
# $$(J_j, m_j) = f(x_j;\; m_0, \dots, m_{j-1};\; \Theta)$$
#
# We want the gradient of $J = J_0 + J_1 + J_2$. Write $\partial_j$ for derivatives of chunk $j$'s own computation, with
# its inputs $m_0..m_{j-1}$ and $\Theta$ taken as independent, and $g_i = dJ/dm_i$ for how the whole loss depends on a
# memory. A memory is used by every later chunk, in its loss and in its memory, so by the chain rule
#
# $$g_2 = 0$$
# $$g_1 = \frac{\partial_2 J_2}{\partial m_1}$$
# $$g_0 = \frac{\partial_2 J_2}{\partial m_0} + \frac{\partial_1 J_1}{\partial m_0} + g_1 \frac{\partial_1 m_1}{\partial m_0}$$
#
# and the gradient of the parameters collects, from each chunk, its loss and its memory:
#
# $$\frac{dJ}{d\Theta} = \sum_{j=0}^{2} \left( \frac{\partial_j J_j}{\partial \Theta} + g_j \frac{\partial_j m_j}{\partial \Theta} \right)$$
#
# Look at the order. $g_1$ needs chunk 2 only. $g_0$ needs chunks 2 and 1, and $g_1$. So walk from the last chunk to the
# first: when we come to chunk $j$, all of $g_j$ has been collected. And chunk $j$'s part is *one* backward pass through
# *one* chunk's graph, started from its loss with 1 and from its memory with $g_j$. Nothing else has to be alive.

# %%
import torch
from concatenating import Concatenating

import minichunk as mc
from minichunk.chunks import cut
from minichunk.loss import summed_loss
from minichunk.protocol import flat

torch.manual_seed(0)
config = mc.LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8,
)  # fmt: skip
model = mc.Llama(config).double()
with torch.no_grad():  # larger weights than a fresh model's, so that there is something to see
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(15)
ids = torch.randint(config.vocab_size, (2, 11))
labels = ids.clone()
labels[1, 9:] = -100  # the second row is two tokens shorter: padding, without a label
targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)  # position t predicts t + 1; the last one nothing
num_targets = int((targets >= 0).sum())
chunks = cut(11, 4)
print("chunks:", [tuple(chunk) for chunk in chunks])
print("targets of each, both rows together:", [int((targets[:, a:b] >= 0).sum()) for a, b in chunks], "of", num_targets)

# %% [markdown]
# Two rows of unequal length, and a last chunk that is shorter than the others, as real batches have them. A chunk takes
# its positions of *all* rows. Labels are shifted *once, before cutting*: the last position of chunk 0 has to predict the
# first token of chunk 1. Shifting inside each chunk would lose a target at every cut. And since chunks have unequally
# many targets, every $J_j$ is a sum that is divided by the number of *all* targets, never a chunk's own mean.
#
# ## One chunk as a function
#
# `f` is eq. 1. The memories of earlier chunks are *leaves*: tensors without a history whose `.grad` collects what
# arrives. So $\partial_j$ is what autograd computes. For this tutorial the past is kept as one leaf per chunk and
# concatenated in every attention, which is the textbook way; minichunk's own KV cache avoids that copy.

# %%
memory = Concatenating(model).new_memory(batch=2, capacity=11, receiving=chunks[:-1])  # none sends to the last


def f(j):
    """J_j and m_j: chunk j's part of the mean loss, and the keys and values it makes, layer by layer."""
    rows = slice(chunks[j].start, chunks[j].stop)
    hidden, m = model.run(ids[:, rows], memory, [chunks[j]])
    return summed_loss(hidden, model.lm_head.weight, targets[:, rows]) / num_targets, m


def leaves(i):
    """m'_i: the stored copies of chunk i's keys and values, layer by layer."""
    return [leaf for layer in memory.layers for leaf in layer.chunks[chunks[i].start]]


def norms(tensors):
    return "  ".join("   -  " if t is None else f"{float(t.norm()):.4f}" for t in tensors)


# %% [markdown]
# ## Fill (lines 1-3)
#
# Run the chunks in order without gradients and keep what they wrote. The loss is not needed yet. (Nobody will read what
# the last chunk wrote, so the loop at the end leaves it out.)

# %%
with torch.no_grad():
    for j in range(3):
        _, m = f(j)
        memory.write([chunks[j]], m)

# %% [markdown]
# ## Chunk 2
#
# Nobody comes after it: $g_2 = 0$. Its backward pass fills the parameters' `.grad` with $\partial_2 J_2 / \partial
# \Theta$, and what arrives at the leaves are the first parts of $g_1$ and $g_0$.

# %%
model.zero_grad(set_to_none=True)
J2, m2 = f(2)
J2.backward()
print("                      layer 0         layer 1")
print("                      keys    values  keys    values")
print("chunk 2 sent to m'_1: " + norms(leaf.grad for leaf in leaves(1)))
print("chunk 2 sent to m'_0: " + norms(leaf.grad for leaf in leaves(0)))
first_part = [leaf.grad.clone() for leaf in leaves(0)]

# %% [markdown]
# The shapes that a chunk comes by, here those of the short one: B rows, C positions in the chunk, P before it, E numbers
# per position, H query heads that share G key-value heads of size D, V ids. Only what has a P in it grows from chunk to
# chunk, and only `m_2` and what is sent back leaves the chunk.

# %%
hidden, m = model.run(ids[:, 8:], memory, [chunks[2]])
queries = model.model.layers[1].self_attn.heads(model.model.layers[1].self_attn.q_proj(hidden))
keys = torch.cat([leaves(0)[2], leaves(1)[2], m[1][0]], dim=2)
for what, letters, x in [
    ("x_2, ids", "B, C", ids[:, 8:]),
    ("hidden states, before and after layers", "B, C, E", hidden),
    ("queries of a layer", "B, H, C, D", queries),
    ("m_2: keys of a layer; values likewise", "B, G, C, D", m[1][0]),
    ("m'_0, m'_1 and m_2 side by side", "B, G, P+C, D", keys),
    ("scores of a layer, within attention", "B, H, C, P+C", queries @ keys.repeat_interleave(2, dim=1).mT),
    ("logits, of which a tile exists at a time", "B, C, V", hidden @ model.lm_head.weight.T),
    ("J_2", "", J2),
    ("sent back to m'_1, added to its .grad", "as m'_1", leaves(1)[2].grad),
]:
    print(f"{what:42}{'(' + letters + ')':15}{tuple(x.shape)}")

# %% [markdown]
# ## Chunk 1
#
# Rebuild its graph, on top of $m'_0$. Now $g_1$ is complete, because chunk 2 was the only one after it. **Relay**
# (line 6): start the backward pass from the loss *and* from $m_1$ with gradient $g_1$.
# To see it on a trained model: [the walk, step 17: relay](walk.html#method=seco&chunk=128&step=17).

# %%
J1, m1 = f(1)
g1 = [leaf.grad for leaf in leaves(1)]
torch.autograd.backward([J1, *flat(m1)], [None, *g1])
print("relayed to chunk 1:   " + norms(g1))
sent = [leaf.grad - before for leaf, before in zip(leaves(0), first_part, strict=True)]
print("chunk 1 sent to m'_0: " + norms(sent))
print("g_0, the sum of both: " + norms(leaf.grad for leaf in leaves(0)))

# %% [markdown]
# What chunk 1 sent has two parts: its own loss, and, through what it wrote in layer 1, the loss of chunk 2. That second
# one is the term $g_1\, \partial_1 m_1 / \partial m_0$, a chain that visits two memories. It ends in layer 0 only: each
# hop to an earlier chunk also goes at least one layer down.
#
# ## Chunk 0, and the check

# %%
J0, m0 = f(0)
g0 = [leaf.grad for leaf in leaves(0)]
torch.autograd.backward([J0, *flat(m0)], [None, *g0])
print("relayed to chunk 0:   " + norms(g0))

SAME = 1e-10  # relative: float64's rounding, summed up over a few hundred operations, stays far below (tutorial 1)
by_hand = {name: p.grad.clone() for name, p in model.named_parameters()}
loss = float((J0 + J1 + J2).detach())


def difference(run):
    """Relative distance between the gradient of `run()` and the one by hand, for the worst parameter."""
    model.zero_grad(set_to_none=True)
    value = float(run())
    assert abs(value - loss) < SAME * loss
    return max(float((p.grad - by_hand[name]).norm() / p.grad.norm()) for name, p in model.named_parameters())


print("\nby hand = full backpropagation, to ten digits:", difference(lambda: mc.full(model, ids, labels)) < SAME)
assert difference(lambda: mc.full(model, ids, labels)) < SAME

# %% [markdown]
# What would have been lost without the relay? Chunk 1's backward from its loss alone misses $g_1$ altogether. (The
# errors are larger than on the trained model of the first tutorial, because these random weights are.)

# %%
model.zero_grad(set_to_none=True)
for j in (2, 1, 0):
    f(j)[0].backward()
without = {name: p.grad for name, p in model.named_parameters()}
for name in ("model.layers.0.self_attn.v_proj.weight", "model.layers.1.self_attn.v_proj.weight"):
    error = float((without[name] - by_hand[name]).norm() / by_hand[name].norm())
    print(f"no relay, relative error of {name}: {error:.2f}")

# %% [markdown]
# ## The loop
#
# The same for any number of chunks. The last chunk is not filled at all, because nobody reads its memory.


# %%
def seco_by_hand(num_chunks):
    global memory
    memory = Concatenating(model).new_memory(batch=2, capacity=11, receiving=chunks[:-1])  # a new one for every walk
    with torch.no_grad():
        for j in range(num_chunks - 1):  # fill
            memory.write([chunks[j]], f(j)[1])
    for j in reversed(range(num_chunks)):
        J, m = f(j)  # rebuild
        g = flat(memory.hand_over(chunks[j]))  # what later chunks have sent back; empty for the last one
        torch.autograd.backward([J, *flat(m)[: len(g)]], [None, *g])  # relay and backpropagate
        yield J.detach()


assert difference(lambda: sum(seco_by_hand(3))) < SAME
print("the loop    = by hand, to ten digits:", difference(lambda: sum(seco_by_hand(3))) < SAME)
print("mc.seco     = by hand, to ten digits:", difference(lambda: mc.seco(model, ids, labels, chunk_size=4)) < SAME)
for size in (1, 2, 3, 4, 5, 7, 11):
    assert difference(lambda size=size: mc.seco(model, ids, labels, chunk_size=size)) < SAME

# %% [markdown]
# Now open [`minichunk/seco.py`](../minichunk/seco.py) and find every line of this loop in it. What it does better, it
# does elsewhere: the memory is one buffer for each layer that is never copied
# ([`memory/cache.py`](../minichunk/memory/cache.py)), attention adds the gradient of the past to it in place
# ([`memory/attention.py`](../minichunk/memory/attention.py)), and the logits of a chunk never exist at once
# ([`loss.py`](../minichunk/loss.py)).
#
# ## Exercises
#
# 1. Walk from the first chunk to the last instead. Which relays are then missing? Predict which parameters stay exact.
# 2. How many chains (paths through memories) lead from $J_2$ to $\Theta$? And from $J_j$? Then why is one backward pass
#    per chunk enough?
# 3. SeCO runs every chunk but the last forward twice, and yet it is [no slower](costs.md) than full on a CPU.
#    PyTorch's causal kernel for the CPU computes the whole square of scores and then masks half of it.
#    Who pays for that, and how much less with chunks? What do you expect on a GPU, whose kernel skips that half?
# 4. Write the relay and the loop yourself: `tutorials/exercises/`, exercises 4 and 5.
