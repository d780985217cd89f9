"""The comparison: what it measures, what it leaves out, what it writes and says."""

import csv
import inspect
import json
import re
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx import files
from efficient_tx.attention import ATTENTION
from efficient_tx.compare import __main__ as command
from efficient_tx.compare import inputs, plots, readme, report
from efficient_tx.compare.attention.measure import Row, Settings, case, errors, may_be_too_slow, rungs
from efficient_tx.compare.timing import PASSES, Cell, compile_pass, exponent, in_turns, predict
from efficient_tx.linear import LINEAR
from tests.support import ROOT

TINY = Settings((16, 32), budget=8, batch=2, heads=2, head_dim=4, rounds=1, error_length=32)


def row(name, seconds, *, cost="n", predicted=None, **about):
    """One whose forward takes a third of `seconds`, by length; None: not measured."""
    cells = {
        length: {
            a_pass: Cell(s and s / part, predicted and predicted / part, 10) for a_pass, part in zip(PASSES, (3, 1))
        }
        for length, s in seconds.items()
    }
    return Row(name, "", "", cost, False, "function", 7, cells=cells, **about)


def test_the_exponent_of_a_power_law():
    assert exponent({length: 3e-6 * length**1.37 for length in (256, 1024, 8192)}) == pytest.approx(1.37)
    assert exponent({256: 1.0}) is None


@pytest.mark.parametrize(
    ("known", "length", "expected"),
    [
        ({}, 4096, None),
        ({1024: 0.5}, 2048, 4.0),  # one point: cubic
        ({1024: 0.5, 2048: 2.0}, 8192, 32.0),  # quadratic goes on
        ({512: 9.0, 1024: 0.5, 2048: 2.0}, 4096, 8.0),  # the last two count
        ({1024: 0.5, 2048: 0.4}, 4096, 0.8),  # nothing gets cheaper: at least linear
        ({1024: 0.5, 2048: 50.0}, 4096, 400.0),  # nor steeper than cubic
        ({1024: 0.5, 2048: 2.0}, 1024, None),  # shorter lengths only
    ],
)
def test_the_prediction_continues_the_growth(known, length, expected):
    assert predict(known, length) == (None if expected is None else pytest.approx(expected))


def test_what_may_be_slow_is_tried_on_shorter_inputs_first():
    assert [rungs(*pair) for pair in ((0, 256), (0, 1024), (1024, 4096), (256, 16384))] == [[], [256], [], [1024, 4096]]
    assert may_be_too_slow({"forward": {}, "forward_backward": {}}, 1024, 20)
    assert may_be_too_slow({"forward": {256: 0.1}, "forward_backward": {256: 0.4}}, 1024, 20)
    assert not may_be_too_slow({"forward": {256: 0.1}, "forward_backward": {256: 0.3}}, 1024, 20)


def test_turns_are_taken_as_long_as_the_time_lasts(monkeypatch):
    """A clock that a slow call moves by 8 s and a quick one by 1 s; the warm-up counts only where it is alone."""
    clock, calls = [0.0], []

    def call(name, *durations):
        durations = iter(durations)

        def run():
            calls.append(name)
            clock[0] += next(durations)

        return run

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    runs = {"slow": call("slow", 8, 8, 8), "quick": call("quick", 9, 1, 2, 1), "slowest": call("slowest", 19)}
    assert in_turns(runs, 3, max_seconds=20) == {"slow": 8, "quick": 1, "slowest": 19}
    assert calls == ["slow", "quick", "slowest", "slow", "quick", "quick", "quick"]


def test_a_pass_returns_the_output_and_all_gradients():
    arrays = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.float32(2)}
    call = lambda arrays, shift: jnp.sin(arrays["a"]) * arrays["b"] + shift  # noqa: E731
    run, temporary_bytes = compile_pass("forward_backward", call, arrays, jnp.float32(1))
    out, (gradients,) = run()
    np.testing.assert_allclose(out, 2 * np.sin(arrays["a"]) + 1, rtol=1e-6)
    cotangent = jax.random.normal(jax.random.key(1), (2, 3))
    np.testing.assert_allclose(gradients["a"], 2 * np.cos(arrays["a"]) * cotangent, rtol=1e-5)  # float32
    np.testing.assert_allclose(gradients["b"], np.vdot(np.sin(arrays["a"]), cotangent), rtol=1e-5)
    assert temporary_bytes >= 0
    forward, _ = compile_pass("forward", call, arrays, jnp.float32(1))
    np.testing.assert_allclose(forward(), out, rtol=1e-6)


@pytest.mark.parametrize("name", ATTENTION)
def test_every_variant_can_be_measured(name):
    """Its function, or module, takes what inputs.py makes for it; the output has the shape of the values."""
    given = inputs.tokens("random", 2, 16, 2, 4)
    call, arrays, *others = case(name, given, TINY)
    out = jax.eval_shape(call, arrays, *others)
    assert out.shape == ((2, 16, 2, 4) if ATTENTION[name].function else (2, 16, 8))
    if ATTENTION[name].exact:
        assert "mask" in inspect.signature(ATTENTION[name].exact).parameters


def test_an_argument_that_nothing_is_known_of_is_named():
    class Needy(ATTENTION["softmax"]):
        function = staticmethod(lambda q, k, v, *, whims, mask=None, key=None: v)

    with pytest.raises(ValueError, match=r"needy requires 'whims': say in .*inputs.py"):
        inputs.arguments("needy", Needy, inputs.tokens("random", 1, 4, 1, 2), 8)


@pytest.mark.parametrize(("family", "share"), [("clustered", 1 / 8), ("imbalanced", 0.96)])
def test_clusters_have_their_shares_and_queries_find_their_keys(family, share):
    q, k, v = (np.asarray(x)[0, :, 0] for x in inputs.tokens(family, 1, 600, 1, 32).values())
    # Two tokens of one centre are 2·32·0.09 = 5.8 apart in squares, on average; two of different ones more than 30.
    near = {
        name: np.square(x[:, None] - y[None]).sum(-1) < 15 for name, x, y in (("k", k, k), ("v", v, v), ("qk", q, k))
    }
    assert near["k"].mean(axis=1).max() == pytest.approx(share, abs=0.045)  # three standard deviations of 600 draws
    for name in ("v", "qk"):
        assert (near[name] == near["k"]).mean() > 0.999
    assert np.diagonal(near["qk"]).all()


def test_the_error_is_that_of_the_outputs():
    """V-mean against dense softmax attention, both in NumPy; an exact variant has none."""
    name, found = errors("vmean", TINY)
    assert name == "softmax"
    assert list(found) == list(inputs.FAMILIES)
    for family, error in found.items():
        q, k, v = (np.asarray(x, np.float64) for x in inputs.tokens(family, 2, 32, 2, 4).values())
        weights = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / 2)
        exact = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
        expected = np.linalg.norm(v.mean(axis=1, keepdims=True) - exact) / np.linalg.norm(exact)
        assert error == pytest.approx(expected, rel=1e-4)
    assert errors("softmax", TINY) == ("softmax", dict.fromkeys(inputs.FAMILIES, 0.0))
    assert errors("fourier", TINY) == (None, {})


def test_what_sub_quadratic_variants_owe():
    settings = Settings((1024, 4096, 16384), error_length=1024)
    softmax = row("softmax", {1024: 1, 4096: 16, 16384: None}, cost="n²", predicted=256)
    good = row("good", {1024: 2, 4096: 8, 16384: 32})
    slow = row("slow", {1024: 4, 4096: 20, 16384: 100}, cost="n·m + m³")
    slower = row("slower", {1024: 4, 4096: None, 16384: None}, cost="n log n")
    cubic = row("cubic", {1024: 30, 4096: None, 16384: None}, cost="n³")
    assert report.verdicts([softmax, good, slow, slower, cubic], settings) == [
        ("good: 2.0 × as fast as softmax at 4096, 8.0 × as fast as softmax (predicted) at 16384, exponent 1.00", []),
        (
            "slow: 0.8 × as fast as softmax at 4096, 2.6 × as fast as softmax (predicted) at 16384, exponent 1.16",
            ["0.8 × as fast as softmax at 4096", "exponent 1.16 > 1.15"],
        ),
        (
            "slower: too slow for 20 s at 4096, too slow for 20 s at 16384",
            ["too slow for 20 s at 4096", "too slow for 20 s at 16384"],
        ),
    ]
    assert report.verdicts([good], settings) == [("good: exponent 1.00", [])]


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    """Three variants at two tiny lengths: table, CSV and JSON hold the same figures; two pictures; no other files."""
    out = tmp_path / "new" / "folder"
    flags = "--lengths=32,16 --variants=vmean,softmax,pool --budget=8 --batch=2 --head_dim=4 --rounds=1"
    assert command.main(["attention", *flags.split(), f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "attention.csv", "attention.json", "error_time.png", "time_length.png",
    ]  # fmt: skip
    record = json.loads((out / "attention.json").read_text())
    lines = list(csv.DictReader((out / "attention.csv").read_text().splitlines()))
    assert record["settings"] == asdict(Settings((16, 32), 8, 20.0, 2, 2, 4, 1, 16)) | {"lengths": [16, 32]}
    assert record["machine"] in printed
    assert re.match(rf"cpu: .* cores, load .*; jax {re.escape(jax.__version__)}, ", record["machine"])
    assert [(line["variant"], line["length"]) for line in lines] == [
        (name, length) for name in ("softmax", "vmean", "pool") for length in ("16", "32")
    ]
    for line in lines:
        variant = next(each for each in record["variants"] if each["name"] == line["variant"])
        cell = variant["cells"][line["length"]]
        for a_pass in PASSES:
            assert float(line[f"{a_pass}_ms"]) == pytest.approx(1e3 * cell[a_pass]["seconds"])
            assert int(line[f"{a_pass}_temporary_bytes"]) == cell[a_pass]["temporary_bytes"]
        for family in inputs.FAMILIES:
            assert line[f"error_{family}"] == str(variant["errors"].get(family, ""))
        assert float(line["exponent"]) == variant["exponent"]
        assert (line["approximates"], line["timed"]) == {
            "softmax": ("softmax", "function"), "vmean": ("softmax", "function"), "pool": ("", "module"),
        }[line["variant"]]  # fmt: skip
        shown = report.milliseconds(Cell(cell["forward_backward"]["seconds"]))
        assert re.search(rf"\b{line['variant']}\*? .*\b{re.escape(shown)}\b", printed)
    sizes = {each["name"]: each["parameters"] for each in record["variants"]}
    assert sizes == {"softmax": 4 * (8 * 8 + 8), "vmean": 2 * (8 * 8 + 8), "pool": 0}
    for picture in ("error_time.png", "time_length.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_calls_that_would_take_too_long_are_not_made(tmp_path, capsys):
    """No prediction at the shortest length; a limit of a nanosecond stops everything after it."""
    flags = "--lengths=8,16 --variants=vmean --batch=1 --heads=1 --head_dim=2 --rounds=1 --max_seconds=1e-9"
    assert command.main(["attention", *flags.split(), f"--out={tmp_path}"]) == 0
    first, second = csv.DictReader((tmp_path / "attention.csv").read_text().splitlines())
    assert float(first["forward_ms"]) > 0
    assert second["forward_ms"] == second["forward_backward_ms"] == second["forward_temporary_bytes"] == ""
    assert re.search(r"vmean .*│ +— │ +— │ +— │", capsys.readouterr().out)


def test_an_interrupted_comparison_writes_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command.COMMANDS["attention"], "compare", interrupted)
    assert command.main(["attention", f"--out={tmp_path}"]) == 130
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == "stopped: nothing was written\n"


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "figures.csv"
    files.write(path, "old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "choose one of attention, linear, table"),
        (["atention"], "nearest: 'attention'"),
        (["attention", "--lenghts=8"], "--lenghts is no flag of attention: the nearest is --lengths"),
        (["attention", "--lengths=8,x"], "'x' is no whole number of at least 1"),
        (["attention", "--budget=0"], "argument --budget: '0' is no whole number"),
        (["attention", "--max_seconds=-1"], "'-1' is no number above 0"),
        (["attention", "--variants=softmax,skyfromer"], "nearest: 'skyformer'"),
        (["attention", "--lengths=8,16", "--error_length=4"], "use one of 8, 16"),
        (["table", "--wirte=README.md"], "the nearest is --write"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert words in error


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert command.main(["attention", f"--out={tmp_path}/file/folder"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_readme_has_the_tables_of_the_code():
    text = (ROOT / "README.md").read_text()
    same = readme.replaced(text) == text  # not compared by assert itself: the difference is a page long
    assert same, "the tables are out of date: python -m efficient_tx.compare table --write README.md"


def test_the_tables_are_written_between_the_markers(tmp_path, capsys):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{readme.BEGIN}\nstale\n{readme.END}\nafter\n")
    assert command.main(["table"]) == 0
    printed = capsys.readouterr().out
    assert command.main(["table", f"--write={path}"]) == 0
    assert path.read_text() == f"before\n{readme.BEGIN}\n{printed}{readme.END}\nafter\n"
    table, structures = printed.split("\n\n")
    assert table.count("\n") == 1 + len(ATTENTION)
    assert structures.count("\n") == 2 + len(LINEAR)
    paper = "Chen et al. 2021, [2111.00035](https://arxiv.org/abs/2111.00035)"
    file = "[skyformer.py](efficient_tx/attention/skyformer.py)"
    computes = "`kernelized` through the Nyström method with m landmarks"
    assert f"| `skyformer` | {paper} | {computes} | n·m + m³ | no | {file} |\n" in table
    formula = "diag(B₁, …, B_k) P diag(C₁, …, C_k) P | n²/2 with 4 blocks, 2·n·√n with √n"
    paper, file = (
        "Dao et al. 2022, [2204.00595](https://arxiv.org/abs/2204.00595)",
        "[monarch.py](efficient_tx/linear/monarch.py)",
    )
    assert f"| `monarch` | {paper} | {formula} | singular value decomposition of every slice | {file} |\n" in structures
    for line in [*table.splitlines()[2:], *structures.splitlines()[2:]]:
        assert "|  |" not in line.replace("| `dense` |  |", "")
        assert (ROOT / re.search(r"\((efficient_tx/\S+)\) \|$", line)[1]).exists()
    path.write_text("no markers")
    assert command.main(["table", f"--write={path}"]) == 2
    assert "are missing" in capsys.readouterr().err


@pytest.mark.parametrize("heights", [[0.1, 0.5, 0.9], [0.5, 0.5, 0.51, 0.9], [0.0, 0.01, 0.99, 1.0], [0.3] * 9])
def test_labels_keep_their_order_and_their_distance(heights):
    places = plots.spread(heights, 0.1)
    assert np.diff(places).min() > 0.1 - 1e-9
    assert -1e-9 < min(places) <= max(places) < 1 + 1e-9
    if np.diff(heights).min() >= 0.1:
        assert places == pytest.approx(heights)
