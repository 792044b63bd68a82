"""What comes with the package: a small trained model, and novels."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED_MODEL = ASSETS / "austen-llama"
TRAINED_ON = ("emma", "mansfieldpark", "prideprejudice", "sensesensibility")  # the shipped model
EXTENDED_ON, MEASURED_ON = "persuasion", "northangerabbey"  # the main job


def novel(name: str) -> Path:
    """The path of a shipped novel."""
    return ASSETS / "austen" / f"{name}.txt"
