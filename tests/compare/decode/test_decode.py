"""Decoding side by side: what is measured, what is skipped, what is written."""

import csv
import io
import json

import pytest

from efficient_tx.attention import ATTENTION
from efficient_tx.compare import __main__ as command
from efficient_tx.compare.decode import measure, report
from efficient_tx.compare.decode.measure import Row, Settings
from efficient_tx.compare.timing import Cell


def test_state_and_times_by_context(tmp_path, capsys):
    flags = ["--lengths=64,128", "--mixers=softmax,gla", "--budget=8", "--head_dim=8", "--rounds=1"]
    assert command.main(["decode", *flags, f"--out={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "softmax" in printed and "gla: a token after 128 takes" in printed
    record = json.loads((tmp_path / "decode.json").read_text())
    softmax, gla = record["mixers"]
    # Two arrays of 2 heads of 8, in float32; and one matrix of 4 by 8 for each head.
    assert softmax["state_bytes"] == {"64": 64 * 2 * 16 * 4, "128": 128 * 2 * 16 * 4}
    assert set(gla["state_bytes"].values()) == {2 * 4 * 8 * 4}
    lines = list(csv.DictReader(io.StringIO((tmp_path / "decode.csv").read_text())))
    assert [(line["mixer"], line["length"]) for line in lines] == [
        (name, length) for name in ("softmax", "gla") for length in ("64", "128")
    ]
    assert all(float(line["token_us"]) > 0 and float(line["prefill_ms"]) > 0 for line in lines)
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_calls_that_take_too_long_are_not_made(monkeypatch):
    monkeypatch.setattr(measure, "in_turns", lambda runs, rounds, most: dict.fromkeys(runs, 30.0))
    (row,) = measure.compare(["vmean"], Settings((64, 128), max_seconds=20.0, head_dim=8))
    assert row.token[64].seconds == 30 / measure.STEPS and row.prefill[64].seconds == 30
    assert row.token[128].seconds is None and row.prefill[128].seconds is None
    assert report.digits(None) == report.ABSENT


def test_who_claims_a_bounded_state_is_judged_by_its_time():
    def row(name, state, seconds):
        sizes = dict(zip((1024, 4096), state))
        return Row(name, "n", sizes, {n: Cell(s) for n, s in zip(sizes, seconds)})

    rows = [row("a", (4096, 4096), (1.0, 1.4)), row("b", (8, 8), (1.0, 1.6)), row("c", (8, 16), (1.0, 9.0))]
    assert report.verdicts(rows) == [
        ("a: a token after 4k takes 1.40 times that after 1k; 4 KB", True),
        ("b: a token after 4k takes 1.60 times that after 1k; 0.00781 KB", False),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", measure.decoders())
def test_every_decoder_can_be_measured(name):
    (row,) = measure.compare([name], Settings((64,), budget=8, rounds=1))
    assert row.token[64].seconds > 0 and row.prefill[64].seconds > 0 and row.state_bytes[64] > 0
    assert ATTENTION[name].can_decode


@pytest.mark.quick
def test_who_cannot_decode_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["decode", "--mixers=softmax,fourier"])
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1) and "'fourier' is no mixer that decodes" in error
