"""The command, on a tiny model: beside memory that is measured anew, and operations counted by hand."""

import csv
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

from efficient_tx.config.build import build_model, build_stages
from efficient_tx.config.errors import ConfigError
from efficient_tx.config.load import ConfigFile
from efficient_tx.fit.__main__ import command, values_of
from efficient_tx.fit.chips import DATA_SHEETS, chip_of
from efficient_tx.fit.step import Recipe
from efficient_tx.report.flops import of_steps
from efficient_tx.training.step import init_state, make_train_step
from tests.support.command import here
from tests.support.workdirs import SMALL, config_of

SIZES = {**SMALL, "batch_size": 8, "grad_accum": 2}
TINY = ["--config=quickstart", *(f"--config.{key}={value}" for key, value in SIZES.items())]


def fit_here(*arguments):
    return here(command, *TINY, *arguments)


def taken(size):
    """Bytes of a real step: with parameters, their moments and a batch of zeros."""
    config = ConfigFile("quickstart:vmean").resolve(SIZES)
    task = Recipe(config).task
    model, devices = build_model(config, task), jax.local_devices()[:1]
    stage = build_stages(config, model)[0][0]
    step = make_train_step(nnx.split(model)[0], stage.optimizer, seed=1, grad_accum=2, devices=devices)
    tokens = np.zeros((1, size, 16), np.int32)
    rows = {"label": np.zeros((1, size), np.int32), "weight": np.zeros((1, size), np.float32)}
    batch = {"inputs": tokens, "mask": tokens == 0, **rows}
    sizes = step.lower(init_state(model, stage.optimizer), batch).compile().memory_analysis()
    given = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return given + sizes.temp_size_in_bytes


def test_the_batch_found_fits_and_the_next_one_does_not(tmp_path):
    """The limit is small, so that there are less than 100 rows of a micro-batch, where the search is exact."""
    limit, out = 118_000, tmp_path / "fit.json"
    status, printed, error = fit_here("--mixers=vmean", f"--memory={limit / 2**30}", f"--out={out}")
    assert status == 0 and "vmean" in printed, error
    (row,) = json.loads(out.read_text())
    found = row["largest_batch"]
    assert 8 < found < 50 and taken(found) <= limit < taken(found + 2)
    assert (row["target"], row["length"], row["batch_size"]) == ("cpu", 16, 8)
    # Dense layers alone: each weight meets each token once forward and twice backward; see tests/report/test_flops.py.
    for_each_token = 2 * 8 * 8 + 2 * 8 * 16
    head = 8 * 16 + 16 * 10
    assert row["flops"] == 3 * 2 * 8 * (16 * for_each_token + head)
    assert row["flops"] == of_steps(config_of("vmean", batch_size=8))[0].operations
    state = 3 * 4 * row["parameters"]  # parameters and two moments: read and written
    assert row["seconds"] > 0 and row["bytes"] >= 2 * state and row["memory"] >= state


def test_a_line_for_each_mixer_and_length(tmp_path):
    out = tmp_path / "fit.csv"
    arguments = [argument for argument in TINY if not re.search("max_len|batch_size", argument)]
    lists = ["--config.batch_size=2", "--mixers=vmean;vmean,linear", "--lengths=16,32"]
    status, _, error = here(command, *arguments, *lists, "--memory=1e-6", f"--out={out}")
    assert status == 0, error
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [(row["mixers"], row["length"]) for row in rows] == [
        ("vmean", "16"), ("vmean", "32"), ("vmean,linear", "16"), ("vmean,linear", "32"),
    ]  # fmt: skip
    assert {row["largest_batch"] for row in rows} == {"0"}
    assert float(rows[1]["flops"]) > 1.5 * float(rows[0]["flops"])


@pytest.mark.quick
def test_a_stop_loses_no_other_row(tmp_path, monkeypatch):
    def row(recipe, chip, memory, say):
        if recipe.config.mixers == "linear":
            raise KeyboardInterrupt
        return {"mixers": recipe.config.mixers}

    monkeypatch.setattr("efficient_tx.fit.__main__.row", row)
    out = tmp_path / "fit.json"
    status, _, _ = fit_here("--mixers=vmean,softmax,linear", f"--out={out}")
    assert status == 130 and json.loads(out.read_text()) == [{"mixers": "vmean"}, {"mixers": "softmax"}]


@pytest.mark.quick
def test_a_key_of_one_mixer_is_set_for_that_mixer_alone():
    file, keys = ConfigFile("quickstart"), ["--config.attention.lev.budget=8", "--config.model.layers=1"]
    assert values_of(file, ["softmax", "lev"], keys) == [
        {"mixers": "softmax", "model.layers": 1},
        {"mixers": "lev", "model.layers": 1, "attention.lev.budget": 8},
    ]
    with pytest.raises(ConfigError, match=r"attention\.lev\.budget is no key"):
        values_of(file, ["softmax", "vmean"], keys)


@pytest.mark.quick
def test_the_roofline():
    chip = DATA_SHEETS["h100"]
    assert chip.bound(989.4e12, 1, "bfloat16") == pytest.approx(1)
    assert chip.bound(1, 3350 * 10**9, "float32") == pytest.approx(1)
    assert chip.memory == 60 * 2**30
    here = chip_of("cpu")
    assert 1e8 < here.peak["float32"] < 1e15 and 1e8 < here.bandwidth < 1e14


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--target=h200"], "argument --target: 'h200' is no target: choose of cpu, v5e"),
        (["--mixers=softmx"], "config.mixers is 'softmx'"),
        (["--mixers=,"], "argument --mixers: it is empty"),
        (["--lengths=1x"], "argument --lengths: '1x' is no length, as 300, 4k or 1M"),
        (["--lengths=16"], "config.task.max_len is given one value, and a flag lists others"),
        (["--memory=0"], "argument --memory: '0' is no number above 0"),
        (["--out=a.txt"], "--out=a.txt: it is written as .json or .csv"),
        (["--out=/nowhere/a.csv"], "--out=/nowhere/a.csv: there is no folder /nowhere"),
        (["--config.step=1"], "config.step is no key: the nearest is steps"),
        (["--mixer=softmax"], "--mixer=softmax is no flag: the nearest is --mixers"),
    ],
)
def test_a_mistake_is_one_line(arguments, line):
    status, printed, error = fit_here(*arguments)
    assert (status, printed) == (2, "") and line in error and error.count("\n") == 1


def test_images_have_no_length_to_set():
    status, _, error = here(command, "--config=vit_fashion", "--lengths=16")
    assert status == 2 and "--lengths=16: the examples of vit_fashion have sizes of their own" in error


def test_without_the_plugins_a_line_names_the_extra(monkeypatch):
    monkeypatch.setattr("efficient_tx.extras.importlib.util.find_spec", lambda name: None)
    status, _, error = fit_here("--target=v5e")
    assert (status, error) == (2, "libtpu not installed: pip install 'efficient-tx[aot]'\n")


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v5e", "h100"])
def test_a_chip_that_is_not_there(target, tmp_path):
    """Nothing fits, so that one program is compiled and no other is looked for."""
    out = tmp_path / "fit.json"
    sizes = ["--config.batch_size=2", "--mixers=softmax", f"--target={target}", "--memory=1e-6", f"--out={out}"]
    status, printed, error = fit_here(*sizes)
    assert status == 0, error
    (row,) = json.loads(out.read_text())
    assert (row["target"], row["largest_batch"]) == (target, 0) and "data sheet" in printed
    assert row["flops"] == of_steps(config_of("softmax", batch_size=2))[0].operations
    assert row["memory"] > 3 * 4 * row["parameters"] and 0 < row["seconds"] < 1e-3
