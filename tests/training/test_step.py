"""One step on one device against numpy: loss, gradient, metrics, keys, ownership of the state, a single program."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_tx.training import metrics
from efficient_tx.training.step import (
    check_batch_size,
    clear_window,
    init_state,
    make_eval_step,
    make_train_step,
    split_batch,
)

CLASSES, FEATURES = 3, 4


class Linear(nnx.Module):
    """Logits x W of real-valued inputs: cross-entropy and its gradient have a closed form."""

    def __init__(self):
        self.weight = nnx.Param(jnp.asarray(np.random.default_rng(0).normal(size=(FEATURES, CLASSES)), jnp.float32))

    def __call__(self, inputs, *, mask, key=None):
        return inputs @ self.weight[...]


def batch_of(shape, seed, weight=None):
    rng = np.random.default_rng(seed)
    return {
        "inputs": rng.normal(size=(*shape, FEATURES)).astype(np.float32),
        "mask": np.ones(shape, bool),
        "label": rng.integers(0, CLASSES, shape).astype(np.int32),
        "weight": np.ones(shape, np.float32) if weight is None else weight,
    }


def closed_form(weight_matrix, batch):
    """Weighted mean cross-entropy, its gradient and the weighted share of right answers, in float64."""
    x = batch["inputs"].reshape(-1, FEATURES).astype(np.float64)
    label, weight = batch["label"].ravel(), batch["weight"].ravel().astype(np.float64)
    logits = x @ weight_matrix
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    onehot = np.eye(CLASSES)[np.minimum(label, CLASSES - 1)]
    loss = -np.log((probability * onehot).sum(1))
    gradient = x.T @ ((probability - onehot) * weight[:, None]) / weight.sum()
    right = logits.argmax(1) == label
    return (loss * weight).sum() / weight.sum(), gradient, (right * weight).sum() / weight.sum()


def trainer(model, optimizer, devices=1, **options):
    devices = jax.local_devices()[:devices]
    step = make_train_step(nnx.split(model)[0], optimizer, devices=devices, **{"seed": 0, **options})
    return init_state(model, optimizer), lambda state, batch: step(state, split_batch(batch, devices))


WEIGHTS = np.array([1, 0.5, 0, 2, 1, 0, 0.25, 1], np.float32)


@pytest.mark.parametrize("grad_accum", [1, 4])
@pytest.mark.parametrize("shape", [(8,), (8, 5)], ids=["label per example", "label per token"])
def test_loss_gradient_and_metrics_are_the_closed_form(shape, grad_accum):
    """Also: fractional weights, and labels out of range where the weight is 0."""
    weight = np.broadcast_to(WEIGHTS.reshape(8, *[1] * (len(shape) - 1)), shape).copy()
    batch = batch_of(shape, 1, weight)
    batch["label"] = np.where(weight > 0, batch["label"], 99)
    model, lr = Linear(), 0.5
    state, step = trainer(model, optax.sgd(lr), grad_accum=grad_accum)
    expected, seen = np.asarray(model.weight[...], np.float64), []
    for _ in range(3):
        state = step(state, batch)
        loss, gradient, accuracy = closed_form(expected, batch)
        seen.append((loss, accuracy, np.linalg.norm(gradient)))
        expected = expected - lr * gradient
        # Sums of 40 terms of size one in float32, three updates one upon the other.
        np.testing.assert_allclose(jax.tree.leaves(state.params)[0], expected, rtol=1e-5, atol=1e-6)
    loss, accuracy, norm = np.mean(seen, axis=0)
    means = metrics.means(state.window)
    assert means == {
        "loss": pytest.approx(loss, rel=1e-5),
        "accuracy": pytest.approx(accuracy, rel=1e-6),
        "grad_norm": pytest.approx(norm, rel=1e-5),
    }
    counts = {name: float(count) for name, (_, count) in state.window.items()}
    assert counts == {"loss": 3 * weight.sum(), "accuracy": 3 * weight.sum(), "grad_norm": 3}
    assert int(state.step) == 3 and int(state.bad_step) == -1
    assert all(np.isnan(mean) for mean in metrics.means(clear_window(state).window).values())


def test_the_loss_of_mixed_examples_is_mixed():
    """mix · loss of `label` + (1 − mix) · loss of `label2`; the accuracy is that of `label`."""
    batch = batch_of((8,), 1, WEIGHTS)
    second, mix = batch_of((8,), 2)["label"], np.linspace(0, 1, 8).astype(np.float32)
    model = Linear()
    state, step = trainer(model, optax.sgd(0.5))
    weights = np.asarray(model.weight[...], np.float64)
    after = step(state, {**batch, "label2": second, "mix": mix})
    loss, gradient, right = 0.0, 0.0, closed_form(weights, batch)[2]
    for label, share in [(batch["label"], mix), (second, 1 - mix)]:
        part = closed_form(weights, {**batch, "label": label, "weight": WEIGHTS * share})
        loss += part[0] * (WEIGHTS * share).sum() / WEIGHTS.sum()
        gradient += part[1] * (WEIGHTS * share).sum() / WEIGHTS.sum()
    means = metrics.means(after.window)
    np.testing.assert_allclose([means["loss"], means["accuracy"]], [loss, right], rtol=1e-5)  # float32
    np.testing.assert_allclose(jax.tree.leaves(after.params)[0], weights - 0.5 * gradient, atol=1e-5)


@pytest.mark.quick
def test_evaluation_is_the_closed_form():
    batch, model, devices = batch_of((8,), 2, WEIGHTS), Linear(), jax.local_devices()[:1]
    graphdef, params = nnx.split(model)
    evaluate = make_eval_step(graphdef, devices=devices)
    loss, _, accuracy = closed_form(np.asarray(model.weight[...], np.float64), batch)
    means = metrics.means(evaluate(params, split_batch(batch, devices)))
    assert means == {"loss": pytest.approx(loss, rel=1e-6), "accuracy": pytest.approx(accuracy, rel=1e-6)}


def test_batch_of_weight_zero_changes_nothing():
    model = Linear()
    state, step = trainer(model, optax.sgd(0.5))
    state = step(state, batch_of((8,), 1, np.zeros(8, np.float32)))
    np.testing.assert_array_equal(jax.tree.leaves(state.params)[0], model.weight[...])
    assert int(state.bad_step) == -1


@pytest.mark.quick
def test_fetched_sums_stay_exact():
    """2^24 + 1 is where float32 stops counting."""
    total = {"accuracy": (0.0, 0.0)}
    for _ in range(3):
        total = metrics.add(total, metrics.fetch({"accuracy": (np.float32(2**24), np.float32(2**24))}))
        total = metrics.add(total, metrics.fetch({"accuracy": (np.float32(1), np.float32(1))}))
    assert total["accuracy"] == (3 * (2**24 + 1), 3 * (2**24 + 1))


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_first_bad_step_is_kept(bad):
    """Step 2 has an infinite loss (a logit of −1e39 for the label), or a finite loss whose gradient overflows."""

    class Root(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.ones(()))

        def __call__(self, inputs, *, mask, key=None):
            w = self.weight[...]
            return jnp.stack([jnp.zeros_like(inputs), w * inputs if bad == "loss" else jnp.sqrt(w - inputs)], axis=1)

    def batch(x):
        return {
            "inputs": np.array([0.0, x], np.float32),
            "mask": np.ones(2, bool),
            "label": np.ones(2, np.int32),
            "weight": np.ones(2, np.float32),
        }

    state, step = trainer(Root(), optax.sgd(0.0))
    state = step(state, batch(0.5))
    assert int(state.bad_step) == -1
    state = step(state, batch(-np.inf if bad == "loss" else 1.0))  # the derivative of √ at 0
    assert int(state.bad_step) == 2
    assert np.isfinite(metrics.means(state.window)["loss"]) == (bad == "gradient")
    state = step(step(state, batch(0.5)), batch(-np.inf))
    assert int(state.bad_step) == 2 and int(state.step) == 4


@pytest.mark.parametrize(("devices", "grad_accum"), [(1, 1), (4, 1), (2, 2)])
@pytest.mark.first(1)
def test_keys_belong_to_seed_step_and_row(devices, grad_accum):
    """A model whose logits are its keys' draws: the loss is that of fold_in(fold_in(key(seed), step), row)."""

    class Draws(nnx.Module):
        def __init__(self):
            self.unused = nnx.Param(jnp.zeros(()))

        def __call__(self, inputs, *, mask, key=None):
            return jax.vmap(lambda key: jax.random.normal(key, (CLASSES,)))(key) + self.unused[...]

    batch, seed = batch_of((8,), 3), 5
    state, step = trainer(Draws(), optax.sgd(0.1), devices, seed=seed, grad_accum=grad_accum)
    for index in range(3):
        state = step(clear_window(state), batch)
        key = jax.random.fold_in(jax.random.key(seed), index)
        logits = jnp.stack([jax.random.normal(jax.random.fold_in(key, row), (CLASSES,)) for row in range(8)])
        expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        assert metrics.means(state.window)["loss"] == pytest.approx(float(expected), rel=1e-6)


def test_state_is_donated_and_the_model_is_not():
    model = Linear()
    before = np.asarray(model.weight[...])
    for devices in (1, 4):
        state, step = trainer(model, optax.contrib.prodigy(), devices)  # which remembers the first parameters
        state = step(state, batch_of((8,), 1))
        following = step(state, batch_of((8,), 1))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(following))
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(following))
    np.testing.assert_array_equal(model.weight[...], before)


def test_donation_saves_the_memory_of_the_state():
    model, optimizer, devices = Linear(), optax.adam(0.1), jax.local_devices()
    state = init_state(model, optimizer)
    step = make_train_step(nnx.split(model)[0], optimizer, seed=0, devices=devices)
    memory = step.lower(state, split_batch(batch_of((8,), 1), devices)).compile().memory_analysis()
    parameters = 4 * FEATURES * CLASSES
    assert memory.alias_size_in_bytes >= 3 * parameters  # weights and both moments


@pytest.mark.parametrize("devices", [1, 4])
def test_one_program_for_all_steps(devices):
    """New state, state after a step, cleared window, state in host memory or on one device (from a checkpoint)."""
    programs = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            programs.append(event)

    state, step = trainer(Linear(), optax.adam(0.1), devices, grad_accum=2)
    batch, device = batch_of((8,), 1), jax.local_devices()[0]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(3):
            state = step(state, batch)
        assert len(programs) == 1
        state = step(clear_window(state), batch)
        assert len(programs) <= 2  # the zeros, unless another test has compiled them
        programs.clear()
        state = step(clear_window(step(state, batch)), batch)
        state = step(jax.tree.map(np.asarray, state), batch)
        state = step(jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), device), state), batch)
        assert not programs
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_bfloat16_logits_get_a_float32_loss():
    """1,000 rows: a bfloat16 sum would stop growing at 256."""

    class Half(Linear):
        def __call__(self, inputs, *, mask, key=None):
            return (inputs @ self.weight[...]).astype(jnp.bfloat16)

    model, batch = Half(), batch_of((1000,), 4)
    state, step = trainer(model, optax.sgd(0.1))
    state = step(state, batch)
    loss, gradient, _ = closed_form(np.asarray(model.weight[...], np.float64), batch)
    means = metrics.means(state.window)
    # bfloat16 logits have a relative error of 2^-9, which the mean over 1,000 rows mostly cancels.
    assert means["loss"] == pytest.approx(loss, rel=1e-3)
    assert means["grad_norm"] == pytest.approx(np.linalg.norm(gradient), rel=2e-2)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))


def test_pairs_arrive_by_name():
    class Pair(Linear):
        def __call__(self, inputs, inputs2, *, mask, mask2, key=None):
            return jnp.where(mask2[:, None], inputs - inputs2, 0) @ self.weight[...]

    batch, other = batch_of((8,), 1), batch_of((8,), 2)
    state, step = trainer(Pair(), optax.sgd(0.1))
    state = step(state, {**batch, "inputs2": other["inputs"], "mask2": other["mask"]})
    difference = {**batch, "inputs": batch["inputs"] - other["inputs"]}
    loss, _, _ = closed_form(np.asarray(Linear().weight[...], np.float64), difference)
    assert metrics.means(state.window)["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.quick
def test_rows_keep_their_order():
    batch = split_batch({"inputs": np.arange(24).reshape(12, 2), "label": np.arange(12)}, jax.local_devices())
    assert batch["inputs"].shape == (4, 3, 2)
    np.testing.assert_array_equal(batch["label"], [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]])


@pytest.mark.slow
def test_sizes_that_do_not_fit_are_named():
    devices = jax.local_devices()
    with pytest.raises(
        ValueError, match=r"^10 rows of a batch cannot be shared out over 4 devices: use a multiple of 4$"
    ):
        split_batch(batch_of((10,), 0), devices)
    message = r"^batch_size=24 cannot be shared out over devices=4 × grad_accum=4: use a multiple of 16$"
    with pytest.raises(ValueError, match=message):
        check_batch_size(24, devices=4, grad_accum=4)
    state, step = trainer(Linear(), optax.sgd(0.1), 4, grad_accum=4)
    with pytest.raises(ValueError, match=message):
        step(state, batch_of((24,), 0))
    step = make_train_step(nnx.split(Linear())[0], optax.sgd(0.1), seed=0, devices=devices)
    with pytest.raises(ValueError, match="the batch is split over 2 devices, the step runs on 4"):
        step(state, split_batch(batch_of((24,), 0), devices[:2]))
