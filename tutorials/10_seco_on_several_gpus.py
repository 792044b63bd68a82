# %% [markdown]
# # 10. SeCO on several GPUs
#
# One card is not enough, so each process, a *rank*, gets a block of adjacent layers. What becomes of Algorithm 1? Here two
# processes on your own machine do what two GPUs would do. (To train on several GPUs, begin with [the
# command](#the-command) or with [a script](#a-script-of-your-own) below.)
#
# **Predict before you read on.** Rank 0 has the lower half of the layers, rank 1 the upper half. What of a chunk has to
# go from one to the other in the fill, in the rebuild, and in the backward pass? And what of these never has to: keys and
# values, their gradients, the relay, weights, the gradients of weights?

# %%
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tokenizers import Tokenizer

import minichunk as mc
from minichunk.files.documents import ASSETS, novel
from minichunk.pipeline import pipeline_seco as step
from minichunk.pipeline.links import Links

sys.path.append(str(Path(__file__).parent if "__file__" in globals() else Path.cwd()))
from pipeline_picture import Work, draw_schedule, equal_times, recorded

model = mc.Llama.from_pretrained(ASSETS / "austen-llama", dtype=torch.float64)  # 6 layers
model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # untied: see exercise 1
tokenizer = Tokenizer.from_file(str(ASSETS / "austen-llama" / "tokenizer.json"))
ids = torch.tensor([tokenizer.encode(novel("persuasion").read_text()[20000:22000]).ids])[:, :96]


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


mc.seco(model, ids, ids, chunk_size=16)
one_process = gradients(model)

# %% [markdown]
# These lines have nothing to do with the matter: they start two processes, as `torchrun` would, which wait for functions,
# run them, and leave what they return in a file.

# %%
WORKER = """
import sys, torch, torch.distributed as dist, minichunk as mc
from datetime import timedelta
from minichunk.pipeline.links import Links
from pipeline_picture import recorded
folder, threads, rank, soon = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), timedelta(seconds=60)
torch.set_num_threads(threads)  # as in the process that we compare with: more threads add in another order
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=soon)
for _ in sys.stdin:  # somebody asks
    source, task, model, arguments = torch.load(f"{folder}/asked.pt", weights_only=False)
    exec(source, globals())
    torch.save(globals()[task](rank, model, *arguments), f"{folder}/{rank}.pt")
    print("done", flush=True)
"""
here = [str(Path(mc.__file__).parents[1]), sys.path[-1]]
folder, place = tempfile.mkdtemp(), {**os.environ, "PYTHONPATH": os.pathsep.join(here)}
place["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"  # this machine, whatever its name is
told, pipes = str(torch.get_num_threads()), {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
start = [sys.executable, "-c", WORKER, folder, told]
workers = [subprocess.Popen([*start, str(rank)], env=place, **pipes) for rank in (0, 1)]


def on_two_ranks(task, *arguments):
    """What `task(rank, model, *arguments)` returns in each of the two processes."""
    source = inspect.getsource(gradients) + inspect.getsource(task)
    torch.save((source, task.__name__, model, arguments), f"{folder}/asked.pt")
    for worker in workers:
        print(file=worker.stdin, flush=True)
    assert all("done\n" in iter(worker.stdout.readline, "") for worker in workers), "a process has failed"
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in (0, 1)]


# %% [markdown]
# ## What passes, and what never does
#
# `mc.PipelineStage(model)` takes out of a model what other ranks have; `mc.pipeline_seco` is called on all ranks as
# `mc.seco` would be. In the first step every message is written down. In further ones `recorded` (from
# [`pipeline_picture.py`](pipeline_picture.py)) notes when the rank works on which chunk.


# %%
def steps(rank, model, ids, sizes):
    stage, sent, works = mc.PipelineStage(model), [], []
    hand = stage.links.hand

    def watched_hand(x, to):
        sent.append((to, tuple(x.shape)))
        hand(x, to)

    stage.links.hand = watched_hand
    mc.pipeline_seco(stage, ids, ids, chunk_size=16)
    stage.links.hand = hand
    found = gradients(stage.model)
    for size in sizes:
        with recorded(stage, size) as work:
            mc.pipeline_seco(stage, ids, ids, chunk_size=size)
        works.append([tuple(piece) for piece in work])
    return found, sent, works


SIZES = (16, 48, 8)
ranks = on_two_ranks(steps, ids, SIZES)
for rank, (found, sent, _) in enumerate(ranks):
    layers = sorted({int(name.split(".")[2]) for name in found if ".layers." in name})
    print(f"rank {rank} has the layers {layers}, {', '.join(name for name in found if '.layers.' not in name)}")
    for to, shape in sorted(set(sent)):
        print(f"   and sends {sent.count((to, shape)):2} tensors {shape} to rank {to}")
    assert all(torch.equal(found[name], one_process[name]) for name in found)
print("every gradient is that of one process, bit for bit: True")

# %% [markdown]
# Six chunks: five hidden states (B, C, E) go up in the fill (as in one process the last chunk need not be filled), six in
# the rebuild, and six gradients come down. **Keys and values never pass, nor do their gradients**: layer 3 of a chunk reads
# what layer 3 of earlier chunks wrote, and sends gradients back to that; all of it is on one rank, and so is the relay.
# For an 8B and chunks of 512 a message is 4 MiB in bfloat16; what stays where it is has 256 KiB for *each* token.
#
# ## The loop beside Algorithm 1
#
# All ranks run [`pipeline_seco.py`](../minichunk/pipeline/pipeline_seco.py). Which of its lines are lines of Algorithm 1?

# %%
for function in (mc.seco, step.pipeline_spaco, step.walk_back, step._backward):
    print(function.__module__, function.__name__)
    for line in inspect.getsource(function).splitlines():
        if "# line" in line or "waiting" in line:
            print(line)

# %% [markdown]
# The same lines, and `waiting` in between. A rank below the last cannot backpropagate a chunk that it has just rebuilt: the
# gradient of its output has not come down yet. So the chunk waits, with its graph, and meanwhile the rank rebuilds the
# chunks before it. The order is known as 1F1B ([PipeDream](https://arxiv.org/abs/1806.03377)), here with the chunks from
# last to first as its micro-batches.
#
# ## Why line 6 has to wait
#
# `seco` asks the memory for the relay right after the rebuild: lines 5 and 6 are one function. **Predict:** if every rank
# did that here, which of the six layers would get a wrong gradient?


# %%
def too_early(rank, model, ids):
    stage, asked = mc.PipelineStage(model), {}
    run = stage.run

    def run_and_ask(x, memory, chunks, options):
        if torch.is_grad_enabled():  # a rebuild
            received = type(memory).hand_over(memory, chunks[0])
            asked[chunks[0]] = [tuple(g.clone() for g in layer) for layer in received]
            memory.hand_over = asked.get
        return run(x, memory, chunks, options)

    stage.run = run_and_ask
    mc.pipeline_seco(stage, ids, ids, chunk_size=16)
    return gradients(stage.model)


wrong = {name: gradient for found in on_two_ranks(too_early, ids) for name, gradient in found.items()}
for layer in range(6):
    names = [name for name in one_process if f".layers.{layer}." in name]
    right, found = (torch.cat([g[name].flatten() for name in names]) for g in (one_process, wrong))
    off = float((found - right).norm() / right.norm())
    print(f"layer {layer}: the gradient is off by {100 * off:4.1f} %")
    assert (off == 0) == (layer >= 3)

# %% [markdown]
# On the last rank no chunk waits, so it asks at the right time. Rank 0 asks for chunk 4 when chunk 5 still waits and has
# sent nothing back yet, for chunk 3 when chunk 4 does: of every relay the next chunk's share is lost. Nothing crashes, and
# half of the model learns the right thing. So `_backward` asks when a chunk's *turn* has come. Turns go from the last chunk
# to the first, as in `seco`, and every sum has the same terms in the same order: the gradients are equal bit for bit.
#
# ## The schedule, and its bubble
#
# Below: when each rank has filled, rebuilt and backpropagated which chunk. Above: the same order, as if each piece of work
# took as long as any other. **Predict** how much less rank 0 would wait with twice as many chunks.

# %%
measured = [[[Work(*piece) for piece in works[i]] for _, _, works in ranks] for i in range(len(SIZES))]
figure, axes = plt.subplots(2, 1, figsize=(10, 3.6), layout="constrained")
draw_schedule(axes[0], equal_times(measured[0]))
draw_schedule(axes[1], measured[0])
axes[0].set(xlabel="pieces of work", xticks=range(0, 20, 2))
axes[1].set(xlabel="seconds")
figure.suptitle("Fill (blue), rebuild (yellow) and backward (green) of each chunk; blank: waiting")
plt.show()

for size, works in zip(SIZES, measured, strict=True):
    walk = [work for work in equal_times(works)[0] if work.what != "fill"]
    chunks, long = 96 // size, walk[-1].stop - walk[0].start
    print(f"{chunks:2} chunks: rank 0 waits for {long - len(walk)} of the {long} pieces of its walk")
    assert (long - len(walk)) / long == 1 / (chunks + 1)  # (ranks - 1) / (chunks + ranks - 1)

# %% [markdown]
# A rebuild and a backward pass are two pieces: 2 of 14 are 1 of 7, **(ranks - 1) of (chunks + ranks - 1)**. The pieces that
# it waits for stay the same, so take many more chunks than ranks. In memory it costs this: a rank holds the graphs of as
# many chunks as there are ranks from it on, the first one most. With three ranks and six chunks:
#
# ![Three ranks by time: chunks go up through them in the fill, then down again, rebuilt and backpropagated](figures/pipeline.png)
#
# *In the order of a real step, drawn by `torchrun --nproc-per-node 3 tutorials/pipeline_picture.py`.*
#
# ## Copies
#
# With more processes than a pipeline needs there are copies of it, each with documents of its own. Two processes can be
# two copies of a pipeline of one rank: `Links(1)`. The loss is divided by the targets of all documents, and at the end
# of the step `add_copies` adds up the gradients. A copy without a document left calls just that.


# %%
def copies(rank, model, documents, num_targets):
    stage = mc.PipelineStage(model, links=Links(1))
    document = documents[stage.links.copy]
    mc.pipeline_seco(stage, document, document, chunk_size=16, num_targets=num_targets)
    stage.add_copies()
    return gradients(stage.model)


documents, num_targets = (ids[:, :60], ids[:, 60:]), 59 + 35
in_one = []
for document in documents:
    mc.seco(model, document, document, chunk_size=16, num_targets=num_targets)
    in_one.append(gradients(model))
for found in on_two_ranks(copies, documents, num_targets):
    assert all(torch.equal(found[name], in_one[0][name] + in_one[1][name]) for name in found)
print("both copies have the sum of the gradients of both documents: True")

for worker in workers:
    worker.communicate(timeout=60)
shutil.rmtree(folder)

# %% [markdown]
# ## The command
#
# ```sh
# torchrun --nproc-per-node 2 -m minichunk train --pipeline 2 --device cpu                      # the main job, on a laptop
# torchrun --nproc-per-node 4 -m minichunk train --pipeline 4 --model DIR --data book.txt       # four GPUs, one model
# torchrun --nproc-per-node 8 -m minichunk train --pipeline 4 --model DIR --data book.txt       # two copies of that
# torchrun --nproc-per-node 2 -m minichunk train --output runs/1 --resume --pipeline 2          # any number of ranks
# ```
#
# - **Options.** All options of `minichunk train` but `--method full` work with a pipeline.
# - **Memory.** Each rank reads its own layers only, tensor by tensor. Layers are split by the bytes of their weights and of
#   their memory, those of the embedding and the LM head included.
# - **Files.** A run writes the files that one process would write, whole and under the same names, so it can go on with
#   another number of ranks or without ranks. On the CPU they are the same to the last bit
#   ([test](../tests/test_train_pipeline.py)), with two exceptions: a *trained* embedding that is also the LM head, and
#   copies, because their sums have another order. The first process gathers a checkpoint; its host needs room for it.
# - **Copies.** They take the batches of a step in turn, so a step needs at least one batch for each copy (`--accumulate`, by
#   default just that).
# - **Ctrl-C** lets the step at work end on all ranks, and saves. torchrun waits 30 seconds for that, or `--shutdown-timeout`
#   of them.
# - **A lost rank.** If a rank ends, or does not answer within `--timeout`, all ranks end. One line says so, beside torchrun's
#   own report, and names the last checkpoint, which is whole. Under NCCL its watchdog may end a rank before it can say that.
# - **Several machines.** Use torchrun's own options. Model and run have to be on a disk that all machines share.
#
# All this has run under Gloo on CPUs, and not yet under NCCL.
#
# ## A script of your own
#
# ```python
# import torch, torch.distributed as dist, minichunk as mc
#
# gpu = torch.cuda.is_available()
# dist.init_process_group("nccl" if gpu else "gloo")  # who and how many: from torchrun
# device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if gpu else torch.device("cpu")
# if gpu:
#     torch.cuda.set_device(device)
# torch.manual_seed(0)  # the same adapter and tokens on all ranks
# stage = mc.PipelineStage.load("minichunk/assets/austen-llama", dtype=torch.float32, device=device)
# mc.add_lora(stage.model, rank=8, alpha=16)
# optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=1e-3)
# input_ids = torch.randint(stage.vocab_size, (1, 2048)).to(device)
# for _ in range(3):
#     loss = mc.pipeline_seco(stage, input_ids, input_ids, chunk_size=256)  # or pipeline_spaco; options as ever
#     optimizer.step()
#     optimizer.zero_grad()
#     print(f"rank {dist.get_rank()}: loss {loss:.4f}")
# dist.destroy_process_group()
# ```
#
# Saved as several.py, it runs on a laptop with `torchrun --nproc-per-node 2 several.py`, and prints the same losses with 1
# process or 3. `PipelineStage(model, counts=[…])` splits the layers as you say. With `links=mc.Links(timeout=…)` a rank that
# does not answer in that time ends the others, with an error that names it.
# [A test](../tests/test_pipeline.py) compares the gradients on 2, 3 and 4 ranks with those of one process, bit for
# bit: attention, windows, states, Mamba-2; SpaCO, LoRA, dropout, recompute, fill size, ragged chunks, and
# fewer chunks than ranks.
#
# ## How long a text fits
#
# `minichunk plan --gpus N` runs the code of each rank by itself on tensors without numbers, and says which rank needs most.
# Its forecast is [tested](../tests/test_plan.py) to be the peak of a real pipeline on the CPU. Llama-3-8B with LoRA, in
# thousands of tokens, by the memory of each GPU (`–`: not one chunk):
#
# | GPUs | method | 12 GiB | 16 GiB | 24 GiB | 48 GiB | 80 GiB | 141 GiB |
# |---|---|---:|---:|---:|---:|---:|---:|
# | 1 | seco | – | – | 31k | 130k | 261k | 510k |
# | 1 | spaco | – | – | 54k | 250k | 511k | 1,011k |
# | 2 | seco | 25k | 58k | 123k | 320k | 582k | 1,082k |
# | 2 | spaco | 41k | 106k | 238k | 631k | 1,155k | 2,154k |
# | 4 | seco | 104k | 169k | 300k | 693k | 1,218k | 2,217k |
# | 4 | spaco | 198k | 329k | 591k | 1,377k | 2,425k | 4,423k |
# | 8 | seco | 260k | 391k | 653k | 1,439k | 2,487k | 4,485k |
# | 8 | spaco | 510k | 772k | 1,296k | 2,867k | 4,962k | 8,956k |
#
# *`minichunk plan --table --gpus 8 --cache-grad-dtype bfloat16`, at commit cbb3a04.* With short texts the first and the last
# rank get fewer layers, to make up for the embedding and the LM head (7, 9, 9 and 7 on four GPUs); with 300,000 tokens all get
# eight.
#
# ## What two ranks save
#
# A step of a model with 47M parameters, all trained in float32, chunks of 128, in one process and on two ranks with one
# thread of a CPU each. Seconds of the slower rank, median and range of two rounds; live tensors at their peak, counted:
#
# | tokens | chunks | one process | 2 ranks | of one process | rank 0 waits, of its walk | by the formula |
# |---:|---:|---:|---:|---:|---:|---:|
# | 1,024 | 8 | 8.29 s (8.26 s to 8.33 s) | 5.23 s (4.90 s to 5.56 s) | 0.63 (0.59 to 0.67) | 27% (26% to 28%) | 11% |
# | 2,048 | 16 | 18.22 s (17.04 s to 19.39 s) | 11.10 s (10.73 s to 11.47 s) | 0.61 (0.59 to 0.63) | 20% | 6% |
# | 4,096 | 32 | 46.31 s (45.17 s to 47.46 s) | 27.74 s (27.20 s to 28.29 s) | 0.60 | 11% (9% to 14%) | 3% |
#
# | tokens | chunks | one process | rank 0, layers: 6 | rank 1, layers: 6 |
# |---:|---:|---:|---:|---:|
# | 1,024 | 8 | 501 MiB | 288 MiB | 290 MiB |
# | 2,048 | 16 | 537 MiB | 306 MiB | 308 MiB |
# | 4,096 | 32 | 610 MiB | 342 MiB | 344 MiB |
# | growth | | 108 MiB | 54 MiB, 0.50 of it | 54 MiB, 0.50 of it |
#
# *`minichunk bench --preset pipeline` printed this at commit c395179, on 2 cores with nothing else to do; the preset is no
# longer part of the package ([all samples](figures/bench-pipeline.json)).* The formula holds for ranks that take as long as
# each other. Here the last one has the LM head too, and rank 0 waits for that. A tied embedding and its gradient are on
# both ranks; what grows with the length is on one.
#
# ## Why not PyTorch's own engine, or FSDP?
#
# `torch.distributed.pipelining` has that schedule too. It calls backward by itself, so the relay is put in where the graph
# passes by: at the output of a rank's layers, as an identity whose backward asks the memory. That is
# [`torch_pipeline.py`](torch_pipeline.py), with the same gradients, [bit for bit](../tests/test_pipeline.py). It is not
# our engine: it receives each chunk, and each gradient, into a buffer of its own, so that the memory of every rank grows by
# one hidden state or two per chunk (counted in that test); it wants chunks of one length, and at least as many as ranks.
#
# FSDP splits every weight, and gathers it whenever it is used: in the fill, the rebuild and the backward pass of each chunk.
# For an 8B in bfloat16 and 64 chunks that is 3 x 64 x 16 GB, 3 TB a step. A link of the pipeline carries three messages for
# a chunk, 3 x 64 x 4 MiB: 0.8 GB.
#
# ## Exercises
#
# 1. Embedding and LM head of the shipped model are one weight; a line above unties them. Without it, which message is there
#    besides, and which gradient equals one process's no longer bit for bit?
# 2. Which messages pass in the last step of the walk, when chunk 0 has its turn? And if only the last layer has an adapter?
# 3. Three ranks, 6 chunks: how many graphs does each rank hold at most, and for how many pieces does each wait in its walk?
# 4. With `fill_size=32`, what changes in the schedule and in the messages, and what must not?
# 5. Let only rank 0 ask too early, in a model of three ranks: which layers are wrong then? And if only rank 1 does?
