"""sweep.json: several sweeps of a folder add to it, and what they cannot read they leave as it is."""

import json
import threading
import time

import pytest

from efficient_tx.sweep import record

pytestmark = pytest.mark.quick


def test_sweeps_that_write_at_once_lose_nothing(tmp_path, monkeypatch):
    """Each would read the record before any other has written it."""
    read = record.read

    def slowly(out):
        before = read(out)
        time.sleep(0.1)
        return before

    monkeypatch.setattr(record, "read", slowly)
    names = ["a", "b", "c"]
    sweeps = [threading.Thread(target=record.add, args=(tmp_path, "x", {name: {}}, {name: {}})) for name in names]
    for sweep in sweeps:
        sweep.start()
    for sweep in sweeps:
        sweep.join()
    assert {part: sorted(of) for part, of in read(tmp_path).items()} == {"runs": names, "chosen": names}


@pytest.mark.parametrize("content", ['{"runs": {}, "chosen": {', '{"runs": {}}', '{"runs": [], "chosen": {}}', "[]"])
def test_a_damaged_one_is_named_and_stays(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    for act in (lambda: record.read(tmp_path), lambda: record.add(tmp_path, "x", {"a": {}}, {})):
        with pytest.raises(ValueError, match=r"sweep\.json is damaged \(.*\): restore it, or move it away"):
            act()
    assert (tmp_path / "sweep.json").read_text() == content


def test_what_was_there_stays(tmp_path):
    record.add(tmp_path / "new", "x", {"a": {"seed": 0}}, {"gla": {"settings": {}}})
    record.add(tmp_path / "new", "y", {"b": {}}, {})
    stored = json.loads((tmp_path / "new" / "sweep.json").read_text())
    assert stored == {"config": "y", "chosen": {"gla": {"settings": {}}}, "runs": {"a": {"seed": 0}, "b": {}}}
