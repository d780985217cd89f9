"""The command: its flags, what it writes, and its exit status; what it runs is tested elsewhere."""

import json

import pytest

from efficient_tx.kernels.verify import __main__ as command
from efficient_tx.kernels.verify import figures, ladder, sections
from efficient_tx.kernels.verify.targets import TARGETS


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say --all (no accelerator needed) or --hardware"),
        (["--all", "--hardware"], "not allowed with argument"),
        (["--all", "--kernels=monarhc"], "'monarhc' is no operation with cases: choose of"),
        (["--all", "--targets=h100,v7"], "'v7' is no target: choose of v5e, v6e, a100, h100"),
        (["--hardware", "--quick"], "--quick is a part of --all, and --hardware is quick: leave it out"),
        (["--hardware", "--jobs=2"], "--jobs=2 is of --all, and --hardware is one process: leave it out"),
        (["--all", "--jobs=0"], "'0' is no whole number of at least 1"),
        (["--al"], "--al is no flag: the nearest is --all"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert words in error


@pytest.mark.quick
def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    assert "verify --all --kernels=monarch --targets=h100,v5e" in capsys.readouterr().out


@pytest.mark.quick
def test_what_is_missing_is_one_line_and_exit_code_2(monkeypatch, capsys):
    assert command.main(["--hardware"]) == 2
    assert capsys.readouterr().err == "jax finds no accelerator, only cpu: --all verifies what needs none\n"
    monkeypatch.setattr(ladder, "packages_distributions", dict)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command.main(["--all"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in ("libtpu", "jax-cuda13-plugin==", "ptxas"))


KERNEL = {"name": "k", "on_chip": 1 << 21, "instructions": 7, "spills": 0}
FIGURES = {"seconds": 1.0, "arguments": 4, "outputs": 4, "temporaries": 2, "loops": 0, "kernels": [KERNEL]}


@pytest.fixture
def rungs(monkeypatch):
    """Rungs that return canned rows: of one program for each target, without a fault."""
    programs = [
        {"name": f"monarch x forward {name}", "operation": "monarch", "target": name, "faults": [], "figures": FIGURES}
        for name in TARGETS
    ]
    run = {"operation": "monarch", "case": "monarch x float32", "implementation": "pallas_tpu", "races": 0}
    run |= {"forward": 1e-7, "gradient": 2e-7, "most": 1e-4}
    asked = []

    def canned(rows):
        return lambda *arguments: asked.append(arguments[-1]) or rows

    monkeypatch.setattr(ladder, "missing", lambda targets: [])
    monkeypatch.setattr(ladder, "interpreted", canned([run]))
    moved = [
        {"operation": "monarch", "implementation": implementation, "ratio": ratio}
        for implementation, ratio in (("pallas_tpu", 1.25), ("pallas_gpu", 2.5))
    ]
    monkeypatch.setattr(ladder, "accounts", canned(moved))
    monkeypatch.setattr(ladder, "compilations", canned(programs))
    monkeypatch.setattr(command, "selection", lambda *_, **__: [])
    monkeypatch.setattr(
        sections, "of_all", lambda _, quick, jobs: asked.append(jobs) or (["## Whole training steps"], True)
    )
    monkeypatch.setattr(figures, "store", lambda path, programs, known: path.write_text(json.dumps(programs)))
    monkeypatch.setattr(figures, "read", lambda path: {})
    return run, programs, asked


def test_all_writes_a_table_and_figures(rungs, tmp_path, capsys):
    assert command.main(["--all", f"--out={tmp_path}"]) == 0
    page = (tmp_path / "kernels.md").read_text()
    assert "| monarch | v5e | 1 | 2e-07; – | 0 | 1.25 | 1.0 | 2.00 | 0.25 | – | 0 | 7 | 0 |" in page
    assert "| monarch | h100 | 1 | –; – | – | 2.50 | 1.0 |" in page
    assert "## Whole training steps" in page
    assert len(json.loads((tmp_path / "kernels.json").read_text())) == len(TARGETS)


def test_quick_is_what_ci_compiles(rungs, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(command, "selection", lambda *_, strength=2: asked.append(strength) or [])
    for flags, strengths, said in ((["--quick"], [2], "every pair of values"), ([], [2, 3], "`python")):
        asked.clear()
        assert command.main(["--all", *flags, f"--out={tmp_path}"]) == 0
        page = (tmp_path / "kernels.md").read_text()
        assert asked == strengths and said in page and ("--quick` on" in page) == bool(flags)


def test_every_rung_is_told_how_many_processes(rungs, tmp_path, capsys):
    *_, asked = rungs
    assert command.main(["--all", "--jobs=3", f"--out={tmp_path}"]) == 0
    assert asked == [3] * 4


def test_a_part_leaves_the_table_of_all_as_it_is(rungs, tmp_path, capsys):
    assert command.main(["--all", "--targets=v5e", f"--out={tmp_path}"]) == 0
    assert not (tmp_path / "kernels.md").exists() and (tmp_path / "kernels.json").exists()


def test_faults_fail_where_a_target_gates_and_races_and_wrong_results_everywhere(rungs, tmp_path, capsys):
    run, programs, _ = rungs
    programs[list(TARGETS).index("v4")]["faults"] = ["a spill"]
    assert command.main(["--all", f"--out={tmp_path}"]) == 0
    assert "- monarch x forward v4: a spill" in (tmp_path / "kernels.md").read_text()
    programs[0]["faults"] = ["a spill"]
    assert command.main(["--all", f"--out={tmp_path}"]) == 1
    programs[0]["faults"], run["races"] = [], 1
    assert command.main(["--all", f"--out={tmp_path}"]) == 1
    run["races"], run["gradient"] = 0, float("inf")
    assert command.main(["--all", f"--out={tmp_path}"]) == 1
    wrong = "- monarch x float32 pallas_tpu, interpreted: errors 1e-07, inf"
    assert wrong in (tmp_path / "kernels.md").read_text()


def test_who_interrupts_it_keeps_what_was_compiled(rungs, tmp_path, monkeypatch):
    def rows(*_):
        for number in range(command.KEEP_EVERY + 1):
            yield {"name": f"p{number}", "figures": FIGURES}
        raise KeyboardInterrupt

    monkeypatch.setattr(ladder, "compilations", rows)
    with pytest.raises(KeyboardInterrupt):
        command.main(["--all", f"--out={tmp_path}"])
    assert len(json.loads((tmp_path / "kernels.json").read_text())) == command.KEEP_EVERY
