"""Files appear as a whole or not at all."""

import os
from pathlib import Path

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
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_meet(tmp_path, monkeypatch):
    """The second writes the whole file while the first is about to rename its own."""
    path, replace = tmp_path / "figures.csv", os.replace

    def first(part, place):
        monkeypatch.setattr(files.os, "replace", replace)
        files.write(path, "second")
        replace(part, place)

    monkeypatch.setattr(files.os, "replace", first)
    files.write(path, "first")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_path_is_literal_but_for_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for name in ("a/b", "run[1]", "a*?", "50%", "$HOME", "/x y", "a~", ""):
        assert files.local_path(name) == Path(name)
    assert files.local_path("~/runs/a") == tmp_path / "home" / "runs" / "a"
    assert files.local_path("~") == tmp_path / "home"
    (tmp_path / "~").mkdir()
    assert files.local_path("~") == Path("~")
    for name in ("gs://bucket/run", "s3://a", "~nobody.here", "a\0b", "a\nb", "\udcff"):
        with pytest.raises(ValueError, match=r"^\S+ (is an address|cannot be found|has control characters)"):
            files.local_path(name)
