"""The weights of a run as a file: the model is built again from it, and another run starts from it."""

import json

import numpy as np
import pytest

from efficient_tx.config.structure import entries
from efficient_tx.config.trained import trained_run
from efficient_tx.data.batching import evaluation_batches
from efficient_tx.export import export_weights, model_of_weights
from efficient_tx.models.weights import save_weights
from efficient_tx.task import model_inputs
from efficient_tx.training.errors import Refused, RunError
from tests.support.command import compress_here, finished_run, train_here
from tests.support.models import run

STILL = ("--config.optimizer.learning_rate=0.0", "--config.steps=1")


def read(path):
    return json.loads(path.read_text())


def check(workdir, path):
    """The model of the file computes what that of the run does, bit for bit, without the workdir and its data."""
    _, task, model, step = trained_run(workdir, "best")
    assert export_weights(workdir, path) == step
    batch = model_inputs(evaluation_batches(task.test, task, batch_size=8)[0])
    config, again = model_of_weights(path)
    np.testing.assert_array_equal(run(again, **batch), run(model, **batch))
    return config


def test_the_model_is_built_again_from_the_file(tmp_path):
    config = check(finished_run()[0], tmp_path / "a.safetensors")
    assert config.steps == 40 and config.task.data_dir is None


def test_what_cannot_be_is_one_line(tmp_path):
    for workdir, name, options, line in [
        (tmp_path, "a.safetensors", {}, "is not the workdir of a run"),
        (finished_run()[0], "a.npz", {}, r"a.npz does not end in .safetensors"),
        (finished_run()[0], "a.safetensors", {"dtype": "int8"}, "dtype is 'int8': choose one of float32, bfloat16"),
        (finished_run()[0], "a.safetensors", {"checkpoint": "7"}, "7: .* has best, last and the steps "),
    ]:
        with pytest.raises(Refused, match=line) as error:
            export_weights(workdir, tmp_path / name, **options)
        assert "\n" not in str(error.value) and not [*tmp_path.iterdir()]
    with pytest.raises(RunError, match=r"cannot write .*nowhere"):
        export_weights(finished_run()[0], tmp_path / "nowhere" / "a.safetensors")
    save_weights(model_of(finished_run()[0]), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="has no config of a run: export_weights writes one"):
        model_of_weights(tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"none\.safetensors: there is no such file"):
        model_of_weights(tmp_path / "none.safetensors")


def model_of(workdir):
    return trained_run(workdir, "best")[2]


@pytest.mark.slow
def test_a_run_starts_from_the_file_as_from_the_workdir(tmp_path):
    """Nothing is learnt in between: the accuracy is the run's own, to the last item. And bad files are one line."""
    path, source = tmp_path / "a.safetensors", finished_run()[0]
    export_weights(source, path)
    status, out, error = train_here(tmp_path / "run", *STILL, f"--config.init_from={path}")
    assert (status, error) == (0, "") and f"parameters of {path}, of a run\n" in out
    for key in ("val_accuracy", "test_accuracy"):
        assert read(tmp_path / "run" / "summary.json")[key] == read(source / "summary.json")[key]
    # Layers of another structure are projected.
    monarch = ["--config.linear.mlp.name=monarch", f"--config.init_from={path}"]
    status, out, error = train_here(tmp_path / "monarch", *STILL, *monarch)
    assert (status, error) == (0, "") and "encoder.blocks.0.mlp.up projected, relative error 0." in out
    save_weights(model_of(source), tmp_path / "plain.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    for name, options, line in [
        ("plain", [], "a file has the parameters of a vit for images or of a bert for texts"),
        ("a", [], "cannot be read"),
    ]:
        given = f"--config.init_from={tmp_path / name}.safetensors"
        status, _, error = train_here(tmp_path / "bad", given, *options)
        assert status == 2 and error.startswith(given) and line in error and error.count("\n") == 1
    assert not (tmp_path / "bad").exists()


@pytest.mark.slow
def test_layers_that_changed_are_in_the_file(tmp_path):
    """Of a compressed run, whose layers and heads are no longer those of its config, and of one that became dense."""
    small, path = tmp_path / "small", tmp_path / "small.safetensors"
    arguments = ("--method=flap", "--budget=0.6", f"--workdir={finished_run()[0]}", f"--out={small}")
    assert compress_here(*arguments)[0] == 0
    assert entries(check(small, path)) == read(small / "config.json")["structure"] != {}
    status, _, error = train_here(tmp_path / "on", *STILL, f"--config.init_from={path}")
    assert (status, error) == (0, "")
    assert read(tmp_path / "on" / "summary.json")["test_accuracy"] == read(small / "summary.json")["test_accuracy"]
    became = tmp_path / "became"
    options = ("--config.linear.mlp.name=monarch", "--config.densify_at=1", "--config.densify_warmup=0")
    assert train_here(became, "--config.steps=4", "--config.eval_every=4", *options)[0] == 0
    assert check(became, tmp_path / "became.safetensors").linear.mlp.name == "dense"
