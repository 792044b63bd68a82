# %% [markdown]
# # 7. Porting it
#
# SeCO needs little from a model: run a chunk on top of given keys and values, and hand out those that it made. Every
# library with a KV cache can do that. Here we drive SeCO on a model that is not ours, Hugging Face `transformers`'
# Llama, without touching its source, and check it against minichunk's golden files, tensor by tensor, with the command
# that names a port's first mistake. SpaCO comes beside it, and then the list of what a port must get right.
#
# Chunks are numbered from 0, here and in the files.

# %%
import json
import logging
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from minichunk.command.main import main as minichunk

logging.getLogger("transformers").setLevel(logging.ERROR)
HERE = Path(__file__).parent if "__file__" in globals() else Path("tutorials")
GOLDEN = HERE.parent / "tests" / "golden"

# %% [markdown]
# ## The port
#
# `run_chunk` is eq. 1 of the paper: it puts the past, as leaves, into one of `transformers`' caches, runs the chunk, and
# takes the chunk's own keys and values out again. `transformers` aligns the mask bottom right by itself, and is told the
# positions. `fill` is lines 1-3 of Algorithm 1, `rebuild` lines 5 and 6, and what is left is the loop.


# %%
def run_chunk(model, ids, start, past):
    """Hidden state and written keys and values [(k, v) of each layer] of a chunk that begins at `start`."""
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(past):
        if start > 0:
            cache.update(keys, values, layer)
    positions = torch.arange(start, start + ids.shape[1])
    hidden = model.model(ids, past_key_values=cache, position_ids=positions[None], use_cache=True).last_hidden_state
    return hidden, [(layer.keys[:, :, start:], layer.values[:, :, start:]) for layer in cache.layers]


def join(memories, num_layers):
    """Several chunks' memories as one, (keys, values) of each layer, still connected to their leaves."""
    if not memories:
        return [(None, None)] * num_layers
    return [tuple(torch.cat([m[layer][i] for m in memories], dim=2) for i in (0, 1)) for layer in range(num_layers)]


def fill(model, ids, cuts):
    """What each chunk leaves behind, as leaves: numbers without a graph, at which gradients will gather."""
    memories = []
    with torch.no_grad():
        for a, b in cuts[:-1]:
            _, written = run_chunk(model, ids[:, a:b], a, join(memories, model.config.num_hidden_layers))
            memories.append([tuple(tensor.clone() for tensor in pair) for pair in written])
    for leaf in (tensor for memory in memories for pair in memory for tensor in pair):
        leaf.requires_grad_()
    return memories


def rebuild(model, ids, targets, cuts, j, memories):
    """Chunk j again: its part of the mean loss, what it wrote, and what later chunks have sent back to that."""
    a, b = cuts[j]
    hidden, written = run_chunk(model, ids[:, a:b], a, join(memories[:j], model.config.num_hidden_layers))
    logits = model.lm_head(hidden).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, targets[:, a:b].flatten(), reduction="sum")
    leaves = [leaf for pair in memories[j] for leaf in pair] if j < len(memories) else []  # the last chunk has none
    made = sum(written, ())[: len(leaves)]
    pairs = [(m, leaf.grad) for m, leaf in zip(made, leaves, strict=True) if leaf.grad is not None]
    return loss / (targets != -100).sum(), written, [m for m, _ in pairs], [g for _, g in pairs]


def seco(model, ids, labels, chunk_size, watch=lambda *_: None):
    """Algorithm 1: adds the exact gradient of the mean loss to `.grad`, returns the loss. `watch` sees each chunk."""
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)  # shifted once, before cutting
    cuts = [(a, min(a + chunk_size, ids.shape[1])) for a in range(0, ids.shape[1], chunk_size)]
    memories, total = fill(model, ids, cuts), 0.0
    for j in reversed(range(len(cuts))):
        loss, written, made, sent = rebuild(model, ids, targets, cuts, j, memories)
        torch.autograd.backward([loss, *made], [None, *sent])
        watch(j, loss.detach(), written, sent)
        total = total + loss.detach()
    return total


# %% [markdown]
# ## The check
#
# A golden file has config, weights, ids, labels and every intermediate of both algorithms on a tiny model, in float64
# ([its page](../tests/golden/README.md) names them all). The port writes what it has into a file of its own, by the same
# names, and `minichunk compare` goes through them in the order in which a port is built. (`transformers` computes its
# norms in float32 whatever the dtype, so we ask for that precision.)


# %%
def open_golden(name):
    """Metadata and tensors of a golden file, and a `transformers` model with its weights."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        metadata, golden = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    config = AutoConfig.for_model(**json.loads(metadata["config"]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa")
    weights = {key.removeprefix("weights."): t for key, t in golden.items() if key.startswith("weights.")}
    model.load_state_dict(weights, strict=not config.tie_word_embeddings)
    return metadata, golden, model


def record(method, name, *, algorithm):
    """Run a method on a golden file; what the port has computed, by the file's names."""
    metadata, golden, model = open_golden(name)
    mine = {}

    def watch(j, loss, written, sent):
        mine[f"{method}.chunk.{j}.loss"] = loss
        tensors = [tensor.detach().clone() for pair in written for tensor in pair]
        for n, tensor in enumerate(tensors):
            where = f"{method}.chunk.{j}.layer.{n // 2}"
            mine[f"{where}.{('keys', 'values')[n % 2]}"] = tensor
            mine[f"{where}.{('key_grads', 'value_grads')[n % 2]}"] = sent[n].clone() if sent else 0 * tensor
        for parameter_name, parameter in model.named_parameters():
            mine[f"{method}.chunk.{j}.grad.{parameter_name}"] = parameter.grad.clone()

    draw = [json.loads(metadata["spaco"])] if method == "spaco" else []
    loss = algorithm(model, golden["input_ids"], golden["labels"], int(metadata["chunk_size"]), *draw, watch)
    return mine | {f"{method}.loss": loss}


def compare(name, mine):
    """`minichunk compare mine.safetensors --golden NAME.safetensors --precision float32`; its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        save_file(mine, f"{folder}/mine.safetensors")
        golden = str(GOLDEN / f"{name}.safetensors")
        return minichunk(["compare", f"{folder}/mine.safetensors", "--golden", golden, "--precision", "float32"])


status = compare("plain", record("seco", "plain", algorithm=seco))

# %% [markdown]
# All of SeCO agrees, and SpaCO is not there yet.
#
# ## Algorithm 2 beside it
#
# SpaCO rebuilds the chunks of a draw only. A kept chunk has two factors: one on its own loss, one on what is relayed to
# it. What is sent to a chunk that is skipped stays where it is: nothing goes on through that chunk.


# %%
def spaco(model, ids, labels, chunk_size, draw, watch=lambda *_: None):
    """Algorithm 2: an estimate of both. draw: for each chunk None (skip), or its factors on loss and relay."""
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    cuts = [(a, min(a + chunk_size, ids.shape[1])) for a in range(0, ids.shape[1], chunk_size)]
    memories, total = fill(model, ids, cuts), 0.0  # skipped chunks are seen by later ones, too
    for j in reversed(range(len(cuts))):
        if draw[j] is None:  # NEW
            continue
        loss, written, made, sent = rebuild(model, ids, targets, cuts, j, memories)
        loss, sent = draw[j][0] * loss, [draw[j][1] * grad for grad in sent]  # NEW; this chunk's part of what was sent
        torch.autograd.backward([loss, *made], [None, *sent])
        watch(j, loss.detach(), written, sent)
        total = total + loss.detach()
    return total


for name in ("plain", "grouped", "tied", "llama3-rope", "qkv-bias", "qk-norm", "calm"):
    mine = record("seco", name, algorithm=seco) | record("spaco", name, algorithm=spaco)
    print(f"{name:12}", end="", flush=True)
    assert compare(name, mine) == 0

# %% [markdown]
# Five files are left: a window with a sink, which stock `transformers` does not know, an adapter, a step over two
# batches, and a state and a hybrid of it, which are no Llamas.
#
# Which factors? With $t$ of $k$ chunks, the published ones and ours side by side:
#
# | | draw | on the loss | on the relay | right on average for chains through |
# |---|---|---|---|---|
# | Algorithm 2 as printed | t of k, without replacement | 1 | k/t | none |
# | `PaperBudget(t)`: the same with the loss scaled | t of k, without replacement | k/t | k/t | one chunk |
# | `FixedBudget(t)` | t of k, without replacement | k/t | (k-1)/(t-1) | one and two chunks |
# | `Bernoulli(r)` | a coin for each chunk, of rate r = t/k | 1/r | 1/r | any number |
#
# Why, is tutorial 4. A port proves its factors by running all draws of a golden file: what has to come out then stands
# under "All draws" on [the files' page](../tests/golden/README.md).
#
# ## A mistake, and its name
#
# Here is a port that relays nothing: each chunk learns from its own loss alone, as if the cache were a constant. The
# loss is right, training runs, and nothing crashes.


# %%
def forgetful(*arguments):
    """Algorithm 1 without line 6."""
    backward = torch.autograd.backward
    torch.autograd.backward = lambda starts, gradients: backward(starts[:1], gradients[:1])
    try:
        return seco(*arguments)
    finally:
        torch.autograd.backward = backward


status = compare("plain", record("seco", "plain", algorithm=forgetful))

# %% [markdown]
# ## What a port must get right
#
# Each row was made as a mistake, in a port in NumPy, to see which tensor differs first. `chunk.…` is that of `seco`.
#
# | | if it is wrong | differs first |
# |---|---|---|
# | **Positions.** RoPE counts from the beginning of the text, not of the chunk. | keys of chunk 1 are those of position 0 | `chunk.1.layer.0.keys` |
# | **Bottom-right mask.** A chunk's queries sit at the end of the keys. | later chunks see too little | `chunk.1.layer.0.attention`; without it, layer 1's keys |
# | **Normaliser.** Valid targets of the whole batch, not the mean of chunk means. | gradients of short or masked chunks weigh too much | `chunk.3.loss` |
# | **Label shift.** Once, before cutting. | a target is lost at every cut, but not at the end: the last chunk's loss is right | `chunk.2.loss` |
# | **Walk order.** Last chunk first; a chunk's relay is complete only when all later ones are done. | nothing is relayed, and the last chunk is added to the others | `chunk.3.grad.lm_head.weight` |
# | **Leaves.** The past is detached; what arrives at it is kept. | the graph of all chunks stays alive | `chunk.3.grad.model.layers.2.self_attn.v_proj.weight` |
# | **Adding up.** All later chunks send to a chunk. | right for the last two chunks only | `chunk.1.layer.2.key_grads` |
# | **Relay at the right place.** The gradient belongs to what was *written*: keys after the rotation. | rotation applied twice or not at all in the backward pass | `chunk.2.grad.model.layers.2.self_attn.k_proj.weight` |
# | **One backward.** Loss and relay together, or else the graph has to be kept for a second pass. | memory, not numbers | |
# | **Dropout replay.** The rebuild must draw the masks of the fill. | gradient of another function, and no test without dropout sees it | `chunk.0.layer.0.keys` of `lora` |
# | **Float32 sums.** The cache's gradients collect one term from every later chunk, the parameters' one from every chunk. | small terms drown in half precision | |
# | **SpaCO's loss factor** is on the loss. | biased without any sign of it | `spaco.chunk.3.loss` |
# | **SpaCO's relay factor** is on the relay. | biased without any sign of it | `spaco.chunk.2.layer.2.key_grads` |
# | **One chunk's part.** The factor is on what is relayed to this chunk, not on all that has arrived so far. | biased, and unseen with two kept chunks | `spaco.chunk.0.layer.2.key_grads` |
# | **Skipped is skipped.** What was sent to a skipped chunk goes no further. | biased | `spaco.chunk.0.layer.1.key_grads` |
#
# What this port leaves out: it concatenates the past in every chunk, which costs a copy of the cache inside the graph
# and the time to make it, and SpaCO's skipped chunks gather gradients that nobody reads. minichunk's cache is one buffer,
# its attention reads views of it and adds gradients to a second buffer in place, of kept chunks only:
# [`memory/cache.py`](../minichunk/memory/cache.py) and [`memory/attention.py`](../minichunk/memory/attention.py) are what
# to port next. And a model of another kind, with something else to remember than keys and values, can run under
# minichunk's own `seco`: what that asks of it is [`protocol.py`](../minichunk/protocol.py).
#
# ## Exercises
#
# 1. Break the port on purpose, one row of the table at a time, before you read what `minichunk compare` says.
# 2. Run all draws of four chunks and compare the mean with `full.grad`. Then scale all of `.grad` by the relay factor,
#    not this chunk's part, and run them again.
# 3. How many bytes does `join` cost per token? Get rid of it: preallocate one buffer per layer.
# 4. Leave out the gradients of skipped chunks. Which tensor shows it?
# 5. Port it to JAX. There are no leaves with a `.grad` there; what takes their place?
