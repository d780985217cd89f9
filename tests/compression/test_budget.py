"""What a budget leaves: sizes in order of their cost, the shares of two stages, layers that stay, nothing lost at 1."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from efficient_tx.checks import OptionError
from efficient_tx.compression import COMPARED, METHODS, compress, cost
from efficient_tx.compression.budget import of_touched
from efficient_tx.compression.cost import Costs, counted, stored
from efficient_tx.compression.layer_form import LayerForm
from efficient_tx.compression.method import Setting
from efficient_tx.compression.model import Layer, dense, kernel_of, select
from efficient_tx.config.methods import named_method
from efficient_tx.linear import LINEAR, Dense, Form, LowRank, Monarch, Sum
from efficient_tx.linear.replacement import find, form
from tests.support.small import batches, compressed, loss, model, output

# Methods with a class of their own, which are no projections onto a structure.
OWN = [name for name in METHODS if name not in LINEAR]


def bytes_of(name, n, m, **options):
    return counted(LayerForm(Form(LINEAR[name], **options), n, m, False), "bytes")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LINEAR if LINEAR[name].sized_by(17, 17)])
def test_sizes_are_in_order_of_their_bytes(name):
    """17 is padded by most blocks, and to whole bytes by bits. Ranks beyond the largest possible one cost the same."""
    option, values = LINEAR[name].sized_by(17, 17)
    sizes = [bytes_of(name, 17, 17, **{option: value}) for value in values]
    assert len(sizes) > 1 and sizes == sorted(sizes)


@pytest.mark.parametrize(("name", "n", "m", "every"), [
    ("monarch", 32, 32, range(1, 6)), ("block_diagonal", 9, 5, range(1, 6)), ("integer", 9, 5, range(2, 9)),
])  # fmt: skip
def test_no_size_that_is_left_out_is_smaller_than_all_or_the_best_for_a_budget(name, n, m, every):
    """Of blocks the fewest hold most, of bits the most."""
    option, values = LINEAR[name].sized_by(n, m)
    sizes = {value: bytes_of(name, n, m, **{option: value}) for value in every}
    best = max if option == "bits" else min
    assert min(sizes.values()) == sizes[values[0]] and set(values) < set(every)
    for budget in sizes.values():
        assert best(value for value in sizes if sizes[value] <= budget) in values


def test_a_line_that_refuses_a_budget_has_the_least_of_all_sizes():
    made = model(features=32)
    layers = select(made, "projections")
    least = min(sum(bytes_of("monarch", 32, 32, blocks=k) + 4 * 32 for _ in layers) for k in range(1, 6))
    share = least / sum(stored(layer.module) for layer in layers)
    with pytest.raises(ValueError, match=rf"monarch cannot meet it: its smallest layers take {share:.3f} of"):
        compress(made, named_method("monarch"), 0.1, where="projections")
    assert compress(made, named_method("monarch"), share, where="projections").after == least


@pytest.mark.parametrize("name", ["svd", "welore", "ternary"])
def test_eora_has_its_share_and_what_the_first_stage_leaves(name):
    """The first stage is that of the method alone, at its part of the budget."""
    budget, share = 0.6, 0.3
    method, first = named_method(f"{name}+eora(share={share})"), {}
    apply = method.first.apply
    method.first.apply = lambda plan, progress: first.update(plan=plan) or apply(plan, progress)
    done = compress(model(features=32), method, budget, batches=batches())
    before, after = method.setting.total(first["plan"])
    _, alone = compressed(name, (1 - share) * budget, made=model(features=32))
    assert (before, after) == (alone.before, alone.after)
    # The rest is spent, but for less than a rank of each layer.
    ranks = sum(4 * (change.form.in_features + change.form.out_features) for change in done.changes)
    assert budget * before - ranks < done.after <= budget * before


def test_layers_that_stay_dense_have_nothing_beside_them():
    """They have no error. Layers of rank one pay for them."""
    made = model(features=32)
    for name in ("up", "down"):
        low = find(made, ("encoder", "blocks", 0, "mlp", name))
        low.kernel[...] = low.kernel[...][:, :1] * low.kernel[...][:1]
    _, done = compressed("welore+eora(share=0.2)", 0.95, made=made)
    assert {change.form.form.structure for change in done.changes} == {Dense, Sum}
    for change in done.changes:
        options = dict(change.form.form.options)
        assert change.error == 0 if not options else options["first"].structure is LowRank


@pytest.mark.quick
@pytest.mark.parametrize(("rank", "structure"), [(7, LowRank), (11, LowRank), (12, Dense), (15, Dense)])
def test_welore_factors_whatever_saves_in_a_layer_that_is_not_square(rank, structure):
    """16 × 48 breaks even at rank 12; the reference code factors below half of the smaller side, 8."""
    draws = np.random.default_rng(0)
    u, v = (np.linalg.qr(draws.normal(size=(size, 16)))[0] for size in (16, 48))
    kernel = (u * np.where(np.arange(16) < rank, 1.0, 0.01)) @ v.T
    layer = Layer(("layer",), "", dense(kernel, None, Dense(1, 1, use_bias=False, rngs=nnx.Rngs(0))))
    method = named_method("welore")
    method.prepare(Setting(None, [layer], {}, Costs("bytes"), {layer.path: stored(layer.module)}))
    form = method.form(layer, 0.5).form
    assert form == (Form(LowRank, rank=rank) if structure is LowRank else Form(Dense))


@pytest.mark.parametrize("name", ["stat", "flap"])
def test_after_a_cut_eora_costs_nothing(name):
    """The first stage has the whole budget: what a dense layer and a low-rank one compute, a dense one can."""
    (_, alone), (_, done) = (compressed(text, 0.6) for text in (name, f"{name}+eora"))
    assert [change.form for change in done.changes] == [change.form for change in alone.changes]
    assert (done.after, done.heads) == (alone.after, alone.heads)
    errors = [(two.error, one.error) for one, two in zip(alone.changes, done.changes, strict=True) if one.error]
    assert errors and all(two < one for two, one in errors)


@pytest.mark.parametrize("name", [*OWN, *(f"{name}+eora" for name in OWN)])
def test_a_budget_of_one_loses_nothing(name):
    made, before = model(layers=1), output(model(layers=1))
    method = named_method(name.replace("mfac", "mfac(gradients=2)").replace("wlra", "wlra(gradients=2)"))
    done = compress(made, method, 1, batches=batches(), loss=loss)
    assert done.after == done.before and {change.form.form.structure for change in done.changes} == {Dense}
    np.testing.assert_allclose(output(made), before, atol=1e-6)  # the same weights in layers of another class
    assert max(change.error for change in done.changes) < 1e-6


@pytest.mark.parametrize(
    ("structure", "method"), [(Dense, "svd"), (nnx.Linear, "svd"), (Form(Monarch, blocks=2), "monarch")]
)
def test_a_budget_of_one_loses_nothing_on_a_clock_that_jitters(monkeypatch, structure, method):
    """Every call of it is slower than the one before; so layers of the model and forms must share their times."""
    calls = itertools.count(100)
    monkeypatch.setattr(cost, "milliseconds", lambda layer: next(calls) * cost.multiplications(layer))
    made, before = (model(features=32, layers=1, linear=structure) for _ in range(2))
    done = compress(made, named_method(method), 1, where="mlp", unit="milliseconds")
    assert done.after == done.before
    for layer in select(before, "mlp"):
        assert form(layer.module) == form(find(made, layer.path))


def test_layers_that_a_method_leaves_count_in_a_budget_of_all():
    made = model()
    layers = [layer.path for layer in select(made, "mlp|projections")]
    left = of_touched(named_method("id"), made, 0.8, "mlp|projections")
    before = sum(stored(find(made, path)) for path in layers)
    compress(made, named_method("id"), left, batches=batches())
    after = sum(stored(find(made, path)) for path in layers)
    assert 0.75 * before < after <= 0.8 * before  # a neuron is 1 % of an MLP
    assert of_touched(named_method("svd"), model(), 0.8, "mlp|projections") == 0.8
    others = sum(stored(find(model(), path)) for path in layers if "mixer" in path) / before
    with pytest.raises(OptionError, match=rf"id cannot meet it: the layers that it leaves .* take {others:.3f} of"):
        of_touched(named_method("id"), model(), 0.9 * others, "mlp|projections")


@pytest.mark.quick
def test_what_is_compared_has_no_method_twice_and_has_second_stages():
    assert len(set(COMPARED)) == len(COMPARED) and set(METHODS) - set(COMPARED) == {"low_rank"}
    assert all(named_method(name) for name in COMPARED)
    assert {name.partition("+")[2] for name in COMPARED} == {"", "eora"}


@pytest.mark.parametrize("name", ["sparse(pattern='2:4')", "sparse(pattern='2:4')+eora(share=0.1)"])
def test_two_of_four_are_of_one_size(name):
    """Half of the values and a bit for each: 17/32 of the kernels' bytes."""
    made = model()
    done = compress(made, named_method(name), 0.7, where="mlp", batches=batches())
    assert done.after <= 0.7 * done.before
    for change in done.changes:
        layer = find(made, change.path)
        there = kernel_of(layer.first if "eora" in name else layer) != 0
        assert (there.reshape(-1, 4, there.shape[1]).sum(1) == 2).all()
    with pytest.raises(ValueError, match=r"cannot meet it: its smallest layers take 0\.5"):
        compress(model(), named_method("sparse(pattern='2:4')"), 0.5, where="mlp")


def test_svd_is_low_rank():
    """Why only one of them is compared."""
    (one, _), (two, _) = compressed("svd", where="mlp"), compressed("low_rank", where="mlp")
    for layer in select(one, "mlp"):
        other = find(two, layer.path)
        assert isinstance(layer.module, LowRank) and layer.module.rank == other.rank
        np.testing.assert_allclose(kernel_of(layer.module), kernel_of(other), atol=1e-5)  # float32


@pytest.mark.quick
def test_a_dense_matrix_is_in_full_precision():
    """On a GPU or TPU products have fewer bits unless somebody asks for more."""
    asked = []

    class Spy(LowRank):
        def to_dense(self):
            asked.append(jax.config.jax_default_matmul_precision)
            return super().to_dense()

    kernel_of(Spy(4, 3, rank=2, rngs=nnx.Rngs(0)))
    assert asked == ["highest"]


@pytest.mark.parametrize("name", ["svd", "flap+eora"])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(name):
    """After the first layers were fitted, or neurons and heads cut."""
    made, method = model(features=32), named_method(name)
    graphdef, state = nnx.split(made)
    within, later = ("predict", 1) if name.endswith("eora") else ("fit", 2)
    work, done = getattr(method, within), []

    def fails(*given):
        done.append(given)
        if len(done) > later:
            raise MemoryError
        return work(*given)

    setattr(method, within, fails)
    with pytest.raises(MemoryError):
        compress(made, method, 0.7, batches=batches())
    after = nnx.split(made)
    assert after[0] == graphdef
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(after[1]), strict=True):
        np.testing.assert_array_equal(one, two)
