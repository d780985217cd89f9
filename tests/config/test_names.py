"""Names in a config: of mixers and structures, of a user's own class, of a task's module or file."""

import builtins
import sys
import textwrap

import pytest

from efficient_tx.attention import ATTENTION
from efficient_tx.config import ConfigError, make_config, names
from efficient_tx.linear import LINEAR

pytestmark = pytest.mark.quick

CLASSES = """
    from efficient_tx.attention.exact.softmax import Softmax
    from efficient_tx.linear import LowRank

    class Mine(Softmax):
        pass

    class Thin(LowRank):
        pass

    number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into a folder on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    written = []

    def write(name, text=CLASSES):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        written.append(name)
        return tmp_path / f"{name}.py"

    yield write
    for name in written:
        sys.modules.pop(name, None)


def test_a_pattern_has_counts():
    assert names.parse_mixers("softmax*2, linformer") == ["softmax", "softmax", "linformer"]


@pytest.mark.parametrize(
    "pattern", ["softmax*0", "softmax,,gla", "", "softmax*", "a:b:c", "softmax gla", f"softmax*{'9' * 5000}"]
)
def test_a_part_that_is_no_name_is_refused(pattern):
    with pytest.raises(ConfigError, match=r"is no NAME or NAME\*COUNT") as caught:
        names.parse_mixers(pattern)
    assert caught.value.key == "mixers"


@pytest.mark.parametrize(
    "pattern", ["softmax*1000000000", "softmax*99999999999999999", "softmax*999,softmax*26", ",".join(["gla"] * 1025)]
)
def test_a_pattern_longer_than_any_model_is_refused_before_it_is_written_out(pattern):
    with pytest.raises(ConfigError, match=r"it must have at most 1024 layers$") as caught:
        names.parse_mixers(pattern)
    assert caught.value.key == "mixers" and len(names.parse_mixers("softmax*999,gla*25")) == 1024


def test_names_are_keys_of_the_tables_or_classes_of_modules(module):
    module("mine_a")
    assert names.mixer_class("gla") is ATTENTION["gla"] and names.structure_class("blast", "x") is LINEAR["blast"]
    assert names.mixer_class("mine_a:Mine").__name__ == "Mine"
    assert names.structure_class("mine_a:Thin", "linear.mlp.name").__name__ == "Thin"
    assert names.parse_mixers("mine_a:Mine*2,softmax") == ["mine_a:Mine", "mine_a:Mine", "softmax"]
    config = make_config("lra.listops", "mine_a:Mine,gla+mine_a:Thin")
    assert set(config.attention) == {"Mine", "gla"} and config.linear.mlp.to_dict() == {
        "name": "mine_a:Thin", "rank": None,
    }  # fmt: skip


def test_two_classes_of_one_name_are_refused(module):
    module("mine_b")
    module("mine_c")
    with pytest.raises(ConfigError, match=r"^config\.mixers has 'mine_b:Mine' and 'mine_c:Mine'.*rename a class$"):
        make_config("lra.listops", "mine_b:Mine,mine_c:Mine")
    module("mine_d", CLASSES + "\n    class softmax(Softmax):\n        pass\n")
    with pytest.raises(ConfigError, match=r"'softmax' and 'mine_d:softmax', whose options share a section") as caught:
        names.parse_mixers("softmax,mine_d:softmax")
    assert caught.value.key == "mixers"


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("skyfromer", "is 'skyfromer': choose one of "),
        ("skyfromer", "(nearest: 'skyformer')"),
        (
            "nowhere:Mine",
            "No module named 'nowhere' (modules are looked for in the working directory",
        ),
        ("mine_e:Yours", "the module mine_e has no Yours"),
        ("mine_e:number", "that is no subclass of efficient_tx.attention.Mixer"),
        ("mine_e:Thin", "that is no subclass of efficient_tx.attention.Mixer"),
    ],
)
def test_a_wrong_name_of_a_mixer_is_said(module, name, fault):
    module("mine_e")
    with pytest.raises(ConfigError) as caught:
        names.mixer_class(name)
    assert caught.value.key == "mixers" and fault in caught.value.fault


def test_a_wrong_name_of_a_structure_is_said_of_its_key(module):
    module("mine_f")
    for name, fault in [("monrach", "(nearest: 'monarch')"), ("mine_f:Mine", "that is no subclass of ")]:
        with pytest.raises(ConfigError) as caught:
            names.structure_class(name, "linear.projections.name")
        assert caught.value.key == "linear.projections.name" and fault in caught.value.fault


def test_the_path_of_a_task_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert names.absolute_task("lra.listops") == "lra.listops"
    assert names.absolute_task("mine.py") == str(tmp_path / "mine.py")
    assert names.absolute_task("/there/mine.py") == "/there/mine.py"


GOOD = """
    from efficient_tx.task import Task

    KIND = "tokens"

    def sizes(**_):
        return {"num_classes": 2, "vocab_size": 5, "max_len": 6}

    def get_task(*, length: int = 3):
        return None
"""


def test_a_file_is_executed_once(module):
    path = module(
        "task_a", GOOD + "\n    import builtins\n    builtins.counted = getattr(builtins, 'counted', 0) + 1\n"
    )
    first = names.task_module(str(path))
    assert names.task_module(str(path)) is first and builtins.counted == 1
    assert names.task_sizes({"name": str(path), "length": 3}) == {"num_classes": 2, "vocab_size": 5, "max_len": 6}
    del builtins.counted


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (GOOD.replace("def get_task", "def got_task"), "that module has no get_task, so it makes no task"),
        (GOOD.replace("KIND", "SORT"), "that module has no KIND, so it makes no task"),
        (GOOD.replace("def sizes", "def size"), "that module has no sizes, so it makes no task"),
        (GOOD.replace('"tokens"', '"words"'), "whose KIND is 'words': choose one of tokens, token_labels"),
        (GOOD.replace("def sizes(**_):", "def sizes(**_:"), "give a module with get_task, as 'lra.listops', or a file"),
        (GOOD + "\n    import nowhere_at_all\n", "No module named 'nowhere_at_all'"),
    ],
    ids=["no get_task", "no KIND", "no sizes", "wrong KIND", "a syntax error", "a missing import"],
)
def test_what_is_wrong_with_a_tasks_file_is_said(module, text, fault, request):
    path = module(f"task_{request.node.callspec.indices['text']}", text)
    with pytest.raises(ConfigError) as caught:
        names.task_module(str(path))
    assert caught.value.key == "task.name" and fault in caught.value.fault and "\n" not in str(caught.value)
    assert f"is {str(path)!r}" in caught.value.fault


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("nowhere/task.py", "is 'nowhere/task.py': there is no such file"),
        ("lra.listop", "is 'lra.listop': No module named 'lra.listop'; give a module with get_task"),
        ("json", "is 'json': it is in "),
        ("", "is '', which cannot be imported"),
    ],
)
def test_a_task_that_there_is_not_is_said(name, fault):
    with pytest.raises(ConfigError) as caught:
        names.task_module(name)
    assert caught.value.key == "task.name" and fault in caught.value.fault
