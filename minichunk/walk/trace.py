"""`trace`: take one real step and write down what happens in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..batch import check_batch, check_tokens
from ..chunks import cut
from ..pipeline.pipeline_seco import pipeline_seco, pipeline_spaco
from .events import Event
from .rank import RankRecorder
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

    With `pipeline_seco` or `pipeline_spaco` the log is that of this rank; merge.py makes one of those of all ranks.

    model: a `protocol.Model` with its `layers`, as all of ours are; for a pipeline, this rank's `PipelineStage`.
    on_event: called with each event as it happens, within the function; a loss is written into its event only when
        the backward pass begins.
    Slower than the step alone, and for one at a time: it puts itself in the place of `torch.autograd.backward`.
    Raises InputError as the function does.
    """
    is_pipeline = function in (pipeline_seco, pipeline_spaco)
    if is_pipeline:
        check_tokens(input_ids, labels, None, model.vocab_size)
    else:
        check_batch(model, input_ids, labels, None)
    bound = inspect.signature(function).bind(model, input_ids, labels, *arguments, **keywords)
    bound.apply_defaults()
    given, tokens = bound.arguments, input_ids.shape[1]
    chunks = cut(tokens, given.get("chunk_size", tokens))
    recorder = (RankRecorder if is_pipeline else Recorder)(model, chunks, on_event, input_ids, labels)
    recorder.begin(function.__name__, input_ids, given.get("recompute", False))
    with recorder.watching(given):
        loss = function(*bound.args, **bound.kwargs)
    recorder.end(loss)
    return recorder.events
