"""`trace`: take one real step and write down what happens in it, as a log of events. tutorials/walk.md describes every
kind of event and every field. An event is a JSON object; a file has one to a line.
A recorder listens to an algorithm's functions and to what they ask of the model. So it is the functions of seco.py,
spaco.py and full.py themselves that run, and they compute what they compute alone, bit for bit. `Recorder.listening`
says where it listens."""

import inspect
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from ..batch import check_tokens
from ..blocks import Hidden, through_blocks
from ..chunks import Chunk, cut
from ..costs.count import CountBytes
from ..errors import InputError
from ..full import full
from ..memory.layer_memory import LayerMemories, MemoryUse, wide
from ..memory.state import LayerState
from ..protocol import Written
from ..samplers import Bernoulli, Weight
from ..seco import seco
from ..spaco import spaco

Event = dict[str, Any]
FORMAT = "minichunk trace 1"
BYTES = ("weights", "gradients", "memory", "memory_gradients", "activations")
FILES = [sys.modules[function.__module__] for function in (seco, through_blocks)]  # `minichunk.seco` is the function
Sums = dict[tuple[int, int], list[Tensor]]  # by layer and chunk


def trace(
    function: Callable[..., Tensor], model: Any, input_ids: Tensor, labels: Tensor, *arguments: Any,
    on_event: Callable[[Event], object] = lambda event: None, **keywords: Any,
) -> list[Event]:  # fmt: skip
    """Call `function(model, input_ids, labels, …)`, one of `seco`, `spaco` and `full`; return the log of its events.

    The function is run as it is and adds to `.grad` what it adds alone, bit for bit. The arguments after `labels` are
    its own. tutorials/walk.md describes the log.
    model: a `protocol.Model` with its `layers`, as all of ours are. input_ids, labels: int64 (B, T).
    on_event: called with each event as it happens, within the function; a loss is written into its event only when
        its backward pass is over.
    Slower than the step alone, and for one at a time: it puts itself in the place of `torch.autograd.backward`.
    Raises InputError for another function, and as the function does."""
    if function not in (seco, spaco, full):
        raise InputError(f"trace watches seco, spaco or full, but was given {getattr(function, '__name__', function)}")
    for name in ("offload", "objective", "chunk_loss", "starts", "share", "graphs"):
        if keywords.get(name) not in (None, False, ()):
            raise InputError(f"trace watches the mean loss, without {name}: leave it out")
    check_tokens(input_ids, labels, None, model.lm_head.weight.shape[0])
    bound = inspect.signature(function).bind(model, input_ids, labels, *arguments, **keywords)
    bound.apply_defaults()
    given, (batch, tokens) = bound.arguments, input_ids.shape
    chunks = cut(tokens, given.get("chunk_size", tokens))
    size, layers = given.get("layers_at_once"), len(model.layers)
    blocks = [list(block) for block in cut(layers, size)] if size else []
    recorder = Recorder(model, chunks, blocks, on_event)
    recorder.add(input_ids, labels)
    recorder.write(
        "begin", format=FORMAT, method=function.__name__, chunks=[list(chunk) for chunk in chunks],
        layers=layers, batch=batch, tokens=tokens, recompute=bool(given["recompute"]),
        parameters=sum(p.numel() for p in model.parameters()), torch=torch.__version__,
        **({"blocks": blocks} if blocks else {}),
    )  # fmt: skip
    if "sampler" in given:
        given["sampler"] = partial(recorder.draw, given["sampler"])
    with recorder.listening():
        loss = function(*bound.args, **bound.kwargs)
    recorder.write("end", loss=float(loss), gradient_norm=recorder.gradient_norm())
    return recorder.events


class Recorder(CountBytes):
    """Writes the events of one step into `events`, with the bytes that are alive, without those of its own numbers.
    chunks: of the step. blocks: [start, stop) of the layers of each; none: it takes all at once. The rest: see
    `trace`."""

    def __init__(
        self, model: Any, chunks: Sequence[Chunk], blocks: list[list[int]], on_event: Callable[[Event], object]
    ) -> None:
        super().__init__()
        self.model, self.chunks, self.blocks, self.on_event = model, chunks, blocks, on_event
        self.events: list[Event] = []
        self.parameters: list[nn.Parameter] = list(model.parameters())
        self.weights: list[Tensor] = [*self.parameters, *model.buffers()]
        self.memory: Callable[[], LayerMemories | None] = lambda: None  # a weak reference, or it would live longer
        self.first = 0  # layer of the block that is at work
        self.place: dict[str, Any] = {}  # of a step through blocks: the number of that block, and whether it goes up
        self.heard = set[type]()  # kinds of layers' memories
        self.factors: list[tuple[float, float]] = [(1.0, 1.0)] * len(chunks)  # on loss and relay
        self.running = 0  # the chunk whose graph is alive
        self.now: Sums = {}  # what the running chunk has sent back, until its layer is left
        self.sums: Sums = {}  # what has been sent back before
        self.loss = 0.0
        self.add(*self.weights, *self.gradients())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block the step is watched."""
        with ExitStack() as self.ends, self:
            for i, layer in enumerate(self.model.layers):
                self.ends.callback(layer.register_forward_pre_hook(partial(self.enter, i)).remove)
            self.listen(type(self.model), "new_memory", self.remember)  # of the model, or of its blocks
            self.listen(type(self.model), "run", self.run)
            self.listen(LayerMemories, "write", self.fill)
            self.listen(LayerMemories, "hand_over", self.relay)
            self.listen(Hidden, "keep", self.keep)
            for file in FILES:
                self.listen(file, "loss_of_chunk", self.take_loss)
            self.listen(F, "cross_entropy", self.take_loss)  # of full.py
            self.listen(torch.autograd, "backward", self.done)
            yield

    def listen(self, owner: Any, name: str, heard: Callable[..., object]) -> None:
        """Call `heard(result, *arguments)` whenever this function of the owner returns, until the step is over."""
        function = getattr(owner, name)

        def listened(*arguments: Any, **keywords: Any) -> Any:
            result = function(*arguments, **keywords)
            heard(result, *arguments)
            return result

        self.ends.enter_context(patch.object(owner, name, listened))

    def write(self, kind: str, **fields: Any) -> None:
        """Write an event down, with the bytes that are alive, and the most that were since the event before."""
        uses = MemoryUse(self.weights, self.gradients()), LayerMemories(self.layers, []).tensors()
        known = [size for use in uses for size in use.bytes()]
        sizes = dict(zip(BYTES, (*known, self.live - sum(known)), strict=True))
        fields |= self.place
        event = {"step": len(self.events), "kind": kind, **fields, "bytes": sizes, "peak": max(self.peak, self.live)}
        self.peak = self.live
        self.events.append(event)
        self.on_event(event)

    @property
    def layers(self) -> list[Any]:
        """The memories of the layers that are at work."""
        memory = self.memory()
        return [] if memory is None else memory.layers

    def draw(self, sampler: Callable[..., Any], num_chunks: int, generator: torch.Generator | None) -> Any:
        entries: Sequence[Weight | None] = sampler(num_chunks, generator)
        rates = {"rates": list(sampler.rates(num_chunks))} if isinstance(sampler, Bernoulli) else {}
        self.write("draw", entries=[weight and [float(x) for x in weight] for weight in entries], **rates)
        self.factors = [weight or (0.0, 0.0) for weight in entries]
        return entries

    def remember(self, memory: LayerMemories, model: Any, *_: Any) -> None:
        self.memory, layers = weakref.ref(memory), memory.layers
        self.first = next(i for i, layer in enumerate(self.model.layers) if layer is model.layers[0])
        if self.blocks:  # up through all but the last one, then down through each
            passes = sum(event["kind"] == "memory" for event in self.events)
            block = [first for first, _ in self.blocks].index(self.first)
            self.place = {"block": block, "up": passes < len(self.blocks) - 1}
        self.write("memory", remembers=["state" if isinstance(x, LayerState) else "keys and values" for x in layers])
        for kind in {type(layer) for layer in layers} - self.heard:
            # Attention adds to its memory, others read leaves from theirs.
            name, heard = ("add_grads", self.sent) if hasattr(kind, "add_grads") else ("past", self.read)
            self.listen(kind, name, heard)
            self.heard.add(kind)

    def fill(self, _: None, memory: LayerMemories, chunks: Sequence[Chunk], written: Written) -> None:
        self.write("fill", chunks=[self.chunks.index(chunk) for chunk in chunks], **describe(written))

    def run(
        self, result: tuple[Tensor, Written], _: Any, x: Tensor, memory: Any = None, chunks: Any = (), *__: Any
    ) -> None:
        if torch.is_grad_enabled() and chunks:
            self.running = self.chunks.index(chunks[0])
            self.write("rebuild", chunk=self.running, **describe(result[1]))
        elif torch.is_grad_enabled():
            self.write("forward", chunk=0)

    def take_loss(self, *_: Any) -> None:
        self.write("loss", chunk=self.running, loss=0.0, factor=self.factors[self.running][0])  # see `done`

    def relay(self, received: Written, *_: Any) -> None:
        factor = self.factors[self.running][1]
        self.write("relay", chunk=self.running, received=[norms(layer) for layer in received], factor=factor)

    def done(self, _: None, tensors: Any, *__: Any) -> None:
        end = tensors if isinstance(tensors, Tensor) else tensors[0]
        if end.ndim == 0:  # the loss, times its factor; blocks below the last one have hidden states
            loss = float(end.detach())
            next(event for event in reversed(self.events) if event["kind"] == "loss")["loss"] = loss
            self.loss += loss
        for layer in sorted({layer for layer, _ in self.now}, reverse=True):
            self.leave(layer)  # nothing below it learns, so that its input has no gradient
        self.write("done", chunk=self.running, loss=self.loss, gradient_norm=self.gradient_norm())

    def keep(self, _: None, hidden: Hidden, chunks: Sequence[Chunk], x: Tensor) -> None:
        if x.is_floating_point():  # not the tokens
            above = len(self.layers) if self.place["up"] else 0  # on the way down in the place of the block's own input
            parts = x.detach().split([stop - start for start, stop in chunks], dim=1)
            at = {"chunks": [self.chunks.index(chunk) for chunk in chunks], "layer": self.first + above}
            self.write("keep", **at, norms=norms(parts))

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

    def read(self, seen: Any, layer: Any, chunks: Sequence[Chunk], *_: Any) -> None:
        """Autograd adds up in leaves what is sent back to the end of the chunk before."""
        before = next((i for i, chunk in enumerate(self.chunks) if chunk.stop == chunks[0].start), 0)
        key = self.first + self.layers.index(layer), before
        for leaf in tree_leaves(seen):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda gradient: add_up(self.now, key, [gradient]))

    def sent(self, _: None, layer: Any, first: int, *gradients: Tensor) -> None:
        """Attention has added a gradient (B, G, n, D) for each tensor that was written: sort them by chunks."""
        with unseen():
            for i, (start, stop) in enumerate(self.chunks):
                low, high = max(first, start), min(first + gradients[0].shape[2], stop)
                if low < high:
                    rows, around = slice(low - first, high - first), (0, 0, low - start, stop - high)
                    key = self.first + self.layers.index(layer), i
                    add_up(self.now, key, [F.pad(g[:, :, rows], around) for g in gradients])

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def gradient_norm(self) -> float:
        return math.hypot(*norms(self.gradients()))


def describe(written: Written) -> dict[str, Any]:
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
