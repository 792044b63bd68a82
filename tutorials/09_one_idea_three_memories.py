# %% [markdown]
# # 9. One idea, three memories
#
# [Tutorial 8](08_one_idea_two_memories.md) ran one loop on two memories: all keys and values, and a state. Many models
# have a third: most of their layers see *a part of the past*, a window, perhaps with the first few positions, the *sinks*,
# or blocks at regular distances. [LongGen](https://arxiv.org/abs/2410.01485) makes such a *hybrid* of a model of full
# attention, which stays in the middle third of its layers; `mc.partial_context` does that to the shipped Llama:

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tokenizers import Tokenizer

import minichunk as mc
from minichunk.batch import prepare
from minichunk.chunks import cut
from minichunk.files.documents import ASSETS, novel
from minichunk.protocol import Options
from minichunk.seco import fill, new_memory, rebuild

HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
text, files = novel("persuasion").read_text()[20000:21500], [ASSETS / "austen-llama", ASSETS / "austen-state"]
words, letters = (torch.tensor([Tokenizer.from_file(str(x / "tokenizer.json")).encode(text).ids]) for x in files)
WINDOW, STRIDED = mc.Window(window=40, sinks=4), mc.Strided(block=8, local=2, stride=4)
PATTERNS = {"full attention": mc.Window(192), "window and sinks": WINDOW, "strided": STRIDED}  # no text here is longer


def llama(pattern=None, full_layers=None):
    model = mc.Llama.from_pretrained(files[0], dtype=torch.float64)
    if pattern is not None:
        mc.partial_context(model, pattern, full_layers)  # None: the middle third stays full
    return model


models = {
    "full attention": (llama(), words),
    "state": (mc.StateSpace.from_pretrained(files[1], dtype=torch.float64), letters),  # its tokens are single bytes
    "window and sinks": (llama(WINDOW), words),
    "strided": (llama(STRIDED), words),
}


def walk(model, ids, size, relay=True):
    """Algorithm 1; yields the memory, each chunk, and what that received. Without relay: the last chunk's loss alone."""
    batch, chunks, options = prepare(model, ids, ids, None), cut(ids.shape[1], size), Options()
    memory = new_memory(model, ids, chunks, options)
    fill(model, ids, chunks[:-1], memory, options)
    for chunk in reversed(chunks):
        loss, written, received = rebuild(model, batch, chunk, memory, options)
        if relay or chunk == chunks[-1]:
            torch.autograd.backward([loss, *written], [None, *received])
        yield memory, chunk, received


def gradient(method, model, *arguments):
    model.zero_grad(set_to_none=True)
    method(model, *arguments)
    return torch.cat([(0 * p if p.grad is None else p.grad).flatten() for p in model.layers.parameters()])


for name, (model, ids) in models.items():
    ids = ids[:, :120]
    exact = gradient(mc.full, model, ids, ids)  # a dense mask, and no memory
    by_hand = gradient(lambda *to_the_end: list(walk(*to_the_end)), model, ids, 24)
    for found in (by_hand, gradient(mc.seco, model, ids, ids, 24)):
        assert (found - exact).norm() < 1e-10 * exact.norm()
    print(f"{name:16}   this loop = mc.seco = full backpropagation, to ten digits: True")

# %% [markdown]
# ## What a query sees
#
# 96 tokens; the red lines cut them into chunks of 24. Strided: of the blocks of 8, the last two and every fourth.

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), sharey=True)
for axis, (name, pattern) in zip(axes, PATTERNS.items(), strict=True):
    axis.imshow(pattern.mask(96), cmap="Greys", vmax=2, extent=(0, 96, 96, 0))
    axis.set(title=name, xlabel="key", ylabel="query", xticks=range(0, 97, 24), yticks=range(0, 97, 24))
    axis.grid(color="tab:red")
figure.suptitle("What a query sees does not depend on the chunks", y=1.02)
plt.show()

# %% [markdown]
# The rule ([`memory/window.py`](../minichunk/memory/window.py)) is about positions and knows nothing of chunks. If a
# window ended where a chunk begins, another chunk size would be another model, and writing token by token a third:

# %%
for name, (model, ids) in models.items():
    ids, whole = ids[:, :60], model.run(ids[:, :60])[0]
    for size in (1, 7, 24):
        pieces = [hidden for _, hidden in model.run_chunks(ids, model.new_memory(1, 60), size)]
        assert (torch.cat(pieces, 1) - whole).norm() < 1e-10 * whole.norm()
    print(f"{name:16}   chunks of 1, of 7 and of 24 tokens, and all at once, give the same outputs: True")

# %% [markdown]
# ## What is remembered
#
# Some positions are *pinned*: all later queries see them. The others are seen from as far as the *reach*, window - 1. Who
# will still ask? When text is written, the next token: the memory keeps the sinks, and a *ring* of the last positions, in
# which the newest takes the place of the oldest. In training a chunk is rebuilt long after its past was filled, so the
# memory keeps the reach *before the start of each chunk* ([`memory/window.py`](../minichunk/memory/window.py)).
#
# **Predict before you read on.** A window of 64 with 4 sinks, a text of 4,096 tokens. How many keys does a layer keep when
# the text is written? And in training, with chunks of half a window, of one window, of two, of eight?

# %%
W, SINKS, LENGTHS = 64, 4, range(1024, 4097, 512)
SIZES = {"half a window": W // 2, "one window": W, "two windows": 2 * W, "eight windows": 8 * W}


def rows(model, length, size=None):
    """How many keys layer 0 keeps; with a chunk size in training. Counted in the real memory, not computed."""
    chunks = cut(length, size or length)
    memory = model.new_memory(1, chunks[-1].start, chunks[:-1]) if size else model.new_memory(1, length)
    return sum(keys.shape[2] for keys in memory.layers[0].tensors().remembered[::2])  # (B, G, rows, D) each


hybrids = {"window": llama(mc.Window(W, SINKS)), "strided": llama(mc.Strided(16, local=4, stride=8))}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
for axis, (name, model) in zip(axes, hybrids.items(), strict=True):
    axis.plot(LENGTHS, LENGTHS, color="black", lw=5, alpha=0.2, label="full attention")
    for label, size in SIZES.items():
        axis.plot(LENGTHS, [rows(model, n, size) for n in LENGTHS], ".-", label=f"training, chunks of {label}")
    axis.plot(LENGTHS, [rows(model, n) for n in LENGTHS], "k--", label="inference")
    axis.set(title=name, xlabel="length of the text", ylabel="keys that a layer keeps", xticks=LENGTHS[::2])
axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
figure.suptitle("Long chunks forget most of the past, chunks of up to a window hardly any", y=1.02)
plt.show()

print(f"{'of 4,096 tokens, kept':24}  {'window':>6}  {'strided':>7}")
for label, size in {**SIZES, "inference": None}.items():
    print(f"{label:24}  {rows(hybrids['window'], 4096, size):6,}  {rows(hybrids['strided'], 4096, size):7,}")
assert [rows(hybrids["window"], 4096, C) for C in (None, W // 2)] == [SINKS + W - 1, 4096 - W // 2]
assert all(rows(hybrids["window"], 4096, C) == SINKS + (4096 // C - 1) * (W - 1) for C in (2 * W, 8 * W))

# %% [markdown]
# Chunks of half a window keep all but the last chunk, which nobody reads; chunks of one window save next to nothing,
# for each needs the chunk before but for one position. From there on it goes as one over the chunk: take chunks of at
# least two windows. A strided layer keeps its pinned blocks besides, here one in eight. At any chunk size a
# window saves time: its work does not grow with the past.
#
# ## How far a relay reaches
#
# Eight chunks of 24, and the patterns of the picture. **Predict:** to which others does a chunk *send* gradients when it
# is backpropagated: in full attention; in the state model; through the window of 40 with 4 sinks; through the blocks of
# 8? Draw the four 8 x 8 squares. Then measure: the loss of a single chunk, nothing relayed, and what all earlier ones
# receive. All layers have the pattern, and one line turns off tutorial 8's bypass, which carries an adjoint past chunks:


# %%
def sends(model, ids, i):
    norms = torch.zeros(8)  # of what each chunk receives from the loss of chunk i
    for memory, chunk, received in walk(model, ids[:, : 24 * (i + 1)], 24, relay=False):
        for layer in memory.layers:
            for handed in getattr(layer, "handed", ()):
                handed.through.zero_()
        norms[chunk.start // 24] = sum(float((g**2).sum()) for g in received) ** 0.5
    return norms * (i + 1)  # the loss is a mean over so many chunks


models |= {"window and sinks": (llama(WINDOW, ()), words), "strided": (llama(STRIDED, ()), words)}
seen = {name: pattern.mask(192).view(8, 24, 8, 24).any(3).any(1).tril(-1) for name, pattern in PATTERNS.items()}
seen["state"] = torch.ones(8, 8).tril(-1).triu(-1) > 0
figure, axes = plt.subplots(1, 4, figsize=(11, 3), sharey=True)
for axis, (name, (model, ids)) in zip(axes, models.items(), strict=True):
    sent = torch.stack([sends(model, ids, i) for i in range(8)])  # (sender, receiver)
    assert torch.equal(sent > 0, seen[name])
    axis.imshow(sent.where(sent > 0, torch.nan).log10(), cmap="Blues", vmin=sent[sent > 0].log10().min() - 0.5)
    axis.plot([-0.5, 7.5], [-0.5, 7.5], color="gray", lw=0.8)
    axis.set(title=name, xlabel="to chunk", ylabel="from chunk", xticks=range(8), yticks=range(8))
figure.suptitle("Who sends gradients to whom (darker: more)", y=1.02)
plt.show()

# %% [markdown]
# To all; to the one before; to those in reach, and everybody to the sinks. The last square looks irregular until you
# count: no pinned block begins between 72 and 95, so chunk 3 hears from the next chunk alone. What is not sent directly
# can still arrive: relayed from chunk to chunk, and through layers of keys and values every such hop goes a layer down.
#
# ## Gradients come late, and go
#
# They are needed from the first that arrives until the chunk receives them. **Predict:** for how many keys of layer 0 is
# there a gradient in memory, after each chunk of the walk over 192 tokens? And over 100,000?

# %%
print("after chunk           7    6    5    4    3    2    1    0")
for name in PATTERNS:
    model, alive = models[name][0], []
    for memory, _, _ in walk(model, words[:, :192], 24):
        alive.append(sum(x.shape[2] for x in memory.layers[0].tensors().gradients) // 2)  # half of them are of values
    print(f"{name:16}   " + "".join(f"{n:5}" for n in alive))
    assert name != "window and sinks" or alive == [4 + 2 * 24] * 6 + [4 + 24, 4]

# %% [markdown]
# In full attention the last chunk sends to all others, so there is room for all from the start to the end. A window has
# the chunks in reach, two here, and the sinks, however long the text is. Of the state there is one adjoint.
#
# ## Does it learn?
#
# [`partial_context.py`](partial_context.py) trains hybrids of the shipped model, of six layers, on two jobs: to read a
# novel in contexts of 2,048 tokens instead of 256, with windows of 256; and to say 320 random tokens once more, with
# windows of 128, where each token is known from the one 320 positions before. **Predict** for both: is a hybrid worse
# than full attention? And windows in *all* layers?

# %%
runs = (json.loads((HERE / f"results/partial_context_{x}.json").read_text())["runs"] for x in ("job", "repeat"))
job, copy = (sorted(found, key=lambda run: (run["case"], run["seed"])) for found in runs)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
print("novel: loss beyond position 256           seed  before  after")
for run in job:
    before, after = run["before"]["beyond"], run["after"]["beyond"]
    left.plot([before, after], [run["case"]] * 2, "o-", color="C0", mfc="white", lw=0.5)
    left.plot(after, run["case"], "o", color="C0")
    print(f"{run['case']:42}{run['seed']:4}{before:8.3f}{after:7.3f}")
left.set(xlabel="loss beyond position 256: before (hollow) and after", title="Novel: windows in all layers do as well")
print("\nrepeat: loss                               seed  after steps")
colors = {case: f"C{i}" for i, case in enumerate(dict.fromkeys(run["case"] for run in copy))}
for run in copy:
    right.plot(*zip(*run["curve"], strict=True), color=colors[run["case"]])
    print(f"{run['case']:42}{run['seed']:4}" + "".join(f"{n:7}: {x:.2f}" for n, x in run["curve"][::-4][::-1]))
right.legend([plt.Line2D([], [], color=c) for c in colors.values()], colors, loc="upper left", bbox_to_anchor=(1, 1))
right.axhline(torch.tensor(2047.0).log(), color="gray", ls=":", lw=1)
right.set(xlabel="steps", ylabel="loss on the repeat", title="Repeat: needs the far past (dotted: chance)")
plt.show()

untrained = [run["before"]["beyond"] for run in job if run["case"] == "window alone in all layers"]
assert max(untrained) < min(run["after"]["beyond"] for run in job if "all layers" not in run["case"])
fetching = [run["curve"][-1] for run in copy if run["case"] in ("full attention", "window, last third full")]
assert all(loss < 1 for steps, loss in fetching if steps >= 300)

# %% [markdown]
# **The novel is no evidence that windows are harmless.** Windows in all layers, *before* any training, are better than
# all that have full layers are after it. What full attention has to learn here is to bear distances that it has never
# met; in a window there are none. What stood far back hardly helps so small a model with a novel.
#
# **The repeat needs nothing but the far past.** Full attention learns it, and so does every hybrid, a few dozen steps
# later. Windows in all layers stay at chance: they could only hand a token on, from layer to layer, three times. To find
# a token's twin takes two layers, one that writes beside each token which came before it (a window will do), and one
# *above* that looks for that: below the last third are four layers, below the middle third, the paper's choice, two, and
# here both are enough. One model, one seed of each curve: measure on your own, with a task that needs the far past.
#
# ## On a real model
#
# ```sh
# minichunk train --model DIR --data book.txt --partial-context window --window 1024 --sinks 64 --chunk-size 2048
# minichunk plan --model llama-3-8b --partial-context window --chunk-size 2048
# ```
#
# As in `mc.partial_context(model, mc.Window(1024, sinks=64))`, the middle third of the layers stays full unless
# `--full-layers` says otherwise; LoRA and a 4-bit base go with it. The adapter and the checkpoint say what they are:
# `evaluate` and `generate` follow them, and PEFT refuses the adapter of a converted base. Windows without sinks are saved
# as Ministral or Qwen, which stock transformers compute alike; what they would ignore silently is saved under a
# `model_type` that they refuse. Checkpoints that have windows already (Mistral, Ministral, Qwen2, Qwen3) need
# none of this: they are read as their `config.json` says.
#
# What it saves in Llama-3-8B at 131,072 tokens, in bfloat16 (window: the last 1,024 and the first 64; strided: blocks of
# 64, the last 16 and every 16th), beside what LongGen measured at 128K tokens with models of its own; the gradients of
# what is in reach, of a chunk or two at a time, come on top (`minichunk.costs.hybrids` at commit `cbb3a04`):
#
# | | full | window | strided | LongGen |
# |---|---:|---:|---:|---:|
# | GiB of keys and values, inference | 16.00 | 6.08 (-62%) | 6.70 (-58%) | -62% |
# | GiB with gradients, training, chunks of 512 | 31.88 | 21.92 (-31%) | 23.16 (-27%) |  |
# | GiB with gradients, training, chunks of 2,048 | 31.50 | 16.74 (-47%) | 17.96 (-43%) |  |
# | GiB with gradients, training, chunks of 8,192 | 30.00 | 12.43 (-59%) | 13.59 (-55%) |  |
# | 10^15 operations of a SeCO step | 27.82 | 15.39 (1.81) | 16.15 (1.72) | 1.55 |
# | 10^15 operations of the prefill | 6.33 | 3.57 (1.78) | 3.74 (1.70) | 1.67 |
# | 10^9 operations of a token | 83.74 | 41.14 (2.04) | 43.79 (1.91) |  |
# | gigabytes read for a token | 32.20 | 21.55 (1.49) | 22.21 (1.45) | 1.41 |
#
# Operations are no times; a token that is decoded waits for the bytes that it reads, weights and cache.
#
# The longest context, with LoRA of rank 8, by the forecast of `minichunk plan --cache-grad-dtype bfloat16
# --partial-context window` (or `strided`); the last two rows with `--memory 80GiB --chunk-size 2048`, the last one with
# sums in float32:
#
# | | full | window | strided |
# |---|---:|---:|---:|
# | SeCO, 24 GiB, chunks of 512 | 31,232 | 44,544 | 41,984 |
# | SpaCO, 24 GiB, chunks of 512 | 53,760 | 137,216 | 121,856 |
# | SeCO, 80 GiB, chunks of 2,048 | 256,000 | 479,232 | 446,464 |
# | SeCO, 80 GiB, chunks of 2,048, sums in float32 | 169,984 | 354,304 | 327,680 |
#
# And times. Attention's share is larger in a small model than in a large one. This is a 47M-parameter Llama (hidden 576,
# 12 layers), chunks of 512, the same patterns; CPU seconds of one thread of an EPYC that was busy with other work too, all
# in turn, the fastest of one or two repeats ([all samples](figures/bench-partial.json); `minichunk bench --preset partial`
# at commit `cbb3a04`). A step is the sum of its chunks, by straight lines between the measured ones:
#
# ![Time of a chunk by position, and how many times as fast whole steps are](figures/bench-partial.png)
#
# | | full | window | strided |
# |---|---:|---:|---:|
# | SeCO step 4,096 | 38.1 s | 1.14 | 1.15 |
# | SeCO step 16,384 | 366 s | 1.78 | 1.73 |
# | SeCO step 32,768 | 1,295 s | 2.20 | 2.05 |
# | SeCO step 131,072 * | 18,042 s | 2.75 | 2.37 |
# | prefill 4,096 | 9.2 s | 1.18 | 1.19 |
# | prefill 16,384 | 81.3 s | 1.76 | 1.67 |
# | prefill 32,768 | 274 s | 2.07 | 1.90 |
# | prefill 131,072 * | 3,719 s | 2.47 | 2.21 |
# | decoding a token after 4,096 | 41 ms | 1.21 | 1.14 |
# | decoding a token after 16,384 | 82 ms | 1.62 | 1.39 |
# | decoding a token after 32,768 | 115 ms | 1.83 | 1.65 |
# | decoding a token after 131,072 * | 369 ms | 2.29 | 2.00 |
#
# The numbers under window and strided say how many times as fast they are. \* lies beyond 32,768 tokens: not measured,
# but on a straight line through what was.
#
# ## Exercises
#
# 1. Leave out the line with `through.zero_()`. What do you expect of the state's square?
# 2. With a window of 40 and no sinks in all six layers, how far back can a token still matter? And in the hybrid?
# 3. The 4,096 tokens again, a third of the layers full: what part of all keys is kept, for the four sizes of chunks?
# 4. SpaCO with rate 1/4 and more and more chunks (tutorial 8's last table): what if all layers have a window?
# 5. Write a layer with a window yourself: [`tutorials/exercises/`](exercises/README.md), exercise 9.
