"""Files appear as a whole or not at all."""

import pytest

from efficient_tx import files

pytestmark = pytest.mark.quick


def test_hidden_files_are_not_seen(tmp_path):
    for name in ("b.txt", "a.txt", "._a.txt", ".txt", "c.npy", "one/x.txt", "one/._x.txt", "._two/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert files.visible(tmp_path, "*.txt") == [tmp_path / "a.txt", tmp_path / "b.txt"]
    assert files.visible(tmp_path, "*/x.txt") == [tmp_path / "one" / "x.txt"]
    hidden = tmp_path / "._two"
    assert files.visible(hidden, "*.txt") == [hidden / "x.txt"]  # a user's own folder may have any name
    assert files.visible(tmp_path / "none", "*") == []


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "figures.csv"
    files.write(path, "old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write(path, "new")
    assert path.read_text() == "old"
