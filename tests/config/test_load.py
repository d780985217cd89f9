"""Config files: by path or shipped name, executed once, and what is wrong with them in one line."""

import pytest

from efficient_tx.checks import OptionError
from efficient_tx.config import ConfigError, load
from tests.support import ROOT

pytestmark = pytest.mark.quick


def test_shipped_configs_are_the_files_of_the_folder():
    files = [path.stem for path in (ROOT / "configs").glob("*.py") if "\ndef get_config(" in path.read_text()]
    assert load.shipped() == sorted(files) and {"quickstart", "lra_listops", "vit_imagenet"} <= set(files)


def test_a_shipped_config_is_known_by_its_name_from_any_folder(tmp_path, monkeypatch):
    from_root = load.load("lra_listops:skyformer+monarch").to_json()
    monkeypatch.chdir(tmp_path)
    assert load.load("lra_listops:skyformer+monarch").to_json() == from_root
    assert load.load(f"{ROOT}/configs/lra_listops.py:skyformer+monarch").to_json() == from_root
    monkeypatch.chdir(ROOT)
    assert load.load("configs/lra_listops.py:skyformer+monarch").to_json() == from_root


def test_a_file_of_ones_own_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.py").write_text(
        "from efficient_tx.config import make_config\n"
        "def get_config(argument=''):\n    return make_config('lra.listops', argument, steps=3)\n"
    )
    assert load.load("quickstart.py:gla").steps == 3 and load.load("quickstart:gla").steps == 1500


def test_a_file_is_executed_once_and_asked_for_every_name(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from pathlib import Path\n"
        "from efficient_tx.config import make_config\n"
        f"with open({str(tmp_path / 'log')!r}, 'a') as log:\n    log.write('executed ')\n"
        "def get_config(argument='gla'):\n    return make_config('lra.listops', argument, steps=3)\n"
    )
    file = load.ConfigFile(str(path))
    assert file.config().mixers == "gla" and file.config({"mixers": "softmax"}).mixers == "softmax"
    typed = {"mixers": "softmax,gla", "linear.mlp.name": "monarch", "steps": 4}
    assert file.departures(file.resolve(typed)) == ["steps"]
    assert (tmp_path / "log").read_text() == "executed "
    assert file.protocols == ("default", "lra", "skyformer")


def test_quickstart_is_a_run_of_its_own():
    file = load.ConfigFile("quickstart:softmax")
    assert file.protocols == ("default",)
    with pytest.raises(ConfigError, match=r"^config\.protocol is 'lra', but quickstart:softmax is a run of its own"):
        file.resolve({"protocol": "lra"})


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("quickstrat", "there is no such config file; the nearest is quickstart"),
        ("configs/lra_listop.py", "there is no such config file; the nearest is configs/lra_listops.py"),
        ("README.md", "there is no such config file"),
        ("a" * 5000 + ".py", "there is no such config file"),
        ("a\0.py", "there is no such config file"),
        ("~nobody-here/a.py", "there is no such config file"),
        ("configs/__init__", "there is no such config file"),
        ("", "there is no such config file"),
        ("efficient_tx/files.py", "efficient_tx/files.py has no get_config"),
    ],
)
def test_what_is_no_config_file_is_said(monkeypatch, path, rule):
    monkeypatch.chdir(ROOT)
    with pytest.raises(OptionError) as caught:
        load.load(path)
    assert (caught.value.option, caught.value.value) == ("config", path) and rule in caught.value.rule


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("skyfromer", ["'skyfromer'", "nearest: 'skyformer'"]),
        ("softmax+monrach", ["'monrach'", "nearest: 'monarch'"]),
        ("softmax*0", ["'softmax*0'", "NAME*COUNT"]),
        ("a+b+c+d", ["at most three parts"]),
    ],
)
def test_what_is_wrong_with_the_argument_is_said_of_the_config(argument, words):
    with pytest.raises(OptionError) as caught:
        load.load(f"lra_listops:{argument}")
    assert (caught.value.option, caught.value.value) == ("config", f"lra_listops:{argument}")
    for word in words:
        assert word in caught.value.rule
