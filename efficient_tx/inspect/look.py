"""All that is measured inside a run: the plain record that tables, pictures and the JSON file are made of."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flax import nnx

from efficient_tx.attention import ATTENTION, Mixer
from efficient_tx.checks import OptionError
from efficient_tx.inspect.captured import Call, Inside
from efficient_tx.inspect.errors import (
    ADDED_SIZE,
    TARGETS,
    approximations,
    budgeted,
    default_sizes,
    errors,
    exact_of,
    exact_out,
    smallest,
)
from efficient_tx.inspect.profiles import least_ranks, leverage_profile, logits_profile, nuclear_norms, weight_profiles
from efficient_tx.inspect.rows import attention_rows

Heads = list[float]


@dataclass
class Layer:
    """One call of a mixer. Lists are by head.

    Attributes:
      name: path of the mixer in the model.
      mixer: its name in the config.
      exact: name of the exact function; None without one.
      error: of the mixer as it is; zeros if it is exact, None without a counterpart.
      errors: variant -> size -> error; None where the variant cannot have that size.
      budgets: variant -> target -> the smallest size; None: none that was measured.
      ranks: target -> the rank that any low-rank attention needs.
      logits: singular values of q·kᵀ, the sum of their squares 1.
      leverage: share of the scores that the keys of the highest scores have.
      attention: rows of the longest example, and what is chosen in it.
    """

    name: str
    mixer: str
    exact: str | None
    error: Heads | None = None
    errors: dict[str, dict[int, Heads | None]] = field(default_factory=dict)
    budgets: dict[str, dict[float, list[int | None]]] = field(default_factory=dict)
    ranks: dict[float, list[int | None]] | None = None
    logits: list[Heads] | None = None
    leverage: dict[str, Any] | None = None
    attention: dict[str, Any] | None = None


@dataclass
class Look:
    """What is inside a run: its mixers; singular values of its weights; Matrix Nuclear-Norm after each block.

    Attributes:
      tokens, sequences: how many were looked at, and in how many sequences; padding is none.
    """

    layers: list[Layer]
    weights: dict[str, list[float]]
    states: dict[str, float]
    tokens: int
    sequences: int

    @property
    def length(self) -> float:
        """Real tokens of a sequence, in the mean."""
        return self.tokens / max(self.sequences, 1)


def look(
    model: nnx.Module, inside: Inside, drawn: Inside, names: Mapping[type[Mixer], str], *,
    against: Sequence[str] | None, sizes: Sequence[int] | None, budget: bool, progress: Callable[[str], None],
) -> Look:  # fmt: skip
    """Measures what passed through a model.

    Args:
      inside: what is measured.
      drawn: of the same mixers, on the example whose rows are told.
      names: of the classes of its mixers in the config.
      against: variants to measure; None: with sizes or a budget, all that approximate a layer, else none.
      sizes: of their budgets; None: powers of two up to the length.
      budget: whether to find the smallest ones.
      progress: gets a line on each step.

    Raises:
      OptionError: a variant in `against` approximates no layer.
    """
    chosen = [candidates(call, against, bool(sizes) or budget) for call in inside.calls]
    for name in against or ():
        if not any(name in some for some in chosen):
            known = list(dict.fromkeys(other for call in inside.calls for other in approximations(call)))
            has = f"choose of {', '.join(known)}" if known else "none does: they have no exact counterpart"
            raise OptionError("against", name, f"it does not approximate what a layer of this run computes; {has}")
    layers = []
    for call, one, variants in zip(inside.calls, drawn.calls, chosen):
        made = layer(call, names.get(call.variant, call.variant.__name__), variants, sizes, budget, progress)
        made.attention = attention_rows(one)
        layers.append(made)
    progress("singular values of the weights")
    real = np.asarray(inside.calls[0].real) if inside.calls else np.zeros((0, 0))
    return Look(layers, weight_profiles(model), nuclear_norms(inside.states), int(real.sum()), len(real))


def candidates(call: Call, against: Sequence[str] | None, swept: bool) -> list[str]:
    """The variants that are measured on a call: its own, if that approximates; else those that could replace it."""
    known = approximations(call)
    if against is not None:
        return [name for name in against if name in known]
    own = [name for name in known if ATTENTION[name] is call.variant]
    return (own or known) if swept else []


def layer(
    call: Call, mixer: str, variants: Sequence[str], sizes: Sequence[int] | None, budget: bool,
    progress: Callable[[str], None],
) -> Layer:  # fmt: skip
    exact, expected = exact_of(call), exact_out(call)
    progress(call.name)
    names = {variant.function: name for name, variant in ATTENTION.items()}
    made = Layer(call.name, mixer, None if exact is None else names.get(exact, exact.__name__))
    made.logits, made.leverage = logits_profile(call), leverage_profile(call)
    if expected is None:
        return made
    own = errors(call, expected, call.variant)
    made.error = None if own is None else own.tolist()
    ladder = list(sizes or default_sizes(expected.shape[1]))
    for name in variants:
        found = []
        for size in ladder:
            progress(f"{call.name}: {name} within {size}")
            found.append(errors(call, expected, ATTENTION[name], size))
        made.errors[name] = {size: None if e is None else e.tolist() for size, e in zip(ladder, found)}
        if budget:
            made.budgets[name] = {target: smallest(ladder, found, target) for target in TARGETS}
    if budget:
        progress(f"{call.name}: rank of the attention matrix")
        made.ranks = least_ranks(call, TARGETS)
    return made


@dataclass
class Advice:
    """What a variant needs for an error, in all layers and heads that it is measured in.

    Attributes:
      size: the largest of their budgets; None: one of them needs more than was measured.
      settings: KEY -> VALUE that apply it, of `--set`.
      mixers: the pattern of mixers with it; None: the run has it already.
    """

    variant: str
    target: float
    size: int | None
    settings: dict[str, str]
    mixers: str | None


def advice(found: Look, pattern: Sequence[str]) -> list[Advice]:
    """For each variant and target the budget that is large enough everywhere, as options are per variant.

    Args:
      pattern: names of the mixers, as `parse_mixers` gives them.
    """
    result = []
    for variant in dict.fromkeys(name for one in found.layers for name in one.budgets):
        places = [one for one in found.layers if variant in one.budgets]
        replaced = {one.mixer for one in places if one.mixer != variant}
        mixers = ",".join(variant if name in replaced else name for name in pattern) if replaced else None
        for target in TARGETS:
            needed = [size for one in places for size in one.budgets[variant][target]]
            size = max(needed) if needed and None not in needed else None
            options = {} if size is None else budgeted(ATTENTION[variant], size)
            settings = {"mixers": mixers} if mixers and size else {}
            if mixers and ADDED_SIZE in inspect.signature(ATTENTION[variant]).parameters:
                options[ADDED_SIZE] = 0  # its weights are none of the run's
            settings |= {f"attention.{variant}.{name}": str(value) for name, value in options.items() if size}
            result.append(Advice(variant, target, size, settings, mixers))
    return result
