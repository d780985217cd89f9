"""inspect: what it measures, beside plain numpy on whole matrices; and the command on a run."""

import json
import re
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION
from efficient_tx.config.trained import trained_run
from efficient_tx.inspect import errors, profiles, rows
from efficient_tx.inspect.captured import Call, capture
from efficient_tx.inspect.look import Layer, Look, advice
from efficient_tx.inspect.report import lines
from efficient_tx.models import Classifier
from lra.expressions import VOCABULARY
from tests.support.command import evaluate_here, finished_run, inspect_here

HEADS, DIM, KEPT = 2, 4, 5
LENGTHS = (12, 9, 7)


def model_of(mixer, **options):
    model = Classifier(
        vocab_size=9, max_len=12, num_classes=3, mixers=[partial(ATTENTION[mixer], linear=nnx.Linear, **options)],
        features=HEADS * DIM, layers=1, heads=HEADS, mlp_features=8, dropout=0.0, rngs=nnx.Rngs(3),
    )  # fmt: skip
    for i, name in enumerate("qkv"):  # so that padding has queries, keys and values too
        bias = getattr(getattr(model.encoder.blocks[0].mixer, name, None), "bias", None)
        if bias is not None:
            bias[...] = jnp.asarray(np.random.default_rng(i).normal(size=bias.shape), bias.dtype)
    return model


def batch():
    tokens = np.random.default_rng(0).integers(1, 9, (3, 12)).astype(np.int32)
    mask = np.arange(12) < np.array(LENGTHS)[:, None]
    return {"inputs": np.where(mask, tokens, 0), "mask": mask, "label": np.zeros(3), "weight": np.ones(3, np.float32)}


def by_hand(model):
    """q, k, v `[example][length, heads, dim]` of the real tokens: the model's parameters, and numpy."""
    given, block = batch(), model.encoder.blocks[0]
    x = np.asarray(model.embedding(given["inputs"], mask=given["mask"]), np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + block.mixer_norm.epsilon)
    x = x * np.asarray(block.mixer_norm.scale[...]) + np.asarray(block.mixer_norm.bias[...])
    found = []
    for row, length in zip(x, LENGTHS):
        parts = [getattr(block.mixer, name) for name in "qkv"]
        found.append(
            [(row[:length] @ layer.kernel[...] + layer.bias[...]).reshape(length, HEADS, DIM) for layer in parts]
        )
    return found


def weights(q, k, kept=None):
    """softmax(q kᵀ / √d) `[length, length]` of one head, over the kept keys only."""
    logits = q @ k.T / DIM**0.5
    if kept is not None:
        logits = np.where(np.isin(np.arange(len(k)), kept), logits, -np.inf)
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def leverage(k):
    return np.diag(k @ np.linalg.pinv(k))


def relative(out, exact):
    return (sum(np.sum((a - b) ** 2) for a, b in zip(out, exact)) / sum(np.sum(b**2) for b in exact)) ** 0.5


def lev_errors(parts, count):
    """By head: lev's error, a softmax over the `count` keys of the highest leverage scores."""
    result = []
    for head in range(HEADS):
        pairs = []
        for q, k, v in parts:
            q, k, v = (x[:, head] for x in (q, k, v))
            kept = np.argsort(-leverage(k), kind="stable")[:count]
            pairs.append((weights(q, k, kept) @ v, weights(q, k) @ v))
        result.append(relative(*zip(*pairs)))
    return result


# float32 against float64.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def test_errors_of_an_approximation_are_those_of_numpy():
    model = model_of("lev", budget=KEPT)
    (call,) = capture(model, batch()).calls
    assert (call.name, call.variant) == ("encoder.blocks.0.mixer", ATTENTION["lev"])
    parts, expected = by_hand(model), errors.exact_out(call)
    np.testing.assert_allclose(errors.errors(call, expected, ATTENTION["lev"]), lev_errors(parts, KEPT), **CLOSE)
    np.testing.assert_allclose(errors.errors(call, expected, ATTENTION["lev"], 8), lev_errors(parts, 8), **CLOSE)
    # All keys: nothing but rounding is left.
    assert max(errors.errors(call, expected, ATTENTION["lev"], 12)) < 1e-5


def test_an_exact_mixer_has_no_error_and_others_are_measured_on_it():
    model = model_of("softmax")
    (call,) = capture(model, batch()).calls
    expected = errors.exact_out(call)
    assert errors.errors(call, expected, ATTENTION["softmax"]).tolist() == [0, 0]
    assert {"lev", "nystromformer", "performer"} <= set(errors.approximations(call))
    np.testing.assert_allclose(
        errors.errors(call, expected, ATTENTION["lev"], KEPT), lev_errors(by_hand(model), KEPT), **CLOSE
    )
    # One that averages: over the values of all real tokens.
    parts = by_hand(model)
    mean = [
        relative(
            [np.broadcast_to(v[:, head].mean(0), v[:, head].shape) for _, _, v in parts],
            [weights(q[:, head], k[:, head]) @ v[:, head] for q, k, v in parts],
        )
        for head in range(HEADS)
    ]
    np.testing.assert_allclose(errors.errors(call, expected, ATTENTION["vmean"]), mean, **CLOSE)


def test_profiles_are_those_of_whole_matrices():
    model = model_of("softmax")
    inside = capture(model, batch())
    (call,), parts = inside.calls, by_hand(model)
    found, shares = profiles.logits_profile(call), profiles.leverage_profile(call)
    for head in range(HEADS):
        values = [np.linalg.svd(q[:, head] @ k[:, head].T, compute_uv=False)[:DIM] for q, k, _ in parts]
        np.testing.assert_allclose(found[head], np.mean([s / np.linalg.norm(s) for s in values], 0), **CLOSE)
        sums = [np.cumsum(np.sort(leverage(k[:, head]))[::-1]) for _, k, _ in parts]
        wanted = [np.mean([s[min(n, len(s)) - 1] / s[-1] for s in sums]) for n in (1, 2, 4, 8)]
        np.testing.assert_allclose(shares["share"][head], wanted, **CLOSE)
    assert shares["keys"] == [1, 2, 4, 8]
    spectrum = profiles.weight_profiles(model)["encoder.blocks.0.mlp.up"]
    kernel = np.asarray(model.encoder.blocks[0].mlp.up.kernel[...])
    assert np.sum(np.square(spectrum)) == pytest.approx(np.sum(kernel**2), rel=1e-5)
    # The norms of the columns, after centring and scaling the states.
    (x,) = inside.states.values()
    assert x.shape == (sum(LENGTHS), HEADS * DIM)
    centred = x - x.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    wanted = np.linalg.norm(unit, axis=0).sum() / len(x)
    assert profiles.nuclear_norms(inside.states)["encoder.blocks.0"] == pytest.approx(wanted, rel=1e-4)


def test_ranks_within_a_share_of_the_norm():
    assert profiles.rank_within([4.0, 2.0, 1.0, 0.0], 0.01) == 3
    assert profiles.rank_within([4.0, 2.0, 1.0, 0.0], 0.5) == 1  # 5 of 21 are left: 0.49
    assert profiles.rank_within([4.0, 2.0, 1.0, 0.0], 0.48) == 2


def test_the_rank_of_an_attention_matrix_that_has_one():
    """Queries of three kinds make an attention matrix of rank three, whatever the keys are."""
    rng = np.random.default_rng(1)
    kinds = rng.normal(size=(3, HEADS, 8))
    q = kinds[rng.integers(3, size=64)][None] * 2
    arrays = {"q": q, "k": rng.normal(size=(1, 64, HEADS, 8)), "v": rng.normal(size=(1, 64, HEADS, 8))}
    call = Call("mixer", ATTENTION["softmax"], {n: jnp.asarray(x, jnp.float32) for n, x in arrays.items()}, {})
    assert profiles.least_ranks(call, (0.001,))[0.001] == [3, 3]


@pytest.mark.parametrize("mixer", ["softmax", "lev"])
def test_attention_rows_are_the_weights(mixer):
    model = model_of(mixer, **({"budget": KEPT} if mixer == "lev" else {}))
    found = rows.attention_rows(capture(model, batch()).calls[0])
    q, k, _ = by_hand(model)[0]
    assert found["queries"][0] == 0 and found["queries"][-1] == 11
    for head in range(HEADS):
        kept = np.argsort(-leverage(k[:, head]), kind="stable")[:KEPT] if mixer == "lev" else None
        whole = weights(q[:, head], k[:, head], kept)
        for query, row in zip(found["queries"], found["rows"]):
            np.testing.assert_allclose(row[head], whole[query], **CLOSE)
        np.testing.assert_allclose(found["received"][head], whole.mean(0), **CLOSE)
        assert found["top"][head][0] == np.argmax(whole.mean(0))
        assert found["chosen"] == {} or {*map(tuple, found["chosen"]["k"][head])} == {(place,) for place in kept}
    assert found["chosen"].keys() == ({"k"} if mixer == "lev" else set())


def test_rows_are_those_of_the_longest_sequence_without_its_padding():
    """Whatever other arrays there are: as many weights of a convolution as examples, for one."""
    model = model_of("nystromformer", landmarks=4, value_conv=3)
    alone = rows.attention_rows(capture(model, {name: x[1:2] for name, x in batch().items()}).calls[0])
    order = [2, 1, 2]
    found = rows.attention_rows(capture(model, {name: x[order] for name, x in batch().items()}).calls[0])
    assert found["sequence"] == 1 and found["queries"] == [0, 2, 5, 8]
    for name in ("rows", "received"):
        assert np.shape(found[name])[-1] == LENGTHS[1]
        np.testing.assert_allclose(found[name], alone[name], **CLOSE)
    assert found["chosen"] == alone["chosen"] and len(found["chosen"]["k"][0]) == 4


def test_the_smallest_size_is_one_from_which_on_all_are_within():
    found = [np.array([0.3, 0.04]), None, np.array([0.05, 0.2]), np.array([0.01, 0.05])]
    assert errors.smallest([4, 8, 16, 32], found, 0.05) == [16, 32]
    assert errors.smallest([4, 8, 16, 32], found, 0.01) == [32, None]
    assert errors.smallest([4], [None], 0.1) == []


def test_advice_is_the_largest_budget_over_layers_and_heads():
    def layer(mixer, variant, sizes):
        return Layer("blocks.0", mixer, "softmax", budgets={variant: dict.fromkeys(errors.TARGETS, sizes)})

    def of(*layers, pattern):
        return advice(Look(list(layers), {}, {}, 1, 1), pattern)[-1]

    found = of(layer("softmax", "lev", [8, 16]), layer("softmax", "lev", [4, 32]), pattern=["gla", "softmax"])
    assert (found.size, found.settings) == (32, {"mixers": "gla,lev", "attention.lev.budget": "32"})
    assert lines([found])[1:] == ["lev, 10%: --set mixers=gla,lev attention.lev.budget=32"]
    found = of(layer("skyformer", "skyformer", [8, 16]), pattern=["skyformer"])
    assert found.settings == {"attention.skyformer.landmarks": "16"}
    found = of(layer("softmax", "lev", [8, None]), pattern=["softmax"])
    assert found.size is None and found.settings == {}
    assert "no measured size is enough" in lines([found])[1]
    assert lines([]) == ["no layer of the run has an approximation with a budget"]


def test_every_approximation_that_is_advised_fits_the_parameters_of_the_run():
    """Its settings make a mixer with the parameters of the exact one."""

    def shapes(name, **options):
        mixer = nnx.eval_shape(lambda: ATTENTION[name](8, heads=2, max_len=12, rngs=nnx.Rngs(0), **options))
        return {path: value.shape for path, value in nnx.to_flat_state(nnx.state(mixer))}

    call = Call("mixer", ATTENTION["softmax"], {name: jnp.zeros((1, 12, 2, 4)) for name in "qkv"}, {})
    names = errors.approximations(call)
    assert names
    for name in names:
        layer = Layer("mixer", "softmax", "softmax", budgets={name: {t: [16] for t in errors.TARGETS}})
        settings = dict(advice(Look([layer], {}, {}, 1, 1), ["softmax"])[0].settings)
        assert settings.pop("mixers") == name
        options = {key.removeprefix(f"attention.{name}."): int(value) for key, value in settings.items()}
        assert shapes(name, **options) == shapes("softmax"), name


def test_the_command_writes_what_it_says_and_its_flags_work(tmp_path):
    run = finished_run()[0]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    out = tmp_path / "out"
    status, said, error = inspect_here(
        f"--workdir={run}", f"--out={out}", "--budget", "--against=lev", "--sizes=8,24", "--examples=3"
    )
    assert status == 0, error  # which has a line of progress where this takes more than ten seconds
    assert sorted(path.name for path in out.iterdir()) == ["attention.png", "inspect.json", "inspect.png"]
    record = json.loads((out / "inspect.json").read_text())
    (layer,) = record["layers"]
    assert (layer["mixer"], layer["exact"], layer["error"]) == ("softmax", "softmax", [0, 0])
    small, whole = (layer["errors"]["lev"][size] for size in ("8", "24"))
    assert min(small) > 0.01 and max(whole) < 1e-4  # no example has more tokens than 24
    # What is drawn is the longest example, in words.
    examples = [trained_run(run, "best")[1].test[i]["inputs"] for i in range(3)]
    lengths = [len(example) for example in examples]
    number = lengths.index(max(lengths))
    assert record["drawn"]["example"] == number
    assert record["drawn"]["texts"] == [[VOCABULARY[i] for i in examples[number]]]
    assert np.shape(layer["attention"]["received"]) == (2, max(lengths)) and layer["attention"]["chosen"] == {}
    assert record["mean_tokens"] == pytest.approx(np.mean(lengths), rel=1e-4)
    told = f"{np.mean(lengths):.1f} real tokens in the mean of 3 sequences"
    title = " ".join(said.split())  # which is in lines as wide as the table
    assert f"Mixers, on {sum(lengths)} tokens: {told}" in title
    assert f"Relative error within a budget, by head; {told}" in title
    assert layer["budgets"]["lev"]["0.01"] == [24, 24]
    flags = re.search(r"^lev, 1%: (.*)$", said, re.MULTILINE)[1].split()
    assert flags == ["--set", "mixers=lev", "attention.lev.budget=24"]
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    status, _, error = evaluate_here(f"--workdir={run}", *flags)
    assert (status, error) == (0, "")
    # With all keys it is the model that was trained.
    name = "eval_test_best_mixers=lev,attention.lev.budget=24.json"
    swapped = json.loads((run / name).read_text())
    (run / name).unlink()
    assert swapped["accuracy"] == json.loads((run / "summary.json").read_text())["test_accuracy"]


def test_what_cannot_be_is_one_line_and_writes_nothing(tmp_path):
    run, out = finished_run()[0], tmp_path / "out"
    (tmp_path / "file").write_text("")
    cases = {
        (f"--workdir={run}", f"--out={out}", "--against=skyformer"): "--against=skyformer: it does not approximate",
        (f"--workdir={run}", f"--out={out}", "--against=sky"): "'sky' is no variant",
        (f"--workdir={run}", f"--out={out}", "--examples=0"): "'0' is no whole number of at least 1",
        (f"--workdir={run}", f"--out={out}", "--sizes=a"): "'a' is no whole number of at least 1",
        (f"--workdir={run}", f"--out={out}", "--checkpoint=7"): "has best, last and the steps",
        (f"--workdir={run}", f"--out={tmp_path / 'file'}"): f"--out={tmp_path / 'file'}: that is no folder",
        (f"--workdir={tmp_path}", f"--out={out}"): "config.json",
        (f"--workdir={run}",): "--out",
    }
    for arguments, line in cases.items():
        status, said, error = inspect_here(*arguments)
        assert (status, said) == (2, "") and line in error and len(error.splitlines()) == 1, (arguments, error)
        assert not out.exists()


def test_every_mixer_with_queries_can_be_looked_into():
    """No mixer breaks the pass: those that take other arrays are recorded, and have no error."""
    for name in ("linear", "gla", "vmean", "fourier"):
        variant = ATTENTION[name]
        options = {"max_len": 12} if variant.needs_max_len else {}
        inside = capture(model_of(name, **options), batch())
        for call in inside.calls:
            assert errors.exact_out(call) is None and errors.approximations(call) == []
            found = rows.attention_rows(call)
            assert found is None or np.isfinite(found["received"]).all()
        assert list(inside.states) == ["encoder.blocks.0"]
        assert len(inside.calls) + len(inside.others) == 1
