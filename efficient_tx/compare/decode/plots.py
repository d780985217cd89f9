"""The picture of decoding: time of a token, bytes of the state and time of a prompt against the context."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from efficient_tx.compare.attention.plots import family_of, looks, plain_ticks, png
from efficient_tx.compare.decode.measure import Row, Settings
from efficient_tx.compare.decode.report import thousands
from efficient_tx.compare.labels import label_right


def against_context(rows: Sequence[Row], settings: Settings, machine: str) -> bytes:
    """PNG, log-log: a panel for each figure; solid lines are those of mixers whose state does not grow."""
    figure = Figure(figsize=(19, 8.5), layout="constrained")
    figure.suptitle(
        f"Decoding, batch {settings.batch}, {settings.heads} heads of {settings.head_dim}, budget {settings.budget}; "
        f"dashed: the state grows\n{machine}",
        fontsize=10,
    )
    panels = {
        "one token, microseconds": lambda row: {n: 1e6 * s for n, s in row.seconds("token").items()},
        "state of one sequence, kilobytes": lambda row: {n: size / 1024 for n, size in row.state_bytes.items()},
        "a prompt, milliseconds": lambda row: {n: 1e3 * s for n, s in row.seconds("prefill").items()},
    }
    look_of = looks((row.name for row in rows), family_of)
    for axes, (title, points_of) in zip(figure.subplots(1, len(panels)), panels.items()):
        labels = []
        for row in rows:
            points = list(points_of(row).items())
            if not points:
                continue
            look = look_of[row.name]
            axes.plot(*zip(*points), markersize=5, linewidth=1.2, linestyle="-" if row.bounded else "--", **look)
            labels.append((points[-1][1], row.name, look["color"], points[-1][0]))
        axes.set(xscale="log", yscale="log", xlabel="tokens before", title=title)
        plain_ticks(axes.yaxis)
        axes.set_xticks(settings.lengths, [thousands(length) for length in settings.lengths], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        label_right(axes, labels)
    return png(figure)
