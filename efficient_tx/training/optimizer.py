"""Optimizers and learning-rate schedules by name: two tables over optax and optax.contrib."""

import inspect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from efficient_tx.checks import OptionError, above_zero, at_least, one_of
from efficient_tx.numerics import inverse_fisher

Schedule = Callable[[jax.Array | int], jax.Array]


def _warm(step, warmup):
    """Linear warm-up: min(1, step / warmup); 1 if warmup is 0."""
    return jnp.minimum(1.0, step / warmup) if warmup else jnp.ones_like(step, jnp.float32)


def cosine(learning_rate: float, *, steps: int, warmup: int) -> Schedule:
    """base · min(1, s/w) · ½(1 + cos π·max(0, s − w)/steps), as Long Range Arena (Tay et al., 2020, arXiv 2011.04006).

    s is the number of updates done, w the warm-up. The cosine is `steps` long and starts after the warm-up, so it would
    end at s = steps + w.
    """

    def schedule(step):
        arc = jnp.clip((step - warmup) / steps, 0.0, 1.0)
        return learning_rate * _warm(step, warmup) * 0.5 * (1 + jnp.cos(math.pi * arc))

    return schedule


def rsqrt(learning_rate: float, *, steps: int, warmup: int) -> Schedule:
    """base · min(1, s/w) / √max(s, w), as in Long Range Arena (Tay et al., 2020, arXiv 2011.04006).

    s is the number of updates done, w the warm-up. The peak is base/√w.
    """
    return lambda step: learning_rate * _warm(step, warmup) / jnp.sqrt(jnp.maximum(step, max(warmup, 1)))


def one_cycle(learning_rate: float, *, steps: int, warmup: int) -> Schedule:
    """Two lines: from base/25 at s = 0 up to base at s = w − 1, then down to base/250,000 at s = steps − 1.

    s is the number of updates done, w the warm-up. This is the 1cycle policy (Smith and Topin, 2018, arXiv 1708.07120)
    as in torch's OneCycleLR(max_lr=base, total_steps=steps, pct_start=w/steps, anneal_strategy="linear"). By default
    torch also moves Adam's b1 from 0.95 down to 0.85 and back and ignores the optimizer's own b1. Here `b1` is the
    config's.
    """
    if warmup > steps:
        raise OptionError("warmup", warmup, f"one_cycle peaks within the run, whose steps are {steps}")
    start, end, peak, last = learning_rate / 25, learning_rate / 25 / 1e4, warmup - 1, steps - 1

    def schedule(step):
        up = start + (learning_rate - start) * jnp.clip(step / max(peak, 1), 0.0, 1.0)
        down = learning_rate + (end - learning_rate) * jnp.clip((step - peak) / max(last - peak, 1), 0.0, 1.0)
        return jnp.where(step < peak, up, down)

    return schedule


def constant(learning_rate: float, *, steps: int, warmup: int) -> Schedule:
    """base · min(1, s/w), with s the number of updates done and w the warm-up."""
    return lambda step: learning_rate * _warm(step, warmup)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine": cosine,
    "rsqrt": rsqrt,
    "one_cycle": one_cycle,
    "constant": constant,
}


def sgd(learning_rate: Schedule, *, b1: float, weight_decay: float) -> optax.GradientTransformation:
    """SGD with momentum `b1` (0 = none) and decoupled weight decay."""
    return optax.chain(
        optax.trace(decay=b1), optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate)
    )


def muon(
    learning_rate: Schedule, *, b1: float, b2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024) for the matrices between input and output, adamw for all other parameters.

    A matrix is a two-dimensional parameter called `kernel`, as in `nnx.Linear`, that is not inside a module called
    `head` or `embedding`. So adamw trains the output layer, embeddings, positions, vectors and the factors of
    structured weights. Updates are scaled to adamw's root mean square (0.2, Liu et al., 2025, arXiv 2502.16982), so
    both share one learning rate.
    """

    def label(path, param):
        names = [getattr(entry, "key", None) for entry in path]
        inner = "kernel" in names and not {"head", "embedding"} & set(names)
        return "muon" if param.ndim == 2 and inner else "adamw"

    matrices = optax.contrib.muon(learning_rate, beta=b1, eps=eps, weight_decay=weight_decay, consistent_rms=0.2)
    rest = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return optax.partition(
        {"muon": matrices, "adamw": rest}, lambda params: jax.tree_util.tree_map_with_path(label, params)
    )


def prodigy(
    learning_rate: Schedule, *, b1: float, b2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """Prodigy (Mishchenko and Defazio, 2023, arXiv 2306.06101) finds the step size itself: learning_rate 1 is best.

    `safeguard_warmup` keeps the learning rate out of the denominator of the estimate. Otherwise a warm-up from 0 would
    make it 0/0.
    """
    return optax.contrib.prodigy(
        learning_rate, betas=(b1, b2), eps=eps, weight_decay=weight_decay, safeguard_warmup=True
    )


def mfac(
    learning_rate: Schedule, *, b1: float, weight_decay: float, window: int, damping: float
) -> optax.GradientTransformation:
    """M-FAC (Frantar, Kurtic and Alistarh, 2021, arXiv 2107.03356): natural gradients of the last `window` gradients.

    The gradient is multiplied by (damping · I + (1/window) Σ g gᵀ)⁻¹, where the sum has the gradient itself, those
    before it, and zeros in the place of those that have not come yet. Of the products, an exponential moving average
    with decay `b1` is the update. As published: learning_rate 1e-3, b1 0, window 1024 and damping 1e-5; but weight
    decay is decoupled here, as in the other optimizers, and not a part of the gradient.
    """

    def init(params):
        return inverse_fisher.empty(params, window)

    def update(gradient, state, params=None):
        del params
        state = inverse_fisher.slide(state, gradient)
        return inverse_fisher.newest_times(state, damping), state

    return optax.chain(
        optax.GradientTransformation(init, update),
        optax.ema(b1, debias=False),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


# An optimizer gets those of weight_decay, b1, b2, eps, window and damping that are in its signature.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "lion": optax.lion,
    "sgd": sgd,
    "muon": muon,
    "schedule_free_adamw": optax.contrib.schedule_free_adamw,
    "prodigy": prodigy,
    "mfac": mfac,
}
# Optimizers whose state is about all parameters together, and is lost when some of them change their form: why.
OVER_ALL = {
    "schedule_free_adamw": "it evaluates an average of the parameters",
    "mfac": "it keeps products of gradients over all parameters",
}

# Optimizers whose updates have entries of about the size of the learning rate, for any gradient.
SIGN_LIKE = ("adam", "adamw", "lion")


def make_optimizer(
    *,
    steps: int,
    name: str = "adamw",
    learning_rate: float = 1e-3,
    schedule: str = "cosine",
    warmup: int = 1000,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    clip_by: str = "norm",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    window: int = 32,
    damping: float = 1e-5,
    structured_lr: bool = False,
    scaling: optax.GradientTransformation | None = None,
    births: optax.Params | None = None,
    rewarm: int = 0,
) -> tuple[optax.GradientTransformation, Schedule]:
    """Returns the optimizer and its schedule: updates done before this one -> learning rate (float32).

    Args:
      steps: updates of the whole run; the schedule is fitted to them.
      name: a key of OPTIMIZERS.
      learning_rate: base of the schedule.
      schedule: a key of SCHEDULES.
      warmup: updates over which the learning rate rises linearly from 0; 0 = none.
      weight_decay: each update also subtracts learning rate × weight_decay × parameter from every parameter, as in the
        official Long Range Arena code, optax and torch.
      clip: largest global norm of the gradient, or largest absolute value of an entry (see clip_by); 0 = no clipping.
      clip_by: "norm" or "value".
      b1: decay of the first moment; momentum of sgd, muon and mfac; interpolation weight of schedule_free_adamw.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      window: of mfac, the number of gradients that it keeps, each of the size of the parameters; published is 1024.
      damping: of mfac, what is added to the diagonal of the Fisher matrix of these gradients.
      structured_lr: gives every layer and factor its own learning rate, so that an update changes a layer's output
        equally at every width and in every structure. `learning_rate` is then the rate of a dense layer with 64 inputs.
        The rule needs updates whose entries are all of one size: optimizers in SIGN_LIKE only.
      scaling: transformation that scales the updates if structured_lr is set; None if nothing is trained.
      births: for runs in which parameters change their form: for each parameter, the update from which its moments and
        their bias corrections count. Parameters with the same birth form a group. An optimizer that estimates something
        over all parameters (prodigy) sees one group at a time; clipping by norm sees all groups.
      rewarm: updates over which the learning rate of parameters that are born later rises linearly to the schedule's.

    Raises:
      ValueError: an unknown name, an option out of its range, or one that has no effect with the chosen optimizer.
    """
    one_of(OPTIMIZERS, name=name)
    one_of(SCHEDULES, schedule=schedule)
    one_of(("norm", "value"), clip_by=clip_by)
    sizes = {"learning_rate": learning_rate, "warmup": warmup, "weight_decay": weight_decay, "clip": clip, "eps": eps}
    for option, value in sizes.items():
        if not value >= 0:
            raise OptionError(option, value, "use 0 or more")
    for option, value in {"b1": b1, "b2": b2}.items():
        if not 0 <= value < 1:
            raise OptionError(option, value, "use a number in [0, 1)")
    at_least(1, window=window)
    above_zero(damping=damping)
    if name == "schedule_free_adamw" and b1 == 0:
        raise OptionError("b1", b1, "schedule_free_adamw interpolates with weight b1, use a number in (0, 1)")
    if structured_lr and name not in SIGN_LIKE:
        rule = f"there is no rule for {name}: leave it at False, or choose one of {', '.join(SIGN_LIKE)}"
        raise OptionError("structured_lr", structured_lr, rule)
    options = {
        "weight_decay": weight_decay, "b1": b1, "b2": b2, "eps": eps, "window": window, "damping": damping
    }  # fmt: skip
    known = inspect.signature(OPTIMIZERS[name]).parameters
    defaults = inspect.signature(make_optimizer).parameters
    for option, value in options.items():
        if option not in known and value != defaults[option].default:
            rule = f"it has no effect with {name}: leave it at {defaults[option].default}, or choose another optimizer"
            raise OptionError(option, value, rule)
    if births is not None and name in OVER_ALL:
        rule = (
            f"{OVER_ALL[name]}, which is lost when they change their form: leave densify_at unset, or choose another "
            "optimizer"
        )
        raise OptionError("name", name, rule)
    rate = SCHEDULES[schedule](learning_rate, steps=steps, warmup=warmup)

    def choose(birth):
        own = _reborn(rate, birth, rewarm) if birth else rate
        return OPTIMIZERS[name](own, **{option: value for option, value in options.items() if option in known})

    groups = {birth: choose(birth) for birth in sorted({0, *jax.tree.leaves(births)})}
    chosen = groups[0] if births is None else optax.partition(groups, births)
    parts = [chosen]
    if clip:
        parts.insert(0, optax.clip(clip) if clip_by == "value" else optax.clip_by_global_norm(clip))
    if structured_lr:
        # Both have an empty state, so the same checkpoint fits both.
        parts.append(scaling or optax.identity())
    return (optax.chain(*parts) if parts[1:] else chosen), rate


def evaluation_params(optimizer_state: optax.OptState, params: optax.Params) -> optax.Params:
    """The parameters to evaluate: `params`, or their average if the optimizer is schedule-free and keeps one.

    Training continues from `params` (Defazio et al., 2024, arXiv 2405.15682).
    """

    def keeps_average(node):
        return isinstance(node, optax.contrib.ScheduleFreeState)

    states = [node for node in jax.tree.leaves(optimizer_state, is_leaf=keeps_average) if keeps_average(node)]
    return optax.contrib.schedule_free_eval_params(states[0], params) if states else params


def _reborn(schedule: Schedule, birth: int, rewarm: int) -> Schedule:
    """The schedule of parameters whose updates count from `birth` on, with a linear warm-up of their own."""
    return lambda step: schedule(step + birth) * (jnp.minimum(1.0, (step + 1) / rewarm) if rewarm else 1.0)
