"""The kernels compiled for TPUs and GPUs that are not there, at the sizes at which they are used (`pytest -m aot`).

Needs what `.[aot]` names: without it they fail, and the plain `pytest` does not run it.
"""

import json
import warnings

import pytest

from efficient_tx.kernels.verify import figures
from efficient_tx.kernels.verify.plan import faults, selection
from tests.support import ROOT

pytestmark = pytest.mark.aot

MOST = 500


def pytest_generate_tests(metafunc):
    """Every compilation is a test, where these tests run at all: to select them takes seconds."""
    if "compilation" in metafunc.fixturenames:
        selected = selection() if metafunc.config.option.markexpr == "aot" else []
        metafunc.parametrize("compilation", selected, ids=lambda one: one.name.replace(" ", "-"))


def test_the_selection_is_small():
    assert 0 < len(selection()) <= MOST


def test_compiles_within_its_limits_and_figures_have_not_grown(compilation):
    program = compilation.run()
    assert faults(compilation, program) == []
    before = json.loads((ROOT / "benchmarks" / "kernels.json").read_text())
    assert compilation.name in before["programs"], "run `python -m efficient_tx.kernels.verify --all` and commit"
    if figures.comparable(before, compilation.target.platform):
        assert figures.grown(before["programs"][compilation.name], figures.of_program(program)) == []
    else:
        warnings.warn(f"figures are not compared: they are those of {before['versions']}", stacklevel=1)
