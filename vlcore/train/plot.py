"""loss.png: the loss of every step by modality, stage after stage."""

from pathlib import Path
from typing import Any

from vlcore.processing.writing import replacing_file
from vlcore.train.metrics import read_json_lines

COLORS = {"text": "tab:blue", "multimodal": "tab:orange", "mixed": "tab:green"}
SMOOTHING = 50


def check_matplotlib() -> None:
    """Raises ValueError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("loss.png needs matplotlib: pip install 'vlcore[plot]', or set plot=false.") from None


def plot_loss(metrics: Path, target: Path) -> None:
    """Draw the losses in a metrics.jsonl, one panel a stage, each modality with its moving average.

    Where there is no loss, nothing is drawn.

    Raises:
        ValueError: matplotlib is not installed, or the file is damaged.
        OSError: `target` cannot be written.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    rows = [row for row in read_json_lines(metrics, ["stage", "step", "modality", "loss"]) if row["loss"] is not None]
    if not rows:
        return
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure = Figure(figsize=(4.5 * len(stages), 3.5), layout="constrained")
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    for panel, stage in zip(panels, stages, strict=True):
        _draw(panel, stage, [row for row in rows if row["stage"] == stage])
    with replacing_file(target) as beside:
        figure.savefig(beside, format="png", dpi=110)


def _draw(panel: Any, stage: str, rows: list[dict[str, Any]]) -> None:
    for modality, color in COLORS.items():
        steps = [row["step"] for row in rows if row["modality"] == modality]
        losses = [row["loss"] for row in rows if row["modality"] == modality]
        if steps:
            panel.plot(steps, losses, color=color, linewidth=0.5, alpha=0.35)
            panel.plot(steps, _moving_average(losses), color=color, linewidth=1.5, label=modality)
    panel.set(title=stage, xlabel="step", ylabel="nats per supervised token")
    panel.legend()


def _moving_average(values: list[float]) -> list[float]:
    """Exponential, not biased towards zero at its start."""
    keep = 1 - 1 / min(SMOOTHING, max(2, len(values) // 10))
    total = weight = 0.0
    averages = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        averages.append(total / weight)
    return averages
