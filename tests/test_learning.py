"""Every mixer learns in 30 steps on small ListOps, on four devices with the same losses; and a hybrid."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION
from efficient_tx.config import build, make_config
from efficient_tx.data.batching import train_batches
from efficient_tx.training import metrics
from efficient_tx.training.signals import StopSignals
from efficient_tx.training.step import clear_window, init_state, make_train_step, split_batch
from tests.support import toy
from tests.support.command import TINY, evaluate_here, train_here
from tests.support.mixers import SHARED

STEPS = 30


def config_of(name, data):
    return make_config(
        "lra.listops",
        name,
        steps=STEPS,
        batch_size=16,
        task={"data_dir": str(data), "train_size": 32, "val_size": 10, "test_size": 10, "min_len": 5, "max_len": 32},
        model={"features": 16, "layers": 1, "heads": 2, "mlp_features": 32, "dropout": 0.1},
        attention={name: ATTENTION[name].within(8)},
        # A large eps keeps Adam from turning the roundings of tiny gradients into whole steps.
        optimizer={"learning_rate": 1e-2, "schedule": "constant", "warmup": 3, "eps": 1e-3},
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def training(config):
    """(devices, steps) -> losses: the model and where it starts from are made once."""
    task = build.build_task(config)
    model = build.build_model(config, task)
    optimizer = build.build_stages(config, model)[0][0].optimizer
    batches = train_batches(task, batch_size=config.batch_size, seed=0)
    graphdef, start = nnx.split(model)[0], init_state(model, optimizer)

    def losses(devices, steps):
        devices = jax.local_devices()[:devices]
        step = make_train_step(graphdef, optimizer, seed=0, grad_accum=1, devices=devices)
        state, seen = jax.tree.map(jnp.copy, start), []  # a step takes the buffers of the state that it is given
        for i in range(steps):
            state = step(clear_window(state), split_batch(batches[i], devices))
            seen.append(metrics.means(state.window)["loss"])
        assert int(state.bad_step) == -1
        return np.array(seen)

    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTION)
def test_thirty_steps_learn_and_four_devices_give_the_same_losses(name, data):
    losses = training(config_of(name, data))
    one = losses(1, STEPS)
    # 15 times the same two batches: what falls is no luck of the draw.
    assert one[-4:].mean() < one[:4].mean() - 0.2
    if name not in SHARED:
        return
    four = losses(4, 15)
    # Sums in another order, 6e-8 a rounding, through updates that feed it back.
    np.testing.assert_allclose(four, one[:15], rtol=1e-3)
    np.testing.assert_allclose(four[:5], one[:5], rtol=1e-5)


@pytest.mark.slow
def test_a_hybrid_trains_is_stopped_resumes_and_is_evaluated(tmp_path, monkeypatch):
    """Two mixers in turn, `:gla,softmax`: interrupted, it ends with the lines of one that was not."""
    hybrid = [*TINY, "--config.mixers=gla,softmax", "--config.model.layers=2"]
    status, _, error = train_here(tmp_path / "straight", run=hybrid)
    assert status == 0, error
    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "after", lambda self, step: signal.SIGTERM if step == 17 else self.received)
        assert train_here(tmp_path / "run", run=hybrid)[0] == 143
    status, out, error = train_here(tmp_path / "run", run=hybrid)
    assert (status, error) == (0, "") and "resuming from step 17" in out
    assert toy.lines(tmp_path / "run") == toy.lines(tmp_path / "straight")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["mixers"] == "gla,softmax"
    status, out, error = evaluate_here(f"--workdir={tmp_path / 'run'}")
    assert (status, error) == (0, "")
    test_accuracy = json.loads((tmp_path / "run" / "summary.json").read_text())["test_accuracy"]
    assert f"{test_accuracy:.4f}" in out
