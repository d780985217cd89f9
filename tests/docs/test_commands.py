"""Commands of the pages as a new user types them, in a folder with the files of the page; long runs made short."""

import os
import subprocess
import sys

import pytest

from tests.docs.pages import SHORT, SHORT_OWN, commands, write_files
from tests.support import ROOT
from tests.support.command import scratch


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", ["README.md", "docs/your_own_mixer.md", "docs/your_own_score.md", "docs/your_own_task.md"]
)
def test_training_and_evaluation_run(page, tmp_path):
    write_files(page, tmp_path)
    environment = os.environ | {"EFFICIENT_TX_DATA": str(scratch() / "data"), "PYTHONPATH": str(ROOT)}
    ran = 0
    for words in commands(page):
        if "efficient_tx.compare" in words:
            continue
        script = [ROOT / words[0], *words[1:]] if words[0].endswith(".py") else words
        script = [str(word).replace("--config=configs/", f"--config={ROOT}/configs/") for word in script]
        shipped = any("quickstart" in word for word in words if word.startswith("--config="))
        own = any(word.startswith("--config=my_") for word in words)
        short = (SHORT if shipped else SHORT_OWN if own else "").split()
        done = subprocess.run(
            [sys.executable, *script, *short],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        ran += 1
    assert ran >= 4
