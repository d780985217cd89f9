"""The learning curve of a run, as a picture."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efficient_tx.training.disk import write_bytes


def draw(
    path: Path,
    lines: Sequence[Mapping[str, Any]],
    *,
    title: str,
    metric: str = "accuracy",
    baselines: Mapping[str, float],
) -> None:
    """Writes a PNG: loss and metric over steps, training and validation, baselines as dashed horizontal lines.

    Args:
      lines: the lines of metrics.jsonl.
      title: above the two plots.
      metric: plotted beside the loss.
      baselines: scores in the metric that a model has to beat, by name.

    Raises:
      RunError: the file cannot be written.
    """
    # Not pyplot: it has global state and looks for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    for axes, name in zip(figure.subplots(1, 2), ("loss", metric)):
        for split, style in (("train", {"linewidth": 1, "alpha": 0.7}), ("validation", {"marker": "o", "ms": 4})):
            points = [(line["step"], line.get(name)) for line in lines if line["split"] == split]
            if len(points) == 1:  # a line through one point is nothing
                style = {**style, "marker": "o", "ms": 4}
            if points:
                axes.plot(*zip(*points), label=split, **style)
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
    for index, (name, value) in enumerate(baselines.items()):
        label = f"{name} ({value:.3f}, test)".replace("$", r"\$")
        axes.axhline(value, color=f"C{index + 2}", linestyle="--", label=label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_bytes(path, image.getvalue())
