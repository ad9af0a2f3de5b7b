"""Plots without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cqil_trt.commands import check_file
from cqil_trt.errors import UserError


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files. Raises ModuleNotFoundError if matplotlib is not installed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def check_plot(path: Path | None) -> None:
    """Raises the errors of drawing --plot at the end, before the work begins."""
    check_file(path, "--plot")
    if path is not None:
        from matplotlib.backend_bases import FigureCanvasBase

        known = FigureCanvasBase.get_supported_filetypes()
        if path.suffix[1:].lower() not in known:
            raise UserError(f"--plot {path}: its ending is none of {', '.join(sorted(known))}")
