# %% [markdown]
# # 3. Where the memory goes
#
# Three ways to the same gradient: ordinary backpropagation (`full`), ordinary backpropagation that keeps only the
# layers' inputs and runs each layer again (`recompute`), and SeCO. They differ in what is alive when. This tutorial
# draws that, predicts the bytes with pencil and paper, measures them, and ends with the line that tells when SeCO wins.

# %%
import matplotlib.pyplot as plt
import torch

import minichunk as mc
from minichunk.costs.count import CountBytes
from minichunk.costs.forecast import forecast
from minichunk.costs.setting import Setting

torch.manual_seed(0)
config = mc.LlamaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=6,
    num_attention_heads=8, num_key_value_heads=2, head_dim=16,
)  # fmt: skip
model = mc.Llama(config)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters in float32")

# %% [markdown]
# ## The schedule
#
# First as a drawing, for four chunks. Time runs to the right, and a box is something that is alive.
#
# - `full` builds the graph of every chunk and can drop them only on the way back.
# - SeCO fills the cache, then builds and drops one graph at a time. The cache stays, and so do its gradients.


# %%
def draw(panel, boxes, steps, title):
    for row, begin, end, color in boxes:
        panel.barh(row, end - begin, left=begin, color=color, edgecolor="white", height=0.28)
    panel.set(title=title, xticks=[i + 0.5 for i in range(8)], yticks=range(4), xlim=(0, 8))
    panel.set_xticklabels(steps, fontsize=8)
    panel.set_yticklabels([f"chunk {i}" for i in range(4)])
    for i in range(3):
        panel.axhline(i + 0.5, color="lightgray", lw=0.5)


GRAPH, CACHE, GRADS = "tab:red", "tab:blue", "tab:green"
figure, axes = plt.subplots(2, 1, figsize=(9, 5), layout="constrained", sharey=True)
forward = [f"forward {i}" for i in range(4)]
backward = [f"backward {i}" for i in reversed(range(4))]
draw(axes[0], [(i, i, 8 - i, GRAPH) for i in range(4)], forward + backward, "full: every graph waits for its way back")
boxes = [(i + 0.3, 7 - i, 8 - i, GRAPH) for i in range(4)]
for i in range(3):
    boxes += [(i - 0.3, i, 8 - i, CACHE), (i, 4, 8 - i, GRADS)]
steps = ["fill 0", "fill 1", "fill 2", "(3 is not filled)", *(f"rebuild {i}" for i in reversed(range(4)))]
draw(axes[1], boxes, steps, "SeCO: one graph at a time, beside a cache and its gradients")
handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (GRAPH, CACHE, GRADS)]
figure.legend(
    handles, ["graph of a chunk", "its keys and values", "their gradients"], loc="outside lower center", ncols=3
)
figure.suptitle("What is alive when")
plt.show()

# %% [markdown]
# (minichunk allocates the KV cache and its gradients as one buffer at the start, which is why memory below jumps once
# instead of climbing. The last chunk has neither, because nobody reads them.)
#
# ## The same, measured
#
# `CountBytes` watches every operation and counts the storages that are alive. Here it also writes down the sum after
# each operation. Weights and their gradients are subtracted: every method has them, at any length.
# Where the peak is, event by event: [the walk, step 6: loss](walk.html#method=seco&chunk=128&step=6).


# %%
class Timeline(CountBytes):
    """Live bytes after every operation."""

    def __init__(self, *always):
        super().__init__()
        self.add(*always)
        self.always, self.points = self.live, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.points.append(self.live - self.always)
        return result


def timeline(step, tokens):
    ids = torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Timeline(*model.parameters(), *(p.grad for p in model.parameters())) as line:
        step(ids)
    return line.points


T, C = 1024, 128
methods = {
    "full": lambda ids: mc.full(model, ids, ids),
    "recompute": lambda ids: mc.full(model, ids, ids, recompute=True),
    "seco": lambda ids: mc.seco(model, ids, ids, C),
}
lines = {name: timeline(step, T) for name, step in methods.items()}
figure, axes = plt.subplots(figsize=(8, 3.6))
for name, points in lines.items():
    axes.plot([i / len(points) for i in range(len(points))], [p / 2**20 for p in points], label=name, lw=1)
axes.set(xlabel="operations, from each method's first to its last (not time)", ylabel="MiB alive", xlim=(0, 1), ylim=0)
axes.set_title(f"A training step of {T:,} tokens: a mountain, a hill with teeth, and a low saw")
axes.legend()
plt.show()

# %% [markdown]
# ## Predicted with pencil and paper
#
# Count, for one layer and one token, the numbers that the backward pass needs (E hidden size, F intermediate size,
# H query heads, G key-value heads, D head size):
#
# | saved for | numbers |
# |---|---|
# | two norms: input, normalized input, 1/rms | 2 (2 E + 1) |
# | q, k, v projections: their common input | E |
# | attention: q, k, v, output and log-sum-exp | H D + 2 G D + H D + H |
# | o projection: its input, the heads joined | H D where joining copies |
# | MLP: input, gate, silu(gate), up, their product | E + 4 F |
#
# For the whole model: the logits, their log-softmax, and the gradients of both, 4 V per token, where the loss is not
# tiled. And the backward pass of an MLP has four gradients of its inner size beside what was saved: 4 F for the tokens
# and the layer at work.

# %%
E, F = config.hidden_size, config.intermediate_size
H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
L, V = config.num_hidden_layers, config.vocab_size
layer_numbers = 2 * (2 * E + 1) + E + (2 * H * D + 2 * G * D + H) + H * D + (E + 4 * F)
activations = 4 * L * layer_numbers  # bytes per token
logits = 4 * 4 * V
at_work = 4 * 4 * F
cache = 4 * L * 2 * G * D

predicted = {
    "full": T * (activations + logits),
    "recompute": T * (4 * L * E + 4 * layer_numbers + at_work),  # the layers' inputs, and one layer whole
    "seco": (T - C) * 2 * cache + C * (activations + at_work),
}
print("method      predicted     measured   measured / predicted")
for name, points in lines.items():
    ratio = max(points) / predicted[name]
    print(f"{name:10} {predicted[name] / 2**20:6.0f} MiB   {max(points) / 2**20:6.0f} MiB   {ratio:.1f}")
    assert abs(ratio - 1) < 0.1

# %% [markdown]
# Pencil and paper come within a tenth. Whoever can predict the bytes knows where they are: most are the MLP's, which is
# why some people tile it; and in a real model with a large vocabulary the logits, which is why everybody should.
#
# ## The line that tells when SeCO wins
#
# All three are straight lines in T. Their slopes are what matters for long texts:

# %%
slopes = {}
for name, step in methods.items():
    slopes[name] = (max(lines[name]) - max(timeline(step, T // 2))) / (T // 2)
print("method     bytes per token   in units of the cache")
for name, slope in slopes.items():
    print(f"{name:10} {slope:15,.0f}   {slope / cache:8.1f}")

# %% [markdown]
# SeCO grows by two caches per token: the keys and values, and their gradients. It pays for that with one chunk of
# activations that is there at any length. So it wins as soon as
#
# $$T \cdot (a - 2c) > C \cdot a$$
#
# with $a$ the bytes of activations per token and $c$ those of the cache: for $2c \ll a$ that is $T > C$, as soon as
# there is more than one chunk. Against `recompute`, whose slope is small too, compare $2c$ with one layer input for
# each layer: $4 L G D$ numbers against $L E$, where mostly $E = H D$. At $H = 4G$, as here and in Llama-3-8B, the two
# are equal, above it SeCO's is lower. What `recompute` pays besides is one whole layer and the logits of all tokens.

# %%
ratio = slopes["full"] / slopes["seco"]
print(f"here: full grows {ratio:.0f} times as fast as SeCO, recompute {slopes['recompute'] / slopes['seco']:.1f} times")

# %% [markdown]
# ## Three orders through a grid
#
# A step is a grid, layers by chunks. SeCO goes through it chunk by chunk, with all layers at once, and so what grows is
# the cache of *all* layers. But the layers can be cut as well (`layers_at_once=`, [`blocks.py`](../minichunk/blocks.py)).
# Then the text goes up through one block of layers after the other, and of each block only its input is kept. On the way
# down each block is a SeCO of its own, whose last layer is given a gradient instead of a loss; its cache is gone before
# the next block's is made. One layer at a time is the order of StreamBP ([arXiv
# 2506.03077](https://arxiv.org/abs/2506.03077)). This is what runs when, watched:


# %%
def watch(layers_at_once, tokens=512, chunk_size=128):
    """(layer, chunk, whether with a graph) of everything that runs, in order."""
    ids = torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    index, seen, run = {layer: i for i, layer in enumerate(model.layers)}, [], model._layer

    def watched(layer, chunks, options, *inputs):
        owner = getattr(layer, "__self__", layer)  # a layer, or its method `fill`
        seen.append((index[owner], chunks[0].start // chunk_size, torch.is_grad_enabled()))
        return run(layer, chunks, options, *inputs)

    model._layer = watched
    mc.seco(model, ids, ids, chunk_size, layers_at_once=layers_at_once)
    del model._layer
    return seen


figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained", sharey=True)
sizes = {6: "all layers: SeCO", 2: "two layers at once", 1: "one layer at once"}
for panel, (size, title) in zip(axes, sizes.items(), strict=True):
    order = [(layer, chunk) for layer, chunk, graph in watch(size) if graph]
    when = torch.empty(6, 4)
    for step, (layer, chunk) in enumerate(order):
        when[layer, chunk] = step
        panel.text(chunk, layer, step + 1, ha="center", va="center", color="white" if step < 16 else "black")
    panel.imshow(when, origin="lower", aspect="auto", cmap="viridis")
    panel.set(title=title, xticks=range(4), xlabel="chunk", yticks=range(6))
axes[0].set_ylabel("layer")
figure.suptitle("Which graphs are built when")
plt.show()

# %% [markdown]
# What is gained is a trade. With $n$ of $L$ layers at once a token leaves behind the inputs of all blocks but the first,
# whose inputs are tokens, and the keys, values and gradients of one block:
#
# $$\left(\frac{L}{n} - 1\right) E + 4\,n\,G D$$
#
# numbers. It is smallest near $n = \sqrt{L E / 4 G D}$, and where $E = 4 G D$, as here and in Llama-3-8B, that is the
# root of the number of layers. (On the way down, a gradient takes the place of the input that it belongs to.)

# %%
print("layers at once   bytes per token: predicted   measured")
for size in (6, 3, 2, 1):
    step = lambda ids, size=size: mc.seco(model, ids, ids, C, layers_at_once=size)  # noqa: E731
    slope = (max(timeline(step, T)) - max(timeline(step, T // 2))) / (T // 2)
    expected = 4 * ((L // size - 1) * E + 4 * size * G * D)
    print(f"{size:14} {expected:28,} {slope:10,.0f}")
    assert abs(slope / expected - 1) < 0.05

# %% [markdown]
# The price: of each block but the last everything runs once more to have its outputs, so $L / n$ blocks cost the
# forward pass of all layers but the last block's a second time. One layer at a time is cheap again, because filling
# one layer's cache takes its keys and values alone, and no attention. There the blocks' inputs are what grows, and these can
# wait in host memory (`--offload`): each is copied there and back a few times, whatever the number of chunks.
#
# ## A real one, without owning it
#
# `minichunk plan` does this for any model, with the real code on tensors that have shapes but no memory. An 8B Llama in
# bfloat16 with LoRA of rank 8, chunks of 512, layers recomputed, sums of the cache's gradients in bfloat16:
#
# ![Peak memory against length for an 8B Llama with LoRA](figures/memory.png)
#
# Two of the lines, within 24 GiB of which 1 is reserved:

# %%
for method in ("full-recompute-tiled", "seco"):
    line = forecast(Setting(model="llama-3-8b", method=method, cache_grad_dtype="bfloat16"))
    more = (line.at(20480).peak - line.at(10240).peak) / 10240
    print(f"{method:20}   {more / 1024:4.0f} KiB per token   longest: {line.longest(23 * 2**30):6,} tokens")

# %% [markdown]
# A fair word on the others: minichunk's `full` is the oracle and makes the logits of all tokens, in float32. Of
# `full-recompute`'s slope (2.2 MiB per token), 1.7 MiB are logits. `full-recompute-tiled` has a tiled loss and grows by
# 500 KiB: 256 KiB are the layers' inputs, the rest one layer's activations. At 4:1 the layers' inputs are as many bytes
# as SeCO's keys, values and their gradients; what SeCO saves against it is that layer. And `full-recompute-offload` lets
# the layers' inputs wait in host memory: 244 KiB. Tile the loss first, whatever else you do, and take SeCO, in blocks of
# layers, where the length is still too much. SpaCO needs gradients only for the chunks that it keeps, so its slope is
# one cache instead of two. (It draws coins, and is counted with as many chunks as 99.9 % of the steps do not exceed.)
#
# ## More room
#
# - **Sums in bfloat16** (`--cache-grad-dtype bfloat16`) take half of what sums in float32 do: SeCO has 31,232 tokens
#   instead of 20,992.
# - **Blocks of layers** (`--layers-at-once 8`, or `auto`): 88 KiB a token instead of 256, and 92,672 tokens; on 80 GiB
#   759,808 instead of 260,608. SpaCO, 8 chunks kept: 140,800 instead of 53,760.
# - **Host memory** (`--offload`): what goes from block to block waits there (pinned, on CUDA, and copied ahead on a stream
#   of its own; this has not run on a GPU yet). `minichunk plan --offload --layers-at-once auto --cache-grad-dtype
#   bfloat16` forecasts 513,536 tokens with 64 GiB of host memory, two layers at once; with `--host-memory 128GiB` and
#   one layer at once, chunks of 4,096 and 20.19 GiB on the device, 540,672. Until commit `ca4e321` the cache itself
#   waited in host memory: 262,656 tokens, and every chunk moved all of it.
# - **4 bits** for the frozen base (`--load-in-4bit`, NF4 by bitsandbytes): with LoRA of rank 32 on all seven linear
#   layers, its optimizer state included, `minichunk plan --load-in-4bit --rank 32 --targets q_proj k_proj v_proj o_proj
#   gate_proj up_proj down_proj --cache-grad-dtype bfloat16` forecasts 64,000 tokens with SeCO, 118,784 with SpaCO, and
#   188,416 with `--layers-at-once auto` (eight).
# - **More than enough** memory: `--graphs N` keeps the graphs of the fill's last N chunks, which are then run once
#   instead of twice; `--layers-at-once auto` keeps as many as fit, where a given `--seq-len` fits with all layers at once.
# - **Several GPUs**: [tutorial 10](10_seco_on_several_gpus.md). **Windows**: [tutorial
#   9](09_one_idea_three_memories.md). **Other models**: the table of the [recipe](recipe_8b.md).
#
# Is a forecast right? It is [tested](../tests/test_plan.py) to be the peak of real steps of small models on the CPU; no
# GPU has confirmed it yet. At its real size, a random llama-3-8b in bfloat16 (16 GB), LoRA of rank 8 on q and v, chunks
# of 128, layers recomputed, one step of SeCO on two CPU cores (`minichunk.costs.measure` at commit `cbb3a04`; 423 s for
# 512 tokens):
#
# | tokens | forecast, without the optimizer's state | counted while it ran | process, at most |
# |---:|---:|---:|---:|
# | 512 | 16,428,026,496 bytes | 16,428,026,508 bytes | 17.03 GiB |
# | 1,024 | 16,629,361,280 bytes | 16,629,361,292 bytes | 17.25 GiB |
#
# These cores multiply no bfloat16, so the products were computed in float32 and rounded; those float32 copies and the
# libraries are what the process has more.
#
# ## Other ways
#
# | | gradient | memory that grows with the length | costs |
# |---|---|---|---|
# | SeCO | exact | cache and its gradients | a second forward pass, with recompute the linear layers a third time ([counted](costs.md#operations)); chunks one after the other |
# | SpaCO | unbiased estimate | cache | noise; a forward pass and the kept part of SeCO's rebuilds |
# | SeCO, SpaCO through blocks of layers | as of SeCO, SpaCO | one block's cache and gradients, and a hidden state per block | of all layers but the last block's a forward pass more; with one layer a block nearly nothing |
# | layer checkpointing (`full --recompute`) | exact | one hidden state per layer, one layer's activations, and the logits | a second forward pass |
# | the same with a tiled loss, and with the layers' inputs in host memory | exact | one hidden state per layer, on the device or on the host, and one layer's activations | a second forward pass, and the bus |
# | tiled MLP and loss | exact | attention's and the layers' activations stay | nearly nothing |
# | sequence parallelism (ring attention, Ulysses) | exact | the same in all, divided by the number of GPUs | many GPUs, fast links |
# | SeCO and SpaCO, the layers on several GPUs | as of SeCO, SpaCO | cache and its gradients, divided by the number of GPUs | waiting at both ends of the walk; little traffic |
# | FSDP around SeCO | exact | the same as SeCO | every layer's weights over the links about three times per chunk |
# | truncated backpropagation (detached cache) | biased: never learns what to write for later chunks | cache | nothing |
#
# The forward pass that SeCO repeats is made up for on the CPU: a chunked pass skips masked scores that PyTorch's kernel
# computes.
#
# ## Exercises
#
# 1. `mc.seco(..., recompute=True)` combines both ideas. Add it to the timeline. Which part of the saw goes away? For
#    which chunk sizes is it worth its time?
# 2. Predict SeCO's peak for C = 64 and C = 1,024, then measure. Where is the best chunk size, and what besides memory
#    speaks against a small one?
# 3. Full logits are 2 V numbers per token. Compute their share for Llama-3-8B (V = 128,256). Then read
#    [`loss.py`](../minichunk/loss.py).
# 4. How does the picture change without grouped queries (G = H)? At which H / G does SeCO's slope cross `recompute`'s?
# 5. With a pencil: how many layers at once are best for Llama-3-8B (32 layers, E = 4,096, G D = 1,024), and how many KiB
#    does a token leave behind then, in bfloat16? And at 8:1 (E = 8,192, G D = 1,024, 80 layers)?
