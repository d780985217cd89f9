"""The documentation: links lead somewhere, commands have flags and keys that exist, blocks of Python run.

Commands are not started here, as they take long: those of training are resolved to a config, those of evaluation are
parsed, and of all others the flags are looked for in their own --help. tests/docs/test_commands.py starts some.
"""

import contextlib
import io
import re
import runpy
import sys

import pytest

from efficient_tx import eval as evaluation
from efficient_tx.compare import readme
from efficient_tx.config import flags
from efficient_tx.config.load import ConfigFile
from efficient_tx.sweep import __main__ as sweep
from tests.docs.pages import GUIDES, PAGES, blocks, commands, write_files
from tests.support import ROOT
from tests.support.command import undone

every_page = pytest.mark.parametrize("page", PAGES)


@every_page
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)\)", text)
    missing = [to for to in targets if "://" not in to and not (ROOT / page).parent.joinpath(to).exists()]
    assert not missing


@every_page
def test_commands_exist_with_their_flags(page, tmp_path, monkeypatch):
    files = write_files(page, tmp_path)
    if any(path.parent == tmp_path for path in files):  # a user's own folder
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        for module in ("my_mixers", "my_scores"):
            monkeypatch.delitem(sys.modules, module, raising=False)  # of another folder
    else:
        monkeypatch.chdir(ROOT)
    for words in commands(page):
        if words[0] == "train.py" or words[:2] == ["-m", "efficient_tx.train"]:
            resolve(words[1:] if words[0] == "train.py" else words[2:])
        elif words[0] == "eval.py" or words[:2] == ["-m", "efficient_tx.eval"]:
            evaluation.parse(words[1:] if words[0] == "eval.py" else words[2:])
        elif words[:2] == ["-m", "efficient_tx.sweep"]:
            assert sweep.grid_of(*sweep.parse(words[2:])).cells()
        else:
            look_up(words, monkeypatch)


def resolve(arguments):
    """What train.py does with its arguments before it trains."""
    path, rest = flags.split([argument for argument in arguments if argument != "--help"])
    file = ConfigFile(path)
    typed, others = flags.typed_values(file, ["train.py", *rest])
    file.resolve(typed)
    assert {other.split("=")[0] for other in others[1:]} <= {"--workdir"}
    assert "--help" in arguments or len(others) == 2, "a run needs a workdir"


def look_up(words, monkeypatch):
    """Asks a command for its --help and finds there the flags that a page gives it."""
    words = [word for word in words if word not in ("[", "]")]
    script, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    chosen = [word for word in rest[:1] if script == "efficient_tx.compare"]
    monkeypatch.setattr(sys, "argv", [script, *chosen, "--help"])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    output = io.StringIO()
    with undone(), contextlib.redirect_stdout(output), pytest.raises(SystemExit) as exit:
        if words[0] == "-m":
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not exit.value.code
    assert rest[:1] != ["--help"]
    for flag in (word.split("=")[0] for word in rest if word.startswith("--")):
        assert re.search(rf"{flag}\b", output.getvalue()), f"{script} has no {flag}"


@every_page
def test_python_is_valid(page):
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, f"{page} {block.what}", "exec")


@pytest.mark.parametrize("page", ["README.md", *GUIDES])
@pytest.mark.first(1)
def test_python_runs(page):
    """Each block by itself. Of lra/README.md it makes 100,000 expressions: tests/lra has that."""
    for block in blocks(page):
        if (block.language, block.what) == ("python", ""):
            exec(compile(block.text, page, "exec"), {"__name__": "block"})


def test_readme_is_read_in_one_sitting():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert [block.text.strip() for block in blocks("README.md") if block.what == "tests"] == [
        "pip install -e '.[test]' && pytest"
    ]
    assert readme.tables()["README.md"] in text, "python -m efficient_tx.compare table --write README.md"
    assert max(path.stat().st_size for path in (ROOT / "docs/pictures").iterdir()) < 150_000
