"""The checkpoint that is evaluated: best, last or a step, of damaged workdirs and of runs that are going on."""

import shutil

import jax
import numpy as np
import pytest

from efficient_tx.training import checkpoint
from efficient_tx.training.checkpoint import Checkpoints
from efficient_tx.training.errors import Refused
from efficient_tx.training.evaluation import trained_parameters
from efficient_tx.training.history import History
from tests.support import toy
from tests.training.test_history import flip

pytestmark = pytest.mark.quick

# Of one step a little run, whose state is that of every checkpoint here: which one it is, its first parameter tells.
ACCURACIES = {2: 0.5, 4: 0.75, 6: 0.25}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return toy.make_loop(tmp_path_factory.mktemp("stages"))._stages


@pytest.fixture
def run(tmp_path, stages):
    """A workdir with checkpoints of three steps, the second one the best."""
    history, checkpoints = History(tmp_path / "metrics.jsonl"), Checkpoints(tmp_path / "checkpoints")
    (tmp_path / "crc32.json").write_text("{}")
    for step, accuracy in ACCURACIES.items():
        state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), stages[0].like())
        checkpoints.save(step, state._replace(step=np.int32(step)))
        history.append({"step": step, "split": "validation", "loss": 1.0, "accuracy": accuracy})
        history.copy(checkpoints.directory / str(step))
    return tmp_path


def chosen(run, which, stages, said=None):
    said = [] if said is None else said
    return trained_parameters(str(run), which, stages, said.append)[0]


def test_best_last_and_a_step(run, stages):
    said = []
    assert [chosen(run, which, stages, said) for which in ("best", "last", "2", "02")] == [4, 6, 2, 2] and said == []
    for which in ("3", "newest", "-1", "9" * 5000, "²"):
        with pytest.raises(Refused, match="has best, last and the steps 2, 4, 6"):
            chosen(run, which, stages)


def test_damaged_metrics_do_not_make_another_one_the_best(run, stages):
    """Any bit of the best one's line, or of all lines: the scores are those that the checkpoints have."""
    whole = (run / "metrics.jsonl").read_bytes()
    place = whole.index(b"0.75")
    for number in range(place - 40, place + 8, 12):
        flip(run / "metrics.jsonl", number, 2)
        said = []
        assert chosen(run, "best", stages, said) == 4
        assert len(said) == 1 and "line 2 is damaged (CRC-32 differs" in said[0] and "copies of all" in said[0]
        (run / "metrics.jsonl").write_bytes(whole)
    for content in (b"", whole[:70], whole.replace(b"\n", b" ")):
        said = []
        (run / "metrics.jsonl").write_bytes(content)
        assert chosen(run, "best", stages, said) == 4 and len(said) == 1 and "copies of all" in said[0]
    for copy in (run / "checkpoints").glob("*/metrics.*"):
        copy.unlink()
    (run / "metrics.jsonl").write_bytes(whole)
    flip(run / "metrics.jsonl", place, 1)
    said = []
    assert chosen(run, "best", stages, said) == 2
    assert len(said) == 1 and "line 2 is damaged" in said[0] and "another checkpoint may be the best" in said[0]
    (run / "metrics.jsonl").unlink()
    assert chosen(run, "best", stages, said) == 6
    assert said[1:] == [f"{run} has no checkpoint that was validated: the newest stands for the best"]


def test_a_best_checkpoint_that_is_gone_or_damaged_is_named(run, stages):
    said = []
    (run / "checkpoints" / "4" / "crc32.json").write_text("{")
    assert chosen(run, "best", stages, said) == 2 and "checkpoints/4 does not open" in said.pop()
    shutil.rmtree(run / "checkpoints" / "4")
    assert chosen(run, "best", stages, said) == 2
    assert said == [f"{run} has no checkpoint of step 4, its best; using 2 instead"]


def test_workdirs_of_an_older_version_are_read_with_one_note(run, stages):
    (run / "crc32.json").unlink()
    for file in [run / "metrics.crc32", *(run / "checkpoints").glob("*/metrics.*")]:
        file.unlink()
    said = []
    assert [chosen(run, which, stages, said) for which in ("best", "last")] == [4, 6]
    assert said == [f"{run} has no crc32.json, as in older versions: read unchecked"] * 2
    (run / "crc32.json").write_text("{}")
    assert chosen(run, "best", stages, said) == 4 and said[2:] == [
        f"{run}/metrics.jsonl has no metrics.crc32: read unchecked"
    ]


def test_a_live_run_may_delete_the_checkpoint_that_is_read(run, stages, monkeypatch):
    """The newest one goes while it is read, as a newer one has come: not the one before it is the last, but that."""
    read, said = checkpoint._read, []

    def deleted_while_it_is_read(path):
        if path.name == "6":
            shutil.copytree(run / "checkpoints" / "6", run / "checkpoints" / "8")
            shutil.rmtree(path)
        arrays = read(path)
        return arrays | {"step": np.int32(8)} if path.name == "8" else arrays

    monkeypatch.setattr(checkpoint, "_read", deleted_while_it_is_read)
    assert chosen(run, "last", stages, said) == 8 and said == []

    def deleted_before_it_is_read(path):
        shutil.rmtree(path)
        return read(path)

    monkeypatch.setattr(checkpoint, "_read", deleted_before_it_is_read)
    with pytest.raises(Refused, match="has best, last and the steps 4, 8"):
        chosen(run, "2", stages)
