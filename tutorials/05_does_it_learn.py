# %% [markdown]
# # 5. Does it learn?
#
# An equal gradient learns equally; so SeCO must do what full backpropagation does. But what do noise (SpaCO) and
# truncation (a detached cache) do to *learning*? For that we need a task that cannot be solved without learning what to
# write into the cache for later chunks.
#
# ## The task: recall
#
# A sequence begins with pairs, key and value. Then comes filler. At the end come the same keys in another order, and
# after each of them the model has to say its value. Only these answers are scored. The pairs are in the first chunk,
# the questions in the last, and filler chunks lie between.
#
# To answer, a layer has to look for "the place that follows this key", and so a lower layer has to have written, at the
# place of the value, *which key came before*. Nothing in the first chunk is ever scored. The only reason to write that
# down is a question that comes many chunks later.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import minichunk as mc
from minichunk.training.loop import Schedule

HERE = Path(__file__).parent if "__file__" in globals() else Path("tutorials")
KEYS, VALUES, FILLER, PAIRS = 8, 8, 4, 4
VOCABULARY = KEYS + VALUES + FILLER
CHUNK, NUM_CHUNKS = 2 * PAIRS, 5


def batch(size, generator):
    """input_ids and labels, (size, CHUNK * NUM_CHUNKS); labels are -100 but at the answers."""
    keys = torch.rand(size, KEYS, generator=generator).argsort(1)[:, :PAIRS]  # all different
    values = KEYS + torch.randint(VALUES, (size, PAIRS), generator=generator)
    order = torch.rand(size, PAIRS, generator=generator).argsort(1)
    pairs = torch.stack((keys, values), dim=2).flatten(1)
    questions = torch.stack((keys.gather(1, order), values.gather(1, order)), dim=2).flatten(1)
    filler = KEYS + VALUES + torch.randint(FILLER, (size, CHUNK * (NUM_CHUNKS - 2)), generator=generator)
    ids = torch.cat((pairs, filler, questions), dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -CHUNK + 1 :: 2] = ids[:, -CHUNK + 1 :: 2]
    return ids, labels


ids, labels = batch(1, torch.Generator().manual_seed(0))
names = [*"abcdefgh", *"ABCDEFGH", *"...."]
print(" | ".join(" ".join(names[i] for i in chunk) for chunk in ids[0].split(CHUNK)))
print(" | ".join(" ".join("^" if label >= 0 else " " for label in chunk) for chunk in labels[0].split(CHUNK)))

# %% [markdown]
# Lower case are keys, upper case values, dots filler; a mark is under every scored answer. Who guesses blindly among
# all values pays log 8 = 2.08. Who knows which values occur in this text, but not which belongs to which key, pays at
# most log 4 = 1.39.
#
# ## The methods
#
# Seven ways to a gradient, all from the same start, on the same batches, with the same optimizer. Truncation is SeCO
# without the relay: every chunk is rebuilt, and nothing is sent back.


# %%
def sampled(sampler):
    def gradient(model, ids, labels, generator):
        return mc.spaco(model, ids, labels, CHUNK, sampler=sampler, generator=generator)

    return gradient


def detached(num_chunks, generator):
    return [mc.Weight(loss=1.0, relay=0.0)] * num_chunks


def last_always(rate):
    """Bernoulli for all chunks but the last, which is always kept: it has all the questions."""
    return lambda k, generator: mc.Bernoulli([rate] * (k - 1) + [1.0])(k, generator)


METHODS = {
    "full": lambda model, ids, labels, generator: mc.full(model, ids, labels),
    "SeCO": lambda model, ids, labels, generator: mc.seco(model, ids, labels, CHUNK),
    "truncated": sampled(detached),
    "SpaCO Bernoulli 3/5": sampled(mc.Bernoulli(3 / 5)),
    "SpaCO Bernoulli, last always": sampled(last_always(1 / 2)),
    "SpaCO fixed 3 of 5": sampled(mc.FixedBudget(3)),
    "SpaCO paper 3 of 5": sampled(mc.PaperBudget(3)),
}


def make_model(seed):
    torch.manual_seed(seed)
    config = mc.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=8,
    )  # fmt: skip
    model = mc.Llama(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def train(method, seed, steps):
    """The loss on 256 fresh sequences, measured every 25 steps."""
    model, schedule = make_model(seed), Schedule(steps, lr=3e-3, warmup=20)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    data, coins = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    fresh_ids, fresh_labels = batch(256, torch.Generator().manual_seed(10**6))
    curve = []
    for step in range(steps + 1):
        if step % 25 == 0:
            with torch.no_grad():
                logits = model(fresh_ids)[:, -CHUNK:-1:2]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), fresh_labels[:, -CHUNK + 1 :: 2].flatten())
            curve.append(round(float(loss), 4))
        METHODS[method](model, *batch(64, data), coins)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = schedule.lr_at(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return curve


# %% [markdown]
# First a few steps, to see that SeCO's curve *is* full's.

# %%
short = {method: train(method, seed=0, steps=25) for method in ("full", "SeCO")}
same = max(abs(a - b) for a, b in zip(short["full"], short["SeCO"], strict=True)) < 1e-3
print(f"after 25 steps SeCO's loss equals full's to 0.001: {same}")
assert same

# %% [markdown]
# The full experiment, 1,000 steps with three seeds for each method, takes about twenty minutes on two cores. Its curves
# are kept in [`results/05_does_it_learn.json`](results/05_does_it_learn.json); delete that file, and the next cell
# makes it again.

# %%
STEPS, SEEDS = 1000, (0, 1, 2)
path = HERE / "results" / "05_does_it_learn.json"
if not path.exists():
    curves = {method: [train(method, seed, STEPS) for seed in SEEDS] for method in METHODS}
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + ",\n".join(f'"{m}": {json.dumps(c)}' for m, c in curves.items()) + "\n}\n")
curves = {method: torch.tensor(c) for method, c in json.loads(path.read_text()).items()}  # (seed, measurement)

figure, axes = plt.subplots(figsize=(8, 4.4))
steps = torch.arange(curves["full"].shape[1]) * 25
for method, values in curves.items():
    style = {"full": {"lw": 5, "alpha": 0.3, "color": "black"}, "SeCO": {"color": "black"}}.get(method, {})
    (drawn,) = axes.plot(steps, values.median(0).values, label=method, **style)
    axes.fill_between(steps, values.amin(0), values.amax(0), alpha=0.06, color=drawn.get_color(), lw=0.5)
axes.axhline(torch.tensor(4.0).log(), color="gray", ls=":", lw=1)
axes.text(STEPS, 1.41, "knows the values, not the keys", ha="right", fontsize=8, color="gray")
axes.set(xlabel="steps", ylabel="loss of the answers", ylim=0)
axes.set_title("SeCO learns as full does, truncation does not learn to write for later")
axes.legend(fontsize=8)
plt.show()

print(f"{'':30}loss after {STEPS:,} steps, three seeds")
for method, values in curves.items():
    print(f"{method:30}" + "".join(f"{v:8.3f}" for v in values[:, -1].tolist()))
assert (curves["SeCO"] - curves["full"]).abs().max() < 0.01
assert curves["truncated"].min() > 0.7
sparse = torch.stack([values[:, -1] for method, values in curves.items() if "SpaCO" in method])  # (variant, seed)
assert (sparse.amin(1) < 0.01).all() and (sparse.amax(1) > 0.5).all()

# %% [markdown]
# What is to be seen:
#
# - **SeCO lies on full**, step for step. It is the same gradient, so it is the same learning.
# - **Truncation fails.** It gets below 1.39: even keys and values that nobody trained carry some trace of what stood
#   there, and the last chunk learns to read it. Then it stays at 0.8 in every seed. Nothing ever told the first chunk
#   what to write.
# - **SpaCO learns the task, later and less reliably.** Every variant solves it with some seed, and every variant has a
#   seed (fixed has two) that is still far from it when the steps are over.
# - Between fixed, paper and Bernoulli three seeds decide nothing: the seeds differ more than the samplers. Mostly one
#   chain counts here, from the last chunk to the first, and with three of five kept the published factor gives it
#   0.83 of its weight instead of 1. That is a bias which this task forgives.
#
# ## Exercises
#
# 1. Put two filler chunks more between pairs and questions. What changes for truncation, and what for SpaCO?
# 2. Give truncation a fair chance: put the questions into the same chunk as the pairs. Predict its curve first.
# 3. The first chunk is the one that matters here. Choose Bernoulli rates that keep it always, with the same number of
#    rebuilt chunks on average. How close do you come to SeCO?
# 4. Why must the model have two layers? Train it with one.
