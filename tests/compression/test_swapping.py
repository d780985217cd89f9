"""Mixers of a trained model are swapped, and the result learns the outputs of the original's blocks."""

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_tx.attention import Kernelized, Lev, LinearAttention, Linformer, RetNet, Skyformer, Soft, Softmax
from efficient_tx.compression.distillation import DISTILLATION, Student, example_error, join, joined, variances
from efficient_tx.compression.swapping import mixer_places, swap
from efficient_tx.linear.replacement import dotted, find
from efficient_tx.models import Classifier, DualEncoder, Pyramid, TokenClassifier
from efficient_tx.training.step import init_state, make_train_step, split_batch
from tests.support import toy
from tests.support.command import compress_here, evaluate_here, finish, start, train_here
from tests.support.models import run

LENGTH, BATCH = 12, 8
SIZES = {"vocab_size": 16, "features": 16, "layers": 2, "heads": 2, "mlp_features": 32, "max_len": LENGTH}


def model(*mixers, seed=0, kind=Classifier, **sizes):
    return kind(num_classes=3, mixers=mixers or [Softmax], rngs=nnx.Rngs(seed), **(SIZES | sizes))


@functools.cache
def batch(seed=1):
    draws = np.random.default_rng(seed)
    return {
        "inputs": draws.integers(0, 16, (BATCH, LENGTH)).astype(np.int32),
        "mask": np.arange(LENGTH) < draws.integers(4, LENGTH + 1, (BATCH, 1)),
        "label": np.zeros(BATCH, np.int32),
        "weight": np.ones(BATCH, np.float32),
    }


def features(of=None):
    return {name: jnp.asarray((of or batch())[name]) for name in ("inputs", "mask")}


def output(made):
    return run(made, batch()["inputs"], mask=batch()["mask"])


def values(made):
    return {path: np.asarray(array) for path, array in nnx.to_flat_state(nnx.as_pure(nnx.state(made)))}


def test_a_swap_to_the_same_mixer_is_the_identity():
    source, target = model(), model(seed=1)
    became = swap(source, target)
    np.testing.assert_array_equal(output(target), output(source))
    assert not became.new and not became.dropped
    assert len(became.kept) == SIZES["layers"] * 4 * 2  # q, k, v, out: kernel and bias


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Softmax, functools.partial(Lev, budget=LENGTH)),
        (Kernelized, functools.partial(Skyformer, landmarks=2 * LENGTH, ridge=1e-5)),
    ],
    ids=["lev", "skyformer"],
)
def test_a_mixer_with_all_keys_changes_nothing(before, after):
    source, target = model(before), model(before, after, seed=1)
    swap(source, target)
    # Skyformer adds its ridge to the kernel, and solves in float32.
    np.testing.assert_allclose(output(target), output(source), atol=1e-5 if after.func is Lev else 1e-4)


@pytest.mark.parametrize(
    ("mixer", "new", "dropped"), [(Linformer, ["e", "f"], []), (Soft, [], ["k.bias", "k.kernel"])], ids=["new", "lost"]
)
def test_what_one_mixer_alone_has_is_new_or_dropped(mixer, new, dropped):
    source, target, fresh = model(), model(Softmax, mixer, seed=1), model(Softmax, mixer, seed=1)
    became = swap(source, target)
    place = ("encoder", "blocks", 1, "mixer")
    assert sorted(map(dotted, became.new)) == [f"{dotted(place)}.{name}" for name in new]
    assert sorted(map(dotted, became.dropped)) == [f"{dotted(place)}.{name}" for name in dropped]
    trained, initial, here = values(source), values(fresh), values(target)
    for path, array in here.items():
        np.testing.assert_array_equal(array, (initial if path in became.new else trained)[path])


def test_what_cannot_be_swapped_is_one_line_and_changes_nothing():
    cases = [
        (
            model(RetNet, seed=1),
            "encoder.blocks.0.mixer.out is 16 × 16 in Softmax and 32 × 16 in RetNet, which therefore cannot replace it",
        ),
        (model(Lev, seed=1, mlp_features=40), "encoder.blocks.0.mlp.down.kernel is (32, 16) there and (40, 16) here"),
        (model(Lev, seed=1, layers=1), "is (16,) there and absent here"),
    ]
    for target, line in cases:
        before = values(target)
        with pytest.raises(ValueError) as error:
            swap(model(), target)
        assert str(error.value).endswith(line) and "\n" not in str(error.value)
        for path, array in values(target).items():
            np.testing.assert_array_equal(array, before[path])


@pytest.mark.quick
def test_a_pattern_names_blocks_or_stages():
    assert mixer_places(nnx.eval_shape(lambda: model(layers=3))) == 3
    sizes = {"features": (8, 8), "depths": (2, 3), "heads": (1, 1)}
    pyramid = functools.partial(Pyramid, num_classes=3, image_shape=(16, 16, 3), mixers=[Softmax], **sizes)
    assert mixer_places(nnx.eval_shape(lambda: pyramid(rngs=nnx.Rngs(0)))) == 2


def hidden_states(made, of):
    """The input of the first block and the output of each, by hand."""
    x = [made.embedding(of["inputs"], mask=of["mask"])]
    for block in made.encoder.blocks:
        x.append(block(x[-1], mask=jnp.asarray(of["mask"])))
    return x


def mean_square(off, mask):
    """For each example, in a loop, float64."""
    return np.array([np.mean(np.square(one[real].astype(np.float64))) for one, real in zip(np.asarray(off), mask)])


@pytest.mark.parametrize("kind", [Classifier, TokenClassifier])
def test_errors_are_those_of_the_blocks_run_by_hand(kind):
    teacher, student = model(kind=kind), model(LinearAttention, seed=1, kind=kind)
    spread = variances(teacher, [batch(1), batch(2)])
    # Variances: of all real tokens of both batches at once.
    states = [hidden_states(teacher, batch(seed)) for seed in (1, 2)]
    for i in range(2):
        tokens = np.concatenate([np.asarray(x[i + 1])[batch(seed)["mask"]] for seed, x in zip((1, 2), states)])
        assert spread[i] == pytest.approx(tokens.var(0).mean(), rel=1e-5)
    mask = batch()["mask"]
    answers = [run(one, batch()["inputs"], mask=mask) for one in (teacher, student)]
    per_token = kind is TokenClassifier
    both = [np.concatenate([run(teacher, batch(s)["inputs"], mask=batch(s)["mask"]) for s in (1, 2)])]
    tokens = both[0][np.concatenate([batch(1)["mask"], batch(2)["mask"]])] if per_token else both[0]
    assert spread[2] == pytest.approx(tokens.var(0).mean(), rel=1e-5)

    theirs, graphdef, params = states[0], *nnx.split(teacher)
    alone = Student(student, graphdef, spread)
    found = np.asarray(alone(teacher=params, **features()))
    outs = [block(x, mask=jnp.asarray(mask)) for block, x in zip(student.encoder.blocks, theirs)]
    expected = [mean_square(out - y, mask) / v for out, y, v in zip(outs, theirs[1:], spread)]
    np.testing.assert_allclose(found, np.stack([np.mean(expected, 0), np.zeros(BATCH)], 1), rtol=1e-4)

    found = np.asarray(joined(alone)(teacher=params, **features()))
    expected = [
        mean_square(x - y, mask) / v for x, y, v in zip(hidden_states(student, batch())[1:], theirs[1:], spread)
    ]
    off = answers[1] - answers[0]
    last = mean_square(off if per_token else off[:, None], mask if per_token else np.ones((BATCH, 1), bool)) / spread[2]
    np.testing.assert_allclose(found, np.stack([np.mean(expected, 0), last], 1), rtol=1e-4)


def test_both_texts_of_a_pair_count_for_their_example():
    draws = np.random.default_rng(0)
    off, mask = draws.normal(size=(6, 4, 5)), draws.random((6, 4)) < 0.7
    off[~mask] = np.nan
    mask[[1, 4]] = False  # an example without tokens has no error
    of_pairs = [
        np.concatenate([off[i][mask[i]], off[i + 3][mask[i + 3]]]) if mask[[i, i + 3]].any() else np.zeros(1)
        for i in range(3)
    ]
    expected = [np.mean(np.square(tokens)) for tokens in of_pairs]
    np.testing.assert_allclose(example_error(jnp.asarray(off), jnp.asarray(mask), 3), expected, rtol=1e-5)
    teacher = model(kind=DualEncoder)
    pairs = batch() | {"inputs2": batch(2)["inputs"], "mask2": batch(2)["mask"]}
    student = joined(Student(model(kind=DualEncoder), nnx.split(teacher)[0], variances(teacher, [pairs])))
    names = ("inputs", "mask", "inputs2", "mask2")
    same = student(teacher=nnx.split(teacher)[1], **{name: jnp.asarray(pairs[name]) for name in names})
    assert same.shape == (BATCH, 2) and np.all(np.asarray(same) < 1e-10)


def test_the_gradient_of_a_block_alone_is_its_own():
    """It does not change with another block's parameters, and nothing outside has one. Jointly it does, and has."""
    teacher = model()
    graphdef, params = nnx.split(teacher)
    spread = variances(teacher, [batch()])

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(definition, state):
        return jax.grad(lambda state: nnx.merge(definition, state)(teacher=params, **features()).sum())(state)

    def by_part(student):
        found = gradients(*nnx.split(student))
        return {path[1:]: np.asarray(array) for path, array in nnx.to_flat_state(nnx.as_pure(found))}

    one, other = (Student(model(Lev, LinearAttention, seed=1), graphdef, spread) for _ in range(2))
    changed = other.model.encoder.blocks[0]
    changed.mlp.up.kernel[...] = 2 * changed.mlp.up.kernel[...]
    first, second = by_part(one), by_part(other)
    block = ("encoder", "blocks", 1)
    for path, gradient in first.items():
        if path[:3] == block:
            np.testing.assert_array_equal(gradient, second[path])
            assert path[-2:] == ("k", "bias") or gradient.any()
        elif path[:2] != ("encoder", "blocks"):
            assert not gradient.any()
    first, second = by_part(joined(one)), by_part(joined(other))
    assert any((first[path] != second[path]).any() for path in first if path[:3] == block)
    assert first["head", "layers", 0, "kernel"].any() and first["embedding", "tokens"].any()


@pytest.mark.slow
def test_a_student_learns_alone_and_jointly_and_the_teacher_is_neither_trained_nor_stored():
    """On four devices."""
    teacher, devices = model(), jax.local_devices()
    untouched = values(teacher)
    target = model(LinearAttention, seed=1)
    swap(teacher, target)
    graphdef, params = nnx.split(teacher)
    student, optimizer = Student(target, graphdef, variances(teacher, [batch()])), optax.adam(1e-3)
    state = init_state(student, optimizer, DISTILLATION)
    losses = []
    for one in (student, joined(student)):
        state = state._replace(optimizer=optimizer.init(state.params))
        given = {"teacher": params}
        step = make_train_step(
            nnx.split(one)[0], optimizer, seed=0, objective=DISTILLATION, given=given, devices=devices
        )
        for _ in range(25):
            before = [np.asarray(pair) for pair in state.window["loss"]]
            state = step(state, split_batch(batch(), devices))
            total, count = (np.asarray(pair) - old for pair, old in zip(state.window["loss"], before))
            losses.append(total / count)
    assert losses[24] < 0.5 * losses[0] and losses[49] < 0.5 * losses[25]
    names = {path[0] for path, _ in nnx.to_flat_state(state.params)}
    assert names == {"model"} and len(jax.tree.leaves(state.params)) == len(jax.tree.leaves(nnx.state(target)))
    for path, array in values(teacher).items():
        np.testing.assert_array_equal(array, untouched[path])
    moved = values(nnx.merge(nnx.split(student)[0], state.params).model)
    assert any((moved[path] != array).any() for path, array in values(target).items())


@pytest.mark.quick
def test_examples_that_only_fill_up_a_batch_do_not_count():
    errors = jnp.asarray([[1.0, 2.0], [jnp.nan, 5.0], [3.0, 4.0]])
    scores = DISTILLATION.score(errors, {"weight": jnp.asarray([1.0, 0.0, 0.5])})
    assert {name: tuple(map(float, pair)) for name, pair in scores.items()} == {"loss": (10, 2), "blocks": (4, 2)}
    tokens = DISTILLATION.score(errors, {"weight": jnp.asarray([[1.0, 0], [0, 0], [0, 1]])})
    assert float(tokens["loss"][0]) == 10
    student = Student(model(), nnx.split(model())[0])
    join(student)
    assert student.jointly


def test_no_data_and_damage_are_one_line():
    with pytest.raises(ValueError, match="there are no calibration data"):
        variances(model(), [])
    damaged = model()
    find(damaged, ("encoder", "blocks", 0, "mlp", "up")).bias[...] = jnp.full(32, jnp.nan)
    with pytest.raises(ValueError, match="outputs of the model's blocks are not finite"):
        variances(damaged, [batch()])


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A finished run of two layers."""
    path = tmp_path_factory.mktemp("original") / "run"
    status, _, error = train_here(path, "--config.model.layers=2")
    assert status == 0, error
    return path


@pytest.mark.slow
def test_a_run_with_other_mixers_killed_and_resumed(original, tmp_path):
    """By processes of their own: the lines of one that was killed twice are those of one that was not."""
    arguments = [
        f"--workdir={original}", "--mixers=softmax,linformer", "--distill=20", "--tune=10", "--calibration=64",
        "--set", "attention.linformer.rank=8", "log_every=1", "eval_every=5", "checkpoint_every=4",
    ]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, out, error = finish(start("-m efficient_tx.compress", *arguments, f"--out={whole}"))
    assert status == 0, error
    assert "mixers softmax become softmax,linformer: 16 parameters of theirs are kept" in out
    assert "  new, with initial values: encoder.blocks.1.mixer.e, encoder.blocks.1.mixer.f\n" in out
    for step in (6, 14):
        process = start("-m efficient_tx.compress", *arguments, f"--out={killed}")
        deadline = time.monotonic() + 300
        while not any(line["step"] >= step for line in toy.lines(killed / "distill")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.communicate()
    assert not (killed / "checkpoints").exists()
    status, out, error = finish(start("-m efficient_tx.compress", *arguments, f"--out={killed}"))
    assert status == 0, error
    assert "resuming from step" in out
    for folder in ("distill", "."):
        lines = toy.lines(whole / folder)
        assert lines == toy.lines(killed / folder) and lines[-1]["step"] == (20 if folder == "distill" else 10)
    validation = [line["loss"] for line in toy.lines(whole / "distill") if line["split"] == "validation"]
    assert validation[1] < validation[0] and validation[4] < validation[2]  # from step 10 on with the logits
    assert not (whole / "distill" / "checkpoints").exists()

    status, out, error = finish(start("-m efficient_tx.compress", *arguments, f"--out={whole}"))
    assert status == 0 and "is finished: 10 steps are done" in out, error
    arguments[2] = "--distill=21"
    status, out, error = compress_here(*arguments, f"--out={whole}")
    assert status == 2 and "distill was 20 there and is 21 here" in error


@pytest.mark.slow
def test_the_result_is_a_run_like_any_other(original, tmp_path):
    """Evaluated, compressed again, distilled from what it was compressed from, and swapped again with what was cut."""
    exact, cut, last = tmp_path / "exact", tmp_path / "cut", tmp_path / "last"
    status, out, error = compress_here(
        f"--workdir={original}", "--mixers=lev", "--set", "attention.lev.budget=24", f"--out={exact}"
    )
    assert status == 0 and "16 parameters of theirs are kept" in out, error
    rows = []
    for path in (original, exact):
        status, _, error = evaluate_here(f"--workdir={path}")
        assert status == 0, error
        rows.append(json.loads((path / "eval_test_best.json").read_text()))
    # All keys: the same model, up to rounding.
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5) and rows[0]["accuracy"] == rows[1]["accuracy"]

    status, out, error = compress_here(
        f"--workdir={exact}", "--method=flap", "--budget=0.5", "--distill=6", "--calibration=64", f"--out={cut}"
    )
    assert status == 0 and "up to step 3 each block alone, up to 6 all together" in out, error
    structure = json.loads((cut / "config.json").read_text())["structure"]
    assert any(set(entry) == {"heads"} for entry in structure.values())

    status, out, error = compress_here(f"--workdir={cut}", "--mixers=soft,fourier", f"--out={last}")
    assert status == 0, error
    assert "encoder.blocks.0.mixer.k.kernel" in out.split("dropped: ")[1]
    kept = json.loads((last / "config.json").read_text())["structure"]
    assert {path for path in structure if ".mlp." in path} < kept.keys()
    assert not any("1.mixer" in path or "mixer.k" in path for path in kept)
    status, _, error = train_here(tmp_path / "from", "--config.model.layers=2", f"--config.init_from={exact}",
                                  "--config.mixers=lev", "--config.steps=2")  # fmt: skip
    assert status == 0, error
    status, _, error = compress_here(f"--workdir={cut}", "--mixers=gla", f"--out={tmp_path / 'no'}")
    assert status == 2 and error.startswith("--mixers=gla: ") and error.count("\n") == 1
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "--method is missing: name one of those that --help shows, or other --mixers"),
        (["--distill=5"], "--method is missing"),
        (["--method=svd"], "--budget is missing: --method=svd needs it"),
        (["--budget=0.5", "--mixers=lev"], "--method is missing: --budget=0.5 needs it"),
        (["--mixers=lev", "--distill=-1"], "--distill=-1: must be at least 0"),
        (["--mixers=levv"], "--mixers=levv: config.mixers is 'levv': choose one of"),
        (["--mixers=lev*0"], "--mixers=lev*0: config.mixers is 'lev*0': 'lev*0' is no NAME or NAME*COUNT"),
        (
            ["--mixers=softmax*3,lev*3"],
            "--mixers=softmax*3,lev*3: it names 6 mixers for 2 places: name 2, or a number that divides it",
        ),
        (["--mixers=retnet"], "--mixers=retnet: encoder.blocks.0.mixer.out is 16 × 16 in Softmax and 32 × 16"),
        (["--mixers=lev", "--set", "attention.lev.budget=0"], "--set=attention.lev.budget=0: config.attention.lev"),
        (
            ["--method=svd", "--budget=0.5", "--set", "model.layers=3"],
            "--set=model.layers=3: the model has other sizes, encoder.blocks.2.mixer",
        ),
        (["--mixers=lev", "--set", "attention.lev.keys=4"], "--set=attention.lev.keys=4: config.attention.lev.keys is"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(original, tmp_path, arguments, line):
    out = tmp_path / "out"
    status, _, error = compress_here(f"--workdir={original}", f"--out={out}", *arguments)
    assert status == 2 and error.startswith(line) and error.count("\n") == 1, error
    assert not out.exists()


@pytest.mark.slow
def test_a_causal_model_refuses_mixers_without_a_causal_form(tmp_path):
    status, _, error = train_here(tmp_path / "run", "--config.model.causal=True", "--config.steps=2")
    assert status == 0, error
    status, _, error = compress_here(f"--workdir={tmp_path / 'run'}", "--mixers=linformer", f"--out={tmp_path / 'out'}")
    assert status == 2 and error.startswith("--mixers=linformer: config.attention.linformer cannot be used: Linformer")
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()
