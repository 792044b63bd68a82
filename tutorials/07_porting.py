# %% [markdown]
# # 7. Porting it
#
# SeCO needs little from a model: run a chunk on top of given keys and values, and hand out those that it made. Every
# library with a KV cache can do that. Here we drive SeCO on a model that is not ours, Hugging Face `transformers`'
# Llama, without touching its source, and check it against minichunk's golden files, number by number. Then comes the
# list of what a port must get right.

# %%
import json
import logging
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

logging.getLogger("transformers").setLevel(logging.ERROR)
HERE = Path(__file__).parent if "__file__" in globals() else Path("tutorials")
GOLDEN = HERE.parent / "tests" / "golden"

# %% [markdown]
# ## The port
#
# Three functions. `run_chunk` is eq. 1 of the paper: it puts the past, as leaves, into one of `transformers`' caches,
# runs the chunk, and takes the chunk's own keys and values out again. `transformers` aligns the mask bottom right by
# itself, and is told the positions.


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


def join(memories, upto, num_layers):
    """The caches of chunks 0 .. upto-1, one (keys, values) per layer, still connected to their leaves."""
    if upto == 0:
        return [(None, None)] * num_layers
    return [
        tuple(torch.cat([m[layer][i] for m in memories[:upto]], dim=2) for i in (0, 1)) for layer in range(num_layers)
    ]


def seco(model, ids, labels, chunk_size, watch=lambda *_: None):
    """Adds the exact gradient of the mean loss to `.grad`; returns the loss. `watch` sees what is relayed."""
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)  # shifted once, before cutting
    num_targets = (targets != -100).sum()
    cuts = [(a, min(a + chunk_size, ids.shape[1])) for a in range(0, ids.shape[1], chunk_size)]
    num_layers = model.config.num_hidden_layers
    memories = []
    with torch.no_grad():  # fill
        for j, (a, b) in enumerate(cuts[:-1]):
            _, written = run_chunk(model, ids[:, a:b], a, join(memories, j, num_layers))
            memories.append([(k.clone(), v.clone()) for k, v in written])
    for memory in memories:
        for keys, values in memory:
            keys.requires_grad_(), values.requires_grad_()
    total = 0.0
    for j, (a, b) in reversed(list(enumerate(cuts))):
        hidden, written = run_chunk(model, ids[:, a:b], a, join(memories, j, num_layers))  # rebuild
        logits = model.lm_head(hidden).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, targets[:, a:b].flatten(), reduction="sum") / num_targets
        made, relayed = [], []
        if j < len(memories):  # relay: what later chunks have sent back; nothing for the last chunk
            made = [tensor for pair in written for tensor in pair]
            relayed = [leaf.grad for pair in memories[j] for leaf in pair]
        torch.autograd.backward([loss, *made], [None, *relayed])
        watch(j, loss.detach(), written, relayed)
        total = total + loss.detach()
    return total


# %% [markdown]
# ## The check
#
# A golden file has config, weights, ids, labels and every intermediate of SeCO on a tiny model, in float64.
# (`transformers` computes its norms in float32 whatever the dtype, so we compare to 1e-5; a port with float64
# throughout should come to 1e-12, as the NumPy one in minichunk's tests does.)


# %%
def check(name):
    """Compare the port with a golden file; returns the largest relative error of anything it has."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        metadata = file.metadata()
        golden = {key: file.get_tensor(key) for key in file.keys()}
    config = AutoConfig.for_model(**json.loads(metadata["config"]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa")
    weights = {key.removeprefix("weights."): t for key, t in golden.items() if key.startswith("weights.")}
    model.load_state_dict(weights, strict=not config.tie_word_embeddings)
    errors = {}

    def compare(key, got):
        expected = golden[key]
        errors[key] = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-3))

    def watch(j, loss, written, relayed):
        compare(f"seco.chunk.{j}.loss", loss)
        for n, tensor in enumerate(t for pair in written for t in pair):
            where = f"seco.chunk.{j}.layer.{n // 2}"
            compare(f"{where}.{('keys', 'values')[n % 2]}", tensor.detach())
            if relayed:
                compare(f"{where}.{('key_grads', 'value_grads')[n % 2]}", relayed[n])
        for name, parameter in model.named_parameters():
            compare(f"seco.chunk.{j}.grad.{name}", parameter.grad)

    loss = seco(model, golden["input_ids"], golden["labels"], int(metadata["chunk_size"]), watch)
    compare("seco.loss", loss)
    return len(errors), max(errors, key=errors.get), max(errors.values())


for path in sorted({*GOLDEN.glob("*.safetensors")} - {GOLDEN / "state.safetensors"}):  # that one is no Llama
    count, worst, error = check(path.stem)
    print(f"{path.stem:14} {count} tensors agree to 1e-5: {error < 1e-5}")
    assert error < 1e-5, (worst, error)

# %% [markdown]
# ## What a port must get right
#
# | | if it is wrong | compare with |
# |---|---|---|
# | **Bottom-right mask.** A chunk's queries sit at the end of the keys. | later chunks see too little; everything differs from chunk 1 on | `chunk.1.layer.1.keys` |
# | **Positions.** RoPE counts from the beginning of the text, not of the chunk. | keys of chunk 1 are those of position 0 | `chunk.1.layer.0.keys` |
# | **Label shift.** Once, before cutting. | a target is lost at every cut; the loss is a little off | `chunk.0.loss` |
# | **Normaliser.** Valid targets of the whole batch, not the mean of chunk means. | gradients of short or masked chunks weigh too much | `chunk.2.loss` |
# | **Relay order.** Last chunk first; a chunk's relay is complete only when all later ones are done. | gradient right for the last two chunks only | `chunk.0.layer.0.key_grads` |
# | **Relay at the right place.** The gradient belongs to what was *written*: keys after the rotation. | rotation applied twice or not at all in the backward pass | `chunk.0.grad…k_proj` |
# | **One backward.** Loss and relay together, or else the graph has to be kept for a second pass. | memory, not numbers | |
# | **Leaves.** The past is detached; what arrives at it is added up and kept. | without: the graph of all chunks stays alive | |
# | **Dropout replay.** The rebuild must draw the masks of the fill. | gradient of another function, and no test without dropout sees it | `full` with the same masks |
# | **Float32 sums.** The cache's gradients collect one term from every later chunk, the parameters' one from every chunk. | small terms drown in half precision | |
# | **SpaCO's factors.** Loss factor on the loss, relay factor on the relay, no gradient for a skipped chunk. | biased without any sign of it | `spaco.…` |
#
# What this port leaves out: it concatenates the past in every chunk, which costs a copy of the cache inside the graph
# and the time to make it. minichunk's cache is one buffer, its attention reads views of it and adds gradients to a
# second buffer in place: [`memory/cache.py`](../minichunk/memory/cache.py) and
# [`memory/attention.py`](../minichunk/memory/attention.py) are what to port next. And a model of another kind, with
# something else to remember than keys and values, can run under minichunk's own `seco`: what that asks of it is
# [`protocol.py`](../minichunk/protocol.py).
#
# ## Exercises
#
# 1. Break the port on purpose, one row of the table at a time, and see which golden tensor differs first.
# 2. Add SpaCO: a list of weights as one more argument, and the `spaco.` tensors to compare with.
# 3. How many bytes does `join` cost per token? Get rid of it: preallocate one buffer per layer.
# 4. Port it to JAX. There are no leaves with a `.grad` there; what takes their place?
