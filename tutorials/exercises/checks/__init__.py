"""What is asked of each exercise, and which mistakes are known.

A check computes the right answer and, if the student's differs from it, the answers to which typical
mistakes lead. If one of them is the student's, its words say what the mistake is and ask the question
that leads to the mend. Chunks are numbered from 0, in words as in code.
"""

from __future__ import annotations

from ..diagnose import Exercise
from .attention import check_attention
from .lora import check_lora
from .loss import check_loss
from .merge import check_merge
from .objective import check_objective
from .relay import check_relay
from .samplers import check_samplers
from .seco import check_seco
from .state import check_state
from .window import check_window

CHECKS = (
    check_attention, check_merge, check_loss, check_relay, check_seco, check_samplers, check_lora, check_state,
    check_window, check_objective,
)  # fmt: skip
EXERCISES = [Exercise(n, check.__name__.removeprefix("check_"), check) for n, check in enumerate(CHECKS, start=1)]
