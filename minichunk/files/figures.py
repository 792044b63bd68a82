"""Plots in files, where matplotlib is installed: it is an extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .atomic import replacing


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure of so many inches, which needs no screen; None if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write it as a PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
