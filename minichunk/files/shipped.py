"""What comes with the package: a small trained model, a smaller one with a state, and novels."""

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED_MODEL = ASSETS / "austen-llama"
SHIPPED_STATE = ASSETS / "austen-state"  # a StateSpace, whose tokens are bytes
TRAINED_ON = ("emma", "mansfieldpark", "prideprejudice", "sensesensibility")  # the shipped models
EXTENDED_ON, MEASURED_ON = "persuasion", "northangerabbey"  # the main job


def novel(name: str) -> Path:
    """The path of a shipped novel."""
    return ASSETS / "austen" / f"{name}.txt"
