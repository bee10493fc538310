"""A picture of measurements: each under its machine's roofline, and how many times as fast as the others it is.

It needs matplotlib, the extra `plot`. Points and bars have the same numbers; those of models have no point, as nobody
counts the bytes that they must move.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlcore.bench.harness import Measurement
from vlcore.bench.report import Results

COLORS = {"bfloat16": "#1f6fb2", "float32": "#d1702a", "float16": "#3a8f4d", "tf32": "#8a5fb0"}
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
BEHIND, OTHERS, GRID = "#b03a3a", "#9a9a9a", "#e6e6e6"


def check_file(file: Path) -> None:
    """See that a picture can be written to a file, before minutes go into what it shows.

    Raises:
        ValueError: matplotlib writes no such format, or there is no such folder.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if file.suffix and file.suffix[1:].lower() not in formats:
        raise ValueError(f"{file}: matplotlib writes no {file.suffix}; it writes {', '.join(formats)}.")
    if not file.parent.is_dir():
        raise ValueError(f"{file}: there is no folder {file.parent}.")


def draw(results: Results, file: Path) -> None:
    """Write the picture of a machine's measurements.

    Raises:
        ValueError: there is nothing to draw.
    """
    shown = [found for found in results.measurements if len(found.seconds) > 1]
    if not shown:
        raise ValueError("There is nothing to draw: nothing was measured beside anything else.")
    from matplotlib.figure import Figure

    height = max(5.5, 0.2 * len(shown) + 1.6)
    figure = Figure(figsize=(15, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 0.85))
    figure.suptitle(results.machine, fontsize=11)
    _roofline(left, shown)
    _ratios(right, shown)
    figure.savefig(file, dpi=140)


def _roofline(axes: Any, shown: Sequence[Measurement]) -> None:
    """FLOP/s over FLOPs a byte; what the machine does at best lies above every point."""
    points = [(number, found) for number, found in enumerate(shown, 1) if found.flops and found.traffic]
    for dtype in dict.fromkeys(found.dtype for _, found in points):
        same = [(number, found) for number, found in points if found.dtype == dtype]
        color, intensities = COLORS[dtype], [found.flops / found.traffic for _, found in same]
        flops, bandwidth = (max(getattr(found.limit, name) for _, found in same) for name in ("flops", "bandwidth"))
        ridge = flops / bandwidth
        first, last = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
        axes.plot((first, ridge, last), (first * bandwidth, flops, flops), color=color, linewidth=1.5, zorder=1)
        roof = f"{dtype}: {_scaled(flops)}FLOP/s, {_scaled(bandwidth)}B/s"
        axes.annotate(roof, (last, flops), (0, 9), textcoords="offset points", ha="right", color=color)
        for (number, found), intensity in zip(same, intensities, strict=True):
            place = intensity, found.flops / found.seconds[found.ours]
            axes.scatter(*place, 130, color=color, marker="s" if found.trains else "o", alpha=0.75, zorder=2)
            axes.annotate(str(number), place, ha="center", va="center", color="white", fontsize=6.5, zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="FLOP/s", title="Roofline  (■ with backward)")
    axes.set_box_aspect(0.95)
    axes.set_anchor("N")
    axes.grid(color=GRID, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _ratios(axes: Any, shown: Sequence[Measurement]) -> None:
    """Bars to the best of the others, by its name; dots for the rest."""
    for row, found in enumerate(shown):
        ratio = found.ratio(found.best_peer)
        others = [found.ratio(name) for name in found.seconds if name not in (found.ours, found.best_peer)]
        axes.barh(row, ratio - 1, left=1, color=COLORS[found.dtype] if ratio >= 1 else BEHIND, height=0.7, zorder=2)
        axes.scatter(others, [row] * len(others), 9, color=OTHERS, zorder=3)
        # Beside the bar, and beside dots that would lie under the words.
        near = [other for other in others if other < 3 * max(1, ratio)]
        words, place = f"{ratio:.2f}×  {found.best_peer}", (max(1, ratio, *near), row)
        axes.annotate(words, place, (5, 0), textcoords="offset points", va="center", fontsize=6.5)
    labels = [f"{found.title}, {found.shape}  {number}" for number, found in enumerate(shown, 1)]
    axes.set_yticks(range(len(shown)), labels, fontsize=6.5)
    axes.set(xscale="log", ylim=(len(shown) - 0.4, -0.6), title="Times as fast as the best of the others  (● the rest)")
    every = [found.ratio(name) for found in shown for name in found.seconds]
    low, high = min(0.7, *every) * 0.9, max(every) * 3
    ticks = [tick for tick in TICKS if low < tick < high]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(low, high)
    axes.axvline(1, color="black", linewidth=0.8, zorder=3)
    axes.grid(axis="x", color=GRID, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _scaled(number: float) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g} "
