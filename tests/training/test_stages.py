"""Reverse sparsification: what the optimizer keeps and forgets, and a run that is stopped around the change."""

import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_tx.linear import LINEAR, Dense, LowRank, Monarch, densify, replace, structured_learning_rates
from efficient_tx.training.checkpoint import Checkpoints, Mismatch
from efficient_tx.training.errors import Interrupted
from efficient_tx.training.evaluation import make_evaluate, trained_parameters
from efficient_tx.training.optimizer import OPTIMIZERS, OVER_ALL, make_optimizer
from efficient_tx.training.signals import StopSignals
from efficient_tx.training.stages import enter, make_stages, stage_at
from efficient_tx.training.step import init_state
from tests.support import toy
from tests.training.test_optimizer import adamw_formula

STEP = 3  # updates before the change in the tests of the optimizer


class Net(nnx.Module):
    def __init__(self, linear=LowRank):
        self.layers = nnx.List([linear(6, 4, rngs=nnx.Rngs(0)), linear(4, 6, rngs=nnx.Rngs(1))])
        self.norm = nnx.LayerNorm(6, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(6, 3, rngs=nnx.Rngs(2))

    def __call__(self, x):
        return self.head(self.norm(self.layers[1](nnx.tanh(self.layers[0](x)))))


def stages_of(linear=LowRank, rewarm=2, transforms=((STEP, densify),), **options):
    settings = {"steps": 20, "learning_rate": 0.1, "schedule": "cosine", "warmup": 0, "clip": 0} | options

    def make(model, births):
        scaling = structured_learning_rates(model) if options.get("structured_lr") else None
        return make_optimizer(births=births, rewarm=rewarm, scaling=scaling, **settings)[0]

    return make_stages(nnx.jit(lambda: Net(linear))(), list(transforms), make), make_optimizer(**settings)[1]


def started(stage):
    """The state with which a run begins, in one program."""
    graphdef, params = nnx.split(stage.model)
    return jax.jit(lambda params: init_state(nnx.merge(graphdef, params), stage.optimizer))(params)


def gradients(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)


def updated(state, optimizer, seeds):
    """The state after an update with the gradients of each seed, and these gradients."""

    @jax.jit
    def update(state, grads):
        updates, remembered = optimizer.update(grads, state.optimizer, state.params)
        return state._replace(params=optax.apply_updates(state.params, updates), optimizer=remembered)

    given = [gradients(state.params, seed) for seed in seeds]
    for grads in given:
        state = update(state, grads)
    return state, given


def named(tree):
    """Leaves by dotted path."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in paths]
    return {name: np.asarray(leaf) for name, (_, leaf) in zip(names, paths, strict=True)}


@pytest.mark.slow
def test_moments_of_dense_weights_start_anew_and_all_others_go_on():
    """Against AdamW's formula: with the whole history, or from the change on with a learning rate that rises again."""
    options = {"name": "adamw", "b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.1}
    (first, second), rate = stages_of(**options)
    start, before = updated(started(first), first.optimizer, range(STEP))
    changed = enter(start, first, second)
    end, after = updated(changed, second.optimizer, range(10, 14))
    initial, middle, final = (named(tree) for tree in (nnx.split(first.model)[1], changed.params, end.params))
    early, late = [named(grads) for grads in before], [named(grads) for grads in after]
    rates = [float(rate(step)) for step in range(STEP + 4)]
    kernels = [name for name in final if "layers" in name and "kernel" in name]
    assert len(kernels) == 2 and len(final) == 8

    def formula(grads, value, rates):
        """AdamW with a learning rate for each update: its m and v do not depend on the parameter."""
        for count in range(len(grads)):
            steps = list(adamw_formula(grads[: count + 1], np.zeros_like(value), 1.0, 0.8, 0.95, 1e-3, 0.0))
            last = steps[-1] - (steps[-2] if count else 0)
            value = value + rates[count] * (last - 0.1 * value)
        return value

    for name in final:
        if name in kernels:
            warm = np.minimum(1, np.arange(1, 5) / 2)  # over rewarm=2 updates
            expected = formula([grads[name] for grads in late], middle[name], rates[STEP:] * warm)
        else:
            expected = formula([grads[name] for grads in early + late], initial[name], rates)
        # Seven float32 updates of size 0.1, divided by 1 − b2^t.
        np.testing.assert_allclose(final[name], expected, rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in OVER_ALL])
def test_every_optimizer_carries_its_state_over_and_descends(name):
    rate = {"prodigy": 1.0, "muon": 0.3}.get(name, 0.1)
    (first, second), _ = stages_of(name=name, clip=1.0, learning_rate=rate, schedule="constant")
    start, _ = updated(started(first), first.optimizer, range(STEP))
    changed = enter(start, first, second)
    old, new, fresh = (
        named(tree) for tree in (start.optimizer, changed.optimizer, second.optimizer.init(changed.params))
    )
    born = f"inner_states.{STEP}."
    assert {path for path in new if path not in old} == {path for path in new if born in path} != set()
    for path, leaf in new.items():
        np.testing.assert_array_equal(leaf, fresh[path] if born in path else old[path])
    # The statistics of the structured factors are all that is gone.
    assert all("down" in path or "up" in path for path in old.keys() - new.keys())

    def loss(params):
        model = nnx.merge(nnx.split(second.model)[0], params)
        return jnp.mean((model(jnp.eye(6)) - 1.0) ** 2)

    def descend(state):
        updates, remembered = second.optimizer.update(jax.grad(loss)(state.params), state.optimizer, state.params)
        return state._replace(params=optax.apply_updates(state.params, updates), optimizer=remembered)

    @jax.jit
    def losses(start):
        end = jax.lax.fori_loop(0, 100, lambda _, state: descend(state), start)  # prodigy begins with tiny steps
        return loss(start.params), loss(end.params), end

    first_loss, last_loss, state = losses(changed)
    assert last_loss < 0.8 * first_loss
    assert not np.array_equal(state.params["layers"][0]["kernel"][...], changed.params["layers"][0]["kernel"][...])


@pytest.mark.parametrize("name", sorted(LINEAR.keys() - {"dense"}, key=lambda name: (name != "monarch", name)))
@pytest.mark.first(1)
def test_the_dense_model_computes_what_the_structured_one_did(name):
    (first, second), _ = stages_of(LINEAR[name])
    state = started(first)
    changed = jax.jit(lambda state: enter(state, first, second))(state)
    x = np.random.default_rng(5).normal(size=(7, 6)).astype(np.float32)
    one, other = (
        jax.jit(lambda params, stage=stage: nnx.merge(nnx.split(stage.model)[0], params)(x))(params)
        for stage, params in ((first, state.params), (second, changed.params))
    )
    # float32 rounding; inputs that a structure rounds differ by half of its step in each of six.
    np.testing.assert_allclose(other, one, atol=1e-5 + 6 * getattr(LINEAR[name], "input_step", 0.0))
    assert type(second.model.layers[0]).__name__ == "Dense" and type(first.model.layers[0]) is LINEAR[name]


def test_stages_are_told_apart_by_the_step_and_have_multipliers_of_their_own():
    (first, second), _ = stages_of(structured_lr=True, name="adam", schedule="constant", rewarm=0)
    assert [stage_at([first, second], step) is second for step in (0, STEP - 1, STEP, STEP + 1)] == [0, 0, 1, 1]
    state = enter(started(first), first, second)
    assert jax.tree.structure(second.like()) == jax.tree.structure(state)
    after, _ = updated(state, second.optimizer, [0])
    moved = {name: np.abs(value - named(state.params)[name]).max() for name, value in named(after.params).items()}
    # The first update of Adam is the learning rate: 0.1 for vectors, 0.1 · 64 / fan-in for kernels.
    expected = {"layers.0.kernel": 6.4 / 6, "layers.1.kernel": 6.4 / 4, "head.kernel": 6.4 / 6}
    assert moved == pytest.approx({name: expected.get(name, 0.1) for name in moved}, rel=1e-3)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that changes within a log window, at a step where nothing else is due, and that nobody stopped."""
    path = tmp_path_factory.mktemp("straight")
    return path, toy.make_loop(path, keep=100, **toy.densified(9)).run()


@pytest.mark.slow
def test_a_run_goes_on_dense_from_a_checkpoint_of_its_own(straight):
    path, state = straight
    assert Checkpoints(path / "checkpoints").steps() == [5, 6, 9, 10, 12, 15, 18, 20, 23]
    assert state.params["logits"]["kernel"].shape == (8, 2)
    loop = toy.make_loop(path, **toy.densified(9))
    first, second = loop._stages
    checkpoints = Checkpoints(path / "checkpoints")
    before, after = checkpoints.load(6, first.like()), checkpoints.load(9, second.like())
    assert (int(before.step), int(after.step)) == (6, 9)
    for step, stage in ((9, first), (6, second)):
        with pytest.raises(Mismatch):
            checkpoints.load(step, stage.like())
    # The window of the train line at step 12 holds steps from both sides.
    assert float(after.window["loss"][1]) == 8


@pytest.mark.parametrize(
    "moments", [(8, 9, 10), *(pytest.param(each, marks=pytest.mark.slow) for each in ((6, 9), (9, 23)))]
)
@pytest.mark.slow
def test_stopped_around_the_change_is_as_if_never_stopped(straight, tmp_path, monkeypatch, moments):
    for step in moments:
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match=f"step {step} of 23"):
            patch.setattr(
                StopSignals, "after", lambda self, done, at=step: signal.SIGTERM if done == at else self.received
            )
            toy.make_loop(tmp_path, keep=100, **toy.densified(9)).run()
        assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == step
    state = toy.make_loop(tmp_path, keep=100, **toy.densified(9)).run()
    assert toy.lines(tmp_path) == toy.lines(straight[0])
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(straight[1])):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.slow
def test_killed_around_the_change(straight, tmp_path):
    """SIGKILL before the transform, in the checkpoint right after it, and before the next one is written."""
    for moment, number in [("enter", 1), ("save", 1), ("save", 2)]:
        killed = subprocess.run([sys.executable, toy.__file__, tmp_path, moment, str(number), "9"])
        assert killed.returncode == -signal.SIGKILL
    toy.make_loop(tmp_path, **toy.densified(9)).run()
    assert toy.lines(tmp_path) == toy.lines(straight[0])


@pytest.mark.slow
def test_a_change_at_a_step_where_all_is_due(tmp_path, monkeypatch):
    """The checkpoint and the validation line of the step are of the dense form, also where the next process adds it."""
    loop = toy.make_loop(tmp_path / "straight", keep=100, **toy.densified(12))
    loop.run()
    dense = Checkpoints(tmp_path / "straight" / "checkpoints").load(12, loop._stages[1].like())
    scores = loop.evaluate(dense.params, loop._validation)
    (line,) = [line for line in loop._history.of("validation") if line["step"] == 12]
    assert {name: line[name] for name in ("loss", "accuracy")} == scores.means
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="step 12 of 23"):
        patch.setattr(StopSignals, "after", lambda self, done: signal.SIGTERM if done == 12 else self.received)
        toy.make_loop(tmp_path / "stopped", **toy.densified(12)).run()
    toy.make_loop(tmp_path / "stopped", **toy.densified(12)).run()
    assert toy.lines(tmp_path / "stopped") == toy.lines(tmp_path / "straight")


@pytest.mark.slow
def test_the_best_checkpoint_may_lie_before_the_change(tmp_path):
    options = {"optimizer": {"learning_rate": 0.0}, **toy.densified(9)}
    loop = toy.make_loop(tmp_path, **options)
    loop.run()
    # Without learning all validation lines have the same accuracy, and the earliest is the best.
    said = []
    step, stage, params = trained_parameters(str(tmp_path), "best", loop._stages, said.append)
    assert (step, stage.start) == (6, 0) and "w1" in params["logits"]
    last = trained_parameters(str(tmp_path), "last", loop._stages, said.append)
    # The loop alone makes no config.json, and so no checksum of one.
    assert set(said) == {f"{tmp_path} has no crc32.json, as in older versions: read unchecked"}
    assert (last[0], last[1].start) == (23, 9) and "kernel" in last[2]["logits"]
    line = loop._history.of("validation")[0]
    scores = [
        make_evaluate(nnx.split(stage.model)[0])(params, loop._validation)
        for stage, params in ((stage, params), last[1:])
    ]
    assert {score.means["accuracy"] for score in scores} == {line["accuracy"]}
    # Both forms compute the same, up to float32 rounding.
    assert [score.means["loss"] for score in scores] == pytest.approx([line["loss"]] * 2, rel=1e-6)


@pytest.mark.slow
def test_two_changes_one_after_the_other():
    """Two layers, densified at different steps: three groups of moments."""

    def densify_layer(index):
        return lambda model: replace(model, lambda path, _: path == ("layers", index), Dense)

    stages, _ = stages_of(Monarch, transforms=[(2, densify_layer(0)), (5, densify_layer(1))], name="adam")
    state = started(stages[0])
    for before, stage, seeds in zip(stages, stages[1:], (range(2), range(2, 5))):
        state = enter(updated(state, before.optimizer, seeds)[0], before, stage)
    state, _ = updated(state, stages[-1].optimizer, range(5, 7))
    counts = {path: int(leaf) for path, leaf in named(state.optimizer).items() if path.endswith("count")}
    found = {
        birth: {count for path, count in counts.items() if f"inner_states.{birth}." in path} for birth in (0, 2, 5)
    }
    assert found == {0: {7}, 2: {5}, 5: {2}}
