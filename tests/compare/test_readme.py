"""The README's tables are those of the code."""

import re

import pytest

from efficient_tx.attention import ATTENTION
from efficient_tx.compare import __main__ as command
from efficient_tx.compare import readme
from efficient_tx.compression import METHODS
from efficient_tx.config.methods import named_method
from efficient_tx.linear import LINEAR
from tests.support import ROOT

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("page", ["README.md", "docs/compressing.md"])
def test_the_pages_have_the_tables_of_the_code(page):
    text = (ROOT / page).read_text()
    same = readme.replaced(text) == text  # not compared by assert itself: the difference is a page long
    assert same, f"the tables are out of date: python -m efficient_tx.compare table --write {page}"


def test_the_tables_are_written_between_the_markers(tmp_path, capsys):
    path = tmp_path / "README.md"
    begin = readme.BEGIN.format("README.md")
    path.write_text(f"before\n{begin}\nstale\n{readme.END}\nafter\n")
    assert command.main(["table"]) == 0
    printed = capsys.readouterr().out
    assert command.main(["table", f"--write={path}"]) == 0
    table, structures, methods = printed.split("\n\n")
    assert path.read_text() == f"before\n{begin}\n{table}\n\n{structures}\n{readme.END}\nafter\n"
    assert table.count("\n") == 1 + len(ATTENTION)
    assert structures.count("\n") == 1 + len(LINEAR)
    paper = "Chen et al. 2021, [2111.00035](https://arxiv.org/abs/2111.00035)"
    file = "[skyformer.py](efficient_tx/attention/low_rank/skyformer.py)"
    computes = "`kernelized` through the Nyström method with m landmarks"
    assert f"| `skyformer` | {paper} | {computes} | n·m + m³ | no | {file} |\n" in table
    formula = "diag(B₁, …, B_k) P diag(C₁, …, C_k) P | n²/2 with 4 blocks, 2·n·√n with √n"
    paper, file = (
        "Dao et al. 2022, [2204.00595](https://arxiv.org/abs/2204.00595)",
        "[monarch_weight.py](efficient_tx/linear/monarch_weight.py)",
    )
    assert f"| `monarch` | {paper} | {formula} | singular value decomposition of every slice | {file} |\n" in structures
    assert "| `stat` | Flynn et al. 2024, [2406.00061](https://arxiv.org/abs/2406.00061) |" in methods
    # The options of a method may decide what it needs; its row is that of the default ones.
    cells = {line.split("`")[1]: line.split(" | ")[3] for line in methods.splitlines()[2:]}
    for name in METHODS.keys() & cells.keys():
        assert cells[name] == (", ".join(sorted(named_method(name).needs)) or "no data")
    assert cells["wlra"] == "gradients"
    assert "`monarch`" not in methods  # every structure is a method: they have a table of their own
    for line in [*table.splitlines()[2:], *structures.splitlines()[2:], *methods.splitlines()[2:]]:
        assert "|  |" not in line.replace("| `dense` |  |", "")
        assert (ROOT / re.search(r"\((?:\.\./)?(efficient_tx/\S+)\) \|$", line)[1]).exists()
    path.write_text("no markers")
    assert command.main(["table", f"--write={path}"]) == 2
    assert "are missing" in capsys.readouterr().err
