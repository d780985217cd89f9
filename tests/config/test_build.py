"""From a resolved config to objects, and what a module of a user's own does wrong, in one line."""

import sys
import textwrap

import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION
from efficient_tx.config import ConfigError, build, check, make_config
from efficient_tx.linear import LINEAR
from efficient_tx.task import Task

pytestmark = pytest.mark.quick

TASK = """
    import numpy as np
    from efficient_tx.task import Task

    KIND = "tokens"

    def sizes(*, length, **_):
        return {"num_classes": 2, "vocab_size": 5, "max_len": length}

    def get_task(*, length: int = 6):
        split = [{"inputs": np.arange(1, 4, dtype=np.int32), "label": 1}] * 8
        return Task(split, split, split, kind=KIND, name="mine", source="memory", **sizes(length=length))
"""


@pytest.fixture
def config_of(tmp_path, monkeypatch):
    """A config whose task is this file, in the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(text, **settings):
        (tmp_path / "mine.py").write_text(textwrap.dedent(text))
        return make_config(str(tmp_path / "mine.py"), "softmax", **settings)

    yield make
    for name in [name for name in sys.modules if name.startswith("task_file")]:
        del sys.modules[name]


def test_a_task_is_a_file(config_of):
    """Its options are those of get_task; it needs no data_dir."""
    config = config_of(TASK, task={"length": 4})
    assert set(config.task) == {"name", "length"}
    check.check(config)
    task = build.build_task(config)
    assert isinstance(task, Task) and (task.name, task.max_len, len(task.train)) == ("mine", 4, 8)
    model = nnx.eval_shape(lambda: build.build_model(config, task))
    assert type(model).__name__ == "Classifier"


@pytest.mark.parametrize(
    ("old", "new", "key", "words"),
    [
        ("    split = [", "    1 / 0\n        split = [", "task",
         ["ZeroDivisionError: division by zero", "mine.py, line 11)"]),
        ("return Task(", "return str(", "task", ["TypeError: "]),
        ("return Task(", "return dict(", "task", ["TypeError: "]),
        ("    split = [", "    return 3\n        split = [", "task",
         ["get_task returned a int, not an efficient_tx.task.Task"]),
        ("**sizes(length=length)", "num_classes=3, vocab_size=5, max_len=length", "task",
         ["sizes() says that num_classes is 2, and the task has 3"]),
        ("kind=KIND", "kind='image'", "task", ["KIND says that kind is 'tokens', and the task has 'image'"]),
        ("    split = [", "    raise ValueError('no such length')\n        split = [", "task", ["no such length"]),
        ("    split = [", "    raise FileNotFoundError('no data here')\n        split = [", "task", ["no data here"]),
    ],
    ids=["an exception", "wrong arguments", "no arguments", "no Task", "other sizes", "another kind", "a wrong value",
         "no data"],
)  # fmt: skip
def test_what_is_wrong_with_get_task_is_one_line(config_of, old, new, key, words):
    assert old in TASK
    with pytest.raises(ConfigError) as caught:
        build.build_task(config_of(TASK.replace(old, new)))
    assert "\n" not in str(caught.value) and caught.value.key == key
    for word in words:
        assert word in str(caught.value)


def test_an_exception_in_sizes_is_found_before_a_run(config_of):
    config = config_of(TASK.replace("return {", "raise ValueError('length is odd')\n        return {"))
    with pytest.raises(ConfigError, match=r"^config\.task cannot be used: length is odd") as caught:
        check.check(config)
    assert caught.value.key == "task"


def test_mixers_and_structures_are_built_by_their_place():
    config = make_config("lra.listops", "softmax,linformer+monarch+low_rank", model={"features": 8, "layers": 2})
    config.attention.linformer.rank = 3
    task = Task((), (), (), kind="tokens", name="", source="", num_classes=2, vocab_size=5, max_len=6)
    model = nnx.eval_shape(lambda: build.build_model(config, task))
    mixers = [module for _, module in nnx.iter_modules(model) if type(module) in ATTENTION.values()]
    assert {type(mixer) for mixer in mixers} == {ATTENTION["softmax"], ATTENTION["linformer"]}
    kinds = {type(module) for _, module in nnx.iter_modules(model)}
    assert {LINEAR["monarch"], LINEAR["low_rank"]} <= kinds and LINEAR["dense"] not in kinds


@pytest.mark.parametrize(
    ("argument", "settings", "key", "fault"),
    [
        ("hyper", {"attention.hyper.block": 0}, "attention.hyper.block", "is 0: it must be at least 1"),
        ("softmax+monarch", {"linear.mlp.blocks": 0}, "linear.mlp.blocks", "is 0"),
        ("softmax+dense+low_rank", {"linear.projections.rank": -1}, "linear.projections.rank", "is -1"),
        ("softmax", {"model.norm": "batch"}, "model.norm", "is 'batch': choose one of"),
        ("softmax", {"model.name": "vit"}, "model.name", "is 'vit': choose one of transformer"),
    ],
)
def test_a_wrong_option_is_an_error_of_its_key(argument, settings, key, fault):
    from efficient_tx.config import keys

    config = make_config("lra.listops", argument, model={"layers": 1})
    for name, value in settings.items():
        keys.assign(config, name, value)
    task = Task((), (), (), kind="tokens", name="", source="", num_classes=2, vocab_size=5, max_len=6)
    with pytest.raises(ConfigError) as caught:
        nnx.eval_shape(lambda: build.build_model(config, task))
    assert caught.value.key == key and fault in caught.value.fault


def test_cores_are_shared_by_what_all_configs_can_share(monkeypatch):
    """Micro-batches of 12 and of 8; the state of the larger model has to fit."""
    calls = []
    monkeypatch.setattr(build, "divide_cores", lambda examples, parameters: calls.append((examples, parameters())))
    small, large = (
        make_config("lra.listops", "softmax", batch_size=batch, grad_accum=accum, **{"model.layers": layers})
        for batch, accum, layers in ((24, 2, 1), (8, 1, 2))
    )
    for configs in ((small,), (large,), (small, large), (large, small)):
        build.share_cores(*configs)
    (_, few), (_, many) = calls[:2]
    assert calls == [(12, few), (8, many), (4, many), (4, many)] and few < many
