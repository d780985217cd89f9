"""Image: sources, grey values, splits and baselines."""

import fractions
import gzip
import io
import os
import pickle
import re
import struct
import tarfile
import typing

import numpy as np
import PIL.Image
import pytest

from efficient_tx.config import load
from efficient_tx.data.batching import evaluation_batches
from lra import cifar, image
from tests.support import tfds_folder
from tests.support.fetched import fetched

RNG = np.random.default_rng(0)
LABELS = {"train": np.tile(np.arange(10), 5), "test": np.tile(np.arange(10)[::-1], 2)}  # five and two of each class
# The brighter, the higher the class; the first image of each split has all kinds of colours.
COLOURS = {
    split: np.clip(25 * labels[:, None, None, None] + RNG.integers(0, 25, (len(labels), 32, 32, 3)), 0, 255)
    for split, labels in LABELS.items()
}
for _colours in COLOURS.values():
    _colours[0] = RNG.integers(0, 256, (32, 32, 3))
    _colours[1, :8] = 0


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """CIFAR-10 and Fashion-MNIST have 50 and 20 images here, so that small data count as whole."""
    monkeypatch.setattr(image, "COUNTS", {"cifar10": (50, 20), "fashion_mnist": (50, 20)})
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "theirs"))


def batches():
    """name -> (images `[n, 32, 32, 3]`, labels) of CIFAR-10's files."""
    parts = [(f"data_batch_{i + 1}", COLOURS["train"][10 * i :][:10], LABELS["train"][10 * i :][:10]) for i in range(5)]
    return [*parts, ("test_batch", COLOURS["test"], LABELS["test"])]


def planes(colours):
    """Rows of 3,072 bytes: red, green, blue."""
    return colours.transpose(0, 3, 1, 2).reshape(len(colours), -1).astype(np.uint8)


class Python2(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings."""

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch: typing.ClassVar = pickle._Pickler.dispatch | {bytes: save_bytes}


def pickled(**content):
    """A pickle as CIFAR-10's: of Python 2, when numpy's module had another name."""
    file = io.BytesIO()
    Python2(file, protocol=2).dump({key.encode(): value for key, value in content.items()})
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def write_python(folder):
    folder.mkdir(parents=True)
    for name, colours, labels in batches():
        content = pickled(batch_label=name.encode(), labels=labels.tolist(), data=planes(colours))
        (folder / name).write_bytes(content)
    (folder / "batches.meta").write_bytes(pickled(label_names=[b"airplane"]))


def write_binary(folder):
    folder.mkdir(parents=True)
    for name, colours, labels in batches():
        rows = np.column_stack([labels.astype(np.uint8), planes(colours)])
        (folder / f"{name}.bin").write_bytes(rows.tobytes())


def pack(folder, path):
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)


def write_tfds(root):
    import tensorflow_datasets as tfds

    def png(pixels):
        file = io.BytesIO()
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(file, "png")
        file.seek(0)
        return file

    features = {"image": tfds.features.Image(shape=(32, 32, 3)), "label": tfds.features.ClassLabel(num_classes=10)}
    splits = {
        split: [{"image": png(pixels), "label": int(label)} for pixels, label in zip(COLOURS[split], LABELS[split])]
        for split in COLOURS
    }
    return tfds_folder.write(root, "cifar10", features, splits, version="3.0.2")


def contents(split):
    return [(item["inputs"].tolist(), item["label"]) for item in split]


SIZES = {"train_size": 45, "val_size": 5, "test_size": 20}


def test_all_forms_of_cifar_give_the_same_task(tmp_path):
    write_python(tmp_path / "python" / "cifar-10-batches-py")
    write_binary(tmp_path / "binary" / "cifar-10-batches-bin")
    (tmp_path / "packed").mkdir()
    pack(tmp_path / "python" / "cifar-10-batches-py", tmp_path / "packed" / "cifar-10-python.tar.gz")
    write_tfds(tmp_path / "prepared")
    plain = image.get_task(data_dir=str(tmp_path / "python"), **SIZES)
    others = [image.get_task(data_dir=str(tmp_path / name), **SIZES) for name in ("binary", "packed", "prepared")]
    paths = ["python", "python/cifar-10-batches-py", "packed/cifar-10-python.tar.gz"]
    others += [image.get_task(source=str(tmp_path / path), data_dir=str(tmp_path), **SIZES) for path in paths]
    grey = {split: image.grey(colours.reshape(-1, 1024, 3)).tolist() for split, colours in COLOURS.items()}
    assert sorted(contents(plain.train) + contents(plain.validation)) == sorted(zip(grey["train"], LABELS["train"]))
    assert sorted(contents(plain.test)) == sorted(zip(grey["test"], LABELS["test"]))
    for other in others:  # of which the prepared one is stored in an order of its own
        assert contents(other.train) == contents(plain.train)
        assert contents(other.validation) == contents(plain.validation)
        assert contents(other.test) == contents(plain.test)
    assert [label for _, label in contents(plain.train)] != LABELS["train"][:45].tolist()  # the stored order
    assert {task.name for task in [plain, *others]} == {"image"}
    assert plain.source == f"cifar10 in {tmp_path}/python/cifar-10-batches-py, 45/5/20 images"
    assert others[-1].source == f"{tmp_path}/packed/cifar-10-python.tar.gz, 45/5/20 images"
    assert (plain.kind, plain.num_classes, plain.vocab_size, plain.max_len) == ("tokens", 10, 256, 1024)


def test_grey_values_are_those_of_tensorflow():
    """The whole part of 255.5 (0.2989 r + 0.587 g + 0.114 b) / 255, in exact fractions."""
    levels = np.arange(256)
    assert np.array_equal(image.grey(np.stack([levels] * 3, -1).astype(np.uint8)), levels)
    colours = np.random.default_rng(1).integers(0, 256, (3000, 3)).astype(np.uint8)
    weights = [fractions.Fraction(weight, 10000) for weight in (2989, 5870, 1140)]
    checked = 0
    for found, colour in zip(image.grey(colours), colours.tolist()):
        exact = sum(w * c for w, c in zip(weights, colour)) * fractions.Fraction(511, 2) / 255
        if abs(exact - round(exact)) > 1e-3:  # else float32, whose rounding is 1e-5 here, may cross a whole number
            checked += 1
            assert found == int(exact)
    assert checked > 2900


def test_sizes_and_masks(tmp_path):
    write_python(tmp_path / "cifar-10-batches-py")
    task = image.get_task(data_dir=str(tmp_path), train_size=7, val_size=11, test_size=3, legacy_mask=True)
    plain = image.get_task(data_dir=str(tmp_path), **SIZES)
    assert [len(split) for split in (task.train, task.validation, task.test)] == [7, 11, 3]
    assert contents(task.train) == contents(plain.train)[:7]
    assert contents(task.validation) == contents(plain.train)[-6:] + contents(plain.validation)
    assert contents(task.test) == contents(plain.test)[:3]
    assert (task.name, plain.name) == ("image-legacy-mask", "image")
    everything = image.get_task(data_dir=str(tmp_path), **SIZES, legacy_mask=True)
    items = [item for split in (everything.train, everything.validation) for item in split]
    for item in items:
        assert item["mask"].tolist() == [value > 0 for value in item["inputs"].tolist()]
    (black,) = (item for item in items if not item["inputs"][: 8 * 32].any())  # image 1 of those stored
    assert not black["mask"][: 8 * 32].any() and black["mask"][8 * 32 :].all()
    assert "mask" not in plain.train[1]
    assert evaluation_batches(plain.train, plain, batch_size=4)[0]["mask"].all()
    batch = evaluation_batches(task.train, task, batch_size=4)[0]
    assert np.array_equal(batch["mask"], batch["inputs"] > 0)
    assert (batch["positions"] == np.arange(1024)).all()
    with pytest.raises(IndexError, match="20 of 20"):
        plain.test[20]


def write_fashion(root, count=(50, 20)):
    """IDX files as fetch stores them."""
    folder = root / "fashion_mnist"
    folder.mkdir(parents=True)
    for split, name, n in zip(("train", "test"), ("train", "t10k"), count):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 28, 28)).astype(np.uint8)
        header = b"".join(number.to_bytes(4, "big") for number in (2051, n, 28, 28))
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
        header = b"".join(number.to_bytes(4, "big") for number in (2049, n))
        labels = LABELS[split][:n].astype(np.uint8)
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    (folder / "SHA256SUMS").write_text("")
    return folder


def test_fashion_mnist_has_a_name_of_its_own(tmp_path):
    folder = write_fashion(tmp_path)
    task = image.get_task(source="fashion_mnist", data_dir=str(tmp_path), **SIZES)
    assert (task.name, task.max_len) == ("image-fashion_mnist", 784)
    assert image.sizes(source="fashion_mnist")["max_len"] == 784
    pixels = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    stored = [(list(pixels[784 * i :][:784]), label) for i, label in enumerate(LABELS["test"])]
    assert sorted(contents(task.test)) == sorted(stored)
    assert task.source == f"fashion_mnist in {folder}, 45/5/20 images"


def test_baselines_are_plain_least_squares(tmp_path):
    write_python(tmp_path / "cifar-10-batches-py")
    task = image.get_task(data_dir=str(tmp_path), **SIZES)
    assert task.baselines["constant"] == 0.1
    x, y = (np.array([item[key] for item in task.train]) for key in ("inputs", "label"))
    x = np.column_stack([x / 255, np.ones(len(x))])
    # The same minimum from the other side: weights in the span of the images.
    dual = x.T @ np.linalg.solve(x @ x.T + np.eye(len(x)), np.eye(10)[y])
    tests = np.array([[*(value / 255 for value in item["inputs"].tolist()), 1.0] for item in task.test])
    expected = np.mean((tests @ dual).argmax(1) == [item["label"] for item in task.test])
    assert 0.15 < expected < 1
    assert task.baselines["linear"] == expected


def test_what_is_stored_follows_the_files(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-bin"
    write_binary(folder)
    before = image.get_task(data_dir=str(tmp_path), **SIZES)
    monkeypatch.setattr(cifar, "read", lambda place: pytest.fail("read again"))
    assert contents(image.get_task(data_dir=str(tmp_path), **SIZES).test) == contents(before.test)
    monkeypatch.undo()
    monkeypatch.setattr(image, "COUNTS", {"cifar10": (50, 20)})
    rows = np.frombuffer((folder / "test_batch.bin").read_bytes(), np.uint8).reshape(20, -1)
    darker = np.column_stack([rows[:, :1], rows[:, 1:] // 2])
    (folder / "test_batch.bin").write_bytes(darker.tobytes())
    os.utime(folder / "test_batch.bin", ns=(0, 0))
    after = image.get_task(data_dir=str(tmp_path), **SIZES).test
    assert np.mean([item["inputs"] for item in after]) < 0.6 * np.mean([item["inputs"] for item in before.test])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def test_missing_and_damaged_data_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def said(error, **options):
        with pytest.raises(error) as caught:
            image.get_task(data_dir=str(tmp_path), **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    missing = said(FileNotFoundError)
    assert all(word in missing for word in ("cifar-10-python.tar.gz", str(tmp_path), "array_record", "fashion_mnist"))
    assert image.state(str(tmp_path)) == (False, missing)
    assert "python -m efficient_tx.data.fetch fashion_mnist" in said(FileNotFoundError, source="fashion_mnist")
    assert "task.source='cifar'" in said(FileNotFoundError, source="cifar")

    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"<html>")
    assert "cifar-10-python.tar.gz is damaged" in said(ValueError)
    folder = tmp_path / "cifar-10-batches-py"
    write_python(folder)
    assert image.state(str(tmp_path)) == (True, f"cifar10: {folder}")
    good = (folder / "data_batch_3").read_bytes()
    rows = np.zeros((10, 3072), np.uint8)
    for content, says in [
        (good[:2000], "data_batch_3 is damaged"),
        (pickled(data=Evil(), labels=[]), "asks for posix.mkdir"),
        # Modules of numpy that no file of CIFAR-10 names: to import one runs it.
        (good.replace(b"cnumpy\ndtype", b"cnumpy.f2py\ndtype"), "asks for numpy.f2py.dtype"),
        (good.replace(b"numpy.core.multiarray", b"numpy.core.numeric"), "asks for numpy.core.numeric._reconstruct"),
        (pickle.dumps({b"data": b""}, protocol=2), "asks for _codecs.encode"),
        (pickled(data=rows[:, 1:], labels=[0] * 10), r"uint8 [10, 3071], not uint8 [images, 3072]"),
        (pickled(data=rows.reshape(5, -1), labels=[0] * 10), r"uint8 [5, 6144], not"),
        (pickled(data=rows.astype(np.int64), labels=[0] * 10), "int64 [10, 3072], not uint8"),
        (pickled(data=rows, labels=[0] * 9), "labels of shape [9] for 10 examples"),
        (pickled(data=rows, labels=[0] * 9 + [11]), "the label 11: it must be a whole number in [0, 10)"),
        (pickled(data=rows, labels=np.array([0] * 9 + [259])), "the label 259: it"),
        (pickled(data=rows, labels=[0] * 9 + [0.7]), "the label 0.7: it"),
        (pickled(data=rows[:9], labels=[0] * 9), "5 images of each"),
    ]:
        (folder / "data_batch_3").write_bytes(content)
        assert says in said(ValueError, **SIZES)
    assert not (tmp_path / "evil-was-here").exists()
    (folder / "data_batch_3").unlink()
    (folder / "data_batch_3").mkdir()
    assert "is not whole: it has no data_batch_3" in said(ValueError, **SIZES)
    (folder / "data_batch_3").rmdir()
    assert not image.state(str(tmp_path))[0]
    labels = write_fashion(tmp_path) / "train-labels-idx1-ubyte.gz"
    good = gzip.decompress(labels.read_bytes())
    for content, says in [
        (good[:-1], "labels of shape [49] for 50 examples"),
        (good[:4] + (49).to_bytes(4, "big") + good[8:-1], "another header expected"),
        (good[:-1] + b"\x0a", "the label 10: it must be a whole number in [0, 10)"),
    ]:
        labels.write_bytes(gzip.compress(content))
        assert says in said(ValueError, source="fashion_mnist")
    images = labels.with_name("train-images-idx3-ubyte.gz")
    images.write_bytes(images.read_bytes()[:-9])
    assert "fetch fashion_mnist gets it again" in said(ValueError, source="fashion_mnist")
    tfds_folder.as_tfrecord(write_tfds(tmp_path / "theirs"))
    for path in (tmp_path / "cifar-10-python.tar.gz", *folder.iterdir()):
        path.unlink()
    folder.rmdir()
    assert 'file_format="array_record"' in said(ValueError)


@pytest.mark.parametrize(
    ("shape", "label", "says"),
    [
        ((32, 32, 3), 12, "train: the label 12: it must be a whole number in [0, 10)"),
        ((32, 32, 3), 259, "train: the label 259: it must be"),
        ((64, 16, 3), 1, "image 0 of train is uint8 [64, 16, 3], not uint8 [32, 32, 3]"),
        ((32, 32, 1), 1, "image 0 of train is uint8 [32, 32, 1], not uint8 [32, 32, 3]"),
    ],
)
def test_a_foreign_prepared_data_set_is_one_line(tmp_path, shape, label, says):
    import tensorflow_datasets as tfds

    png = io.BytesIO()
    PIL.Image.fromarray(np.zeros(shape, np.uint8).squeeze()).save(png, "PNG")
    feature = tfds.features.Image(shape=shape, encoding_format="png")
    features = {"image": feature, "label": tfds.features.Scalar(np.int64)}
    splits = {
        split: [{"image": io.BytesIO(png.getvalue()), "label": label} for _ in range(3)] for split in ("train", "test")
    }
    folder = tfds_folder.write(tmp_path, "cifar10", features, splits)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{folder}, {says}')}"):
        image.get_task(data_dir=str(tmp_path))


def test_stored_images_of_others_are_refused(tmp_path):
    write_binary(tmp_path / "cifar-10-batches-bin")
    image.get_task(data_dir=str(tmp_path), **SIZES)
    (path,) = (path for path in tmp_path.glob("image/*/data.npz") if "baselines" not in str(path))
    arrays = dict(np.load(path))
    for name, array, says in [
        ("test_labels", np.full(20, 10, np.uint8), "test_labels holds 10, which is not in [0, 9]"),
        ("labels", arrays["labels"][:-1], "labels is uint8 [49], not uint8 [50]"),
        ("pixels", arrays["pixels"][:, :784], "pixels is uint8 [50, 784], not uint8 [50, 1024]"),
    ]:
        np.savez(path, **arrays | {name: array})
        with pytest.raises(ValueError, match=re.escape(says)):
            image.get_task(data_dir=str(tmp_path), **SIZES)


def test_hidden_files_change_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-bin"
    write_binary(folder)
    before = image.get_task(data_dir=str(tmp_path), **SIZES)
    (folder / "._test_batch.bin").write_bytes(b"\0\5\26\7")
    monkeypatch.setattr(cifar, "read", lambda place: pytest.fail("read again"))
    assert contents(image.get_task(data_dir=str(tmp_path), **SIZES).test) == contents(before.test)


def test_impossible_sizes_are_one_line(tmp_path):
    write_binary(tmp_path / "cifar-10-batches-bin")
    for options, says in [
        ({"val_size": 0}, "val_size is 0: it must be at least 1"),
        ({"val_size": 50}, "val_size is 50: of 50 images"),
    ]:
        with pytest.raises(ValueError, match=says):
            image.get_task(data_dir=str(tmp_path), **SIZES | options)


def test_published_settings_and_stand_ins():
    file = load.ConfigFile("lra_image:skyformer")
    for protocol in ("lra", "skyformer"):
        for source, expected in (("cifar10", []), ("/data/cifar", []), ("fashion_mnist", ["task.source"])):
            config = file.resolve({"protocol": protocol, "task.source": source})
            assert config.task.legacy_mask
            assert file.departures(config) == expected


@pytest.mark.slow
def test_fashion_mnist_as_it_is_fetched(monkeypatch):
    monkeypatch.setattr(image, "COUNTS", {"cifar10": (50000, 10000), "fashion_mnist": (60000, 10000)})
    task = image.get_task(data_dir=str(fetched("fashion_mnist")), source="fashion_mnist")
    assert [len(split) for split in (task.train, task.validation, task.test)] == [45000, 5000, 10000]
    assert np.bincount(task.test.labels).tolist() == [1000] * 10
    assert task.baselines["constant"] == 0.1
    assert 0.78 < task.baselines["linear"] < 0.85  # labels out of step with their images would leave 0.1
