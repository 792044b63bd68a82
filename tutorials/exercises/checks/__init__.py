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
from .relay import check_relay
from .samplers import check_samplers
from .seco import check_seco
from .state import check_state
from .window import check_window

EXERCISES = [
    Exercise(1, "attention", check_attention),
    Exercise(2, "merge", check_merge),
    Exercise(3, "loss", check_loss),
    Exercise(4, "relay", check_relay),
    Exercise(5, "seco", check_seco),
    Exercise(6, "samplers", check_samplers),
    Exercise(7, "lora", check_lora),
    Exercise(8, "state", check_state),
    Exercise(9, "window", check_window),
]
