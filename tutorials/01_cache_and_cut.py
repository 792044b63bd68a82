# %% [markdown]
# # 1. The cache and the cut
#
# Cut a long text into chunks, run them one after the other, and remember what earlier chunks computed. Inference does
# this every day with a KV cache. Training can do it too, and this tutorial shows what is easy about it (the forward
# pass), what it saves (nearly all activations) and what breaks (the gradient). The next one mends what breaks. The
# whole idea on one page, to read now or to come back to, is [`minichunk/tiny.py`](../minichunk/tiny.py).
#
# We take the small Llama that ships with minichunk: 2.76 million parameters, trained on Jane Austen. In float64, so
# that equal means equal, to ten digits: float64 rounds by at most 1.1e-16 of a number, and a result has a few hundred
# operations behind it, with sums of a few hundred terms. Even if all these roundings added up, they would come to about
# 1e-11 of the terms. A mistake is seen in the first digits.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tokenizers import Tokenizer

import minichunk as mc
from minichunk.chunks import cut

ASSETS = Path(mc.__file__).parent / "assets"
model = mc.Llama.from_pretrained(ASSETS / "austen-llama", dtype=torch.float64)
tokenizer = Tokenizer.from_file(str(ASSETS / "austen-llama" / "tokenizer.json"))
text = (ASSETS / "austen" / "persuasion.txt").read_text()

ids = torch.tensor([tokenizer.encode(text[20000:22000]).ids[:192]])  # (B, T): one sequence of 192 tokens
chunk_size = 48
print(f"{ids.shape[1]} tokens in {len(cut(ids.shape[1], chunk_size))} chunks of {chunk_size}")
print("…" + " ".join(tokenizer.decode(ids[0, :40].tolist()).split()) + "…")

# %% [markdown]
# ## Attention over a cache
#
# In a transformer, a token looks at earlier tokens in one place only: attention. What it looks at are their *keys* and
# *values*. So if we keep the keys and values of every layer, the tokens before a chunk need not be run again.
#
# One thing changes. In a whole sequence, query i sees keys 0 to i: the mask is a square with its upper triangle cut
# off. A chunk's queries sit at the *end* of the keys, so the diagonal of the mask must end in the bottom right corner.
# PyTorch's `is_causal=True` puts it in the top left one, which is right for squares only. The first mistake of every
# port is here, so let us make it.

# %%
C, past = 3, 4
top_left = torch.ones(C, past + C).tril()
bottom_right = torch.ones(C, past + C).tril(diagonal=past)
figure, axes = plt.subplots(1, 2, figsize=(9, 2.4))
for panel, mask, title in zip(axes, (top_left, bottom_right), ("top-left: wrong", "bottom-right: right"), strict=True):
    panel.imshow(mask, cmap="Blues", vmin=0, vmax=1.6)
    panel.set(title=title, xlabel="keys: 4 of the cache, 3 of the chunk", ylabel="queries")
    panel.axvline(past - 0.5, color="tab:red")
    panel.set_xticks(range(past + C))
    panel.set_yticks(range(C))
figure.suptitle("A chunk's queries see the whole cache: its mask must end bottom right", y=1.06)
plt.show()

# %% [markdown]
# Letters for sizes, here and in all tutorials: B sequences, T tokens, C tokens of a chunk, H query heads, G key-value
# heads, D numbers per head, V words in the vocabulary.
#
# ### Attention in two pieces
#
# The cache and the chunk's own keys need not be put side by side to attend to both. Attend to each piece alone, and
# keep for each query the *log-sum-exp* of its scores, $l = \log \sum_i e^{s_i}$. A piece's share of the whole softmax
# is then $e^{l}$ over the sum of both: with $l = \log(e^{l_a} + e^{l_b})$, the merged output is
# $e^{l_a - l} o_a + e^{l_b - l} o_b$. And because $e^{s_i - l}$ is the probability within the whole, a piece's backward
# pass that is given the *merged* $l$ and output finds the exact gradients of its own keys and values.

# %%
q, keys, values = torch.randn(5, 8), torch.randn(7, 8), torch.randn(7, 8)
whole = (q @ keys.T).softmax(-1) @ values
pieces = [(q @ k.T, v) for k, v in ((keys[:4], values[:4]), (keys[4:], values[4:]))]
(out_a, lse_a), (out_b, lse_b) = ((s.softmax(-1) @ v, s.logsumexp(-1)) for s, v in pieces)
lse = torch.logaddexp(lse_a, lse_b)
merged = (lse_a - lse).exp()[:, None] * out_a + (lse_b - lse).exp()[:, None] * out_b
print("merged = whole:", torch.allclose(merged, whole, atol=1e-6))
assert torch.allclose(merged, whole, atol=1e-6)

# %% [markdown]
# ## The forward pass: chunk by chunk is exact
#
# `model(ids)` runs the whole sequence without any cache: ordinary attention, an ordinary Llama. `run_chunks` runs chunk
# after chunk on top of a *memory* and writes into it what each chunk leaves behind: in a Llama, the keys and values of
# every layer, the KV cache. RoPE needs the true positions, and a chunk says where it starts.
# To see it: [the walk, step 3: fill](walk.html#method=seco&chunk=128&step=3).

# %%
with torch.no_grad():
    whole = model(ids)  # logits (B, T, V)
    memory = model.new_memory(batch=1, capacity=ids.shape[1])
    pieces = [model.lm_head(hidden) for _, hidden in model.run_chunks(ids, memory, chunk_size)]
    difference = (torch.cat(pieces, dim=1) - whole).abs().max() / whole.abs().max()
print(f"largest logit: {whole.abs().max():.1f}; chunk by chunk the same to ten digits: {bool(difference < 1e-10)}")
assert difference < 1e-10

keys, values = memory.layers[0].rows.pair
print(f"memory of a layer: keys {tuple(keys.shape)}, values {tuple(values.shape)}  (B, G, T, D)")

# %% [markdown]
# ## What autograd keeps alive
#
# For the backward pass, autograd saves the inputs of nearly every operation. We can count what it saves. Not counted:
# the parameters, which are there anyway, and the cache.


# %%
def saved_bytes(run):
    """Bytes of the distinct tensors that autograd saves while `run()` builds its graph."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    known = [p.untyped_storage().data_ptr() for p in model.parameters()]
    known += [x.untyped_storage().data_ptr() for layer in memory.layers for x in layer.rows.pair]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(size for pointer, size in storages.items() if pointer not in known)


lengths = [48, 96, 144, 192]
whole_bytes = [saved_bytes(lambda n=n: model.run(ids[:, :n])) for n in lengths]
chunk_bytes = []
for n in lengths:
    last = cut(n, chunk_size)[-1]
    chunk_bytes.append(saved_bytes(lambda c=last: model.run(ids[:, c.start : c.stop], memory, [c])))
print("tokens   whole sequence   last chunk on top of the cache")
for n, a, b in zip(lengths, whole_bytes, chunk_bytes, strict=True):
    print(f"{n:6}   {a / 2**20:10.1f} MiB   {b / 2**20:10.1f} MiB")

# %% [markdown]
# The whole sequence's activations grow with its length. A chunk's do not, however long the past is, because attention
# here holds the cache by reference and saves no part of it
# ([`memory/attention.py`](../minichunk/memory/attention.py)). What still grows is the cache itself:

# %%
per_token = sum(x[0, :, 0].numel() for layer in memory.layers for x in layer.rows.pair) * 8
activations = whole_bytes[-1] / ids.shape[1]
print(f"cache: {per_token / 1024:.1f} KiB per token; activations: {activations / 1024:.1f} KiB per token,", end=" ")
print(f"{activations / per_token:.0f} times as much")

figure, axes = plt.subplots(figsize=(6, 3.4))
axes.plot(lengths, [b / 2**20 for b in whole_bytes], "o-", label="whole sequence")
axes.plot(lengths, [b / 2**20 for b in chunk_bytes], "s-", label="last chunk of 48, on top of the cache")
axes.plot(lengths, [n * per_token / 2**20 for n in lengths], "--", label="the cache itself")
axes.set(xlabel="tokens", ylabel="MiB", ylim=(0, 48), title="A chunk's activations do not grow with the length")
axes.legend(loc="upper left", fontsize=8)
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## What is lost
#
# So train chunk by chunk: run a chunk on top of the cache, backpropagate its loss, go on? The cache was written without
# a graph. A chunk's loss depends on earlier chunks *through the cache*, and that part of its gradient has nowhere to
# go. This is truncated backpropagation. In minichunk's terms: every chunk is rebuilt, and none of them is given what
# later chunks sent back, which a sampler with relay factor 0 expresses.


# %%
def gradients(run):
    """The gradient of every parameter after `run()`."""
    model.zero_grad(set_to_none=True)
    run()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def detached(num_chunks, generator):
    return [mc.Weight(loss=1.0, relay=0.0)] * num_chunks


exact = gradients(lambda: mc.full(model, ids, ids))
truncated = gradients(lambda: mc.spaco(model, ids, ids, chunk_size, sampler=detached))
relative = {name: float((truncated[name] - exact[name]).norm() / exact[name].norm()) for name in exact}

total = sum(float((truncated[n] - exact[n]).norm() ** 2) for n in exact) / sum(
    float(g.norm() ** 2) for g in exact.values()
)
print(f"relative error of the whole gradient: {total**0.5:.2f}\n")
print("layer   q_proj   k_proj   v_proj   o_proj   down_proj")
for i in range(model.config.num_hidden_layers):
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
    print(f"{i:5}" + "".join(f"{relative[f'model.layers.{i}.{part}.weight']:9.3f}" for part in parts))
exactly = [n for n, error in relative.items() if error < 1e-10]
print("\nexact to ten digits:", ", ".join(n.removeprefix("model.").removesuffix(".weight") for n in exactly))
last = f"model.layers.{model.config.num_hidden_layers - 1}."
assert {f"{last}self_attn.q_proj.weight", f"{last}self_attn.o_proj.weight", f"{last}mlp.down_proj.weight"} <= {*exactly}
assert all(error > 0.01 for name, error in relative.items() if "k_proj" in name or "v_proj" in name)

# %% [markdown]
# Read it by its zeros and its large numbers. In the last layer, queries and everything above attention are exact up to
# rounding: no later chunk looks at them. Keys and values of *every* layer are wrong, because making good keys and
# values for later chunks is what was not learnt from; and with them everything below. That is the part of learning that
# long contexts are about: *what to write down now for use much later*.

# %%
figure, axes = plt.subplots(figsize=(6, 3.2))
kinds = ("q_proj", "k_proj", "v_proj")
for offset, kind in enumerate(kinds):
    values = [relative[f"model.layers.{i}.self_attn.{kind}.weight"] for i in range(model.config.num_hidden_layers)]
    axes.bar([i + 0.25 * (offset - 1) for i in range(len(values))], values, width=0.25, label=kind)
axes.set(xlabel="layer", ylabel="relative error", title="Detach the cache: keys and values get the wrong gradient")
axes.set_xticks(range(model.config.num_hidden_layers))
axes.legend()
plt.show()

# %% [markdown]
# The exact gradient needs the lost part back, without keeping the graphs. That is SeCO, in
# [the next tutorial](02_seco_by_hand.md). To see that it can be done:

# %%
seco = gradients(lambda: mc.seco(model, ids, ids, chunk_size))
worst = max(float((seco[n] - exact[n]).norm() / exact[n].norm()) for n in exact)
print(f"SeCO, relative error of the worst parameter below 1e-10: {worst < 1e-10}")
assert worst < 1e-10

# %% [markdown]
# ## Exercises
#
# 1. Which columns of the table would be zero in a model with one layer? Say it first, then build one with
#    `mc.Llama(mc.LlamaConfig(...))` and look.
# 2. Repeat the error for chunks of 12, 24 and 96 tokens. Why does it shrink as chunks grow, and why not to zero?
# 3. Count the saved bytes with `options=Options(recompute=True)`, from `minichunk.protocol`, as an argument of
#    `model.run`. What is left, and why does it still grow for the whole sequence?
# 4. Write attention over a cache yourself: `tutorials/exercises/`, exercise 1.
