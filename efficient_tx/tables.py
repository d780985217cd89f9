"""Tables of words and numbers, as Markdown, CSV, TeX, HTML or plain cells for a terminal."""

import csv
import html
import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

TEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"},
        **{"±": r"$\pm$", "×": r"$\times$", "≥": r"$\geq$", "≤": r"$\leq$", "−": "$-$", "–": "--", "—": "---"},
        **{"<": "$<$", ">": "$>$", "|": r"\textbar{}"},
    }
)


class Table(NamedTuple):
    """A table.

    Attributes:
      title: one line.
      columns: heads; one that ends in "|" is of words and set left, without the "|". Others are of numbers.
      rows: a cell for each column.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def heads(self) -> list[str]:
        return [name.removesuffix("|") for name in self.columns]

    @property
    def left(self) -> list[bool]:
        """Whether a column is set left."""
        return [name.endswith("|") for name in self.columns]


def to_markdown(table: Table) -> str:
    """A table of GitHub's Markdown below its title."""
    rule = ["---" if left else "---:" for left in table.left]
    words = ([cell.replace("|", r"\|") for cell in row] for row in (table.heads, *table.rows))
    lines = [next(words), rule, *words]
    return f"**{table.title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def to_csv(table: Table) -> str:
    """Comma-separated values, heads first; the title is a first column, so that several tables make one file."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", *table.heads])
    writer.writerows([table.title, *row] for row in table.rows)
    return out.getvalue()


def to_tex(table: Table) -> str:
    r"""A `tabular` with rules of booktabs, in a `table`."""
    form = "".join("l" if left else "r" for left in table.left)
    lines = [" & ".join(cell.translate(TEX) for cell in row) + r" \\" for row in (table.heads, *table.rows)]
    body = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
    caption = table.title.translate(TEX)
    return (
        f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n\\begin{{tabular}}{{{form}}}\n{body}\n"
        "\\end{tabular}\n\\end{table}\n"
    )


def to_html(table: Table) -> str:
    """A `table` that scrolls sideways, below its title, which does not."""

    def cells(tag: str, row: Sequence[str]) -> str:
        classes = [' class="left"' if left else "" for left in table.left]
        return "".join(f"<{tag}{c}>{html.escape(cell)}</{tag}>" for c, cell in zip(classes, row))

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    title = html.escape(table.title)
    head = f"<thead><tr>{cells('th', table.heads)}</tr></thead>"
    inner = f'<table aria-label="{title}">\n{head}\n<tbody>\n{body}\n</tbody></table>'
    return f'<h3>{title}</h3>\n<div class="wide" tabindex="0">{inner}</div>\n'


FORMATS: dict[str, Callable[[Table], str]] = {"md": to_markdown, "csv": to_csv, "tex": to_tex}
