"""`trace`: take one real step and write down what happens in it.

A recorder stands between an algorithm and its model, and passes on every question as it is. So it is the functions of
seco.py, spaco.py and full.py themselves that are watched, and they compute what they compute alone, bit for bit. This
is where it listens, and what it writes down there:

- the sampler: `draw`; `model.new_memory`: `memory`; `memory.write`: `fill`
- `model.run`: `rebuild`, or `forward` where the whole text is run
- the loss function: `loss`; `memory.hand_over`: `relay`
- the gradient of a layer's input: `backward`, with what the layer has sent to its memory
- `torch.autograd.backward`, when it returns: `done`
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from ..batch import check_batch
from ..chunks import Chunk, cut
from ..costs.count import CountBytes
from ..errors import InputError
from ..full import full
from ..memory.attention import Past
from ..memory.layer_memory import LayerMemories, LayerMemory, wide
from ..memory.state import LayerState
from ..protocol import DEFAULTS, Memory, Options, Written
from ..samplers import Bernoulli, Weight
from ..seco import seco
from ..spaco import spaco
from .events import BYTES, FORMAT, Event

SECO = sys.modules[seco.__module__]  # the file: `minichunk.seco` is the function
Sums = dict[tuple[int, int], list[Tensor]]  # by layer and chunk


def trace(
    function: Callable[..., Tensor], model: Any, input_ids: Tensor, labels: Tensor, *arguments: Any, on_event:
    Callable[[Event], object] = lambda event: None, **keywords: Any,
) -> list[Event]:  # fmt: skip
    """Call `function(model, input_ids, labels, …)`, one of `seco`, `spaco` and `full`; return the log of its events.

    The function is run as it is and adds to `.grad` what it adds alone, bit for bit; events.py describes the log. The
    arguments after `labels` are the function's own.

    model: a `protocol.Model` with its `layers`, as all of ours are.
    input_ids, labels: int64 (B, T).
    on_event: called with each event as it happens, within the function; a loss is written into its event only when
        the backward pass begins.
    Slower than the step alone, and for one at a time: it puts itself in the place of `torch.autograd.backward`.
    Raises InputError for another function, and as the function does.
    """
    if function not in (seco, spaco, full):
        raise InputError(f"trace watches seco, spaco or full, but was given {getattr(function, '__name__', function)}")
    check_batch(model, input_ids, labels, None)
    bound = inspect.signature(function).bind(model, input_ids, labels, *arguments, **keywords)
    bound.apply_defaults()
    given, (batch, tokens) = bound.arguments, input_ids.shape
    chunks = cut(tokens, given.get("chunk_size", tokens))
    recorder = Recorder(model, chunks, on_event)
    recorder.add(input_ids, labels)
    recorder.write(
        "begin", format=FORMAT, method=function.__name__, chunks=[list(chunk) for chunk in chunks],
        layers=len(model.layers), batch=batch, tokens=tokens, recompute=bool(given["recompute"]),
        parameters=sum(p.numel() for p in model.parameters()), torch=torch.__version__,
    )  # fmt: skip
    with recorder.watching(given):
        loss = function(*bound.args, **bound.kwargs)
    recorder.memory, recorder.sums = None, {}
    recorder.write("end", loss=float(loss), gradient_norm=recorder.gradient_norm())
    return recorder.events


class Watched:
    """Another object, of which some methods are replaced by these; all else is its own."""

    def __init__(self, watched: Any, **methods: Callable[..., Any]) -> None:
        self._watched = watched
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watched, name)


class Recorder(CountBytes):
    """Writes the events of one step into `events`, with the bytes that are alive, without those of its own numbers.

    chunks: of the step. The rest: see `trace`.
    """

    def __init__(self, model: Any, chunks: Sequence[Chunk], on_event: Callable[[Event], object]) -> None:
        super().__init__()
        self.model, self.chunks, self.on_event = model, chunks, on_event
        self.events: list[Event] = []
        self.parameters: list[nn.Parameter] = list(model.parameters())
        self.weights: list[Tensor] = [*self.parameters, *model.buffers()]
        self.memory: Memory | None = None
        self.factors: list[tuple[float, float]] = [(1.0, 1.0)] * len(chunks)  # on loss and relay
        self.running = 0  # the chunk whose graph is alive
        self.now: Sums = {}  # what the running chunk has sent back, until its layer is left
        self.sums: Sums = {}  # what has been sent back before
        self.loss = 0.0
        self.add(*self.weights, *self.gradients())

    @contextmanager
    def watching(self, given: dict[str, Any]) -> Iterator[None]:
        """Within the block the step is watched; given: the function's arguments, by name."""
        given["model"] = Watched(self.model, new_memory=self.new_memory, run=self.run)
        if "sampler" in given:
            given["sampler"] = partial(self.draw, given["sampler"])
        hooks = [layer.register_forward_pre_hook(partial(self.enter, i)) for i, layer in enumerate(self.model.layers)]
        try:
            with (
                self,
                patch.object(SECO, "summed_loss", partial(self.take_loss, SECO.summed_loss)),
                patch.object(F, "cross_entropy", partial(self.take_loss, F.cross_entropy)),  # of full.py
                patch.object(torch.autograd, "backward", partial(self.backward, torch.autograd.backward)),
            ):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def write(self, kind: str, **fields: Any) -> None:
        """Write an event down, with the bytes that are alive, and the most that were since the event before."""
        tensors = getattr(self.memory, "tensors", None)
        of_memory = tensors().bytes() if tensors else (0, 0)
        known = (storage_bytes(self.weights), storage_bytes(self.gradients()), *of_memory)
        sizes = dict(zip(BYTES, (*known, self.live - sum(known)), strict=True))
        event = {"step": len(self.events), "kind": kind, **fields, "bytes": sizes, "peak": max(self.peak, self.live)}
        self.peak = self.live
        self.events.append(event)
        self.on_event(event)

    # What the algorithm asks, in its own order.

    def draw(self, sampler: Callable[..., Any], num_chunks: int, generator: torch.Generator | None) -> Any:
        entries: Sequence[Weight | None] = sampler(num_chunks, generator)
        rates = {"rates": list(sampler.rates(num_chunks))} if isinstance(sampler, Bernoulli) else {}
        self.write("draw", entries=[weight and [float(x) for x in weight] for weight in entries], **rates)
        self.factors = [weight or (0.0, 0.0) for weight in entries]
        return entries

    def new_memory(
        self, batch: int, capacity: int, receiving: Sequence[Chunk] = (), options: Options = DEFAULTS
    ) -> Watched:
        self.memory = memory = self.model.new_memory(batch, capacity, receiving, options)
        layers = memory.layers if isinstance(memory, LayerMemories) else []
        self.write("memory", remembers=["state" if isinstance(x, LayerState) else "keys and values" for x in layers])
        watched: Any = [Watched(x, past=partial(self.past, i, x)) for i, x in enumerate(layers)]
        return Watched(memory, layers=watched, write=partial(self.fill, memory), hand_over=partial(self.relay, memory))

    def fill(self, memory: Memory, chunks: Sequence[Chunk], written: Written) -> None:
        memory.write(chunks, written)
        self.write("fill", chunks=[self.chunks.index(chunk) for chunk in chunks], **self.describe(written))

    def run(
        self, input_ids: Tensor, memory: Any = None, chunks: Sequence[Chunk] = (), options: Options = DEFAULTS
    ) -> tuple[Tensor, Written]:
        hidden, written = self.model.run(input_ids, memory, chunks, options)
        if torch.is_grad_enabled() and chunks:
            self.running = self.chunks.index(chunks[0])
            self.write("rebuild", chunk=self.running, **self.describe(written))
        elif torch.is_grad_enabled():
            self.write("forward", chunk=0)
        return hidden, written

    def take_loss(self, function: Callable[..., Tensor], *arguments: Any, **keywords: Any) -> Tensor:
        loss = function(*arguments, **keywords)
        self.write("loss", chunk=self.running, loss=0.0, factor=self.factors[self.running][0])  # see `backward`
        return loss

    def relay(self, memory: Memory, chunk: Chunk) -> Written:
        received, factor = memory.hand_over(chunk), self.factors[self.running][1]
        self.write("relay", chunk=self.running, received=[norms(layer) for layer in received], factor=factor)
        return received

    def backward(self, function: Callable[..., None], tensors: Any, *arguments: Any, **keywords: Any) -> None:
        loss = float((tensors if isinstance(tensors, Tensor) else tensors[0]).detach())  # times its factor
        next(event for event in reversed(self.events) if event["kind"] == "loss")["loss"] = loss
        self.loss += loss
        function(tensors, *arguments, **keywords)
        for layer in sorted({layer for layer, _ in self.now}, reverse=True):
            self.leave(layer)  # nothing below it learns, so that its input has no gradient
        self.write("done", chunk=self.running, loss=self.loss, gradient_norm=self.gradient_norm())

    # What layers do in the backward pass.

    def enter(self, layer: int, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A layer is run: ask its input to tell when it has its gradient, for then the layer is left."""
        in_backward = torch._C._current_graph_task_id() != -1  # recompute runs the layer again
        if isinstance(inputs[0], Tensor) and inputs[0].requires_grad and not in_backward:
            inputs[0].register_hook(lambda _: self.leave(layer))

    def leave(self, layer: int) -> None:
        sent = {i: self.now.pop((layer, i)) for (at, i) in sorted(self.now) if at == layer}
        for i, tensors in sent.items():
            add_up(self.sums, (layer, i), tensors)
        rows = [[i, *norms(tensors)] for i, tensors in sent.items()]
        held = [[i, *norms(self.sums[layer, i])] for i in sent]
        self.write("backward", chunk=self.running, layer=layer, sent=rows, held=held)

    def past(self, number: int, layer: LayerMemory, chunks: Sequence[Chunk], save: bool) -> Any:
        """What a layer sees of its memory, which tells what is sent back to it: attention adds gradients to the
        memory, for others autograd adds them up in leaves."""
        seen = layer.past(chunks, save)
        if isinstance(seen, Past):
            seen.memory = Watched(seen.memory, add_grads=partial(self.send, number, layer))
            return seen
        before = next((i for i, chunk in enumerate(self.chunks) if chunk.stop == chunks[0].start), 0)
        for leaf in tree_leaves(seen):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda gradient: add_up(self.now, (number, before), [gradient]))
        return seen

    def send(self, number: int, layer: Any, first: int, *gradients: Tensor) -> None:
        """Attention adds a gradient (B, G, n, D) for each tensor that was written: sort them by chunks."""
        layer.add_grads(first, *gradients)
        with unseen():
            for i, (start, stop) in enumerate(self.chunks):
                low, high = max(first, start), min(first + gradients[0].shape[2], stop)
                if low < high:
                    rows, around = slice(low - first, high - first), (0, 0, low - start, stop - high)
                    add_up(self.now, (number, i), [F.pad(g[:, :, rows], around) for g in gradients])

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def gradient_norm(self) -> float:
        return math.hypot(*norms(self.gradients()))

    def describe(self, written: Written) -> dict[str, Any]:
        shapes = [[list(x.shape) for x in layer] for layer in written]
        return {"written": [norms(layer) for layer in written], "shapes": shapes}


@contextmanager
def unseen() -> Iterator[None]:
    """Within the block no bytes are counted, and autograd sees nothing."""
    with torch.no_grad(), _disable_current_modes():
        yield


def add_up(sums: Sums, key: tuple[int, int], tensors: Sequence[Tensor]) -> None:
    """Add tensors to the sums of this layer and chunk, in float32 or wider."""
    with unseen():
        before = sums.get(key, [torch.zeros((), device=x.device) for x in tensors])
        sums[key] = [x + y.to(wide(y)) for x, y in zip(before, tensors, strict=True)]


def norms(tensors: Sequence[Tensor]) -> list[float]:
    with unseen():
        return [float(torch.linalg.vector_norm(x.detach(), dtype=torch.float64)) for x in tensors]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each once."""
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())
