"""Files appear as a whole or not at all."""

import pytest

from efficient_tx import files

pytestmark = pytest.mark.quick


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "figures.csv"
    files.write(path, "old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write(path, "new")
    assert path.read_text() == "old"
