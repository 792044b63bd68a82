"""`trace`: take one real step and write down what happens in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..batch import check_batch
from ..chunks import cut
from ..errors import InputError
from ..full import full
from ..seco import seco
from ..spaco import spaco
from .events import Event
from .recorder import Recorder


def trace(
    function: Callable[..., Tensor],
    model: Any,
    input_ids: Tensor,
    labels: Tensor,
    *arguments: Any,
    on_event: Callable[[Event], object] = lambda event: None,
    **keywords: Any,
) -> list[Event]:
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
    given, tokens = bound.arguments, input_ids.shape[1]
    recorder = Recorder(model, cut(tokens, given.get("chunk_size", tokens)), on_event, input_ids, labels)
    recorder.begin(function.__name__, input_ids, bool(given["recompute"]))
    with recorder.watching(given):
        loss = function(*bound.args, **bound.kwargs)
    recorder.end(loss)
    return recorder.events
