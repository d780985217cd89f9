"""Every method on a small transformer: budget, values, errors, what is refused; and each against its own identities."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import GLA, Custom, Linformer, RetNet
from efficient_tx.compression import METHODS, compress, cost
from efficient_tx.compression.cost import multiplications, stored
from efficient_tx.compression.cutting import Cutting, expand
from efficient_tx.compression.eora import prediction
from efficient_tx.compression.interpolative import Interpolative
from efficient_tx.compression.model import bias_of, kernel_of, linear_layers, select
from efficient_tx.compression.statistics import Inputs, gather
from efficient_tx.config.methods import named_method
from efficient_tx.linear import Dense, Form, LowRank, Monarch, Sparse, Sum
from efficient_tx.linear.replacement import dotted, find
from tests.kernels.test_flash_examples import FirstHeadOnly
from tests.support.small import SIZES, batches, compressed, layer_inputs, loss, model, output


def of_kind(kind):
    """The names of the methods of a class."""
    return [name for name, method in METHODS.items() if isinstance(method, type) and issubclass(method, kind)]


CUTTING, INTERPOLATIVE = of_kind(Cutting), of_kind(Interpolative)


@pytest.mark.first(3)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_keeps_its_budget_and_says_its_errors(name):
    """Costs are counted anew from the arrays; errors from the inputs that reach the layer, by running them through."""
    budget, made, before = 0.7, model(features=32), model(features=32)
    method = named_method(name)
    done = compress(made, method, budget, batches=batches(), loss=loss)
    touched = [change.path for change in done.changes]
    assert len(set(touched)) == len(touched) > 0
    costs = [sum(stored(find(one, path)) for path in touched) for one in (before, made)]
    assert costs == [done.before, done.after] and costs[1] <= budget * costs[0]
    assert np.isfinite(output(made)).all()
    for layer in linear_layers(made):
        if layer.path not in touched:
            np.testing.assert_array_equal(kernel_of(layer.module), kernel_of(find(before, layer.path)))
    change = next(change for change in done.changes if change.path[-1] == "down")
    old, new = (find(one, change.path) for one in (before, made))
    if old.in_features == new.in_features:
        x = np.concatenate([layer_inputs(before, batch, change.path) for batch in batches()]).astype(np.float64)
        left = np.linalg.norm(x @ (kernel_of(old) - kernel_of(new))) / np.linalg.norm(x @ kernel_of(old))
        assert change.error == pytest.approx(left, abs=1e-5)  # the model computes in float32
    # Twice the same.
    again, repeated = model(features=32), None
    repeated = compress(again, named_method(name), budget, batches=batches(), loss=loss)
    assert repeated == done
    for one, two in zip(jax.tree.leaves(nnx.state(made)), jax.tree.leaves(nnx.state(again)), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_whitened_beats_plain_svd_on_the_inputs_and_both_are_what_theory_says():
    (_, plain), (_, white) = compressed("svd"), compressed("whitened")
    for one, two in zip(plain.changes, white.changes, strict=True):
        assert (one.path, one.form) == (two.path, two.form)
        assert two.error == pytest.approx(two.theory[1], abs=1e-5)  # the factors are float32
    spectra = {
        change.path: np.linalg.svd(kernel_of(find(model(), change.path)), compute_uv=False) for change in plain.changes
    }
    for change in plain.changes:
        rank, s = dict(change.form.form.options)["rank"], spectra[change.path]
        assert change.theory[1] == pytest.approx(np.sqrt(np.sum(s[rank:] ** 2) / np.sum(s**2)))
    # The same inputs for both: Frobenius-optimal factors leave at least as much on them.
    inputs = gather(model(), select(model(), "mlp|projections"), batches())
    for one, two in zip(plain.changes, white.changes):
        made, _ = compressed("svd")
        off = kernel_of(find(model(), one.path)) - kernel_of(find(made, one.path))
        left = np.sum(off * (inputs[one.path].moment @ off))
        whole = kernel_of(find(model(), one.path))
        assert two.error <= np.sqrt(left / np.sum(whole * (inputs[one.path].moment @ whole))) + 1e-6


def test_welore_gives_ranks_by_one_threshold_and_leaves_dense_what_would_not_shrink():
    made = model()
    low = find(made, ("encoder", "blocks", 0, "mlp", "up"))
    u, s, v = np.linalg.svd(kernel_of(low), full_matrices=False)
    s[3:] *= 1e-4  # nearly of rank 3
    low.kernel[...] = jnp.asarray((u * s) @ v, jnp.float32)
    _, done = compressed("welore", budget=0.8, made=made)
    forms = {dotted(change.path): change for change in done.changes}
    planted = forms["encoder.blocks.0.mlp.up"]
    assert planted.form.form.structure is LowRank and dict(planted.form.form.options)["rank"] <= 3
    kinds = {change.form.form.structure for change in done.changes}
    assert kinds == {LowRank, Dense}
    for change in done.changes:
        rank = dict(change.form.form.options).get("rank")
        n, m = change.form.in_features, change.form.out_features
        assert rank is None or rank * (n + m) < n * m
        assert rank is not None or change.error == 0


@pytest.mark.first(3)
@pytest.mark.parametrize("name", CUTTING)
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_units_are_cut_from_all_layers_around_them(name, mlp):
    made, done = compressed(name, made=model(mlp=mlp))
    assert np.isfinite(output(made)).all()
    for block in made.encoder.blocks:
        inner = block.mlp
        width = inner.down.in_features
        assert inner.up.out_features == width and (inner.gate is None or inner.gate.out_features == width)
        mixer = block.mixer
        assert mixer.q.out_features == mixer.out.in_features == mixer.heads * mixer.head_dim
        if name == "id":
            assert mixer.heads == SIZES["heads"]
    assert done.after <= 0.5 * done.before
    assert (
        sum(block.mlp.down.in_features for block in made.encoder.blocks)
        < 2 * find(model(mlp=mlp), ("encoder", "blocks", 0, "mlp", "down")).in_features
    )


@pytest.mark.parametrize("name", INTERPOLATIVE)
def test_neurons_and_heads_that_are_copies_go_without_a_change(name):
    """Half of the neurons are copies of the others, and so are two heads of four."""
    made = model()
    for block in made.encoder.blocks:
        for layer in (block.mlp.up,):
            layer.kernel[...] = layer.kernel[...].at[:, 24:].set(layer.kernel[...][:, :24])
            layer.bias[...] = layer.bias[...].at[24:].set(layer.bias[...][:24])
        if name == "stat":
            for layer in (block.mixer.q, block.mixer.k, block.mixer.v):
                layer.kernel[...] = layer.kernel[...].at[:, 8:].set(layer.kernel[...][:, :8])
                layer.bias[...] = layer.bias[...].at[8:].set(layer.bias[...][:8])
    before = output(made)
    _, done = compressed(name, budget=0.53, made=made)
    np.testing.assert_allclose(output(made), before, atol=2e-4)  # float32, through two blocks
    assert max(change.error for change in done.changes) < 1e-4


def test_a_channel_that_never_changes_is_the_first_that_flap_removes_and_its_mean_stays():
    made = model()
    for block in made.encoder.blocks:
        block.mlp.up.kernel[...] = block.mlp.up.kernel[...].at[:, 40:].set(0)  # gelu of the bias, for every token
    before = output(made)
    _, done = compressed("flap", budget=0.93, made=made, where="mlp")
    assert done.after < done.before
    np.testing.assert_allclose(output(made), before, atol=2e-5)
    for block in made.encoder.blocks:
        assert block.mlp.down.in_features >= 40


def test_flap_keeps_the_mean_of_the_outputs():
    """Of the first block's MLP, whose inputs are the same before and after."""
    made = model()
    path = ("encoder", "blocks", 0, "mlp")
    before = find(made, path)
    x = jnp.asarray(np.concatenate([layer_inputs(made, batch, (*path, "up")) for batch in batches()]))
    mean = np.mean(np.asarray(before(x), np.float64), 0)
    compressed("flap", budget=0.5, made=made, where="blocks.0.mlp")
    np.testing.assert_allclose(np.mean(np.asarray(find(made, path)(x), np.float64), 0), mean, atol=1e-4)


def test_something_of_every_mlp_and_mixer_stays_and_a_bias_is_added_where_it_is_needed():
    """The reference code has no guard against a layer without heads, and assumes a bias."""
    made = model(linear=partial(Dense, use_bias=False))
    assert made.encoder.blocks[0].mlp.down.bias is None
    with pytest.raises(ValueError, match=r"flap cannot meet it: its smallest layers take 0\.\d+"):
        compress(made, named_method("flap"), 0.01, batches=batches())
    least = compress(made, named_method("flap"), 0.3, batches=batches())
    for block in made.encoder.blocks:
        assert block.mixer.heads >= 1 and block.mlp.down.in_features >= 1
        cut = block.mlp.down.in_features < SIZES["mlp_features"]
        assert (block.mlp.down.bias is not None) == cut and block.mlp.up.bias is None
    assert least.after <= 0.3 * least.before and np.isfinite(output(made)).all()


def test_layers_with_shared_weights_are_refused():
    made = model()
    made.encoder.blocks[1].mlp.up = made.encoder.blocks[0].mlp.up
    made.encoder.blocks[1].mixer.q.kernel = made.encoder.blocks[0].mixer.q.kernel
    made.encoder.blocks[1].mixer.v.bias = made.encoder.blocks[0].mixer.v.bias
    for where in ("mlp", "mixer.q", "mixer.v"):
        with pytest.raises(ValueError, match="shares its weights with another layer: select others"):
            compress(made, named_method("svd"), 0.5, where=where)


@pytest.mark.first(2)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["stat", "flap", "id", "block_diagonal", "sparse(density=0.25)"])
def test_eora_lowers_the_error_of_what_it_follows_to_what_its_theory_says(name, bias):
    """The error of the first stage is that of the same plan, so with the same units kept."""
    method, before = named_method(f"{name}+eora(share=0.3)"), model(linear=partial(Dense, use_bias=bias))
    made, first = nnx.merge(*nnx.split(before)), {}
    apply = method.first.apply

    def applied(plan, progress):
        changes = apply(plan, progress)
        first.update({change.path: change.error for change in changes}, kept=plan.kept)
        return changes

    method.first.apply = applied
    done = compress(made, method, 0.7, batches=batches())
    assert done.after <= 0.7 * done.before and np.isfinite(output(made)).all()
    kept, found = first["kept"], getattr(method.first, "found", {})
    cut = {found[path].reading: expand(units, found[path].size) for path, units in kept.items()}
    parts = [change for change in done.changes if change.form.form.structure is Sum or change.path in cut]
    assert parts and {change.form.form.structure for change in parts} == {Dense if name in CUTTING else Sum}
    for change in parts:
        # Without a bias T W is the best prediction already, of which float32 factors may miss as much as it gains.
        nothing_left = name in INTERPOLATIVE and not bias and change.path in cut
        assert change.error < first[change.path] + (1e-6 if nothing_left else 0)
        # The factors are float32.
        assert change.theory[1] == pytest.approx(change.error, abs=1e-4)
        old, new = (find(one, change.path) for one in (before, made))
        x = np.concatenate([layer_inputs(before, batch, change.path) for batch in batches()]).astype(np.float64)
        left = x[:, cut.get(change.path, slice(None))]
        y, there = (
            a @ kernel_of(one) + (0 if one.bias is None else bias_of(one)) for a, one in ((x, old), (left, new))
        )
        assert change.error == pytest.approx(np.linalg.norm(y - there) / np.linalg.norm(x @ kernel_of(old)), abs=1e-4)


def test_the_budget_chooses_the_bits_of_integers():
    """The most that fit, for 32 inputs."""
    for method, budget, bits in [("integer", 0.5, 8), ("integer", 0.25, 6), ("integer(group=8)", 0.25, 3)]:
        made = model(features=32)
        done = compress(made, named_method(method), budget, where="blocks.0.mlp.up")
        (change,) = done.changes
        assert find(made, change.path).bits == bits
        groups, m = 4 if "group" in method else 1, 48
        size = [4 * m * (some + groups + 1) for some in (bits, bits + 1)]  # four rows of bits, scales, a bias
        assert done.before == 4 * (32 * m + m) and done.after == size[0] <= budget * done.before
        assert bits == 8 or size[1] > budget * done.before
    with pytest.raises(ValueError, match=r"budget is 0\.05: integer cannot meet it: its smallest layers take 0\.12"):
        compress(model(features=32), named_method("integer"), 0.05, where="blocks.0.mlp.up")


@pytest.mark.quick
@pytest.mark.parametrize("bias", [True, False])
def test_a_sum_stores_its_parts_packed(bias):
    parts = {"first": Form(Sparse, density=0.25), "second": Form(LowRank, rank=2)}
    layer = Sum(16, 24, **parts, use_bias=bias, rngs=nnx.Rngs(0))
    # A quarter of the values, a bit for each, two factors, and the bias.
    assert stored(layer) == 4 * (16 * 24 // 4) + 16 * 24 // 8 + 4 * 2 * (16 + 24) + 4 * 24 * bias


@pytest.mark.quick
@pytest.mark.parametrize("bias", [True, False])
def test_the_best_linear_prediction_from_what_a_cut_leaves(bias):
    """Up to a constant if there is a bias to hold it."""
    draws = np.random.default_rng(0)
    x = draws.normal(size=(200, 6)) @ draws.normal(size=(6, 6)) + draws.normal(size=6)
    kernel, rows = draws.normal(size=(6, 4)), np.array([0, 2, 5])
    target, missed = prediction(kernel, Inputs(len(x), x.mean(0), x.T @ x / len(x)), rows, centred=bias)
    left, y = x[:, rows], x @ kernel
    known = np.concatenate([left, np.ones((len(x), 1))], axis=1) if bias else left
    best = np.linalg.lstsq(known, y, rcond=None)[0]
    np.testing.assert_allclose(target, best[:3], atol=1e-8)
    assert missed == pytest.approx(np.sum((y - known @ best) ** 2) / len(x))


@pytest.mark.parametrize("unit", ["parameters", "multiplications"])
def test_units_of_the_budget(unit):
    _, done = compressed("low_rank", unit=unit, where="mlp")
    counts = {"parameters": lambda n, m, r: n * r + r * m + m, "multiplications": lambda n, m, r: n * r + r * m}
    expected = sum(
        counts[unit](change.form.in_features, change.form.out_features, dict(change.form.form.options)["rank"])
        for change in done.changes
    )
    assert done.after == expected <= 0.5 * done.before


def test_milliseconds_are_measured_once_for_each_form(monkeypatch):
    """On a clock that counts multiplications: a real one depends on what else the machine does."""
    timed = []

    def clock(layer):
        timed.append(layer)
        return 1e-3 * multiplications(layer)

    monkeypatch.setattr(cost, "milliseconds", clock)
    _, done = compressed("low_rank", unit="milliseconds", where="mlp")
    layers = [change.form for change in done.changes]
    counts = [1e-3 * form.make().multiplies for form in layers]
    assert done.after == pytest.approx(sum(counts)) and done.after <= 0.5 * done.before
    forms = [(layer.rank, layer.in_features) for layer in timed if isinstance(layer, LowRank)]
    assert len(forms) == len(set(forms))


@pytest.mark.quick
def test_a_layer_takes_time():
    assert cost.milliseconds(Dense(4, 3, rngs=nnx.Rngs(0))) > 0


def test_layers_of_other_structures_are_compressed_again():
    made = model(linear=partial(Monarch, blocks=2), features=32)
    before = sum(stored(layer.module) for layer in select(made, "mlp"))
    done = compress(made, named_method("svd"), 0.5, where="mlp", batches=batches())
    assert done.before == before and done.after <= before / 2
    assert all(isinstance(layer.module, LowRank) for layer in select(made, "mlp"))


def in_bfloat16():
    made = model(linear=partial(Dense, param_dtype=jnp.bfloat16), dtype=jnp.bfloat16)
    assert {leaf.dtype for layer in select(made, "mlp") for leaf in jax.tree.leaves(nnx.state(layer.module))} == {
        jnp.dtype(jnp.bfloat16)
    }
    return made


@pytest.mark.first(3)
@pytest.mark.parametrize(
    "name", ["low_rank", "flap", "svd+eora", "sparse", "ternary+eora", "welore", "monarch", "sum(first='sparse')"]
)
def test_the_bytes_of_bfloat16_layers_are_theirs(name):
    before, made = in_bfloat16(), in_bfloat16()
    done = compress(made, named_method(name), 0.7, where="mlp", batches=batches())
    costs = [sum(stored(find(one, change.path)) for change in done.changes) for one in (before, made)]
    assert costs == [done.before, done.after]
    if name in ("low_rank", "flap", "sparse"):
        assert done.after > 0.6 * done.before  # what the budget allows is used


def test_layers_are_timed_in_their_own_dtypes(monkeypatch):
    timed = []
    monkeypatch.setattr(cost, "milliseconds", lambda layer: timed.append(layer) or 1e-3 * multiplications(layer))
    compress(in_bfloat16(), named_method("low_rank"), 0.5, where="mlp", unit="milliseconds")
    assert {(layer.dtype, layer.param_dtype) for layer in timed} == {(jnp.bfloat16, jnp.bfloat16)}
    assert any(isinstance(layer, LowRank) for layer in timed)


def test_bfloat16_layers_stay_bfloat16():
    made = in_bfloat16()
    done = compress(made, named_method("whitened"), 0.5, where="mlp", batches=batches())
    for change in done.changes:
        layer = find(made, change.path)
        assert layer.up.dtype == jnp.bfloat16 and layer.dtype == jnp.bfloat16
        assert change.error == pytest.approx(change.theory[1], abs=0.02)  # bfloat16 factors


def test_what_cannot_be_is_one_line_and_changes_nothing():
    cases = {
        ("svd", 0.0, "mlp"): "budget is 0.0: it must be above 0 and at most 1",
        ("svd", 2, "mlp"): "budget is 2: it must be above 0 and at most 1",
        ("svd", 1e-4, "mlp"): "budget is 0.0001: svd cannot meet it: its smallest layers take",
        ("svd", 0.5, "mpl"): "where='mpl' selects no linear layer: use mlp, projections or a part of encoder.blocks",
        ("svd", 0.5, "("): "where='(' is no regular expression",
        ("id", 0.5, "mlp.down"): "id cuts neurons: the selected layers hold no whole MLP or mixer",
    }
    made, state = model(), None
    state = jax.tree.map(np.asarray, nnx.state(made))
    for (name, budget, where), line in cases.items():
        with pytest.raises(ValueError) as error:
            compress(made, named_method(name), budget, where=where, batches=batches())
        assert str(error.value).startswith(line) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="there are no calibration data"):
        compress(made, named_method("flap"), 0.5)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.up is a Monarch: neurons are cut from dense layers only"):
        compress(model(linear=Monarch, features=32), named_method("id"), 0.5, where="mlp", batches=batches())
    beside = "beside its projections"
    for mixer, has in (
        (RetNet, f"gate {beside}"), (GLA, f"decay_down {beside}"), (Linformer, f"e {beside}"),
        (partial(Custom, score=FirstHeadOnly(2.0)), "heads that are not alike"),
    ):  # fmt: skip
        line = f"({getattr(mixer, 'func', mixer).__name__}) has {has}: its heads cannot be cut: where='mlp' selects"
        with pytest.raises(ValueError, match=re.escape(line)):
            compress(model(mixer=mixer), named_method("flap"), 0.5, batches=batches())
        compress(model(mixer=mixer), named_method("flap"), 0.7, where="mlp", batches=batches())
    damaged = model()
    damaged.encoder.blocks[0].mixer.out.bias[...] = jnp.full(16, jnp.nan)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.down has inputs that are not finite"):
        compress(damaged, named_method("whitened"), 0.5, where="mlp", batches=batches())
    for name in ("svd", "monarch+eora"):
        with pytest.raises(ValueError, match=r"^encoder\.blocks\.0\.mixer\.out has weights that are not finite: "):
            compress(damaged, named_method(name), 0.5, batches=batches())
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(nnx.state(made)), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("svdd", "method is 'svdd': choose one of svd, whitened"),
        ("monarch+svd", "method is 'svd': choose one of eora"),
        ("svd(rank)", "method is 'svd(rank)'"),
        ("svd(ranks=3)", "method is 'svd(ranks=3)': svd has no option 'ranks': choose one of rank (nearest: 'rank')"),
        ("svd(rank='3')", "method is \"svd(rank='3')\": rank is '3': it takes a value of type int"),
        ("id(heads=True)", "method is 'id(heads=True)': id has no option 'heads': it has none"),
        ("id+eora(first=2)", "method is 'eora(first=2)': eora has no option 'first': choose one of share"),
        ("svd(rank=0)", "method is 'svd(rank=0)': rank is 0: it must be at least 1"),
        ("id+eora(share=2)", "method is 'eora(share=2)': share is 2: it must be above 0 and below 1"),
        ("dense", "method is 'dense': choose one of svd"),
        ("monarch(block=3)", "method is 'monarch(block=3)': monarch has no option 'block': choose one of blocks"),
        ("sum(first='monrach')", """method is "sum(first='monrach')": sum.first is 'monrach': choose one of dense"""),
        ("sum(second='low_rank(rang=2)')", "method is \"sum(second='low_rank(rang=2)')\": sum.second is"),
    ],
)
def test_names_of_methods(text, line):
    with pytest.raises(ValueError) as error:
        named_method(text)
    assert str(error.value).startswith(line)
