"""Stages: what a run trains before and after each change of its model's form."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from efficient_tx.task import Objective
from efficient_tx.training.objective import CLASSIFICATION
from efficient_tx.training.step import NOTHING, State, init_state

# Changes a model in place. A parameter that stays the same `nnx.Param` keeps its moments.
Transform = Callable[[nnx.Module], Any]


class Stage(NamedTuple):
    """What a run trains from one step on, until the next stage.

    The checkpoint of step `start` belongs to this stage: it is saved right after the transform.

    Attributes:
      start: updates done when the stage begins; 0 for the first.
      model: in the first stage with the values that the run starts from, in the others abstract.
      optimizer: for the parameters of `model`.
      transform: turns the model of the stage before into this one; None for the first.
      objective: what the model is trained for.
      given: further arguments of the model, which are not trained: see `make_train_step`.
    """

    start: int
    model: nnx.Module
    optimizer: optax.GradientTransformation
    transform: Transform | None = None
    objective: Objective = CLASSIFICATION
    given: Mapping[str, Any] = NOTHING

    def like(self) -> State:
        """The state in this stage, abstract."""
        graphdef, params = nnx.split(self.model)
        return jax.eval_shape(
            lambda params: init_state(nnx.merge(graphdef, params), self.optimizer, self.objective), params
        )


def make_stages(
    model: nnx.Module,
    transforms: Sequence[tuple[int, Transform]],
    make_optimizer: Callable[[nnx.Module, nnx.State | None], optax.GradientTransformation],
    objective: Objective = CLASSIFICATION,
) -> list[Stage]:
    """The stages of a run.

    Args:
      model: of the first stage; may be abstract if nothing is trained.
      transforms: (step, transform) with ascending steps; each begins a stage.
      make_optimizer: (model, births) -> optimizer. `births` has the structure of the parameters and holds the steps
        from which their moments count; None if all count from 0.
      objective: of all stages.
    """
    births = jax.tree.map(lambda _: 0, nnx.split(model)[1])
    stages = [Stage(0, model, make_optimizer(model, births if transforms else None), None, objective)]
    for start, transform in transforms:
        model, births = _abstractly(transform, start, model, births)
        stages.append(Stage(start, model, make_optimizer(model, births), transform, objective))
    return stages


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage of the state, and of the checkpoint, of `step`."""
    return [stage for stage in stages if stage.start <= step][-1]


def enter(state: State, before: Stage, stage: Stage) -> State:
    """The first state of `stage`, from the last state of the stage `before`.

    Arrays of the optimizer's state are kept if the new state has the same path; the others start anew.
    """
    state = jax.tree.map(jnp.asarray, jax.device_get(state))
    model = nnx.merge(nnx.split(before.model)[0], state.params)
    stage.transform(model)
    fresh = init_state(model, stage.optimizer, stage.objective)
    remembered = dict(jax.tree_util.tree_leaves_with_path(state.optimizer))
    return state._replace(
        params=fresh.params,
        optimizer=jax.tree_util.tree_map_with_path(lambda path, leaf: remembered.get(path, leaf), fresh.optimizer),
    )


def _abstractly(transform: Transform, start: int, model: nnx.Module, births: nnx.State) -> tuple[nnx.Module, nnx.State]:
    """The abstract model after the transform, and its births: `start` for its new parameters."""
    graphdef, params = nnx.split(model)
    old = {path: birth.get_value() for path, birth in nnx.to_flat_state(births)}
    static = []

    def run(params):
        changed = nnx.merge(graphdef, params)
        before = _variables(changed)
        transform(changed)
        graphdef_after, after = nnx.split(changed)
        kept = {path for path, variable in _variables(changed).items() if before.get(path) is variable}
        static.append((graphdef_after, kept))
        return after

    params = jax.eval_shape(run, params)
    ((graphdef, kept),) = static
    births = nnx.from_flat_state(
        [(path, variable.replace(old[path] if path in kept else start)) for path, variable in nnx.to_flat_state(params)]
    )
    return nnx.merge(graphdef, params), births


def _variables(model: nnx.Module) -> dict[tuple, nnx.Variable]:
    return {path: node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Variable)}
