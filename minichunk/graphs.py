"""Where memory is left: the graphs of the last chunks of the fill stay, and need not be built again.

SeCO runs each chunk but the last twice, once to fill the memory and once to have its graph. A chunk that is run with
its graph in the first place is run once; its graph then lives until its turn comes on the way back. With the graphs of
all chunks SeCO would be ordinary backpropagation in chunks.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .chunks import Chunk, span
from .errors import InputError
from .protocol import DEFAULTS, Memory, Model, Options, Written


class WithGraphs:
    """A model some of whose chunks have been run already: `run` returns what that returned. All else is the model's."""

    def __init__(self, model: Model, built: dict[Chunk, tuple[Tensor, Written]]) -> None:
        self.model, self.built = model, built

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def run(
        self, input_ids: Tensor, memory: Any = None, chunks: Sequence[Chunk] = (), options: Options = DEFAULTS
    ) -> tuple[Tensor, Written]:
        """See protocol.Model; a graph is given away, so that it goes with its backward."""
        built = self.built.pop(chunks[0], None)
        return self.model.run(input_ids, memory, chunks, options) if built is None else built


def fill_with_graphs(
    model: Model, input_ids: Tensor, chunks: Sequence[Chunk], memory: Memory, options: Options
) -> WithGraphs:
    """Lines 1-3 for the last chunks of the fill, and line 5 for them already. Returns what is to be rebuilt from."""
    built = {}
    for chunk in chunks:
        hidden, written = model.run(input_ids[:, span([chunk])], memory, [chunk], options)
        memory.write([chunk], [tuple(tensor.detach() for tensor in layer) for layer in written])
        built[chunk] = hidden, written
    return WithGraphs(model, built)


def check_graphs(graphs: int, **others: object) -> None:
    """Raise InputError for a number that cannot be, and for what does not go together with graphs that are kept."""
    if graphs < 0:
        raise InputError(f"graphs is {graphs}, but must be at least 0")
    if graphs and (given := [name for name, value in others.items() if value]):
        raise InputError(f"graphs is {graphs}, but is not supported together with {given[0]}: leave one of them out")
