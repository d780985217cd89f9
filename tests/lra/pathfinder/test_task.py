"""Pathfinder as a task: splits, masks, stored parts, the arena's files, baselines and the preview."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from efficient_tx.config import ConfigError, check, load, protocols, resolve
from efficient_tx.data.batching import collate
from efficient_tx.task import Task
from lra import pathfinder
from lra.pathfinder import drawing, files, preview
from lra.pathfinder import task as pathfinder_task

SMALL = {"train_size": 30, "val_size": 6, "test_size": 8, "contour_length": 6}


def get_task(path, **settings):
    return pathfinder.get_task(data_dir=str(path), **SMALL | settings)


def contents(split):
    return [(item["inputs"].tolist(), item["label"]) for item in split]


@pytest.mark.slow
def test_no_size_of_a_split_moves_another(tmp_path):
    task = get_task(tmp_path)
    assert (len(task.train), len(task.validation), len(task.test)) == (30, 6, 8)
    assert (task.kind, task.num_classes, task.vocab_size, task.max_len) == ("tokens", 2, 256, 1024)
    assert (task.name, task.source) == ("pathfinder-length-6", "generated, seed 0")
    for split, first in ((task.test, 0), (task.validation, 2**30), (task.train, 2**31)):
        for index, (pixels, label) in enumerate(contents(split), start=first):
            drawn = drawing.draw(index, resolution=32, contour_length=6, seed=0)
            assert (pixels, label) == (drawn.pixels.ravel().tolist(), drawn.label)
    everything = contents(task.test) + contents(task.validation) + contents(task.train)
    assert len({tuple(pixels) for pixels, _ in everything}) == 44
    other = get_task(tmp_path, train_size=3, val_size=9)
    assert contents(other.test) == contents(task.test)
    assert contents(other.train) == contents(task.train)[:3]
    assert contents(other.validation)[:6] == contents(task.validation)
    assert contents(get_task(tmp_path, seed=1).test) != contents(task.test)
    with pytest.raises(IndexError):
        task.train[30]


@pytest.mark.slow
def test_parts_and_what_a_killed_run_leaves(tmp_path, monkeypatch):
    whole = contents(get_task(tmp_path / "whole").train)
    monkeypatch.setattr(pathfinder_task, "_PIXELS_PER_PART", 16 * 1024)  # 16 images: two parts of 16 and 14
    monkeypatch.setattr(pathfinder_task, "_PIXELS_PER_CHUNK", 16 * 1024)
    task = get_task(tmp_path)
    assert [len(part["labels"]) for part in task.train.parts] == [16, 14]
    assert contents(task.train) == whole
    pixels, labels = task.train.arrays(20)
    assert [(row.tolist(), label) for row, label in zip(pixels, labels.tolist(), strict=True)] == whole[:20]
    # Only the part that is missing is drawn again.
    paths = sorted(tmp_path.glob("pathfinder/*/train-*/data.npz"))
    times = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    assert contents(get_task(tmp_path).train) == whole
    assert [path.stat().st_mtime_ns == time for path, time in zip(paths, times, strict=True)] == [True, False]


@pytest.mark.slow
def test_black_pixels_are_tokens_unless_the_old_mask_is_asked_for(tmp_path):
    task = get_task(tmp_path)
    batch = collate([task.test[i] for i in range(8)], task)
    assert batch["mask"].all() and (batch["inputs"] == 0).any()
    old = get_task(tmp_path, legacy_mask=True)
    assert old.name == "pathfinder-length-6-legacy-mask"
    legacy = collate([old.test[i] for i in range(8)], old)
    np.testing.assert_array_equal(legacy["mask"], batch["inputs"] > 0)
    np.testing.assert_array_equal(legacy["inputs"], batch["inputs"])
    assert (legacy["positions"] == np.arange(1024)).all() and "positions" not in batch


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"resolution": 48}, "resolution is 48: the arena has 32, 64, 128, 256"),
        ({"contour_length": 5}, "contour_length is 5: the arena has 6, 9, 14"),
        ({"test_size": 0}, "test_size is 0: it must be at least 1"),
        ({"seed": -1}, "seed is -1: it must be at least 0"),
    ],
)
def test_wrong_settings_are_named(settings, says, tmp_path):
    with pytest.raises(ValueError, match=re.escape(says)):
        get_task(tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_without_numba_one_line_says_what_to_install(tmp_path):
    script = f"""
import sys; sys.modules["numba"] = None
from lra import pathfinder
try: pathfinder.get_task(data_dir={str(tmp_path)!r}, train_size=3, val_size=3, test_size=3)
except ModuleNotFoundError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install numba, or give the files" in done.stdout and done.stdout.count("\n") == 1


def test_neither_jax_nor_numba_to_import():
    script = (
        "import sys; import lra.pathfinder; print({'jax', 'flax', 'numba', 'PIL', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.slow
def test_baselines(tmp_path):
    # Closed form: with one feature of two values, a logistic regression answers each by its majority.
    dark, bright = np.zeros((40, 1024), np.uint8), np.full((40, 1024), 9, np.uint8)
    parts = [
        {"pixels": np.concatenate([dark, bright] * 2), "labels": np.array([0] * 36 + [1] * 12 + [1] * 32, np.uint8)}
    ]
    parts[0]["labels"] = np.concatenate([parts[0]["labels"]] * 2)
    train, test = pathfinder_task.Images(parts, np.arange(80)), pathfinder_task.Images(parts, np.arange(80, 160))
    expected = {"constant": 44 / 80, "brightness": (36 + 40) / 80}
    assert pathfinder_task._baselines(train, test, tmp_path) == expected
    assert pathfinder_task._baselines(train, test, tmp_path) == expected  # stored
    assert len(list(tmp_path.iterdir())) == 1


def test_brightness_features_are_plain_statistics():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 256)).astype(np.uint8)
    pixels[:, :100] = 0
    features = pathfinder_task.brightness(pixels)
    for row, image in zip(features, pixels.reshape(5, 16, 16).astype(float), strict=True):
        quadrants = [image[:8, :8].mean(), image[:8, 8:].mean(), image[8:, :8].mean(), image[8:, 8:].mean()]
        histogram = np.histogram(image, np.arange(0, 257, 32))[0] / 256
        expected = [image.mean(), image.std(), (image == 0).mean(), *quadrants, *histogram]
        np.testing.assert_allclose(row, expected, rtol=1e-5)  # means are taken in float32


def test_the_logistic_regression_is_at_its_minimum():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(200, 3)), rng.random(200) < 0.4
    weights = pathfinder_task.fit_logistic(x, y)

    def loss(weights):
        z = np.column_stack([x, np.ones(200)]) @ weights
        return np.sum(np.logaddexp(0, z) - y * z) + weights @ weights / 2

    for step in np.eye(4) * 1e-3:
        assert loss(weights) < min(loss(weights + step), loss(weights - step))


def release(root, names, label, inner=""):
    """An archive as the arena's: PNG files of one grey value each, and metadata as text."""
    level = root / inner / "pathfinder32" / "curv_contour_length_14"
    rng = np.random.default_rng(0)
    images = {}
    for batch, count in names.items():
        (level / "imgs" / batch).mkdir(parents=True)
        (level / "metadata").mkdir(exist_ok=True)
        lines = []
        for i in range(count):
            name = f"imgs/{batch}/sample_{i}.png"
            images[name] = rng.integers(0, 256, (32, 32)).astype(np.uint8), label(batch, i)
            Image.fromarray(images[name][0]).save(level / name)
            lines.append(f"imgs/{batch} sample_{i}.png {i} {label(batch, i)} 1.0 14 4 2 0.5 1 1\n")
        (level / "metadata" / f"{batch}.npy").write_text("".join(lines))
    return level, images


def test_the_arenas_files(tmp_path, capsys):
    level, images = release(tmp_path / "lra_release", {"0": 25, "1": 15}, lambda batch, i: (i + int(batch)) % 2)
    settings = {"source": str(tmp_path / "lra_release"), "contour_length": 14, "train_size": 1000, "val_size": 3}
    task = get_task(tmp_path / "data", **settings)
    assert (len(task.train), len(task.validation), len(task.test)) == (32, 3, 4)
    assert task.source == f"{level}, 32/3/4 images, split with seed 0"
    assert task.name == "pathfinder-lra_release"  # fewer than asked for: never the arena's own column
    assert get_task(tmp_path / "data", **settings | {"train_size": 30}, test_size=5).name == "pathfinder"
    expected = {name: (pixels.ravel().tolist(), label) for name, (pixels, label) in images.items()}
    found = contents(task.train) + contents(task.validation) + contents(task.test)
    assert all(item in expected.values() for item in found)
    assert len({tuple(pixels) for pixels, _ in found}) == 39
    # Decoded once, another seed is another split of the same.
    capsys.readouterr()
    other = get_task(tmp_path / "data", **settings, seed=1)
    assert "to make" not in capsys.readouterr().err
    assert contents(other.test) != contents(task.test)
    assert contents(get_task(tmp_path / "data", **settings).train) == contents(task.train)
    parts = files.read(settings["source"], tmp_path / "data" / "pathfinder", 32, 14)[1]
    assert contents(pathfinder_task.Images(parts, np.arange(40))) == [expected[name] for name in sorted(expected)]
    # Other images in the same place are decoded anew: the metadata tell how each was drawn.
    metadata = level / "metadata/1.npy"
    metadata.write_text(metadata.read_text().replace(" 0.5 1 1", " 0.5 2 1"))
    contents(get_task(tmp_path / "data", **settings).train)
    assert "to make" in capsys.readouterr().err


def test_hidden_files_are_no_metadata(tmp_path):
    """macOS leaves ._NAME beside a file that it copies to another file system, with bytes of its own."""
    level, _ = release(tmp_path / "lra_release", {"0": 20}, lambda batch, i: i % 2)
    settings = {"source": str(tmp_path / "lra_release"), "contour_length": 14}
    before = contents(get_task(tmp_path, **settings).train)
    (level / "metadata" / "._0.npy").write_bytes(b"\0\5\26\7\0\2Mac OS X")
    assert contents(get_task(tmp_path, **settings).train) == before


def test_stored_images_of_others_are_refused(tmp_path):
    release(tmp_path / "lra_release", {"0": 20}, lambda batch, i: i % 2)
    settings = {"source": str(tmp_path / "lra_release"), "contour_length": 14}
    get_task(tmp_path, **settings)
    images, baselines = tmp_path.glob("pathfinder/*files*/*/data.npz"), tmp_path.glob("pathfinder/base*/data.npz")
    for (path,), name, value, says in [
        (images, "labels", 2, r"labels holds 2, which is not in \[0, 1\]"),
        (baselines, "brightness", np.nan, r"brightness holds nan, which is not in \[0, 1\]"),
    ]:
        good = path.read_bytes()
        arrays = dict(np.load(path))
        np.savez(path, **arrays | {name: np.full_like(arrays[name], value)})
        with pytest.raises(ValueError, match=rf"^{path} is whole, but not what is kept there \({says}\)"):
            get_task(tmp_path, **settings)
        path.write_bytes(good)


def test_files_too_few_to_be_split_are_refused(tmp_path):
    level, _ = release(tmp_path, {"0": 9}, lambda batch, i: 0)
    with pytest.raises(ValueError, match=rf"{level} has 9 images: fewer than 10 cannot be split"):
        get_task(tmp_path / "data", source=str(tmp_path), contour_length=14)


def test_the_inner_directory_of_the_archive_is_preferred(tmp_path):
    release(tmp_path / "lra_release", {"0": 20}, lambda batch, i: 0)
    inner, _ = release(tmp_path / "lra_release", {"0": 20}, lambda batch, i: 1, inner="lra_release")
    for source in (tmp_path, tmp_path / "lra_release", tmp_path / "lra_release" / "lra_release"):
        task = get_task(tmp_path / "data", source=str(source), contour_length=14)
        assert task.source.startswith(str(inner))
        assert {label for _, label in contents(task.train)} == {1}


def test_damaged_and_missing_files_are_named(tmp_path, capsys):
    source = tmp_path / "lra_release"
    with pytest.raises(FileNotFoundError, match=r'neither "generated" nor a directory.*curv_contour_length_14/imgs'):
        get_task(tmp_path, source=str(source), contour_length=14)
    source.mkdir()
    with pytest.raises(FileNotFoundError, match=r"lra_release\.gz.*are in none of .*lra_release/pathfinder32"):
        get_task(tmp_path, source=str(source), contour_length=14)
    level, _ = release(source, {"0": 20}, lambda batch, i: 0)
    broken, metadata = level / "imgs/0/sample_7.png", level / "metadata/0.npy"
    good = broken.read_bytes()
    for bad, says in ((b"", "no readable PNG"), (good[:60], "no readable PNG"), (None, "no such file")):
        broken.unlink()
        if bad is not None:
            broken.write_bytes(bad)
        with pytest.raises(ValueError, match=rf"{broken}: {says}"):
            get_task(tmp_path, source=str(source), contour_length=14)
    Image.new("L", (32, 31)).save(broken)
    with pytest.raises(ValueError, match=rf"{broken}: 32 x 31 pixels, expected 32 x 32"):
        get_task(tmp_path, source=str(source), contour_length=14)
    broken.write_bytes(good)
    lines = metadata.read_text().splitlines()
    metadata.write_text("\n".join([*lines[:5], "imgs/0 sample_5.png 5", *lines[6:]]))
    with pytest.raises(ValueError, match=rf"{metadata}, line 6: expected text"):
        get_task(tmp_path, source=str(source), contour_length=14)
    metadata.write_text("\n".join([*lines, lines[3].replace("sample_3.png 3 0", "sample_3.png 3 1")]))
    with pytest.raises(ValueError, match=rf"{metadata}, line 21: imgs/0/sample_3.png has the label 1, and another"):
        get_task(tmp_path, source=str(source), contour_length=14)
    np.save(metadata, np.array(lines))
    with pytest.raises(ValueError, match=rf"{metadata}, line 1: expected text"):
        get_task(tmp_path, source=str(source), contour_length=14)
    # The one file that is empty in the arena's archive is left out.
    easy = level.with_name("curv_baseline")
    level.rename(easy)
    metadata = easy / "metadata/0.npy"
    metadata.write_text("\n".join([*lines, "imgs/0 sample_172.png 172 1 1.0 6 2 2 0.5 1 1"]))
    (easy / "imgs/0/sample_172.png").touch()
    capsys.readouterr()
    task = get_task(tmp_path, source=str(source), contour_length=6)
    assert len(task.train) + len(task.validation) + len(task.test) == 20
    assert "sample_172.png is empty, as in the arena's archive: left out" in capsys.readouterr().err


@pytest.mark.parametrize("positions", ["rope", "rope2d"])
def test_rotary_positions_are_refused_with_the_old_mask_before_a_run(positions):
    settings = {"task.legacy_mask": True, "model.positions": positions}
    config = resolve.resolve(load.load("lra_pathfinder:skyformer"), settings)
    with pytest.raises(
        ConfigError, match=rf"^config\.model.*positions is '{positions}'.*legacy_mask.*use 'learned'"
    ) as caught:
        check.check(config)
    assert caught.value.key.startswith("model")
    check.check(resolve.resolve(config, {"model.positions": "learned"}))


@pytest.mark.parametrize("protocol", ["lra", "skyformer"])
def test_protocols_tell_pathfinder_and_path_x_apart(protocol):
    typed = {"protocol": protocol}
    small = resolve.resolve(load.load("lra_pathfinder:skyformer"), typed)
    assert (small.batch_size, small.task.legacy_mask) == ({"lra": 512, "skyformer": 128}[protocol], True)
    large = load.load("lra_pathx:skyformer")
    typed_large = load.load("lra_pathfinder:skyformer"), typed | {"task.resolution": 128}
    if protocol == "skyformer":
        with pytest.raises(ValueError, match=r"but not for lra\.pathfinder 128"):
            resolve.resolve(large, typed)
        return
    for config in (resolve.resolve(large, typed), resolve.resolve(*typed_large)):
        assert (config.batch_size, config.steps, config.model.layers, config.optimizer.clip) == (64, 500000, 1, 1.0)
        assert load.ConfigFile("lra_pathfinder:skyformer").departures(config) == ["task.source"]
    assert protocols.key({"name": "lra.listops"}) == "lra.listops"


@pytest.mark.slow
def test_sizes_are_those_of_the_task(tmp_path):
    task = get_task(tmp_path, resolution=64, contour_length=6, train_size=2, val_size=1, test_size=1)
    known = pathfinder.sizes(resolution=64, contour_length=6, data_dir=None)
    assert isinstance(task, Task) and task.name == "pathfinder-64-length-6"
    assert known == {name: getattr(task, name) for name in known}
    assert len(task.train[0]["inputs"]) == known["max_len"] == 4096


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preview=sheet.png", "--resolution=33"], "invalid choice: 33"),
        (["--preview=sheet.png", "--count=0"], "--count must be from 1 to 400"),
        (["--preview=nowhere/sheet.png"], "No such file or directory"),
        (["--preview=sheet.xyz", "--count=1"], "'xyz' is not supported"),
        ([], "required: --preview"),
    ],
)
@pytest.mark.slow
def test_mistakes_of_the_preview_are_one_line(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        preview.main(arguments)
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert says in error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sheet.png", "sheet"])
def test_the_preview_is_a_picture(tmp_path, name):
    path = tmp_path / name
    preview.main([f"--preview={path}", "--count=5", "--contour_length=6"])
    with Image.open(path) as image:
        assert image.width > 1000 and image.height > 300
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 100
