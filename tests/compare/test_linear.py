"""The comparison of weight structures: sizes, projections at equal bytes, where weights come from, what is written."""

import csv
import inspect
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.compare import __main__ as command
from efficient_tx.compare import linear, linear_report, weights
from efficient_tx.compare.linear.measure import SIZES, TIMED, Row, case, describe, equal_bytes, inference, project
from efficient_tx.compare.linear.plots import gains_and_losses
from efficient_tx.compare.timing import PASSES, Cell
from efficient_tx.linear import LINEAR
from efficient_tx.training.checkpoint import Checkpoints


def row(structure, multiplies, seconds, *, packed=False, width=64):
    passes = PASSES[:1] if packed else PASSES
    cells = {name: Cell(s) for name, s in zip(passes, (seconds / 3, seconds))}
    return Row(structure, {}, packed, width, width, 7, multiplies, 8, cells)


@pytest.mark.parametrize("name", LINEAR)
def test_every_structure_can_be_timed_and_counted(name):
    for options in TIMED.get(name, (lambda n: {},)):
        for packed in {False, hasattr(LINEAR[name], "pack")}:
            made = describe(name, 12, 12, options(12), packed=packed)
            call, arrays = case(made, jnp.ones((5, 12)))
            assert jax.eval_shape(call, arrays).shape == (5, 12)
            assert made.stored == sum(leaf.nbytes for leaf in jax.tree.leaves(arrays["state"]))
            assert made.parameters == (0 if packed else linear.layer(name, 12, 12, options(12)).parameters)
    if name in SIZES:
        assert SIZES[name][0] in inspect.signature(LINEAR[name].__init__).parameters


@pytest.mark.parametrize("name", SIZES)
def test_as_many_bytes_as_allowed(name):
    """One size more would be too much; where even the least is, it is that."""
    option, values = SIZES[name]
    sizes = list(values(64, 48))
    for share in (0.9, 0.5, 0.01):
        at = sizes.index(equal_bytes(name, 64, 48, share)[option])
        stored = [inference(name, 64, 48, {option: size}).stored for size in sizes[at : at + 2]]
        assert at == 0 or stored[0] <= share * 64 * 48 * 4
        assert len(stored) == 1 or stored[1] > share * 64 * 48 * 4


def test_projection_errors_are_those_of_the_formula():
    kernel = np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32)
    rows = {made.structure: made for made in project(["dense", "low_rank", "toeplitz", "ternary"], kernel, 0.5)}
    assert list(rows) == ["low_rank", "toeplitz", "ternary"]
    rank = 16 * 12 // 2 // (16 + 12)
    assert rows["low_rank"].options == {"rank": rank}
    singular = np.linalg.svd(kernel, compute_uv=False)
    tail = np.sqrt((singular[rank:] ** 2).sum() / (singular**2).sum())
    means = {d: kernel.diagonal(d).mean() for d in range(-15, 12)}
    toeplitz = np.array([[means[j - i] for j in range(12)] for i in range(16)])
    assert rows["low_rank"].error == pytest.approx(tail, rel=1e-5)  # float32
    assert rows["toeplitz"].error == pytest.approx(np.linalg.norm(kernel - toeplitz) / np.linalg.norm(kernel), rel=1e-5)
    assert (rows["ternary"].name, rows["ternary"].stored) == ("ternary, packed", 4 * 12 + 4)


def test_times_and_rates_are_against_dense_of_the_same_width():
    rows = [row("dense", 100, 6.0), row("a", 25, 2.0), row("b", 50, 6.0), row("c", 100, 1.0, packed=True)]
    rows += [row("dense", 400, 9.0, width=128), row("a", 50, 18.0, width=128)]
    assert [linear_report.faster(made, rows) for made in rows] == [1, 3, 1, None, 1, 0.5]
    assert [linear_report.faster(made, rows, "forward") for made in rows] == pytest.approx([1, 3, 1, 6, 1, 0.5])
    assert [linear_report.rate(made, rows) for made in rows] == [1, 0.75, 0.5, None, 1, 0.0625]
    assert linear_report.verdicts(rows) == [
        "b: 50% of the multiplications of dense at 64 features, 1.00 × as fast",
        "a: 12% of the multiplications of dense at 128 features, 0.50 × as fast",
    ]
    projected = [Row("b", {"rank": 3}, False, 6, 6, 7, 8, 9, error=0.5)]
    settings = linear.Settings((64, 128), tokens=4)
    assert gains_and_losses(rows, projected, "W", settings, "here").startswith(b"\x89PNG")


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    """Two structures, and dense unasked: the same figures on the terminal, in CSV and JSON; a picture."""
    np.save(tmp_path / "w.npy", np.random.default_rng(0).normal(size=(12, 8)))
    out = tmp_path / "new" / "folder"
    flags = f"--features=8 --structures=ternary,monarch --tokens=4 --rounds=1 --weight={tmp_path}/w.npy --out={out}"
    assert command.main(["linear", *flags.split()]) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["linear.csv", "linear.json", "linear.png"]
    record = json.loads((out / "linear.json").read_text())
    lines = list(csv.DictReader((out / "linear.csv").read_text().splitlines()))
    assert record["settings"] == {"features": [8], "tokens": 4, "rounds": 1, "share": 0.5}
    assert record["machine"] in printed
    assert re.fullmatch(
        r"12 × 8, the matrix in .*/w.npy; 99 % of its squares are in \d singular directions", record["weight"]
    )
    timed = [("dense", ""), ("monarch", "blocks=4"), ("monarch", "blocks=32"), ("ternary", ""), ("ternary", "")]
    expected = [(*pair, "8") for pair in timed] + [("monarch", "blocks=2", "12"), ("ternary", "", "12")]
    assert [(line["structure"], line["options"], line["in_features"]) for line in lines] == expected
    assert [line["packed"] for line in lines] == [*4 * ["False"], "True", "False", "True"]
    for line, made in zip(lines, [*record["timed"], *record["projected"]]):
        assert (line["bytes"], line["multiplies"]) == (str(made["stored"]), str(made["multiplies"]))
        assert line["error"] == str(made["error"] or "")
        for name in PASSES:
            seconds = made["cells"].get(name, {"seconds": None})["seconds"]
            assert line[f"{name}_ms"] == ("" if seconds is None else str(1e3 * seconds))
    for made in record["projected"]:
        assert re.search(rf"{made['structure']}.* {made['stored']:,} .*{made['error']:.3f}", printed)
    assert re.search(r"dense .* 64 │ +64 │ +256 │ .* 1.00 │ +100% │", printed)
    assert (out / "linear.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def run(tmp_path):
    """The workdir of a run as far as weights are read from it."""
    wide, narrow = np.ones((6, 9), np.float32), np.zeros((6, 6), np.float32)
    params = {"up": {"kernel": wide, "bias": np.ones(9)}, "out": {"kernel": narrow}, "table": {"embedding": wide}}
    Checkpoints(tmp_path / "checkpoints").save(3, {"params": params, "moments": params})
    (tmp_path / "config.json").write_text('{"linear": {"mlp": {"name": "dense"}, "projections": {"name": "low_rank"}}}')
    return tmp_path


def test_the_largest_or_a_named_layer_of_a_run(run):
    kernel, source = weights.from_run(run)
    assert (kernel.shape, source) == ((6, 9), f"up of the run {run} at step 3")
    assert weights.from_run(run, "out").kernel.shape == (6, 6)


def test_what_is_wrong_with_a_run_is_said(run, tmp_path):
    with pytest.raises(ValueError, match=r"--layer is 'upp': choose one of out, up \(nearest: 'up'\)"):
        weights.from_run(run, "upp")
    with pytest.raises(ValueError, match="nothing has no checkpoint"):
        weights.from_run(tmp_path / "nothing")
    (run / "config.json").write_text('{"linear": {"mlp": {"name": "ternary"}}}')
    with pytest.raises(ValueError, match="has ternary layers, whose kernels are latent"):
        weights.from_run(run)
    (run / "config.json").write_text('{"linear": {"mlp": {"name": "dense"}}}')
    for file in (run / "checkpoints" / "3").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoint 3 does not open"):
        weights.from_run(run)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones(3), "is no matrix of real numbers"),
        (np.array([["a"]]), "is no matrix of real numbers"),
        (np.array([[1.0, np.nan]]), "is empty or not finite"),
        (np.ones((0, 3)), "is empty or not finite"),
        (np.array([[{}]]), "cannot be read: Object arrays"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, array, words):
    np.save(tmp_path / "w.npy", array)
    with pytest.raises(ValueError, match=words):
        weights.from_file(tmp_path / "w.npy")


def test_the_weight_trained_here_learns(monkeypatch):
    for name, value in {"IMAGES": 16, "WIDTH": 64, "STEPS": 500, "BATCH": 32, "PATCH": 8}.items():
        monkeypatch.setattr(weights, name, value)
    kernel, source = weights.trained()
    assert kernel.shape == (64, 64)
    error, noisy = map(float, re.search(r"other images ([\d.]+), of the noisy input ([\d.]+)\)", source).groups())
    assert error < 0.9 * noisy == 0.9 * 0.25


def test_images_of_disks_have_all_scales():
    """Variance 1, and neighbours that are mostly equal: areas; but not all: edges."""
    images = weights.disks(np.random.default_rng(0), 8)
    assert (images.mean(), images.std()) == (pytest.approx(0, abs=1e-5), pytest.approx(1, rel=1e-5))
    assert 0.6 < (images[:, 1:] == images[:, :-1]).mean() < 0.95


def test_directions_that_hold_a_matrix():
    singular = np.sqrt([90, 9, 0.9, 0.1])
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))
    assert weights.directions(q * singular) == 2
    assert weights.directions(np.eye(200)) == 198


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--features=8,0"], "argument --features: '0' is no whole number of at least 1"),
        (["--structures=monrach"], "'monrach' is no structure: choose of dense"),
        (["--share=-1"], "'-1' is no number above 0"),
        (["--weight=a.npy", "--run=b"], "--weight and --run both name a weight"),
        (["--layer=mlp.up"], "name the run with --run"),
        (["--token=8"], "--token is no flag of linear: the nearest is --tokens"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["linear", *arguments])
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert words in error


def test_a_weight_that_is_not_there_is_one_line(tmp_path, capsys):
    assert command.main(["linear", f"--weight={tmp_path}/w.npy"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "w.npy" in error
