"""Commands of the pages as a new user types them, in a folder with the files of the page; long runs made short."""

import sys

import pytest

import efficient_tx.compress.__main__
import efficient_tx.eval
import efficient_tx.predict.__main__
import efficient_tx.train
from tests.docs.pages import SHORT, SHORT_OWN, commands, write_files
from tests.support import ROOT
from tests.support.command import here

COMMANDS = {
    "train.py": efficient_tx.train.command,
    "eval.py": efficient_tx.eval.command,
    "-m efficient_tx.train": efficient_tx.train.command,
    "-m efficient_tx.eval": efficient_tx.eval.command,
    "-m efficient_tx.compress": efficient_tx.compress.__main__.command,
    "-m efficient_tx.predict": efficient_tx.predict.__main__.command,
}
# They have many runs, or need what these have left; their own tests run them.
ELSEWHERE = {"efficient_tx.compare", "efficient_tx.sweep", "efficient_tx.report", "efficient_tx.inspect"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", ["README.md", "docs/your_own_mixer.md", "docs/your_own_score.md", "docs/your_own_task.md"]
)
def test_training_and_evaluation_run(page, tmp_path, monkeypatch):
    """In this process; that each starts as a process of its own, from any folder, is in tests/test_own.py."""
    for file in write_files(page, tmp_path):
        monkeypatch.delitem(sys.modules, file.stem, raising=False)  # of another folder
    monkeypatch.chdir(tmp_path)
    ran = 0
    for words in commands(page):
        if ELSEWHERE & set(words):
            continue
        name, arguments = (" ".join(words[:2]), words[2:]) if words[0] == "-m" else (words[0], words[1:])
        arguments = [word.replace("--config=configs/", f"--config={ROOT}/configs/") for word in arguments]
        shipped = any("quickstart" in word for word in words if word.startswith("--config="))
        own = any(word.startswith("--config=my_") for word in words)
        short = (SHORT if shipped else SHORT_OWN if own else "").split()
        if short and not any("," in word for word in words):  # mixers that take turns need two layers
            short.append("--config.model.layers=1")
        status, _, error = here(COMMANDS[name], *arguments, *short)
        assert status == 0, f"{words}: {error}"
        ran += 1
    assert ran >= 4
