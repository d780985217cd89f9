"""Draws the README's picture from the table of docs/results.md: python docs/pictures/draw.py (needs matplotlib)."""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
BUDGETS = (16, 64, 256)
SOFTMAX = {4096: 0.67, 16384: 12.5}  # seconds, forward and backward, from the text above the table
COLORS = {
    "skyformer": "C0", "nystromformer": "C1", "lev": "C2", "hyper": "C3", "local": "C4", "skeinformer": "C5",
    "performer": "C6", "soft": "midnightblue", "linear": "C8", "gla": "C9", "tensor": "tab:gray",
}  # fmt: skip


def rows() -> dict[str, list[str]]:
    """Mixer -> the other cells of its row in the table of errors and speed."""
    text = (HERE.parent / "results.md").read_text(encoding="utf-8")
    table = text.split("| mixer | random | clustered |")[1].split("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()[2:]]
    return {cells[0].strip("`"): cells[1:] for cells in lines}


def main():
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
    ends = []
    for name, (_, clustered, _, at_4096, at_16384, *_) in rows().items():
        if name not in COLORS:
            continue
        errors = [float(number) for number in re.findall(r"[\d.]+", clustered)]
        if len(errors) == len(BUDGETS):
            left.plot(BUDGETS, errors, "o-", color=COLORS[name])
            ends.append((left, BUDGETS[-1], errors[-1], name))
        seconds = [SOFTMAX[4096] / float(at_4096), SOFTMAX[16384] / float(at_16384)]
        right.plot(list(SOFTMAX), seconds, "o-", color=COLORS[name])
        ends.append((right, 16384, seconds[-1], name))
    right.plot(list(SOFTMAX), list(SOFTMAX.values()), "ks-", linewidth=2)
    ends.append((right, 16384, SOFTMAX[16384], "softmax"))
    for axis, gap in ((left, 1.19), (right, 1.27)):
        floor = 0.0
        for _, x, y, name in sorted((end for end in ends if end[0] is axis), key=lambda end: end[2]):
            floor = max(y, floor * gap)  # names do not lie on each other
            axis.annotate(
                name, (x, y), xytext=(x * 1.12, floor), color=COLORS.get(name, "black"), va="center", fontsize=9
            )
    left.set(
        title="Error against the exact counterpart, clustered inputs",
        xlabel="budget: keys, landmarks or features of a query",
        ylabel="relative error at 1,024 tokens",
        xscale="log", yscale="log", xticks=BUDGETS, xticklabels=BUDGETS, xlim=(14, 640),
    )  # fmt: skip
    right.set(
        title="Time with a budget of 128, two CPU cores",
        xlabel="tokens",
        ylabel="seconds, forward and backward",
        xscale="log", yscale="log", xticks=list(SOFTMAX), xticklabels=["4,096", "16,384"], xlim=(3700, 29000),
    )  # fmt: skip
    for axis in (left, right):
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    figure.savefig(HERE / "which_mixer.png", dpi=100)


if __name__ == "__main__":
    main()
