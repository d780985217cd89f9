"""A run exported to a file: what examples/run_exported.py, which knows jax and numpy alone, makes of it."""

import importlib.util
import json
import re

import jax
import numpy as np
import pytest

from efficient_tx.config.build import build_model, build_task
from efficient_tx.config.load import ConfigFile
from efficient_tx.config.trained import trained_run
from efficient_tx.data.batching import collate, evaluation_batches, first_examples
from efficient_tx.export import archive, export_function
from efficient_tx.export.program import PLATFORMS, program
from efficient_tx.task import model_inputs
from efficient_tx.training.errors import Refused, RunError
from lra.expressions import VOCABULARY
from tests.support import ROOT
from tests.support.command import finished_run
from tests.support.models import run

SPEC = importlib.util.spec_from_file_location("run_exported", ROOT / "examples/run_exported.py")
reader = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reader)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The shared tiny run as a file, and what `export_function` returned."""
    path = tmp_path_factory.mktemp("exported") / "classifier.npz"
    return path, export_function(finished_run()[0], path, vocabulary=VOCABULARY, classes="0123456789")


def test_the_file_answers_every_test_example_as_the_model_does(exported):
    path, about = exported
    _, task, model, step = trained_run(finished_run()[0], "best")
    function = reader.Exported(str(path))
    assert function.about == json.loads(json.dumps(about)) and about["step"] == step
    assert tuple(about["platforms"]) == function.function.platforms == PLATFORMS
    batch = model_inputs(evaluation_batches(task.test, task, batch_size=len(task.test))[0])
    examples = [{"inputs": example["inputs"]} for example in (task.test[i] for i in range(len(task.test)))]
    ours = run(model, **batch)
    # The same float32 sums, one example at a time.
    np.testing.assert_allclose(function(examples), ours, atol=1e-5 * abs(ours).max())
    np.testing.assert_allclose(function(examples[3:4]), ours[3:4], atol=1e-5 * abs(ours).max())
    assert function.check() <= 1e-5 * abs(ours).max()
    for name, x in function.batch(examples).items():
        np.testing.assert_array_equal(x, batch[name])


def test_the_file_says_how_it_is_used(exported):
    _, about = exported
    assert about["max_len"] == 24 and about["vocab_size"] == 16 and about["num_classes"] == 10
    assert about["inputs"]["inputs"]["dtype"] == "int32" and about["inputs"]["mask"]["shape"] == [24]
    assert "padded on the right with 0" in about["inputs"]["inputs"]["is"]
    assert about["task"]["module"] == "lra.listops" and "[MAX 4 3" in about["task"]["says"]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([], "there is no example"),
        ([{}], "example 0 has no inputs"),
        ([{"inputs": [1, 2]}, {"inputs": []}], r"example 1 has inputs of shape \[0\], not of 1 to 24 tokens"),
        ([{"inputs": [1] * 25}], r"example 0 has inputs of shape \[25\], not of 1 to 24 tokens"),
        ([{"inputs": [[1]]}], r"of shape \[1, 1\], not of 1 to 24"),
        ([{"inputs": [1, 16]}], r"example 0 has inputs that are no whole numbers in \[0, 16\)"),
        ([{"inputs": [1, -1]}], r"no whole numbers in \[0, 16\)"),
        ([{"inputs": [1.0, 2.0]}], r"no whole numbers in \[0, 16\)"),
        ([{"inputs": [1, 2], "mask": [True]}], "inputs with a mask that is not True or False for each token"),
    ],
)
def test_bad_input_is_one_line(exported, given, line):
    with pytest.raises(ValueError, match=line) as error:
        reader.Exported(str(exported[0]))(given)
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_one_line(exported, tmp_path):
    path, copy = exported[0], tmp_path / "copy.npz"
    with pytest.raises(ValueError, match=r"is no .npz file, or there is none"):
        reader.Exported(str(copy))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    with pytest.raises(ValueError, match=r"copy.npz cannot be read: Bad CRC-32"):
        reader.Exported(str(copy))
    np.savez(copy, other=np.ones(2))
    with pytest.raises(ValueError, match=r"copy.npz cannot be read: .*about"):
        reader.Exported(str(copy))
    with np.load(path) as archived:
        parts = dict(archived.items())
    np.savez(copy, **parts | {"outputs": parts["outputs"] + 0.01})
    with pytest.raises(ValueError, match=r"outputs differ from the exporting machine's by 0.01"):
        reader.Exported(str(copy)).check()
    with pytest.raises(ValueError, match=r"'seven' is no word of the vocabulary: <pad> 0 1"):
        reader.Exported(str(path)).ids("[MAX seven 3 ]")


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("a.bin", {}, r"a.bin does not end in .npz"),
        ("nowhere/a.npz", {}, "there is no such folder"),
        ("a.npz", {"vocabulary": "abc"}, r"vocabulary is '3 words': the task has 16"),
        ("a.npz", {"classes": "abc"}, r"classes is '3 words': the task has 10"),
        ("a.npz", {"checkpoint": "7"}, "7: .* has best, last and the steps "),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_writes_nothing(name, options, line, tmp_path):
    with pytest.raises(Refused, match=line) as error:
        export_function(finished_run()[0], tmp_path / name, **options)
    assert "\n" not in str(error.value) and not [*tmp_path.iterdir()]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(Refused, match="is not the workdir of a run"):
        export_function(tmp_path, tmp_path / "a.npz")


def test_a_function_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "evaluated", lambda *given: np.zeros((8, 10), np.float32))
    with pytest.raises(Refused, match=r"what was exported differs from the model by .*: nothing is written"):
        export_function(finished_run()[0], tmp_path / "a.npz")
    monkeypatch.undo()
    monkeypatch.setattr(archive, "write_bytes", lambda path, content: path.write_bytes(content[:-1]))
    with pytest.raises(RunError, match="comes back with other bytes than were written"):
        export_function(finished_run()[0], tmp_path / "a.npz")


TASK = """
    import numpy as np
    from efficient_tx.config import make_config
    from efficient_tx.task import Task
    KIND = "{kind}"
    def sizes(**_):
        return dict(num_classes=3, vocab_size={vocab}, max_len=16, **{more})
    def get_task():
        "Some."
        draws = np.random.default_rng(0)
        some = []
        for length in range(1, 9):
            {example}
        return Task(some, some, some, kind=KIND, name="some", source="drawn", own_masks={own}, **sizes())
    def get_config(argument=""):
        small = dict(features=8, layers=1, heads=2, mlp_features=8)
        return make_config("{path}", argument, dtype="{dtype}", model=dict(small, {options}))
"""
IDS = 'draws.integers(0, 5, length), "label": length % 3'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("token_pairs", {"example": f'some.append({{"inputs2": draws.integers(0, 5, 9 - length), "inputs": {IDS}}})'}),
        ("tokens", {"example": f'some.append({{"mask": draws.random(length) < 0.9, "inputs": {IDS}}})', "own": True}),
        ("image", {"example": 'some.append({"inputs": draws.normal(size=(4, 4, 1)), "label": 1})', "vocab": None,
                   "more": {"image_shape": (4, 4, 1)}, "options": "name='vit', patch_size=2"}),
        ("tokens", {"example": f'some.append({{"inputs": {IDS}}})', "dtype": "bfloat16"}),
    ],
)  # fmt: skip
def test_every_kind_of_task(kind, given, tmp_path):
    """The reader pads and masks as the batches of training do."""
    path = tmp_path / "some_task.py"
    fields = {"vocab": 5, "more": {}, "own": False, "options": "", "dtype": "float32", "path": path, "kind": kind}
    text = re.sub(r"\{(\w+)\}", lambda match: str((fields | given).get(match[1], match[0])), TASK)
    path.write_text("\n".join(line.removeprefix("    ") for line in text.splitlines()))
    config = ConfigFile(str(path)).resolve({})
    task = build_task(config)
    model = build_model(config, task)
    batch = model_inputs(first_examples(task.test, task, archive.EXAMPLES))
    function, outputs = program(model, batch), archive.evaluated(model, batch, "highest")
    about = archive.facts(config, task, function, outputs) | {"vocabulary": None, "classes": None}
    (tmp_path / "a.npz").write_bytes(archive.packed(model, function, batch, outputs, about))
    exported = reader.Exported(str(tmp_path / "a.npz"))
    assert exported.check() <= about["tolerance"] < 0.1 * abs(outputs).max() + 0.1
    examples = [{name: x for name, x in example.items() if name != "label"} for example in task.test]
    made, collated = exported.batch(examples), model_inputs(collate(task.test, task))
    assert made.keys() == collated.keys()
    jax.tree.map(np.testing.assert_array_equal, made, collated)
    np.testing.assert_allclose(exported(examples), outputs, atol=about["tolerance"])
