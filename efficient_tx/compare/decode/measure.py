"""Measurements of decoding: bytes of the state, time of a token and of a prompt, against the length of the context."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.attention import ATTENTION, Mixer
from efficient_tx.compare.timing import Cell, in_turns, predict

# Tokens that are decoded in one call, so that calling costs little of a token's time.
STEPS = 32


@dataclass(frozen=True)
class Settings:
    """Settings of one comparison. `lengths` ascend."""

    lengths: tuple[int, ...]
    budget: int = 128
    max_seconds: float = 20.0
    batch: int = 1
    heads: int = 2
    head_dim: int = 32
    rounds: int = 5

    @property
    def features(self) -> int:
        return self.heads * self.head_dim


@dataclass
class Row:
    """All results of one mixer; by length of the context.

    Attributes:
      cost: of the whole causal form.
      state_bytes: of one sequence, in float32.
      token: of one token after a context of that length.
      prefill: of a prompt of that length.
    """

    name: str
    cost: str
    state_bytes: dict[int, int] = field(default_factory=dict)
    token: dict[int, Cell] = field(default_factory=dict)
    prefill: dict[int, Cell] = field(default_factory=dict)

    @property
    def bounded(self) -> bool:
        """Whether the state has the same size at the two longest lengths."""
        return len(set(list(self.state_bytes.values())[-2:])) == 1

    def seconds(self, what: str) -> dict[int, float]:
        """Seconds of "token" or "prefill", where they were measured."""
        return {length: cell.seconds for length, cell in getattr(self, what).items() if cell.seconds is not None}


def decoders() -> list[str]:
    """The mixers that can decode."""
    return [name for name, variant in ATTENTION.items() if variant.can_decode]


def compare(names: Sequence[str], settings: Settings, progress: Callable[[str], Any] = lambda _: None) -> list[Row]:
    """Measures the mixers `names`; `progress` gets a line on each step."""
    rows = [Row(name, ATTENTION[name].cost) for name in names]
    for length in settings.lengths:
        runs: dict[str, dict[str, Callable[[], Any]]] = {"token": {}, "prefill": {}}
        for row in rows:
            progress(f"{length} tokens: compiling {row.name}")
            mixer = module(ATTENTION[row.name], length + STEPS, settings)
            row.state_bytes[length] = mixer.state_bytes(length)
            for what, program in (("token", tokens_after), ("prefill", prompt_of)):
                expected = predict(row.seconds(what), length)
                getattr(row, what)[length] = Cell(None, expected)
                if expected is None or expected * (STEPS if what == "token" else 1) <= settings.max_seconds:
                    runs[what][row.name] = program(mixer, length, settings)
        progress(f"{length} tokens: measuring")
        # Apart: after a long prompt nothing of a state is left in the caches.
        for what, mine in runs.items():
            for name, seconds in in_turns(mine, settings.rounds, settings.max_seconds).items():
                cells = getattr(next(row for row in rows if row.name == name), what)
                one = seconds / STEPS if what == "token" else seconds
                cells[length] = Cell(one, cells[length].predicted)
    return rows


def module(variant: type[Mixer], max_len: int, settings: Settings) -> Mixer:
    """The causal mixer of a variant."""
    return variant(
        settings.features, heads=settings.heads, head_dim=settings.head_dim, max_len=max_len, causal=True,
        rngs=nnx.Rngs(0), **variant.within(settings.budget),
    )  # fmt: skip


def tokens_after(mixer: Mixer, length: int, settings: Settings) -> Callable[[], Any]:
    """A call that decodes `STEPS` tokens after a context of that length.

    The time of a token does not depend on what the context was, so it is all zeros.
    """
    graphdef, parameters = nnx.split(mixer)
    state = mixer.init_state(settings.batch)
    state = state._replace(count=jnp.full_like(state.count, length))
    x = jax.random.normal(jax.random.key(0), (STEPS, settings.batch, settings.features))

    @jax.jit
    def decode(parameters, state, x):
        mixer = nnx.merge(graphdef, parameters)

        def step(state, token):
            y, state = mixer.step(token, state)
            return state, y

        return jax.lax.scan(step, state, x)[1]

    compiled = decode.lower(parameters, state, x).compile()
    return lambda: jax.block_until_ready(compiled(parameters, state, x))


def prompt_of(mixer: Mixer, length: int, settings: Settings) -> Callable[[], Any]:
    """A call that reads a prompt of that length."""
    graphdef, parameters = nnx.split(mixer)
    x = jax.random.normal(jax.random.key(0), (settings.batch, length, settings.features))
    compiled = jax.jit(lambda parameters, x: nnx.merge(graphdef, parameters).prefill(x)).lower(parameters, x).compile()
    return lambda: jax.block_until_ready(compiled(parameters, x))
