"""The logic of --hardware, on the CPU with an interpreter in place of an accelerator."""

import types

import jax.numpy as jnp
import pytest

from efficient_tx.kernels.case import Case, shape
from efficient_tx.kernels.verify import hardware, report


def square(x, *, implementation=None, interpret=False):
    if implementation == "pallas_gpu":
        raise RuntimeError("a kernel\nfails")
    return x * x


@pytest.fixture
def cases(monkeypatch):
    """One operation."""
    module = types.SimpleNamespace(
        AXES={"length": (8, 16), "dtype": ("float32", "bfloat16")},
        SMALL={"length": (3,)},
        case=lambda length, dtype: Case(square, (shape(dtype, length),)),
    )
    for name in ("efficient_tx.kernels.case", "efficient_tx.kernels.verify.hardware"):
        monkeypatch.setattr(f"{name}.cases_of", lambda operation: module)


def test_errors_of_small_cases_are_checked(cases):
    rows = list(hardware.checked(["op"], "pallas_tpu", hardware.Clock.start(9999), 0, lambda text: None))
    assert [row["name"] for row in rows] == ["op 3 float32", "op 3 bfloat16"]
    assert [row["most"] for row in rows] == [1e-4, 4e-2]
    assert all(map(report.holds, rows)) and "yes" in report.of_errors(rows)[-1]
    assert not report.holds(rows[0] | {"gradient": 2e-4}) and not report.holds(rows[0] | {"forward": float("nan")})


@pytest.mark.quick
def test_heads_of_the_size_that_is_used_are_checked_and_come_first(monkeypatch):
    monkeypatch.setattr(hardware.accuracy, "errors", lambda case, *_, **__: {"dim": case.arrays[0].shape[-1]})
    operations = ["block_attention", "delta_rule", "sampled_block_attention"]
    rows = list(hardware.checked(operations, "pallas_gpu", hardware.Clock.start(9999), 0, lambda text: None))
    assert all(row["dim"] in (64, 128) for row in rows[: 2 * len(operations)])
    for operation in operations:
        assert {row["dim"] for row in rows if row["name"].startswith(operation)} == {16, 64, 128}


def test_a_kernel_that_fails_is_a_finding(cases):
    rows = list(hardware.checked(["op"], "pallas_gpu", hardware.Clock.start(9999), 0, lambda text: None))
    assert [row["failed"] for row in rows] == ["RuntimeError: a kernel fails"] * 2
    assert not any(map(report.holds, rows)) and "NO" in report.of_errors(rows)[-1]


def test_times_are_of_both_passes_and_of_peers_that_run(cases, monkeypatch):
    monkeypatch.setattr(hardware, "BATCH_SECONDS", 1e-4)
    others = {"slower": lambda x: jnp.power(x, 2), "none": lambda x: x @ jnp.zeros((99, 1))}
    clock = hardware.Clock.start(9999)
    rows = list(hardware.timed(["op"], clock, 0, lambda text: None, peers=lambda operation, values, platform: others))
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        assert row["milliseconds"].keys() == {"ours", "xla", "slower"} and min(row["milliseconds"].values()) > 0
        assert row["failed"].keys() == {"none"}
    assert "TypeError" in report.of_times(rows)[-1]


@pytest.mark.quick
def test_what_does_not_run_is_a_finding_unless_it_is_a_peer():
    right = {"name": "op", "forward": 1e-6, "gradient": 1e-6, "most": 1e-4}
    step, time = {"name": "softmax", "tokens_per_second": 9.0}, {"name": "op", "milliseconds": {"ours": 1.0}}
    assert report.sound([right], [step], [time | {"failed": {"a peer": "none"}}])
    assert not report.sound([right | {"forward": 1.0}], [step], [time | {"failed": {}}])
    assert not report.sound([right], [{"name": "softmax", "failed": "out of memory"}], [time | {"failed": {}}])
    assert not report.sound([right], [step], [time | {"failed": {"ours": "out of memory"}}])


@pytest.mark.slow
def test_tokens_a_second_are_those_of_the_training_step(monkeypatch):
    monkeypatch.setattr(hardware, "BATCHES", 1)
    monkeypatch.setattr(hardware, "MIXERS", ("softmax", "none"))
    ran, failed = hardware.trained(hardware.Clock.start(9999), lambda text: None, length=16, batch=2)
    assert ran["name"] == "softmax" and ran["tokens_per_second"] > 0
    assert failed == {"name": "none", "failed": "KeyError: 'none'"}
    assert report.of_steps([ran, failed])[-1] == "| none | KeyError: 'none' |"


def test_nothing_is_begun_when_the_time_is_over(cases):
    clock = hardware.Clock.start(0)
    assert not list(hardware.checked(["op"], "pallas_tpu", clock, 0, lambda text: None))
    assert not list(hardware.trained(clock, lambda text: None))
    assert not list(hardware.timed(["op"], clock, 0, lambda text: None))


@pytest.mark.quick
def test_a_machine_without_an_accelerator_is_told_so():
    with pytest.raises(ValueError, match="jax finds no accelerator, only cpu"):
        hardware.accelerator()
