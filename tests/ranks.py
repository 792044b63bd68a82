"""Processes that do what the ranks of a run under torchrun do, on the CPU; they are started once for many examples.

Every wait in here has a timeout.
"""

import copy
import gc
import importlib.util
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


def stage_of(case: Case, timeout: timedelta = TIMEOUT) -> PipelineStage:
    return PipelineStage(case.model, case.counts, mc.Links(timeout=timeout))


def in_one_process(case: Case) -> Tensors:
    """The losses, and the gradients by name. A tied weight's two parts are added up once in a step."""
    model, tied = copy.deepcopy(case.model), case.model.lm_head.weight is case.model.embedding.weight
    if tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), model.lm_head.weight.requires_grad)
    torch.manual_seed(case.seed)
    ends, losses, sums = (model.embedding.weight, model.lm_head.weight), [], list[Tensor]()
    for _ in range(case.steps):
        losses.append(case.run(getattr(mc, case.method), model))
        if tied and ends[1].grad is not None:
            sums.append(ends[0].grad + ends[1].grad)
            ends[0].grad = ends[1].grad = None
    for weight in ends if sums else ():
        weight.grad = sums[0] if len(sums) == 1 else sums[1] + sums[0]
    return {"loss": torch.stack(losses), **take_gradients(model)}


def in_several(rank: int, case: Case, method: Callable[..., Tensor] | None = None) -> tuple[Tensors, Tensors]:
    """What this rank finds; and on the first one, what one process does. The others have seeds of their own."""
    expected = in_one_process(case) if rank == 0 else {}
    stage = stage_of(case)
    torch.manual_seed(case.seed + rank)
    losses = [case.run(method or getattr(mc, f"pipeline_{case.method}"), stage) for _ in range(case.steps)]
    assert not stage.links.on_the_way
    return {"loss": torch.stack(losses), **take_gradients(stage.model)}, expected


def tutorial(name: str) -> Any:
    """A module in tutorials/, which are no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "tutorials" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def works(rank: int, case: Case) -> tuple[list[tuple[str, int, float, float]], int]:
    """What this rank does with which chunk, from when to when, and the most messages that were on the way."""
    stage, most = stage_of(case), 0
    hand = stage.links.hand

    def seen_hand(*arguments: Any) -> None:
        nonlocal most
        hand(*arguments)
        most = max(most, len(stage.links.on_the_way))

    stage.links.hand = seen_hand  # type: ignore[method-assign]
    with tutorial("pipeline_picture").recorded(stage, case.chunk_size) as found:
        case.run(mc.pipeline_seco, stage)
    return [tuple(work) for work in found], most


def by_torch(rank: int, case: Case) -> tuple[Tensors, Tensors]:
    """The same with PyTorch's own engine."""
    return in_several(rank, case, tutorial("torch_pipeline").torch_seco)


def peaks(rank: int, case: Case) -> tuple[int, int]:
    """The most bytes that are alive on this rank in a step: ours, and that of PyTorch's own engine."""
    found = []
    for function in (mc.pipeline_seco, tutorial("torch_pipeline").torch_seco):
        stage = stage_of(copy.deepcopy(case))
        with CountBytes() as count:
            case.run(function, stage)
        found.append(count.peak)
    return found[0], found[1]


def copies_of_which_one_is_idle(rank: int, case: Case) -> tuple[Tensors, Tensors]:
    """What each of two copies has in the end, and what one process finds: the first does all, the second nothing."""
    expected = copy.deepcopy(case.model)
    case.run(mc.seco, expected)
    stage = PipelineStage(case.model, links=mc.Links(1, TIMEOUT))
    if rank == 0:
        case.run(mc.pipeline_seco, stage)
    stage.add_copies()
    return take_gradients(stage.model), take_gradients(expected)


def mistake(rank: int, method: str, others_are_shorter: bool, case: Case) -> str:
    """The message of the InputError that a step ends with."""
    ids = case.input_ids[:, rank:] if others_are_shorter else case.input_ids
    try:
        getattr(mc, method)(stage_of(case), ids, ids, case.chunk_size)
    except mc.InputError as error:
        return str(error)
    return "no error"


def lose_one_in_the_walk(rank: int, lost: int, hangs: bool, case: Case) -> None:
    """One of the ranks ends at its first rebuild without a word, or goes no further."""
    stage = stage_of(case, timedelta(seconds=4))
    run = stage.run

    def last_run(x: Tensor, memory: Any, chunks: Any, options: Any) -> Any:
        if rank == lost and torch.is_grad_enabled():
            time.sleep(WITHIN if hangs else 0)
            os._exit(1)
        return run(x, memory, chunks, options)

    stage.run = last_run  # type: ignore[method-assign]
    case.run(mc.pipeline_seco, stage)


def counted(rank: int, setting: Setting, counts: Sequence[int], tokens: int) -> tuple[int, int]:
    """Bytes on this rank and in host memory at the peak of a real step of what is forecast, with AdamW's state."""
    model = random_model(setting.config(), setting.torch_dtype, setting.rank, setting.targets)
    stage = PipelineStage(model, counts, mc.Links(timeout=TIMEOUT))
    chunks, kept = setting.chunks(tokens)
    entries = [None] * (len(chunks) - len(kept)) + [mc.Weight(1.0, 2.0)] * len(kept)
    gc.collect()
    with CountBytes() as count:
        count.add(*stage.parameters(), *stage.buffers())
        states = optimizer_states(stage)
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        draw = {"sampler": lambda *_: entries} if setting.method == "spaco" else {}
        getattr(mc, f"pipeline_{setting.method}")(stage, ids, ids, setting.chunk_size, **draw, **setting.keywords())
    assert states
    return count.peak, count.left_out
