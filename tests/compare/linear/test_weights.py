"""Where the dense weight comes from that is projected."""

import re

import numpy as np
import pytest

from efficient_tx.checks import OptionError
from efficient_tx.compare.linear import weights
from efficient_tx.training.checkpoint import Checkpoints


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
    with pytest.raises(OptionError, match=r"^layer is 'upp': choose one of out, up \(nearest: 'up'\)"):
        weights.from_run(run, "upp")
    with pytest.raises(OptionError, match=r"^run is '.*nothing': there is no checkpoint"):
        weights.from_run(tmp_path / "nothing")
    (run / "config.json").write_text('{"linear": {"mlp": {"name": "ternary"}}}')
    with pytest.raises(OptionError, match=r"^run is .*it has ternary layers, whose kernels are latent"):
        weights.from_run(run)
    (run / "config.json").write_text('{"linear": {"mlp": {"name": "dense"}}}')
    for file in (run / "checkpoints" / "3").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(OptionError, match=r"^run is .*checkpoint 3 does not open"):
        weights.from_run(run)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones(3), "it is no matrix of real numbers"),
        (np.array([["a"]]), "it is no matrix of real numbers"),
        (np.array([[1.0, np.nan]]), "it is empty or not finite"),
        (np.ones((0, 3)), "it is empty or not finite"),
        (np.array([[{}]]), "it cannot be read: Object arrays"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, array, words):
    np.save(tmp_path / "w.npy", array)
    with pytest.raises(OptionError, match=words) as caught:
        weights.from_file(tmp_path / "w.npy")
    assert (caught.value.option, caught.value.value) == ("weight", str(tmp_path / "w.npy"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\x93NUMPY\x01\x00\x10\x00{'descr': ((((((\n"])
def test_a_damaged_file_is_one_line(tmp_path, content):
    (tmp_path / "w.npy").write_bytes(content)
    with pytest.raises(ValueError, match="it cannot be read"):
        weights.from_file(tmp_path / "w.npy")


@pytest.mark.slow
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


def test_the_kernel_of_a_part_of_a_sum_is_no_layer(tmp_path):
    """It is larger than the dense layer's, and may be latent."""
    params = {"up": {"first": {"kernel": np.ones((6, 9))}, "bias": np.ones(9)}, "out": {"kernel": np.zeros((6, 6))}}
    Checkpoints(tmp_path / "checkpoints").save(3, {"params": params})
    (tmp_path / "config.json").write_text('{"linear": {"mlp": {"name": "sum"}, "projections": {"name": "dense"}}}')
    assert weights.from_run(tmp_path).kernel.shape == (6, 6)
