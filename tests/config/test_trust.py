"""Trust: a config names modules of this project and the user's own ones; others are not even looked into."""

import json
import os
import subprocess
import sys

import pytest

from efficient_tx.config import ConfigError, make_config, stored, trust
from efficient_tx.config.load import ConfigFile
from efficient_tx.config.names import mixer_class, structure_class, task_module

pytestmark = pytest.mark.quick

BOTH = """
from efficient_tx.config import make_config
KIND = "tokens"
def sizes(): return {"num_classes": 2, "vocab_size": 5, "max_len": 6}
def get_task(): return None
def get_config(argument=""): return make_config(__file__, argument)
"""
MARK = "import pathlib\npathlib.Path({!r}).touch()\n"


@pytest.fixture(autouse=True)
def nothing_is_trusted():
    before = trust.allowed()
    trust.allow()
    yield
    trust.allow(*before)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """place(FOLDER, NAME) writes a module that leaves a file `seen` when it is executed."""

    def write(folder, name):
        path = tmp_path / folder / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MARK.format(str(tmp_path / "seen")))
        return path

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = set(sys.modules)
    yield write
    for name in set(sys.modules) - known:
        del sys.modules[name]


def seen(tmp_path):
    return (tmp_path / "seen").exists()


@pytest.mark.parametrize(
    ("name", "where"),
    [("this", "it is in "), ("json.tool", "it is in "), ("sys", "it is built into Python"), ("yaml", "it is in ")],
)
def test_modules_of_python_and_installed_ones_are_refused(name, where):
    for look_up in (
        task_module,
        lambda name: mixer_class(f"{name}:Mixer"),
        lambda name: structure_class(f"{name}:Weight", "linear.mlp.name"),
    ):
        with pytest.raises(ConfigError) as caught:
            look_up(name)
        assert where in caught.value.fault and f"allow({name!r})" in caught.value.fault
    assert "this" not in sys.modules


def test_the_run_of_another_person_imports_nothing():
    config = json.loads(make_config("lra.listops", "softmax").to_json())
    for changed in ({"mixers": "this:Mixer"}, {"task": config["task"] | {"name": "this"}}):
        with pytest.raises(ValueError, match=r"'this(:Mixer)?': it is in ") as caught:
            stored.restore(config | changed)
        assert str(caught.value).startswith("config.json: ")
    assert "this" not in sys.modules


def test_modules_of_the_working_directory_and_of_pythonpath_are_the_users_own(place, tmp_path):
    place("work", "here_a")
    place("work", "here_b.inner")
    place("chosen", "here_c")
    sys.path.insert(0, str(tmp_path / "chosen"))
    sys.path.append(os.getcwd())
    for name in ("here_a", "here_b.inner", "here_c"):
        assert trust.refusal(name) is None
    assert trust.refusal("nowhere_at_all") is None  # importing it will say so
    for name in ("lra.listops", "efficient_tx.data.recall", "efficient_tx.linear"):
        assert trust.refusal(name) is None
    assert not seen(tmp_path)


def test_what_is_installed_is_refused_wherever_it_is(place, tmp_path, monkeypatch):
    """Beside Python's modules, on a path that a .pth file added, and where the working directory is site-packages."""
    place("venv/lib/site-packages", "package_a.tasks")
    place("editable/src", "package_b.tasks")
    for folder in ("venv/lib/site-packages", "editable/src"):
        sys.path.append(str(tmp_path / folder))
    for name in ("package_a.tasks", "package_b.tasks"):
        assert name in trust.refusal(name)
        with pytest.raises(ConfigError, match=rf"'{name}': it is in "):
            task_module(name)
    monkeypatch.chdir(tmp_path / "venv/lib/site-packages")
    assert trust.refusal("package_a.tasks")
    # A package in two places is the user's own in neither.
    place("work", "package_b.more")
    monkeypatch.chdir(tmp_path / "work")
    sys.path.append(os.getcwd())
    assert trust.refusal("package_b.more")
    assert not seen(tmp_path)


def test_what_is_allowed_is_imported(place, tmp_path):
    place("editable", "package_c.tasks")
    sys.path.append(str(tmp_path / "editable"))
    for names in (["package_c"], ["other", "package_c.tasks"]):
        trust.allow(*names)
        assert trust.refusal("package_c.tasks") is None
    trust.allow("package_c.task", "package")
    assert trust.refusal("package_c.tasks")
    trust.allow("package_c.tasks")
    with pytest.raises(ConfigError, match="has no get_task"):
        task_module("package_c.tasks")
    assert seen(tmp_path)


def test_files_are_in_the_working_directory_or_on_pythonpath(place, tmp_path):
    inside, below, beside = place("work", "a"), place("work/deep", "b"), place("else", "c")
    installed = place("work/venv/lib/python3/site-packages", "d")
    assert trust.refusal("a.py") is trust.refusal(str(inside)) is trust.refusal(str(below)) is None
    assert str(beside) in trust.refusal(str(beside)) and trust.refusal("../else/c.py")
    assert trust.refusal(str(installed))
    (tmp_path / "work" / "link.py").symlink_to(beside)
    assert trust.refusal("link.py")
    trust.allow("../else/c.py")
    assert trust.refusal(str(beside)) is None
    trust.allow()
    sys.path.insert(0, str(tmp_path / "else"))
    assert trust.refusal(str(beside)) is None
    assert not seen(tmp_path)


def test_a_config_file_may_be_its_own_task_wherever_it_is(tmp_path, monkeypatch):
    """The user has named it; the command that is printed for its evaluation then says so."""
    for folder in ("else", "work"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "both.py").write_text(BOTH)
    monkeypatch.chdir(tmp_path / "work")
    assert ConfigFile("both.py").config().task.name == str(tmp_path / "work" / "both.py") and trust.allowed() == ()
    path = str(tmp_path / "else" / "both.py")
    assert ConfigFile(f"{path}:gla").config().task.name == path
    assert trust.allowed() == (path,)
    trust.allow()
    with pytest.raises(ConfigError, match=r"it is in .*/else, and a config names"):
        task_module(path)


def test_a_process_with_pythonpath(place, tmp_path):
    """The real order of sys.path."""
    path = place("chosen", "here_d").parent
    program = f"refusal = runpy.run_path({trust.__file__!r})['refusal']"
    program = f"import runpy; {program}; print([refusal(name) is None for name in ('here_d', 'json', 'jax')])"
    environment = os.environ | {"PYTHONPATH": str(path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout == "[True, False, False]\n", done.stderr
