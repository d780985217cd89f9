"""Optimizers and schedules against plain numpy formulas, and against figures that torch printed."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_tx.checks import OptionError
from efficient_tx.training.optimizer import OPTIMIZERS, SCHEDULES, evaluation_params, make_optimizer

# Parameters of size one in float32, whose updates of size 0.1 are divided by 1 − b2^t: that loses 1/(1 − b2) = 50
# roundings of 6e-8.
CLOSE = {"rtol": 2e-6, "atol": 1e-6}

PARAMS = {"kernel": np.array([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]]), "bias": np.array([0.1, -0.2, 0.3])}
GRADS = [
    {name: np.random.default_rng(seed).normal(size=value.shape) for name, value in PARAMS.items()} for seed in range(4)
]


def single(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def run(grads=GRADS, params=PARAMS, **options):
    """Parameters after each update, and the last optimizer state."""
    optimizer, _ = make_optimizer(**{"steps": 100, "schedule": "constant", "warmup": 0, "clip": 0, **options})

    def step(carry, grad):
        params, state = carry
        updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    @jax.jit
    def train(params, grads):
        (_, state), history = jax.lax.scan(step, (params, optimizer.init(params)), grads)
        return history, state

    history, state = train(single(params), single(jax.tree.map(lambda *each: np.stack(each), *grads)))
    history = [jax.tree.map(lambda leaf, at=at: leaf[at], jax.device_get(history)) for at in range(len(grads))]
    return history, state


def adamw_formula(grads, p, lr, b1, b2, eps, decay):
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        p = p - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * p)
        yield p


def lion_formula(grads, p, lr, b1, b2, decay):
    m = 0.0
    for g in grads:
        p = p - lr * (np.sign(b1 * m + (1 - b1) * g) + decay * p)
        m = b2 * m + (1 - b2) * g
        yield p


def sgd_formula(grads, p, lr, b1, decay):
    m = 0.0
    for g in grads:
        m = b1 * m + g
        p = p - lr * (m + decay * p)
        yield p


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        (
            {"name": "adam", "b1": 0.8, "b2": 0.95, "eps": 1e-2},
            lambda g, p: adamw_formula(g, p, 0.1, 0.8, 0.95, 1e-2, 0),
        ),
        (
            {"name": "adamw", "b1": 0.9, "b2": 0.98, "eps": 1e-9, "weight_decay": 0.1},
            lambda g, p: adamw_formula(g, p, 0.1, 0.9, 0.98, 1e-9, 0.1),
        ),
        (
            {"name": "lion", "b1": 0.9, "b2": 0.99, "weight_decay": 0.1},
            lambda g, p: lion_formula(g, p, 0.1, 0.9, 0.99, 0.1),
        ),
        ({"name": "sgd", "b1": 0.7, "weight_decay": 0.1}, lambda g, p: sgd_formula(g, p, 0.1, 0.7, 0.1)),
        ({"name": "sgd", "b1": 0.0}, lambda g, p: sgd_formula(g, p, 0.1, 0.0, 0.0)),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_updates_are_the_formula(options, formula):
    history, _ = run(learning_rate=0.1, **options)
    for name, start in PARAMS.items():
        for step, expected in enumerate(formula([g[name] for g in GRADS], start)):
            np.testing.assert_allclose(history[step][name], expected, err_msg=f"{name}, update {step}", **CLOSE)


def test_schedule_free_evaluates_the_average():
    """Defazio et al. 2024: gradients at y, steps at z, evaluation at the mean x of the z's (constant learning rate)."""
    lr, b1, b2, eps, decay = 0.1, 0.9, 0.95, 1e-3, 0.1
    history, state = run(
        name="schedule_free_adamw", learning_rate=lr, b1=b1, b2=b2, eps=eps, weight_decay=decay, clip=1e9
    )
    averages = evaluation_params(state, history[-1])
    for name, start in PARAMS.items():
        x = y = z = start
        v = 0.0
        for t, grad in enumerate(GRADS, 1):
            g = grad[name]
            v = b2 * v + (1 - b2) * g**2
            z = z - lr * (g / (np.sqrt(v / (1 - b2**t)) + eps) + decay * y)
            x = (1 - 1 / t) * x + z / t
            y = (1 - b1) * z + b1 * x
            np.testing.assert_allclose(history[t - 1][name], y, rtol=1e-5, atol=1e-6)
        # x is recovered from y and z by a division by b1 at every step: a few roundings more.
        np.testing.assert_allclose(averages[name], x, rtol=1e-5, atol=1e-6)
        assert np.abs(x - y).max() > 1e-3
    plain, state = run(name="adamw")
    assert evaluation_params(state, plain[-1]) is plain[-1]


class Parts(nnx.Module):
    """One parameter of each sort that a model has."""

    def __init__(self, rngs):
        self.tokens = nnx.Embed(5, 4, rngs=rngs)
        self.embedding = nnx.Linear(6, 4, rngs=rngs)  # of patches, in a ViT
        self.positions = nnx.Param(jnp.ones((6, 4)))
        self.query = nnx.Linear(4, 6, rngs=rngs)
        self.blocks = nnx.Param(jnp.ones((2, 3, 3)))
        self.head = nnx.Linear(6, 3, rngs=rngs)


@pytest.mark.slow
def test_muon_orthogonalises_hidden_matrices_only():
    rng = np.random.default_rng(0)
    params = nnx.split(Parts(nnx.Rngs(0)))[1]
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    lr, b1, b2, eps, decay = 0.1, 0.8, 0.9, 1e-8, 0.1
    optimizer, _ = make_optimizer(
        steps=10, name="muon", schedule="constant", warmup=0, clip=0,
        learning_rate=lr, b1=b1, b2=b2, eps=eps, weight_decay=decay,
    )  # fmt: skip
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    muon = []
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        g, p = (np.asarray(dict(_paths(tree))[name], np.float64) for tree in (grads, params))
        adamw = next(adamw_formula([g], p, lr, b1, b2, eps, decay)) - p
        if np.allclose(update, adamw, **CLOSE):
            continue
        muon.append(name.removesuffix("/value"))
        # Newton-Schulz by Jordan's quintic on the first (Nesterov) momentum, which points along g.
        x = g / np.linalg.norm(g)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        expected = -lr * (0.2 * math.sqrt(max(g.shape)) * x + decay * p)
        # Five quintics multiply a float32 rounding by up to 3.4445^5 = 485.
        np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-5)
    assert muon == ["query/kernel"]


def _paths(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def test_mfac_multiplies_by_the_inverse_of_the_last_gradients():
    """Against the matrix itself, in float64; two of the four gradients have left the window at the end."""
    lr, b1, decay, window, damping = 0.1, 0.8, 0.1, 2, 0.5
    history, _ = run(name="mfac", learning_rate=lr, b1=b1, weight_decay=decay, window=window, damping=damping)
    flat = {name: slice(start, start + PARAMS[name].size) for name, start in (("kernel", 0), ("bias", 6))}
    vectors = [np.concatenate([grad[name].ravel() for name in flat]) for grad in GRADS]
    p = np.concatenate([PARAMS[name].ravel() for name in flat])
    average = np.zeros(9)
    for t, g in enumerate(vectors):
        fisher = damping * np.eye(9) + sum(np.outer(v, v) for v in vectors[max(0, t + 1 - window) : t + 1]) / window
        average = b1 * average + (1 - b1) * np.linalg.solve(fisher, g)
        p = p - lr * (average + decay * p)
        for name, part in flat.items():
            np.testing.assert_allclose(history[t][name].ravel(), p[part], err_msg=f"{name}, update {t}", **CLOSE)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_descends(name):
    """f(w) = ½|w − 3|² from w = 0, with warm-up (whose first learning rate is 0) and clipping: within 5 % of 3."""
    rate = {"prodigy": 1.0, "muon": 0.3}.get(name, 0.1)
    optimizer, _ = make_optimizer(steps=300, name=name, learning_rate=rate, schedule="constant", warmup=10)
    params = {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.tree.map(lambda w: w - 3.0, params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=300)
    params = evaluation_params(state, params)
    # Steps of fixed length (lion, muon) end up circling at a distance of a few steps.
    np.testing.assert_allclose(params["kernel"], 3.0, rtol=0.05)
    np.testing.assert_allclose(params["bias"], 3.0, rtol=0.05)


def test_clipping():
    grads = [{"kernel": np.array([[3.0, -4.0, 0.1]]), "bias": np.array([12.0])}]  # global norm 13.0004
    params = {"kernel": np.zeros((1, 3)), "bias": np.zeros(1)}
    plain = {"name": "sgd", "b1": 0.0, "learning_rate": 1.0, "grads": grads, "params": params}
    norm = math.sqrt(9 + 16 + 0.01 + 144)

    def updates(**options):
        history, _ = run(**plain, **options)
        return np.concatenate([np.ravel(history[0]["kernel"]), history[0]["bias"]])

    gradient = np.array([3.0, -4.0, 0.1, 12.0])
    np.testing.assert_allclose(updates(clip=2.0, clip_by="value"), [-2.0, 2.0, -0.1, -2.0], **CLOSE)
    np.testing.assert_allclose(updates(clip=2.0, clip_by="norm"), -gradient * 2 / norm, **CLOSE)
    np.testing.assert_allclose(updates(clip=14.0), -gradient, **CLOSE)
    np.testing.assert_allclose(updates(clip=0.0), -gradient, **CLOSE)


def rates(schedule, points, **options):
    _, rate = make_optimizer(schedule=schedule, **options)
    return [float(rate(s)) for s in points]


def test_rsqrt_is_long_range_arenas():
    """The peaks and Retrieval's last learning rate of the official settings (reference/lra.md §1.2)."""
    assert rates("rsqrt", [1000], steps=5000, learning_rate=0.05, warmup=1000) == [pytest.approx(1.58e-3, rel=2e-3)]
    assert rates("rsqrt", [8000], steps=20000, learning_rate=0.05, warmup=8000) == [pytest.approx(5.6e-4, rel=2e-3)]
    assert rates("rsqrt", [5000], steps=5000, learning_rate=0.05, warmup=8000) == [pytest.approx(3.5e-4, rel=2e-3)]
    points = [0, 1, 7, 8, 9, 50, 99]
    expected = [0.3 * min(1, s / 8) / math.sqrt(max(s, 8)) for s in points]
    np.testing.assert_allclose(rates("rsqrt", points, steps=100, learning_rate=0.3, warmup=8), expected, rtol=1e-6)
    expected = [0.3, 0.3, 0.3 / math.sqrt(2), 0.3 / math.sqrt(99)]
    np.testing.assert_allclose(
        rates("rsqrt", [0, 1, 2, 99], steps=100, learning_rate=0.3, warmup=0), expected, rtol=1e-6
    )


@pytest.mark.parametrize("warmup", [0, 8])
def test_cosine_and_constant(warmup):
    points = [0, 1, 7, 8, 9, 50, 99]
    ramp = np.array([min(1, s / warmup) if warmup else 1 for s in points])
    arc = np.array([0.5 * (1 + math.cos(math.pi * max(0, s - warmup) / 100)) for s in points])
    options = {"steps": 100, "learning_rate": 0.3, "warmup": warmup}
    # float32 cos near π loses what 1 + cos cancels.
    np.testing.assert_allclose(rates("cosine", points, **options), 0.3 * ramp * arc, rtol=1e-6, atol=3e-8)
    np.testing.assert_allclose(rates("constant", points, **options), 0.3 * ramp, rtol=1e-6)


def test_one_cycle_is_torchs():
    """What torch 2.13's OneCycleLR(max_lr, total_steps, pct_start=warmup/steps, anneal_strategy="linear") printed."""
    skyformer = {0: 4e-06, 1: 4.096096096096096e-06, 500: 5.204804804804806e-05, 999: 1e-4, 1000: 9.999795919183674e-05,
                 1001: 9.999591838367348e-05, 25000: 5.101856327346939e-05, 49999: 4.000000000008771e-10}  # fmt: skip
    short = [4e-05, 0.00028, 0.00052, 0.00076, 0.001, 0.0009333336, 0.0008666672, 0.0008000008, 0.0007333344,
             0.000666668, 0.0006000016, 0.0005333352, 0.0004666688, 0.0004000024, 0.000333336, 0.0002666696,
             0.0002000032, 0.0001333368, 6.66704e-05, 4e-09]  # fmt: skip
    # atol: the last value is the difference of numbers of the size of max_lr, rounded to float32.
    np.testing.assert_allclose(
        rates("one_cycle", skyformer, steps=50000, learning_rate=1e-4, warmup=1000),
        list(skyformer.values()), rtol=1e-6, atol=1e-11,
    )  # fmt: skip
    np.testing.assert_allclose(
        rates("one_cycle", range(20), steps=20, learning_rate=1e-3, warmup=5), short, rtol=1e-6, atol=1e-10
    )
    for warmup in (0, 1, 20):  # torch divides by zero at 1; a peak on the first or last step is a single line
        line = rates("one_cycle", range(20), steps=20, learning_rate=1.0, warmup=warmup)
        assert np.isfinite(line).all() and max(line) <= 1.0 and np.argmax(line) == max(warmup - 1, 0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_optimizer_follows_its_schedule(name):
    """sgd without momentum on a gradient of ones moves by the learning rate, the first one at 0 updates done."""
    options = {"steps": 10, "warmup": 3, "learning_rate": 0.5}
    history, _ = run([{"w": np.ones(1)}] * 6, {"w": np.zeros(1)}, name="sgd", b1=0.0, schedule=name, **options)
    expected = -np.cumsum(rates(name, range(6), **options))
    np.testing.assert_allclose([float(p["w"][0]) for p in history], expected, **CLOSE)


REFUSED = {
    ("adam", "weight_decay"), ("lion", "eps"), ("sgd", "b2"), ("sgd", "eps"), ("mfac", "b2"), ("mfac", "eps"),
    *((name, option) for name in OPTIMIZERS if name != "mfac" for option in ("window", "damping")),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("adam", "sgd"))) for name in OPTIMIZERS]
)
def test_every_option_works_or_is_refused(name):
    # Gradients of changing size, so that clipping shows even where only signs count (lion).
    grads = [jax.tree.map(lambda g, t=t: g * 10.0 ** -(t % 3), grad) for t, grad in enumerate(GRADS * 2)]
    options = {"name": name, "grads": grads, "learning_rate": 1.0 if name == "prodigy" else 0.1, "clip": 1.0}
    plain, _ = run(**options)
    for change in ({"weight_decay": 0.5}, {"b1": 0.5}, {"b2": 0.5}, {"eps": 0.5}, {"clip": 0.2}, {"clip_by": "value"},
                   {"window": 2}, {"damping": 0.5}):  # fmt: skip
        ((option, value),) = change.items()
        if (name, option) in REFUSED:
            with pytest.raises(OptionError, match=f"it has no effect with {name}") as caught:
                run(**{**options, **change})
            assert (caught.value.option, caught.value.value) == (option, value)
        else:
            changed, _ = run(**{**options, **change})
            same = [np.array_equal(plain[-1][k], changed[-1][k]) for k in PARAMS]
            assert not all(same), change


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "adamm"},
            "name is 'adamm': choose one of adam, adamw, lion, sgd, muon, schedule_free_adamw, prodigy, "
            "mfac (nearest: 'adam')",
        ),
        (
            {"schedule": "cosin"},
            "schedule is 'cosin': choose one of cosine, rsqrt, one_cycle, constant (nearest: 'cosine')",
        ),
        ({"clip_by": "vale"}, "clip_by is 'vale': choose one of norm, value (nearest: 'value')"),
        ({"clip": -1.0}, "clip is -1.0: use 0 or more"),
        ({"b2": 1.0}, "b2 is 1.0: use a number in [0, 1)"),
        ({"learning_rate": float("nan")}, "learning_rate is nan: use 0 or more"),
        (
            {"schedule": "one_cycle", "warmup": 11},
            "warmup is 11: one_cycle peaks within the run, whose steps are 10",
        ),
        (
            {"name": "schedule_free_adamw", "b1": 0.0},
            "b1 is 0.0: schedule_free_adamw interpolates with weight b1, use a number in (0, 1)",
        ),
    ],
)
def test_errors_are_one_clear_line(options, message):
    with pytest.raises(OptionError) as error:
        make_optimizer(steps=10, **options)
    assert str(error.value) == message and error.value.option == message.split()[0]
