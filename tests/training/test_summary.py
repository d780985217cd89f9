"""What a summary says of the code: its commit, and nothing of another project's."""

import shutil
import subprocess
from pathlib import Path

import pytest

from efficient_tx.training import summary

pytestmark = pytest.mark.quick


def git(folder, *words):
    author = ["-c", "user.name=x", "-c", "user.email=x@y"]
    return subprocess.run(["git", "-C", folder, *author, *words], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_is_that_of_a_checkout_of_this_code(tmp_path, monkeypatch):
    file = shutil.copy(summary.__file__, tmp_path / "summary.py")
    monkeypatch.setattr(summary, "__file__", str(file))
    assert summary.commit() is None
    git(tmp_path, "init")
    (tmp_path / "other").touch()
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-m", "of another project")
    assert summary.commit() is None
    git(tmp_path, "add", "summary.py")
    git(tmp_path, "commit", "-m", "of this one")
    head = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert summary.commit() == head
    Path(file).write_text("")
    assert summary.commit() == f"{head}-dirty"
