"""The picture of a comparison of compressions: score against bytes, and against time."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from efficient_tx.compare.attention.plots import looks, png
from efficient_tx.compare.compression.measure import Metric, Row, Settings, front


def against_cost(rows: Sequence[Row], settings: Settings, machine: str, metric: Metric) -> bytes:
    """PNG: a line for each method through its budgets; hollow without tuning; rings for those that no other beats."""
    figure = Figure(figsize=(17, 7.5), layout="constrained")
    tuned = f", {settings.trained} steps: filled" if settings.trained else ""
    figure.suptitle(
        f"{settings.run.name}, {settings.calibration} calibration examples; as compressed: hollow{tuned}; "
        f"ring: no other is better at that cost\n{machine}",
        fontsize=10,
    )
    dense, *others = rows
    found = [row for row in others if row.refused is None]
    look_of = looks(dict.fromkeys(row.method for row in found))
    costs = {"bytes of linear layers, share of dense": lambda row: row.stored / dense.stored,
             "time of a forward pass, share of dense": lambda row: row.milliseconds / dense.milliseconds}  # fmt: skip
    for axes, (label, cost) in zip(figure.subplots(1, len(costs), sharey=True), costs.items()):
        for method in look_of:
            of_method = sorted((row for row in found if row.method == method), key=cost)
            x = [cost(row) for row in of_method]
            plain = [sum(row.scores) / len(row.scores) for row in of_method]
            axes.plot(x, plain, markersize=6, linewidth=1, linestyle=":", fillstyle="none", **look_of[method],
                      label=None if settings.trained else method)  # fmt: skip
            if settings.trained:
                axes.plot(
                    x, [row.score for row in of_method], markersize=6, linewidth=1.2, label=method, **look_of[method]
                )
        # At either end, as the two lines may be one.
        levels = (("dense", dense.scores, 0.99, "right", ":" if dense.tuned else "--"),
                  ("dense, tuned", dense.tuned, 0.01, "left", "--"))  # fmt: skip
        for name, scores, x, side, line in levels:
            for score in scores:
                axes.axhline(score, color="gray", linestyle=line, linewidth=1)
                axes.text(x, score, name, transform=axes.get_yaxis_transform(), ha=side, va="bottom", fontsize=9)
        best = [row for row in front(rows, cost, metric) if row is not dense]
        axes.plot([cost(row) for row in best], [row.score for row in best], "o", markersize=13, fillstyle="none",
                  color="black", linewidth=0)  # fmt: skip
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(metric.name)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    return png(figure)
