"""Checkpoints: what is saved comes back bit for bit on any devices, and damage never passes unseen."""

import os
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_tx.training import checkpoint
from efficient_tx.training.checkpoint import FILES, Checkpoints, Damaged, Mismatch
from efficient_tx.training.errors import Gone, Refused, RunError
from efficient_tx.training.step import init_state, replicate

pytestmark = pytest.mark.quick


@pytest.fixture
def tree():
    generator = np.random.default_rng(0)
    return {
        "kernel": generator.standard_normal((100, 70)).astype(np.float32),
        "half": generator.standard_normal((5, 3)).astype(ml_dtypes.bfloat16),
        "count": np.int32(7),
        "empty": np.zeros((0, 4), np.float32),
        "odd": (np.float32([np.nan, -0.0, np.inf, 1e-45]), np.arange(3, dtype=np.uint8)),
    }


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert (np.asarray(x).dtype, np.shape(x)) == (np.asarray(y).dtype, np.shape(y))
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def largest(folder):
    return max(files(folder), key=lambda path: path.stat().st_size)


def flip(path, place=0.5, bit=2):
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1 << bit
    path.write_bytes(content)


def test_comes_back_bit_for_bit(tmp_path, tree):
    Checkpoints(tmp_path).save(3, tree)
    assert_same_bits(Checkpoints(tmp_path).load(3, tree), tree)


def test_a_relative_folder_will_do(tmp_path, tree, monkeypatch):
    """Orbax takes absolute paths only; `--workdir=runs/a` is none."""
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(Path("runs/a"))
    checkpoints.save(3, tree)
    assert_same_bits(checkpoints.load(3, tree), tree)


@pytest.mark.first(3)
@pytest.mark.parametrize("name", ["run[1]", "a\\b", "sweep[lr=0.1]/$x {*?}/ä ", "%41#;'\"", "[!a]", "gs:/bucket", "\n"])
def test_any_folder_will_do(tmp_path, tree, name):
    """Orbax and tensorstore see patterns, backslashes and addresses in these. A run may move to another."""
    Checkpoints(tmp_path / name / "x").save(3, tree)
    assert_same_bits(Checkpoints(tmp_path / name / "x").load(3, tree), tree)
    (tmp_path / name / "x").rename(tmp_path / "plain")
    assert_same_bits(Checkpoints(tmp_path / "plain").load(3, tree), tree)
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["3"]


def test_training_state_goes_between_any_numbers_of_devices(tmp_path):
    state = init_state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), optax.chain(optax.clip(1.0), optax.adamw(1e-3)))
    for number, count in enumerate((1, 2, 4)):
        state = state._replace(step=jnp.int32(number))
        Checkpoints(tmp_path).save(number, replicate(state, jax.devices()[:count]))
        loaded = Checkpoints(tmp_path).load(number, jax.tree.map(jnp.zeros_like, state))
        assert_same_bits(loaded, state)
        assert_same_bits(replicate(loaded, jax.devices()[: 5 - count]), state)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_of_any_file_is_noticed(tmp_path, tree, damage):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree)
    for victim in files(tmp_path / "1"):
        copy = tmp_path / "2"
        shutil.copytree(tmp_path / "1", copy)
        victim = copy / victim.relative_to(tmp_path / "1")
        if damage == "remove":
            victim.unlink()
        elif victim.stat().st_size == 0:
            victim.write_text("x")
        elif damage == "truncate":
            os.truncate(victim, victim.stat().st_size // 2)
        else:
            flip(victim)
        with pytest.raises(Damaged) as caught:
            checkpoints.load(2, tree)
        assert "\n" not in str(caught.value)
        shutil.rmtree(copy)


def test_arrays_are_compared_with_what_was_saved(tmp_path, tree):
    """What was written and is read without an error of any file, but is not what was in memory."""
    checkpoints = Checkpoints(tmp_path)
    for step, changed in [(1, tree), (2, tree | {"kernel": tree["kernel"] + 1})]:
        checkpoints.save(step, changed)
    shutil.rmtree(tmp_path / "2" / "state")
    shutil.copytree(tmp_path / "1" / "state", tmp_path / "2" / "state")
    (tmp_path / "2" / FILES).write_text("{}")
    with pytest.raises(Damaged, match=r"the bytes of kernel are not those that were saved \(CRC-32 differs\)"):
        checkpoints.load(2, tree)


def test_a_checkpoint_is_that_of_its_own_step(tmp_path, tree):
    """Under the name of another it is not used, whichever is the newer."""
    checkpoints, said = Checkpoints(tmp_path), []
    for step in (5, 10):
        checkpoints.save(step, tree | {"step": np.int32(step)})
    for old, new, usable in ((5, 15, 10), (10, 2, 5)):
        (tmp_path / str(old)).rename(tmp_path / str(new))
        like = tree | {"step": np.int32(0)}
        assert checkpoints.first_usable([new, usable], lambda step, like=like: like, said.append)[0] == usable
        words = f"holds the state of step {old}: its folder was renamed; using {usable} instead"
        assert said.pop() == f"checkpoint {tmp_path}/{new} {words}"
        (tmp_path / str(new)).rename(tmp_path / str(old))


def test_what_does_not_come_back_as_it_was_is_no_checkpoint(tmp_path, tree, monkeypatch):
    checkpoints, save = Checkpoints(tmp_path), checkpoint.ocp.save
    checkpoints.save(1, tree)

    def wrong(path, arrays, **options):
        save(path, arrays | {"kernel": arrays["kernel"] + 1}, **options)

    def incomplete(path, arrays, **options):
        save(path, arrays, **options)
        shutil.rmtree(path / "state")

    for number, (fault, words) in enumerate(
        [(wrong, "kernel comes back with other bytes"), (incomplete, "it does not open again")], 2
    ):
        monkeypatch.setattr(checkpoint.ocp, "save", fault)
        with pytest.raises(RunError, match=f"cannot write {tmp_path}/{number}.part: {words}") as caught:
            checkpoints.save(number, tree)
        assert caught.value.status == 1 and checkpoints.steps() == [1]


def test_a_folder_that_is_deleted_or_replaced_gets_no_more_checkpoints(tmp_path, tree):
    for there in (False, True):
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        checkpoints.save(1, tree)
        shutil.rmtree(tmp_path / "checkpoints")
        if there:
            (tmp_path / "checkpoints").mkdir()
        with pytest.raises(Gone, match="checkpoints was deleted or replaced during the run"):
            checkpoints.save(2, tree)
        assert (tmp_path / "checkpoints").exists() == there and not any(tmp_path.rglob("2*"))


def test_the_next_older_one_stands_in(tmp_path, tree):
    checkpoints, said = Checkpoints(tmp_path), []
    assert checkpoints.first_usable([], lambda step: tree, said.append) == (None, None)
    tree["step"] = np.int32(0)
    for step in (5, 10, 15):
        checkpoints.save(step, tree | {"step": np.int32(step)})
    flip(largest(tmp_path / "15"))
    largest(tmp_path / "10").unlink()
    step, loaded = checkpoints.first_usable([15, 10, 5], lambda step: tree, said.append)
    assert (step, loaded["step"]) == (5, 5)
    assert [line.count("\n") for line in said] == [0, 0]
    assert f"{tmp_path}/15" in said[0] and "using 10 instead" in said[0]
    assert f"{tmp_path}/10" in said[1] and "using 5 instead" in said[1]
    os.truncate(largest(tmp_path / "5"), 10)
    with pytest.raises(Refused, match=f"{tmp_path}/5 .*no other is left"):
        checkpoints.first_usable([15, 10, 5], lambda step: tree, said.append)


def test_what_does_not_fit_is_named(tmp_path, tree):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree)
    for other, reason in [
        (
            tree | {"kernel": np.zeros((100, 71), np.float32)},
            r"kernel is float32\[100, 70\] in it and float32\[100, 71\]",
        ),
        (
            tree | {"kernel": np.zeros((100, 70), np.float16)},
            r"kernel is float32\[100, 70\] in it and float16\[100, 70\]",
        ),
        (tree | {"extra": np.zeros(2)}, "it has no extra"),
        ({key: value for key, value in tree.items() if key != "half"}, "it has half, which is not asked for"),
    ]:
        with pytest.raises(Mismatch, match=reason):
            checkpoints.load(1, other)
        with pytest.raises(Refused, match=reason):
            checkpoints.first_usable([1, 1], lambda step, tree=other: tree, pytest.fail, passing=Damaged)


def test_parameters_are_named_as_in_the_model(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    small, large = (nnx.split(nnx.Linear(3, size, rngs=nnx.Rngs(0)))[1] for size in (2, 4))
    checkpoints.save(1, {"params": small})
    with pytest.raises(Mismatch, match=r"params\.kernel is float32\[3, 2\] in it and float32\[3, 4\] here"):
        checkpoints.load(1, {"params": large})


def test_newest_and_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20, 30, 40, 50):
        checkpoints.save(step, {"x": np.float32(step)})
    checkpoints.prune(2, newest=50, best=20)
    assert checkpoints.steps() == [20, 40, 50]
    # The run went back to 40 and saved 45: what it had passed over is gone, and does not count among the newest.
    checkpoints.save(45, {"x": np.float32(45)})
    checkpoints.prune(2, newest=45, best=None)
    assert checkpoints.steps() == [40, 45]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["40", "45"]


def test_half_written_and_half_deleted_ones_are_no_checkpoints(tmp_path, tree):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree)
    for name in ("2.part.orbax-checkpoint-tmp", "2.part", "3.deleted"):
        shutil.copytree(tmp_path / "1", tmp_path / name)
    assert checkpoints.steps() == [1]
    checkpoints.clean()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_saving_again_replaces(tmp_path, tree):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree)
    flip(largest(tmp_path / "1"))
    for _ in range(2):
        checkpoints.save(1, tree)
    assert_same_bits(checkpoints.load(1, tree), tree)


def test_a_full_disk_is_one_line_and_nothing_is_lost(tmp_path, tree, capfd):
    """The limit on the size of a file stands in for a full disk: the same failed write, at any privilege."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree)
    capfd.readouterr()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(RunError, match=f"cannot write {tmp_path}/2: File too large") as caught:
            checkpoints.save(2, tree)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(caught.value) and caught.value.status == 1
    assert capfd.readouterr() == ("", "")
    assert checkpoints.steps() == [1]
    assert_same_bits(checkpoints.load(1, tree), tree)
    checkpoints.clean()
    checkpoints.save(2, tree)
    assert_same_bits(checkpoints.load(2, tree), tree)
