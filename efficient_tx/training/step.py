"""One training step and one evaluation step over any number of devices, processes and micro-batches.

`train_step` and `eval_step` are written for one device; one `psum` over the axis "devices" connects the devices.
`make_train_step` and `make_eval_step` map them. Every sum is over the global batch, and every random key belongs to a
global row. So the split of a batch changes only the order of float32 additions.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efficient_tx.numerics.random import evaluation_keys
from efficient_tx.task import Batch, Objective, model_inputs
from efficient_tx.training import metrics
from efficient_tx.training.errors import innermost
from efficient_tx.training.lengths import at_needed_length, shortest_first
from efficient_tx.training.metrics import Metrics
from efficient_tx.training.objective import CLASSIFICATION

AXIS = "devices"
# What a model is given beside the batch, if nothing.
NOTHING: Mapping[str, Any] = {}


class State(NamedTuple):
    """All that training carries from one step to the next, a pytree of arrays.

    Attributes:
      step: int32 scalar, updates done.
      params: the model's parameters, `nnx.split(model)[1]`.
      optimizer: state of the optax transformation.
      window: (sum, count) of the loss, the metrics and grad_norm since `clear_window`.
      bad_step: int32 scalar, the first step (1 = the first update) with a loss or gradient that is not finite; -1 =
        none. Its update was applied nevertheless: use such a state only to name the step.
    """

    step: jax.Array
    params: nnx.State
    optimizer: optax.OptState
    window: Metrics
    bad_step: jax.Array


def init_state(
    model: nnx.Module, optimizer: optax.GradientTransformation, objective: Objective = CLASSIFICATION
) -> State:  # fmt: skip
    """The state before the first step. Its arrays are copies: the step donates them, and `model` stays usable."""
    params = nnx.split(model)[1]
    state = State(
        step=jnp.int32(0),
        params=params,
        optimizer=optimizer.init(params),
        window=metrics.zeros(*objective.names, "grad_norm"),
        bad_step=jnp.int32(-1),
    )
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)


def clear_window(state: State) -> State:
    """The same state with an empty window, on the same devices."""
    return state._replace(window=jax.tree.map(jnp.zeros_like, state.window))


def replicate(tree, devices: Sequence[jax.Device] | None = None):
    """A copy of every array on each of the local `devices` (None = all), where the steps expect their state."""
    return jax.device_put(tree, _everywhere(jax.local_devices() if devices is None else devices))


def split_batch(batch: Batch, devices: Sequence[jax.Device]) -> Batch:
    """Splits local rows `[local_batch, ...]` into `[devices, local_batch / devices, ...]`, in order.

    Local row j of process p is row p + j·P of the global batch (P processes). Device d of the local `devices` takes the
    local rows from d·local_batch/devices on.

    Raises:
      ValueError: the number of rows is not a multiple of the number of devices.
    """
    rows, count = len(batch["label"]), len(devices)
    if rows % count:
        raise ValueError(f"{rows} rows of a batch cannot be shared out over {count} devices: use a multiple of {count}")
    return {name: np.reshape(array, (count, rows // count, *array.shape[1:])) for name, array in batch.items()}


def check_batch_size(batch_size: int, *, devices: int, grad_accum: int) -> None:
    """Raises ValueError unless `batch_size` is a multiple of `devices` (of all processes) × `grad_accum`."""
    if batch_size % (devices * grad_accum):
        raise ValueError(
            f"batch_size={batch_size} cannot be shared out over devices={devices} × grad_accum={grad_accum}: "
            f"use a multiple of {devices * grad_accum}"
        )


def score(
    model: nnx.Module, batch: Batch, keys: jax.Array | None, objective: Objective, given: Mapping[str, Any]
) -> Metrics:  # fmt: skip
    """Sums over the rows of one micro-batch: loss and metrics of the objective, each with its divisor.

    The objective gets the model's output in float32.
    """
    return objective.score(outputs(model, batch, keys, given), batch)


def outputs(model: nnx.Module, batch: Batch, keys: jax.Array | None, given: Mapping[str, Any]) -> jax.Array:
    """What the model answers to a batch, float32.

    It gets the `model_inputs` of the batch, what is `given`, and one key per example (None at evaluation).
    """
    return model(**model_inputs(batch), **given, key=keys).astype(jnp.float32)


def train_step(
    state: State,
    batch: Batch,
    given: Mapping[str, Any] = NOTHING,
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    grad_accum: int,
    lengths: int = 1,
) -> State:
    """One update from one device's rows `[b, ...]`; `row` and `seed`, both `[b]`, determine their random keys."""

    def example_key(seed, row):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), row)

    def loss_sum(params, batch):
        keys = jax.vmap(example_key)(batch["seed"], batch["row"])
        sums = score(nnx.merge(graphdef, params), batch, keys, objective, given)
        return sums["loss"][0], sums

    def at_full_length(batch):
        (_, sums), grads = jax.value_and_grad(loss_sum, has_aux=True)(state.params, batch)
        return sums, jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)

    sums_and_gradients = at_full_length
    if lengths > 1 and not jax.config.jax_debug_nans:  # which could not look into the branches of a length
        sums_and_gradients = partial(at_needed_length, at_full_length, count=lengths)
        batch = shortest_first(batch)
    if grad_accum == 1:
        sums, grads = sums_and_gradients(batch)
    else:
        micro = jax.tree.map(lambda x: x.reshape(grad_accum, x.shape[0] // grad_accum, *x.shape[1:]), batch)
        shapes = jax.eval_shape(sums_and_gradients, jax.tree.map(lambda x: x[0], micro))
        (sums, grads), _ = jax.lax.scan(
            lambda total, batch: (jax.tree.map(jnp.add, total, sums_and_gradients(batch)), None),
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
            micro,
        )
    sums, grads = jax.lax.psum((sums, grads), AXIS)

    loss, weight = sums["loss"]
    grads = jax.tree.map(lambda grad: grad / jnp.where(weight > 0, weight, 1.0), grads)
    norm = optax.tree.norm(grads)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    step = state.step + 1
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    return State(
        step=step,
        params=optax.apply_updates(state.params, updates),
        optimizer=optimizer_state,
        window=metrics.add(state.window, {**sums, "grad_norm": (norm, jnp.ones_like(norm))}),
        bad_step=jnp.where((state.bad_step < 0) & ~finite, step, state.bad_step),
    )


def eval_step(
    params: nnx.State,
    batch: Batch,
    given: Mapping[str, Any] = NOTHING,
    *,
    graphdef: nnx.GraphDef,
    objective: Objective,
    draw: int = 0,
) -> tuple[Metrics, dict[str, jax.Array]]:
    """Loss and metrics of the global batch as (sum, count) pairs, and this device's rows, from its rows `[b, ...]`.

    `given` are further arguments of the model, as in `make_train_step`. `draw` 0 is evaluation. With another one, the
    mixers that draw do it from another key, the same for every example; the model must have no dropout. The rows are
    what the model answers, `output`, and the (sum, count) of each row, by their names.
    """
    keys = None
    if draw:
        keys = jnp.broadcast_to(jax.random.fold_in(evaluation_keys(1)[0], draw), batch["label"].shape[:1])
    output = outputs(nnx.merge(graphdef, params), batch, keys, given)
    each = jax.vmap(lambda *row: objective.score(*jax.tree.map(lambda x: x[None], row)))
    rows = {"output": output, **each(output, batch)}
    return jax.lax.psum(objective.score(output, batch), AXIS), rows


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    objective: Objective = CLASSIFICATION,
    given: Mapping[str, Any] = NOTHING,
    grad_accum: int = 1,
    lengths: int = 1,
    devices: Sequence[jax.Device] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Callable[[State, Batch], State]:
    """The training step of all devices: (state, batch from `split_batch`) -> state; the old state is donated.

    The loss is the weighted mean over the global batch. Keys come from `seed`, the step and the global row. So no draw
    depends on `devices` (this process's; None = all), on the processes, on `grad_accum` (the number of micro-batches
    that each device splits its rows into) or on `lengths` (how many of `at_needed_length` there are; above 1, the rows
    of a micro-batch are of similar length). Seed and rows are entries of the batch: all seeds and processes run one
    program. `given` are further arguments of the model, trees of arrays that are the same in every step, neither
    trained nor part of the state. `step.lower(state, batch)` is that of pmap; `step.trace` is the jaxpr. Both cost
    nothing where the step ran before, and take shapes and dtypes in place of arrays.

    Raises:
      ValueError: `devices` does not fit; (in a call) the batch does not divide over devices and micro-batches.
    """
    devices, mesh_devices = _devices(devices)
    step = partial(
        train_step, graphdef=graphdef, optimizer=optimizer, objective=objective, grad_accum=grad_accum, lengths=lengths
    )
    mapped = jax.pmap(
        step, axis_name=AXIS, in_axes=(None, 0, None), out_axes=None, donate_argnums=0, devices=mesh_devices
    )
    given = replicate(given, devices)
    home = _everywhere(devices)

    def prepare(state: State, batch: Batch) -> tuple[State, Batch, Mapping[str, Any]]:
        count, rows = batch["label"].shape[:2]
        if count != len(devices):
            raise ValueError(f"the batch is split over {count} devices, the step runs on {len(devices)}")
        check_batch_size(count * rows * process_count, devices=count * process_count, grad_accum=grad_accum)
        row = process_index + process_count * np.arange(count * rows, dtype=np.int32).reshape(count, rows)
        # For a state with another sharding (new, or from a checkpoint) the step would be compiled a second time.
        if getattr(state.step, "sharding", None) != home:
            state = replicate(state, devices)
        return state, {**batch, "row": row, "seed": np.full((count, rows), seed, np.uint32)}, given

    def run(state: State, batch: Batch) -> State:
        try:
            return mapped(*prepare(state, batch))
        except FloatingPointError as error:  # of jax.debug_nans
            # Only without jit does the error of a gradient keep the line that the gradient is of.
            if innermost(error).filename == __file__:
                with jax.disable_jit():
                    mapped(*prepare(state, batch))
            raise

    run.lower = lambda state, batch: mapped.lower(*prepare(state, batch))
    run.trace = lambda state, batch: jax.make_jaxpr(mapped)(*prepare(state, batch))
    return run


def make_eval_step(
    graphdef: nnx.GraphDef,
    *,
    objective: Objective = CLASSIFICATION,
    given: Mapping[str, Any] = NOTHING,
    devices: Sequence[jax.Device] | None = None,
    draw: int = 0,
    rows: bool = False,
) -> Callable[[nnx.State, Batch], Metrics]:
    """The evaluation step of all devices: (params, batch from `split_batch`) -> sums over devices and processes.

    Parameters that are not yet on the `devices` are copied at every call: `replicate` them first. `given` and `draw`
    are those of `eval_step`. With `rows` the step returns the sums and the rows of `eval_step`, `[devices, b, ...]`.
    """
    devices, mesh_devices = _devices(devices)
    step = partial(eval_step, graphdef=graphdef, objective=objective, draw=draw)
    wanted = step if rows else lambda *arguments: step(*arguments)[0]
    out = (None, 0) if rows else None
    mapped = jax.pmap(wanted, axis_name=AXIS, in_axes=(None, 0, None), out_axes=out, devices=mesh_devices)
    given = replicate(given, devices)
    return lambda params, batch: mapped(params, batch, given)


def _everywhere(devices: Sequence[jax.Device]) -> NamedSharding:
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec())


def _devices(devices: Sequence[jax.Device] | None) -> tuple[list[jax.Device], list[jax.Device] | None]:
    """This process's devices, and the `devices` argument of `pmap`: None with several processes, as it takes all."""
    local = jax.local_devices()
    devices = local if devices is None else list(devices)
    if jax.process_count() == 1:
        return devices, devices
    if devices != local:
        raise ValueError(f"devices={devices} of several processes: every process uses all of its own, {local}")
    return devices, None
