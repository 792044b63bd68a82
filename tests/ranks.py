"""Processes that do what the ranks of a run under torchrun do, on the CPU; they are started once for many examples.

Every wait in here has a timeout.
"""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # a step imports it, on every rank: so it is here once
import torch.distributed as dist
from torch import Tensor, nn

import minichunk as mc
from minichunk.costs.count import CountBytes
from minichunk.costs.peak import optimizer_states
from minichunk.costs.setting import Setting
from minichunk.models.shapes import random_model
from minichunk.pipeline.links import RankLost
from minichunk.pipeline.stage import PipelineStage

from .gradients import Tensors, take_gradients

WITHIN = 60.0  # seconds in which any example is done, on a slow machine
TIMEOUT = timedelta(seconds=30)  # of a message


class Ranks:
    """Up to `most` processes, of which the first ones are the ranks of an example.

    After a failure all of them are replaced: some may have ended, and others still say what belongs to that example.
    """

    def __init__(self, most: int, directory: Path) -> None:
        self.most, self.directory, self.asked = most, directory, 0
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imported once, by the process that the ranks are forked from
        self.connections, self.processes = list[Any](), list[Any]()
        for _ in range(self.most):
            ours, theirs = context.Pipe()
            process = context.Process(target=_answer, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def ask(self, ranks: int, task: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `task(rank, *arguments)` returns on each of that many ranks."""
        self.tell(ranks, task, *arguments)
        answers = [self.answer(rank) for rank in range(ranks)]
        failed = [str(text) for failed, text in answers if failed]
        if failed:
            self.replace()
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def tell(self, ranks: int, task: Callable[..., Any], *arguments: Any) -> None:
        """Let them begin."""
        self.asked += 1
        store = str(self.directory / f"store-{self.asked}")
        for rank, connection in enumerate(self.connections[:ranks]):
            connection.send_bytes(pickle.dumps((task, rank, ranks, store, arguments)))

    def answer(self, rank: int) -> tuple[bool, Any]:
        """(whether it failed, what it returned or what went wrong)."""
        try:
            if self.connections[rank].poll(WITHIN):
                return pickle.loads(self.connections[rank].recv_bytes())
        except EOFError:
            return True, f"rank {rank} has ended without an answer"
        return True, f"rank {rank} has not answered within {WITHIN:.0f} s"

    def replace(self) -> None:
        """Other processes for the next example."""
        self.close()
        self.start()

    def close(self) -> None:
        for connection, process in zip(self.connections, self.processes, strict=True):
            connection.close()
            process.kill()
            process.join(WITHIN)


def _answer(connection: Connection) -> None:
    """The life of one process."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"  # not the host name
    while True:
        try:
            task, rank, ranks, store, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:  # the tests have ended
            return
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=TIMEOUT)
            dist.barrier()  # who ends at once would leave others in the middle of finding each other
            result = False, task(rank, *arguments)
            dist.barrier()
            dist.destroy_process_group()
        except RankLost as error:  # one who has lost another ends too, as it would in a script
            connection.send_bytes(pickle.dumps((True, f"RankLost: {error}")))
            os._exit(1)
        except Exception:
            result = True, f"rank {rank}: {traceback.format_exc()}"
            if dist.is_initialized():
                dist.destroy_process_group()
        connection.send_bytes(pickle.dumps(result))


@dataclass
class Case:
    """A step or several, whose gradients add up, with `method` ("seco" or "spaco") and its options."""

    model: Any
    input_ids: Tensor
    labels: Tensor
    chunk_size: int
    method: str = "seco"
    options: dict[str, Any] = field(default_factory=dict)
    counts: Sequence[int] | None = None
    seed: int = 0
    steps: int = 1

    def run(self, method: Callable[..., Tensor], model: Any) -> Tensor:
        return method(model, self.input_ids, self.labels, self.chunk_size, **self.options)


def in_one_process(case: Case) -> Tensors:
    """The losses, and the gradients by name. A tied weight's two parts are added up once in a step."""
    model, tied = copy.deepcopy(case.model), case.model.lm_head.weight is case.model.embedding.weight
    if tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), model.lm_head.weight.requires_grad)
    torch.manual_seed(case.seed)
    losses, both = [], list[Tensor]()
    for _ in range(case.steps):
        losses.append(case.run(getattr(mc, case.method), model))
        if tied and model.lm_head.weight.grad is not None:
            both.append(model.embedding.weight.grad + model.lm_head.weight.grad)
            model.embedding.weight.grad = model.lm_head.weight.grad = None
    found = take_gradients(model)
    if both:
        names = {id(p): name for name, p in model.named_parameters()}
        for weight in (model.embedding.weight, model.lm_head.weight):
            found[names[id(weight)]] = both[0] if len(both) == 1 else both[1] + both[0]
    return {"loss": torch.stack(losses), **found}


def in_several(rank: int, case: Case) -> tuple[Tensors, Tensors]:
    """What this rank finds; and on the first one, what one process does. The others have seeds of their own."""
    expected = in_one_process(case) if rank == 0 else {}
    stage = PipelineStage(case.model, case.counts, mc.Links(timeout=TIMEOUT))
    torch.manual_seed(case.seed + rank)
    losses = [case.run(getattr(mc, f"pipeline_{case.method}"), stage) for _ in range(case.steps)]
    assert not stage.links.on_the_way
    return {"loss": torch.stack(losses), **take_gradients(stage.model)}, expected


def events(rank: int, case: Case) -> tuple[list[tuple[str, int]], int]:
    """What this rank does with which chunk, in order, and the most messages that were on the way."""
    stage, seen, most = PipelineStage(case.model, links=mc.Links(timeout=TIMEOUT)), list[tuple[str, int]](), 0
    run, fill, hand, backward = stage.run, stage.fill, stage.links.hand, torch.autograd.backward
    rebuilt: list[int] = []

    def seen_run(x: Tensor, memory: Any, chunks: Any, options: Any) -> Any:
        if torch.is_grad_enabled():
            rebuilt.append(chunks[0].start // case.chunk_size)
            seen.append(("rebuild", rebuilt[-1]))
        return run(x, memory, chunks, options)

    def seen_fill(x: Tensor, memory: Any, chunks: Any, options: Any) -> Any:
        seen.append(("fill", chunks[0].start // case.chunk_size))
        return fill(x, memory, chunks, options)

    def seen_backward(*arguments: Any) -> None:
        seen.append(("backward", rebuilt.pop(0)))
        backward(*arguments)

    def seen_hand(*arguments: Any) -> None:
        nonlocal most
        hand(*arguments)
        most = max(most, len(stage.links.on_the_way))

    stage.run, stage.fill, stage.links.hand = seen_run, seen_fill, seen_hand  # type: ignore[method-assign]
    torch.autograd.backward = seen_backward
    try:
        case.run(mc.pipeline_seco, stage)
    finally:
        torch.autograd.backward = backward
    return seen, most


def copies_of_which_one_is_idle(rank: int, case: Case) -> tuple[Tensors, Tensors]:
    """What each of two copies has in the end, and what one process finds: the first does all, the second nothing."""
    expected = copy.deepcopy(case.model)
    case.run(mc.seco, expected)
    stage = PipelineStage(case.model, links=mc.Links(1, TIMEOUT))
    if rank == 0:
        case.run(mc.pipeline_seco, stage)
    stage.add_copies()
    return take_gradients(stage.model), take_gradients(expected)


def parameter_names(rank: int, case: Case) -> list[str]:
    """The names of the parameters that a rank has."""
    return [
        name for name, _ in PipelineStage(case.model, case.counts, mc.Links(timeout=TIMEOUT)).model.named_parameters()
    ]


def mistake(rank: int, make: Callable[[int, Case], Any], case: Case) -> str:
    """The message of the InputError that `make` ends with."""
    try:
        make(rank, case)
    except mc.InputError as error:
        return str(error)
    return "no error"


def another_batch_on_each(rank: int, case: Case) -> None:
    stage = PipelineStage(case.model, links=mc.Links(timeout=TIMEOUT))
    ids = case.input_ids[:, rank:]
    mc.pipeline_seco(stage, ids, ids, case.chunk_size)


def seco_of_a_stage(rank: int, case: Case) -> None:
    case.run(mc.seco, PipelineStage(case.model, links=mc.Links(timeout=TIMEOUT)))


def step_of_a_stage(rank: int, case: Case) -> None:
    case.run(mc.pipeline_seco, PipelineStage(case.model, case.counts, mc.Links(timeout=TIMEOUT)))


def end_without_a_word(rank: int, lost: int) -> int:
    """One of the ranks ends, and the others wait for it."""
    if rank == lost:
        os._exit(1)
    dist.barrier()
    return rank


def rank_of(rank: int) -> int:
    return rank


def lose_one_in_the_walk(rank: int, lost: int, hangs: bool, case: Case) -> None:
    """One of the ranks ends at its first rebuild without a word, or goes no further."""
    stage = PipelineStage(case.model, links=mc.Links(timeout=timedelta(seconds=4)))
    run = stage.run

    def last_run(x: Tensor, memory: Any, chunks: Any, options: Any) -> Any:
        if rank == lost and torch.is_grad_enabled():
            time.sleep(WITHIN if hangs else 0)
            os._exit(1)
        return run(x, memory, chunks, options)

    stage.run = last_run  # type: ignore[method-assign]
    case.run(mc.pipeline_seco, stage)


def counted(rank: int, setting: Setting, counts: Sequence[int], tokens: int) -> int:
    """Peak bytes on this rank of a whole real step of what is forecast, with the optimizer's state."""
    model = random_model(setting.config(), setting.torch_dtype, setting.rank, setting.targets)
    stage = PipelineStage(model, counts, mc.Links(timeout=TIMEOUT))
    num_chunks = -(-tokens // setting.chunk_size)
    kept = setting.kept(num_chunks)
    entries = [None] * (num_chunks - kept) + [mc.Weight(1.0, 2.0)] * kept
    options = setting.options()
    keywords: dict[str, Any] = {"recompute": options.recompute, "cache_grad_dtype": options.cache_grad_dtype}
    keywords |= {"offload": options.offload, "fill_size": options.fill_size}
    gc.collect()
    with CountBytes() as count:
        count.add(*stage.parameters(), *stage.buffers())
        states = optimizer_states(stage)
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        if setting.method == "seco":
            mc.pipeline_seco(stage, ids, ids, setting.chunk_size, **keywords)
        else:
            mc.pipeline_spaco(stage, ids, ids, setting.chunk_size, sampler=lambda *_: entries, **keywords)
    assert states
    return count.peak
