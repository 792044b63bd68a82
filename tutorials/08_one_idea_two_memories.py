# %% [markdown]
# # 8. One idea, two memories
#
# A Llama remembers keys and values, one pair for each token. A *state-space model* remembers a state: a fixed number of
# numbers, which each token changes a little and hands on. SeCO on it is the same loop, line for line, and what it
# relays has a name of its own, the *adjoint*: this is adjoint sharding
# ([arXiv 2501.00692](https://arxiv.org/abs/2501.00692)). A layer of our model
# ([`models/ssm.py`](../minichunk/models/ssm.py)) takes $u_t$, the normed input of token t (P numbers), makes
# $a_t, b_t, c_t$ of it (N numbers each; the gates a are in (0, 1)), and computes a state h (P x N) and its output:
#
# $$h_t = h_{t-1} \cdot a_t + u_t b_t^\top, \qquad y_t = h_t c_t, \qquad \text{output: } x_t + y_t$$

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

import minichunk as mc
from minichunk.batch import prepare
from minichunk.chunks import cut
from minichunk.files.documents import ASSETS, novel
from minichunk.memory.state import scan
from minichunk.models.ssm import StateLayer
from minichunk.protocol import Options
from minichunk.seco import fill, new_memory, rebuild

text = novel("persuasion").read_text()[20000:22000]
llama = mc.Llama.from_pretrained(ASSETS / "austen-llama", dtype=torch.float64)
state = mc.StateSpace.from_pretrained(ASSETS / "austen-state", dtype=torch.float64)  # its tokens are single bytes
files = [str(ASSETS / name / "tokenizer.json") for name in ("austen-llama", "austen-state")]
words, letters = (torch.tensor([Tokenizer.from_file(file).encode(text).ids]) for file in files)  # (1, T)

# %% [markdown]
# ## The same loop
#
# These are the lines of [`seco.py`](../minichunk/seco.py). Nothing in them says what kind of memory it is.


# %%
def walk(model, ids, size):
    """Algorithm 1, which adds the gradient to `.grad`; yields each chunk, what it wrote, and what it received."""
    batch, chunks, options = prepare(model, ids, ids, None), cut(ids.shape[1], size), Options()
    memory = new_memory(model, ids, chunks, options)
    fill(model, ids, chunks[:-1], memory, options)
    for chunk in reversed(chunks):
        loss, written, received = rebuild(model, batch, chunk, memory, options)
        torch.autograd.backward([loss, *written], [None, *received])
        yield chunk, written, received


def show(model, ids):
    for chunk, written, received in walk(model, ids, 24):
        n = len(written) // len(model.layers)
        layer_0 = [f"{tuple(m.shape)} {g.norm():.4f}" for m, g in zip(written[:n], received[:n], strict=True)]
        print(f"{chunk.start:3} to {chunk.stop:3}   {'   '.join(layer_0) or '-'}")


def gradient(method, model, *arguments, **keywords):
    """That of all parameters in the layers, as one long vector."""
    model.zero_grad(set_to_none=True)
    method(model, *arguments, **keywords)
    return torch.cat([(0 * p if p.grad is None else p.grad).detach().flatten() for p in model.layers.parameters()])


def distance(got, expected):
    return float((got - expected).norm() / expected.norm())


for name, model, ids in (("Llama", llama, words[:, :96]), ("state", state, letters[:, :96])):
    print(f"{name}: what layer 0 writes, and the norm of what it receives")
    by_hand = gradient(show, model, ids)
    assert distance(by_hand, gradient(mc.full, model, ids, ids)) < 1e-10
    assert distance(by_hand, gradient(mc.seco, model, ids, ids, chunk_size=24)) < 1e-10
    print("this loop = mc.seco = full backpropagation, to ten digits: True")

# %% [markdown]
# In a Llama a chunk writes as many keys and values as it has tokens, and receives from *all* later chunks, for all have
# read them. In the state model it writes one state per layer, and receives from the *next* chunk alone, the only one
# that has read it. What the chunks after that have to say comes through the next one, which received it before.
#
# ## What is in memory
#
# A state is large, but there is one for a chunk and not one for a token. Keys and values have a gradient each; the state
# needs only one adjoint at a time, which the walk carries along. In bytes per token, in float32:

# %%
keys_values = sum(2 * layer.self_attn.k_proj.out_features for layer in llama.layers)
one_state = len(state.layers) * state.config.hidden_size * state.config.state_size
for size in (24, 128, 512, 2048):
    print(f"chunks of {size:4}:   Llama, with gradients {8 * keys_values:6,}   state {4 * one_state / size:6,.0f}")

# %% [markdown]
# ## The relay is an adjoint
#
# The adjoint of a state is the gradient of the loss by it. With one layer it can be written down: the state $h_s$ at
# the end of a chunk reaches a later $y_t$ through the gates in between, times $c_t$. So
#
# $$\frac{dJ}{dh_s} = \sum_{t > s} \frac{dJ}{dy_t} \Big( c_t \cdot \prod_{r=s+1}^{t} a_r \Big)^\top$$
#
# Is that what the loop relays? In a tiny model, whose gates are near 0.998:

# %%
torch.manual_seed(0)
one = mc.StateSpace(mc.StateSpaceConfig(vocab_size=257, hidden_size=6, state_size=4, num_hidden_layers=1)).double()
with torch.no_grad():
    for parameter in one.parameters():
        parameter += 0.5 * torch.randn_like(parameter)
    one.layers[0].a_proj.bias.fill_(6.2)

ids, layer = letters[:, :12], one.layers[0]
out, u = layer(one.embedding(ids), None)[0], layer.norm(one.embedding(ids))[0]
a, c = layer.a_proj(u).sigmoid(), layer.c_proj(u)  # (T, N)
(dy,) = torch.autograd.grad(F.cross_entropy(one.lm_head(one.norm(out))[0, :-1], ids[0, 1:]), out)  # (1, T, P)
for chunk, _, received in walk(one, ids, 4):
    s = chunk.stop  # the state before token s
    adjoint = sum(torch.outer(dy[0, t], c[t] * a[s : t + 1].prod(0)) for t in range(s, 12))
    assert s == 12 or distance(received[0][0], adjoint.detach()) < 1e-10
print("relayed = the sum of dJ/dy, c and products of gates, to ten digits: True")

# %% [markdown]
# In a model of several layers $h_s$ has one more way to the loss: what the layers above make of $y_t$, gates and all.
# The loop need not care: autograd finds that way in the rebuilt chunk.
#
# ## What a coin does to each
#
# SpaCO keeps each chunk by a coin, and a chain of the gradient survives if *all* chunks that it visits are kept. In a
# Llama a late chunk sends to the first one directly: two coins. From state to state it has to go through every chunk in
# between, if autograd carries all of the adjoint through the rebuilt chunks: a *plain* memory. minichunk's becomes plain
# if a layer says that nothing is left of the state before. Enumerate all draws, as in [tutorial 4](04_spaco_unbiased.md):


# %%
class Plain(StateLayer):
    def forward(self, x, past, *_):
        out, (end, decay) = super().forward(x, past)
        (h,) = past.states if past else (end,)
        return out, (end + decay * (h - h.detach()), torch.zeros_like(decay))


def deviation(model, ids, kind=None):
    """Root-mean-square distance of SpaCO's estimate, chunks of 24, from the gradient, relative to it."""
    for layer in model.layers if kind else ():
        layer.__class__ = kind
    exact = gradient(mc.full, model, ids, ids)
    mean, square = torch.zeros_like(exact), 0.0
    for probability, entries in mc.Bernoulli(1 / 4).outcomes(ids.shape[1] // 24):
        draw = gradient(mc.spaco, model, ids, ids, 24, sampler=lambda *_, entries=entries: entries)
        mean += probability * draw
        square += probability * float((draw - exact).norm() ** 2)
    assert distance(mean, exact) < 1e-9  # unbiased, whatever the memory
    return square**0.5 / float(exact.norm())


rows = {
    "Llama": [deviation(llama, words[:, : 24 * k]) for k in (2, 4)],
    "state, plain": [deviation(state, letters[:, : 24 * k], Plain) for k in (2, 4)],
    "state": [deviation(state, letters[:, : 24 * k], StateLayer) for k in (2, 4)],
    "long memory, plain": [deviation(one, letters[:, : 24 * k], Plain) for k in (2, 4, 6, 8)],
    "long memory": [deviation(one, letters[:, : 24 * k], StateLayer) for k in (2, 4, 6, 8)],
}
print("chunks                  2     4     6     8")
for name, row in rows.items():
    print(f"{name:18} " + "".join(f"{x:6.1f}" for x in row))

# %% [markdown]
# In a Llama more chunks do not hurt: none is more than one hop away. Nor in the state that was trained on novels: its
# loss hardly depends on what is far back. Where it does, which is what long contexts are for, the plain memory fails:
# the noise grows with every coin on the way.
#
# ## The bypass, in two lines
#
# Part of each new state is the old one, faded: $h_s = d \cdot h_{s'} + \dots$, where the decay $d$ is the product of the
# chunk's gates. So the adjoint of $h_{s'}$ has $d$ times the adjoint of $h_s$ in it, whatever else the chunk does; and
# $d$ is known since the fill. No coin is needed for that: the memory carries this part past every chunk, kept or
# skipped, and a rebuilt chunk leaves it out ([`memory/state.py`](../minichunk/memory/state.py)).
#
# ```text
# the chunk writes     end - decay * (h - h.detach())
# the memory keeps     adjoint = adjoint * decay + what came
# ```
#
# `h - h.detach()` is zero, to the last bit: what is written is `end`. But its gradient by h is 1, and `decay` times it
# is what is taken off that of `end`. With the first line alone the far past is lost, with the second alone it counts
# twice. With both, only what a chunk *does* with the state depends on its coin: still unbiased, and less noise.

# %%
figure, axes = plt.subplots(figsize=(6, 3.2))
for (name, row), marker in zip(rows.items(), "s^o^o", strict=True):
    axes.plot([2, 4, 6, 8][: len(row)], row, marker + ("--" if "plain" in name else "-"), label=name)
axes.set(xlabel="chunks of 24 tokens, each kept with rate 1/4", ylabel="rms error / gradient", xticks=[2, 4, 6, 8])
axes.set_title("A state with a long memory needs a way past the coins")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## The adjoint passes through the layers above
#
# Adjoint sharding computes each layer's gradient by itself, from $dJ/dy$ at that layer's output. Its Proposition 3
# takes for all of them the gradient at the *last* layer's output. But what layer 0 puts out is read by layer 1, which
# makes gates and states of it, and so on up. The proposition sees one way only: the residual stream, straight up.

# %%
ids, streams = letters[:, :512], [state.embedding(letters[:, :512])]
for layer in state.layers:
    streams.append(layer(streams[-1], None)[0])
own = torch.autograd.grad(F.cross_entropy(state.lm_head(state.norm(streams[-1]))[0, :-1], ids[0, 1:]), streams[1:])
exact = gradient(mc.full, state, ids, ids)
print("the last layer's gradient for all: relative error, cosine")
for i, (layer, whole) in enumerate(zip(state.layers, exact.chunk(4), strict=True)):  # the layers are equally large
    out, parameters = layer(streams[i].detach(), None)[0], list(layer.parameters())
    found = (torch.autograd.grad(out, parameters, g, retain_graph=True) for g in (own[i], own[-1]))
    right, printed = (torch.cat([grad.flatten() for grad in grads]) for grads in found)
    assert distance(right, whole) < 1e-10  # from the gradient at the layer's own output
    print(f"layer {i} {distance(printed, whole):43.2f} {float(F.cosine_similarity(printed, whole, dim=0)):7.2f}")

# %% [markdown]
# The last layer is exact, for there are no others above it. `seco` gets all of them right without a word about it: the
# rebuilt chunk's graph leads through all layers.
#
# ## Truncation
#
# A cheaper form sends the gradient of $y_t$ to the last W tokens only, in every layer (eq. 7). What $y_t$ has from the
# state W tokens ago is a scan as well: keep its value, and take off its gradient.


# %%
class Truncated(StateLayer):
    def forward(self, x, past, *_):
        u, W, start = self.norm(x), self.window, self.nothing(x)
        log_a, b, c = F.logsigmoid(self.a_proj(u)), self.b_proj(u), self.c_proj(u)
        faded = c[:, W:] * log_a.unfold(1, W, 1).sum(-1)[:, 1:].exp()  # by the gates of W tokens
        far, _ = scan(u[:, :-W], log_a[:, :-W], b[:, :-W], faded.detach(), start)
        return x + scan(u, log_a, b, c, start)[0] - F.pad(far - far.detach(), (0, 0, W, 0)), ()


for W in (1, 4, 16, 64):
    for layer in state.layers:
        layer.__class__, layer.window = Truncated, W
    print(f"window {W:2}: relative error {distance(gradient(mc.full, state, ids, ids), exact):.4f}")

# %% [markdown]
# The error falls with W, but nothing is gained: a scan's backward costs the same for any W, and this takes two. That is so
# [across chunks too](truncated_adjoint.py). SeCO is exact.
#
# ## At real size
#
# `minichunk train`, `evaluate`, `generate` and `plan` take models with a state: `mc.StateSpace`, the model above, between
# whose layers layers of attention may stand, and `mc.Mamba2` for checkpoints with `model_type` mamba2, in Hugging Face's
# layout.
#
# ```sh
# minichunk train --model minichunk/assets/austen-state --data book.txt --seq-len 65536 --chunk-size 2048 --rank 0
# minichunk plan --model mamba2-2.7b --chunk-size 4096
# ```
#
# Only the states at the ends of chunks grow with the length, so a longer chunk needs less per token:
#
# ![Peak memory against length for a state-space model](figures/state-memory.png)
#
# | | 35,000 tokens | 100,000 | 1,000,000 | the longest where backpropagation has 35,000 |
# |---|---:|---:|---:|---:|
# | full | 4,091 GiB | 11,654 GiB | 116,377 GiB | 512 |
# | full, layers recomputed | 136 GiB | 343 GiB | 3,219 GiB | 34,816 |
# | SeCO, chunks of 1,024 | 72 GiB | 150 GiB | 1,243 GiB | 88,064 |
# | SeCO, chunks of 4,096 | 49 GiB | 68 GiB | 342 GiB | 323,584 |
# | SpaCO, 8 chunks of 4,096 | 49 GiB | 57 GiB | 60 GiB | over a billion |
#
# *1.27 billion parameters (hidden size 4,096, 256 states, 318 layers), all of them trained, in bfloat16, by the forecasts
# of `minichunk plan`; `python tutorials/readme_figures.py` draws and prints it. The weights, their gradients and the
# optimizer take 21 GiB of each. The paper reports 100K tokens instead of 35K for a model of as many parameters, whose shape
# it does not give. SpaCO holds the states of its kept chunks alone: 8 on average, counted with as many as 99.9 % of the
# steps do not exceed.*
#
# The shipped model of this tutorial (136,704 parameters, 4 layers) has taken one step on a million tokens on two CPU
# cores, in 215 s and a process of 569 MiB (at commit `cbb3a04`). Its states are 24 bytes per token at chunks of 2,048:
#
# ```sh
# cat minichunk/assets/austen/{emma,persuasion}.txt | head -c 1000000 > million.txt
# minichunk train --model minichunk/assets/austen-state --data million.txt --val-fraction 0 --seq-len 1000000 \
#     --chunk-size 2048 --rank 0 --steps 1
# ```
#
# [Next](09_one_idea_three_memories.md): models with windows.
#
# ## Exercises
#
# 1. Set the gates of `one` to about 0.9 instead of 0.998. What do you expect of its two rows? And at rate 1/2?
# 2. In every layer a truncated gradient gets W - 1 tokens back. How far does it get in a model of K layers?
# 3. Write the walk with the bypass yourself: `tutorials/exercises/`, exercise 8.
