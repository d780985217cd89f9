"""Forms of a table: what a reader of each of them gets back."""

import csv
import io

import pytest

from efficient_tx.tables import Table, to_csv, to_markdown, to_tex

pytestmark = pytest.mark.quick

TABLE = Table("50 % of |x|", ["method|", "p < 0.05 | q", "±"], [["a|b, c_d", "< 0.001", "1 ± 2"], ["e", "> 0", ""]])


def test_markdown_has_the_same_cells_in_every_row():
    lines = to_markdown(TABLE).splitlines()[2:]
    assert [line.replace(r"\|", "").count("|") for line in lines] == [4] * 4
    assert lines[0] == r"| method | p < 0.05 \| q | ± |" and lines[2] == r"| a\|b, c_d | < 0.001 | 1 ± 2 |"


def test_csv_is_read_back():
    head, *rows = csv.reader(io.StringIO(to_csv(TABLE)))
    assert head == ["table", "method", "p < 0.05 | q", "±"] and [row[1:] for row in rows] == TABLE.rows


def test_tex_has_no_character_that_its_fonts_show_as_another():
    """In the encoding that LaTeX begins with, < > and | are ¡ ¿ and —."""
    text = to_tex(TABLE)
    assert (
        r"a\textbar{}b, c\_d & $<$ 0.001 & 1 $\pm$ 2 \\" in text and r"\caption{50 \% of \textbar{}x\textbar{}}" in text
    )
    assert not set("<>|") & set(text.replace("$<$", "").replace("$>$", ""))
