"""Image tasks: what is read, split and mixed, against numpy; ImageNet through its real loading code."""

import gzip
import io
import re
import shutil
from functools import cache

import numpy as np
import pytest
import tensorflow_datasets as tfds
from flax import nnx
from PIL import Image

from efficient_tx.config import build, check, keys, load, make_config, names, resolve
from efficient_tx.data import vision
from efficient_tx.data.batching import evaluation_batches, train_batches
from efficient_tx.data.pictures import AUGMENTATIONS, normalise
from efficient_tx.task import Task
from tests.data.test_pictures import gradient_image
from tests.support import tfds_folder
from tests.support.fingerprint import Fingerprint

TRAIN, TEST = 60, 20


def write_idx(path, array):
    header = np.array([2048 + array.ndim, *array.shape], ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def fashion(count, seed):
    """Images whose class is the row that is brightest on average, and whose first pixels say which one it is."""
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 100, (count, 28, 28)), rng.integers(0, 10, count)
    images[np.arange(count), 2 * labels] += 150
    images[:, -1, -2:] = np.stack(np.divmod(np.arange(count), 256), axis=1)
    return images.astype(np.uint8), labels


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    """A folder as data.fetch leaves it, with small files, and the data directory of every test."""
    root = tmp_path_factory.mktemp("data")
    (root / "fashion_mnist").mkdir()
    for split, count in [("train", TRAIN), ("t10k", TEST)]:
        images, labels = fashion(count, seed=count)
        write_idx(root / "fashion_mnist" / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(root / "fashion_mnist" / f"{split}-labels-idx1-ubyte.gz", labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFICIENT_TX_DATA", str(root))
        patch.setenv("TFDS_DATA_DIR", str(root))
        yield root


def numbers(split):
    """Which of the stored images an item is."""
    return [int(np.asarray(split[i]["inputs"].stored)[-1, -2:, 0] @ [256, 1]) for i in range(len(split))]


def get_task(**options):
    return vision.get_task(**{"val_size": 10, **options})


def test_splits_hold_every_image_once_with_its_label():
    task = get_task()
    images, labels = fashion(TRAIN, TRAIN)
    train, validation = numbers(task.train), numbers(task.validation)
    assert sorted(train + validation) == list(range(TRAIN))
    assert validation != list(range(50, 60)) and train != sorted(train)
    assert numbers(task.test) == list(range(TEST))
    for split, places in [(task.train, train), (task.validation, validation)]:
        for item, place in zip(map(split.__getitem__, range(len(split))), places):
            expected = images[place].astype(np.float64)[..., None] / 255 * 2 - 1
            np.testing.assert_allclose(item["inputs"], expected, atol=1e-6)  # float32
            assert item["label"] == labels[place]


def test_the_validation_split_belongs_to_the_seed_and_not_to_the_sizes():
    same, other, fewer = get_task(), get_task(seed=1), get_task(train_size=7, test_size=3)
    assert numbers(same.validation) == numbers(get_task().validation) == numbers(fewer.validation)
    assert numbers(same.validation) != numbers(other.validation)
    assert numbers(fewer.train) == numbers(same.train)[:7] and numbers(fewer.test) == [0, 1, 2]


def test_sizes_say_what_the_task_is():
    task = get_task()
    assert (task.num_classes, task.vocab_size, task.max_len, task.image_shape) == (10, None, 784, (28, 28, 1))
    assert vision.sizes(source="imagenet2012", data_dir="x", image_size=64)["image_shape"] == (64, 64, 3)
    batch = evaluation_batches(task.test, task, batch_size=16)[1]
    assert batch["inputs"].shape == (16, 28, 28, 1) and batch["inputs"].dtype == np.float32
    assert batch["weight"].sum() == TEST - 16


def test_baselines_by_hand():
    task = get_task()
    images, labels = fashion(TRAIN, TRAIN)
    images, labels = images[numbers(task.train)].astype(float), labels[numbers(task.train)]
    queries, truth = fashion(TEST, TEST)
    means = {label: images[labels == label].mean(0) for label in set(labels.tolist())}
    nearest = [min(means, key=lambda label, x=x: ((means[label] - x) ** 2).sum()) for x in queries]
    commonest = max(range(10), key=labels.tolist().count)
    expected = {"constant": (truth == commonest).mean(), "nearest class mean": (truth == nearest).mean()}
    assert task.baselines == pytest.approx(expected)
    assert task.baselines["nearest class mean"] > 0.5  # the labels do belong to the images


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "mnist"}, "source is 'mnist': choose one of fashion_mnist"),
        ({"augment": "autoaugment"}, "augment is 'autoaugment': choose one of none"),
        ({"mixup": -1.0}, "mixup is -1.0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"val_size": 0}, "val_size is 0: it must be at least 1"),
        ({"val_size": 60}, "val_size is 60: of 60 images"),
        ({"train_size": 55}, "train_size=55 and val_size=10: fashion_mnist has 60 images"),
        ({"test_size": 21}, "test_size=21: fashion_mnist has 20 images"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        get_task(**options)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.gz: python -m .*fetch fashion_mnist"):
        get_task(data_dir=tmp_path)
    for source, says in [
        ("cifar10", r"/cifar10, .*/cifar10: prepare it once.*build"),
        ("imagenet2012", "ILSVRC2012_img_train"),
    ]:
        with pytest.raises(FileNotFoundError, match=rf"{source} is in none of .*{says}"):
            get_task(source=source, data_dir=tmp_path)
    (tmp_path / "fashion_mnist").mkdir()
    path = tmp_path / "fashion_mnist" / "train-images-idx3-ubyte.gz"
    write_idx(path, np.zeros((3, 28, 28)))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged"):
        get_task(data_dir=tmp_path)
    write_idx(path, np.zeros(9))
    with pytest.raises(ValueError, match="no idx file of 3 axes"):
        get_task(data_dir=tmp_path)


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        ((9, 28, 28), np.zeros(8), "fashion_mnist, train: labels of shape [8] for 9 examples"),
        ((9, 28, 28), np.full(9, 10), "fashion_mnist, train: the label 10: it must be a whole number in [0, 10)"),
        ((9, 14, 56), np.zeros(9), "fashion_mnist, train: images of shape [9, 14, 56, 1], not [9, 28, 28, 1]"),
    ],
)
def test_labels_that_do_not_fit_the_images_are_refused(tmp_path, images, labels, says):
    folder = tmp_path / "fashion_mnist"
    folder.mkdir()
    write_idx(folder / "train-images-idx3-ubyte.gz", np.zeros(images))
    write_idx(folder / "train-labels-idx1-ubyte.gz", labels)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}/{re.escape(says)}$"):
        get_task(data_dir=tmp_path)


@pytest.mark.parametrize(
    ("side", "label", "says"),
    [
        (32, 12, "cifar10, train: the label 12: it must be a whole number in [0, 10)"),
        (32, -1, "cifar10, train: the label -1: it must be a whole number in [0, 10)"),
        (16, 1, "cifar10, stored image 0, has the shape [16, 16, 3], not [32, 32, 3]"),
        (32, None, "it has image, but no label"),
    ],
)
def test_foreign_prepared_data_are_refused(tmp_path, side, label, says):
    png = encoded(np.zeros((side, side, 3), np.uint8), "PNG")
    features = {
        "image": tfds.features.Image(shape=(side, side, 3), encoding_format="png"),
        "label": tfds.features.Scalar(np.int64),
    }
    if label is None:
        del features["label"]
    splits = {
        split: [{name: {"image": io.BytesIO(png), "label": label}[name] for name in features} for _ in range(3)]
        for split in ("train", "test")
    }
    version = str(tfds.builder("cifar10").version)
    tfds_folder.write(tmp_path, "cifar10", features, splits, version=version)
    with pytest.raises(ValueError, match=re.escape(says)):
        vision.get_task(source="cifar10", data_dir=tmp_path, val_size=1)


def test_mixup_is_a_mixture_of_two_images_of_the_split():
    task = get_task(mixup=0.4)
    images, labels = (np.stack([np.asarray(task.train[i][key]) for i in range(50)]) for key in ("inputs", "label"))
    batch = train_batches(task, batch_size=200, seed=0)[0]
    plain = train_batches(get_task(), batch_size=200, seed=0)[0]
    np.testing.assert_array_equal(batch["label"], plain["label"])
    rest = batch["inputs"] - batch["mix"][:, None, None, None] * plain["inputs"]
    partners = set()
    for row, (mix, label) in enumerate(zip(batch["mix"], batch["label2"])):
        assert 0.5 <= mix <= 1
        fits = np.abs(rest[row] - (1 - mix) * images).max((1, 2, 3)) < 1e-5
        assert label in labels[fits]
        partners.add(int(fits.argmax()))
    assert len(partners) > 40
    # max(λ, 1 − λ) of Beta(α, α) with α = 0.4 is 0.83 on average (by quadrature), with standard deviation 0.16.
    assert abs(batch["mix"].mean() - 0.83) < 4 * 0.16 / np.sqrt(200) + 0.005
    assert task.augment is not None and get_task().augment is None
    assert set(evaluation_batches(task.train, task, batch_size=8)[0]) == {"inputs", "label", "weight"}


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_a_row_is_the_same_on_one_process_and_on_two(augment):
    task = get_task(augment=augment, mixup=0.2)
    whole = train_batches(task, batch_size=6, seed=1)[3]
    for p in range(2):
        part = train_batches(task, batch_size=6, seed=1, process_index=p, process_count=2)[3]
        assert part.keys() == whole.keys()
        for key in whole:
            np.testing.assert_array_equal(part[key], whole[key][p::2])


def prepare(name, root, splits, num_classes, form, picture):
    """A directory as tensorflow_datasets prepares it: image i of a split of so many is the file picture(i)."""
    label = tfds.features.ClassLabel(num_classes=num_classes)
    features = {"image": tfds.features.Image(encoding_format=form), "label": label}
    items = {
        split: [{"image": io.BytesIO(picture(i)), "label": 10 * i % num_classes} for i in range(count)]
        for split, count in splits.items()
    }
    tfds_folder.write(root, name, features, items, version=str(tfds.builder(name).version))


def encoded(pixels, form):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    splits = {"train": 30, "validation": 7}
    prepare("imagenet2012", root, splits, 1000, "jpeg", lambda i: encoded(gradient_image(60 + i, 80 - i), "JPEG"))
    return root


def test_cifar_is_read_into_memory(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3)).astype(np.uint8)
    prepare("cifar10", tmp_path, {"train": 12, "test": 5}, 10, "png", lambda i: encoded(pixels[i], "PNG"))
    task = vision.get_task(source="cifar10", data_dir=tmp_path, val_size=3)
    assert (len(task.train), len(task.validation), len(task.test)) == (9, 3, 5)
    assert task.image_shape == (32, 32, 3)
    # The writer shuffles, so an image is known by its pixels.
    seen = [task.train[i] for i in range(9)] + [task.validation[i] for i in range(3)]
    arrays = {np.asarray(item["inputs"]).tobytes() for item in seen}
    assert arrays == {normalise(image).tobytes() for image in pixels}
    assert set(task.baselines) == {"constant", "nearest class mean"}


def test_files_of_another_format_are_named(imagenet, tmp_path):
    shutil.copytree(imagenet / "imagenet2012", tmp_path / "imagenet2012")
    (info,) = tmp_path.glob("imagenet2012/*/dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"5.1.0 is not stored as array_record"):
        vision.get_task(source="imagenet2012", data_dir=tmp_path)
    info.write_text(info.read_text()[:20])
    with pytest.raises(ValueError, match=rf"{info} is damaged .*download_and_prepare"):
        vision.get_task(source="imagenet2012", data_dir=tmp_path)


def test_a_damaged_image_is_named_also_where_it_is_decoded_late(tmp_path):
    """CIFAR-10 is decoded at the start, ImageNet batch by batch."""
    from efficient_tx.training.errors import Refused
    from efficient_tx.training.evaluation import prefetch

    whole = encoded(gradient_image(32, 32), "PNG")
    prepare("cifar10", tmp_path, {"train": 12, "test": 5}, 10, "png", lambda i: whole[: -40 * (i == 3) or None])
    with pytest.raises(ValueError, match=r"^cifar10, stored image \d+, cannot be decoded \(.+\)$"):
        vision.get_task(source="cifar10", data_dir=tmp_path, val_size=3)
    whole = encoded(gradient_image(60, 80), "JPEG")
    splits = {"train": 12, "validation": 3}
    prepare("imagenet2012", tmp_path, splits, 1000, "jpeg", lambda i: whole[: -40 * (i == 3) or None])
    task = vision.get_task(source="imagenet2012", data_dir=tmp_path, val_size=3, image_size=32)
    with pytest.raises(Refused, match=r"^imagenet2012, stored image \d+, cannot be decoded \(.+\)$"):
        list(prefetch(evaluation_batches(task.train, task, batch_size=4)))
        list(prefetch(evaluation_batches(task.validation, task, batch_size=4)))


@pytest.mark.slow
def test_two_steps_of_imagenet(imagenet):
    """The shipped recipe, smaller, through the real loading code."""
    import jax

    from efficient_tx.training.evaluation import make_evaluate
    from efficient_tx.training.metrics import means
    from efficient_tx.training.step import init_state, make_train_step, split_batch

    config = load.load("vit_imagenet")
    small = {"model.layers": 1, "model.features": 16, "model.heads": 2, "model.mlp_features": 16}
    small |= {"model.representation": 16, "batch_size": 8, "task.val_size": 6, "task.data_dir": str(imagenet)}
    config = resolve.resolve(config, small | {"task.image_size": 32, "steps": 2, "optimizer.warmup": 1})
    check.check(config)
    task = build.build_task(config)
    assert (len(task.train), len(task.validation), len(task.test)) == (24, 6, 7)
    stored = tfds.builder("imagenet2012", data_dir=imagenet)
    for split, part in [(task.train, "train[:80%]"), (task.validation, "train[80%:]"), (task.test, "validation")]:
        labels = [int(record["label"]) for record in stored.as_data_source(split=part)]
        assert [split[i]["label"] for i in range(len(split))] == labels
    assert task.baselines == {"constant": 0.001}
    batches = train_batches(task, batch_size=8, seed=0)
    assert {"inputs", "label", "label2", "mix", "weight"} == set(batches[0])
    model = build.build_model(config, task)
    stages, _ = build.build_stages(config, model)
    device = jax.local_devices()[:1]
    state = init_state(model, stages[0].optimizer)
    step = make_train_step(nnx.split(model)[0], stages[0].optimizer, seed=0, devices=device)
    for i in range(2):
        state = step(state, split_batch(batches[i], device))
    assert np.isfinite(means(state.window)["loss"]) and int(state.bad_step) == -1
    scores = make_evaluate(nnx.split(model)[0])(state.params, evaluation_batches(task.test, task, batch_size=8))
    assert scores.count == 7 and np.isfinite(scores.means["loss"])


TINY = {
    "batch_size": 8,
    "steps": 3,
    "task": {"train_size": 40, "val_size": 8, "test_size": 8},
    "model": {"features": 8, "heads": 2, "mlp_features": 8, "layers": 2, "patch_size": 7},
}
# As in tests/test_config.py: another value where doubling a number or flipping a switch is none.
OTHER = {
    "model.pool": "mean",
    "model.positions": "sincos",
    "model.norm": "rms",
    "model.mlp": "gelu_erf",
    "model.dropout": 0.5,
    "model.drop_path": 0.5,
    "model.layer_scale": 0.5,
    "model.representation": 4,
    "model.head_dim": 8,
    "model.features": 16,
    "model.heads": 4,
    "model.patch_size": 14,
    "task.augment": "flip_crop",
    "task.mixup": 0.5,
    "task.image_size": 14,
    "task.train_size": 20,
    "task.val_size": 4,
    "task.test_size": 4,
}


@cache
def base_fingerprint():
    return Fingerprint(make_config("efficient_tx.data.vision", "", **TINY))


KEYS = [
    key
    for key in keys.flatten(make_config("efficient_tx.data.vision", "", **TINY))
    if key.split(".")[0] in ("task", "model") and key not in ("task.name", "task.data_dir", "task.source", "model.name")
]


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_no_key_of_images_is_dead(key):
    config = make_config("efficient_tx.data.vision", "", **TINY)
    value = OTHER[key] if key in OTHER else 2 * keys.flatten(config)[key] + 1
    assert Fingerprint(resolve.resolve(config, {key: value})) != base_fingerprint()


@pytest.mark.parametrize("name", names.MODELS["image"])
@pytest.mark.slow
def test_the_name_chooses_the_model(name):
    config = make_config("efficient_tx.data.vision", "softmax", task={"image_size": 64}, model={"name": name})
    if name == "vit":
        config.model.layers = 1
    check.check(config)
    task = Task((), (), (), kind="image", name="", source="", **vision.sizes(**config.task))
    assert type(nnx.eval_shape(lambda: build.build_model(config, task))) is names.MODELS["image"][name]
