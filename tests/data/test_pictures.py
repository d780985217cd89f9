"""Pictures: what evaluation sees of them, and what is drawn out of them, by formula or by statistics."""

import io

import numpy as np
import pytest
from PIL import Image

from efficient_tx.data.pictures import AUGMENTATIONS, Picture, normalise
from efficient_tx.data.randaugment import OPERATIONS, randaugment

pytestmark = pytest.mark.quick


def gradient_image(height, width):
    """Every pixel says where it is: red its row, green its column."""
    row, column = np.mgrid[:height, :width]
    return np.stack([row, column, np.full_like(row, 7)], axis=-1).astype(np.uint8)


def test_evaluation_sees_the_middle():
    """A picture of 100 × 60 pixels: the square of 60/1.25 = 48 in its middle, rows 26 to 74, columns 6 to 54."""
    array = np.asarray(Picture(gradient_image(100, 60), (24, 24, 3), margin=1.25))
    pixels = (array + 1) * 127.5
    # Pixel i of 24 is the mean of two, weighted like a tent over them and one to each side: 26.5 + 2 i.
    np.testing.assert_allclose(pixels[:, 5, 0], 26.5 + 2 * np.arange(24), atol=0.6)  # rounded to whole numbers
    np.testing.assert_allclose(pixels[5, :, 1], 6.5 + 2 * np.arange(24), atol=0.6)
    assert array.dtype == np.float32 and (pixels[..., 2].round() == 7).all()


def test_files_are_decoded():
    pixels, file = gradient_image(9, 9), io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    np.testing.assert_array_equal(Picture(file.getvalue(), (9, 9, 3)), normalise(pixels))
    grey = np.asarray(Picture(file.getvalue(), (9, 9, 1)))
    luma = pixels @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose((grey[..., 0] + 1) * 127.5, luma, atol=1)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_are_functions_of_the_generator(name):
    picture = Picture(gradient_image(40, 50), (32, 32, 3))
    draws = [np.asarray(AUGMENTATIONS[name](picture, np.random.default_rng(seed))) for seed in (0, 0, *range(1, 9))]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert {draw.shape for draw in draws} == {(32, 32, 3)}
    different = {draw.tobytes() for draw in draws[1:]}
    few = {"none": 1, "flip": 2}  # of 9; flip_crop has 162 outcomes
    assert len(different) == few[name] if name in few else len(different) > 6


def test_flips_and_shifts():
    """Inside, a moved image is the image; outside there is nothing; half of them are mirrored."""
    pixels = gradient_image(32, 32) + 100
    flipped, shifts = [], set()
    for seed in range(400):
        drawn = AUGMENTATIONS["flip_crop"](Picture(pixels, (32, 32, 3)), np.random.default_rng(seed))
        out = np.asarray(drawn).astype(int)
        top = out[16, 16, 0] - 116
        mirrored = out[16, 17, 1] < out[16, 16, 1]
        image = pixels[:, ::-1] if mirrored else pixels
        left = next(x for x in range(-4, 5) if image[16, 16 + x, 1] == out[16, 16, 1])
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        np.testing.assert_array_equal(out, padded[4 + top : 36 + top, 4 + left : 36 + left])
        flipped.append(mirrored)
        shifts.add((int(top), int(left)))
    assert abs(np.mean(flipped) - 0.5) < 4 * 0.025  # 400 draws
    assert {top for top, _ in shifts} == {left for _, left in shifts} == set(range(-4, 5))


def test_random_crops_have_the_areas_and_ratios_that_they_should():
    """The side of a crop is told by how much a pixel of the result covers."""
    picture, areas, ratios = Picture(gradient_image(200, 250), (8, 8, 3)), [], []
    for seed in range(500):
        out = np.asarray(picture.crop(np.random.default_rng(seed))).astype(float)
        tall, wide = (out[-2, 4, 0] - out[1, 4, 0]) * 8 / 5, (out[4, -2, 1] - out[4, 1, 1]) * 8 / 5
        areas.append(tall * wide / (200 * 250))
        ratios.append(wide / tall)
    # Pixels are whole numbers: a side of 45 or more is told to within 3 %.
    assert 0.045 < min(areas) < 0.1 and 0.85 < max(areas) < 1.03
    assert 0.7 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.4


@pytest.mark.parametrize("channels", [1, 3])
def test_operations_of_randaugment(channels):
    """Against numpy where an operation has a formula; all keep the shape, in grey and in colour."""
    pixels = np.random.default_rng(0).integers(20, 200, (32, 32, 3)).astype(np.uint8)
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    x = np.asarray(image).astype(int)
    outs = {f.__name__: np.asarray(f(image, 0.9, np.random.default_rng(0))).astype(int) for f in OPERATIONS[:7]}
    outs |= {f.__name__: np.asarray(f(image, 0.9, np.random.default_rng(0))).astype(int) for f in OPERATIONS[-5:]}
    assert all(np.asarray(f(image, 0.9, np.random.default_rng(0))).shape == x.shape for f in OPERATIONS)
    assert len(OPERATIONS) == 16
    np.testing.assert_array_equal(outs["invert"], 255 - x)
    np.testing.assert_array_equal(outs["posterize"], x // 32 * 32)  # int(0.9 · 4) = 3 bits stay
    np.testing.assert_array_equal(outs["solarize"], np.where(x < 230, x, 255 - x))
    full = {f.__name__: np.asarray(f(image, 1.0, np.random.default_rng(0))).astype(int) for f in OPERATIONS}
    np.testing.assert_array_equal(full["solarize"], 255 - x)  # as in big_vision, where 256 is 0 in a byte
    np.testing.assert_allclose(full["contrast"], np.clip(196 + 1.9 * (x - 196), 0, 255), atol=1)
    np.testing.assert_array_equal(outs["solarize_add"], np.where(x < 128, x + 99, x))
    low, high = x.min((0, 1)), x.max((0, 1))
    np.testing.assert_allclose(outs["autocontrast"], (x - low) * 255 / (high - low), atol=1)
    moved = round(0.9 * 100 / 224 * 32)
    candidates = [np.pad(x[:, moved:], ((0, 0), (0, moved)) + ((0, 0),) * (x.ndim - 2), constant_values=128)]
    candidates += [np.pad(x[:, :-moved], ((0, 0), (moved, 0)) + ((0, 0),) * (x.ndim - 2), constant_values=128)]
    assert min(np.abs(outs["translate_x"] - candidate).max() for candidate in candidates) == 0
    cut = (outs["cutout"] != x).reshape(32, 32, -1).any(-1)
    assert 0 < cut.sum() <= (2 * int(0.9 * 40 / 224 * 32)) ** 2 and (outs["cutout"][cut] == 128).all()


def test_randaugment_draws_each_operation_as_often(monkeypatch):
    drawn = []
    noting = [lambda image, strength, rng, i=i: drawn.append((i, strength)) or image for i in range(16)]
    monkeypatch.setattr("efficient_tx.data.randaugment.OPERATIONS", noting)
    rng = np.random.default_rng(0)
    for _ in range(800):
        randaugment(Image.fromarray(gradient_image(8, 8)), rng, operations=2, level=7)
    counts = np.bincount([i for i, _ in drawn], minlength=16)
    assert len(drawn) == 1600 and {strength for _, strength in drawn} == {0.7}
    assert (np.abs(counts - 100) < 4 * 9.7).all()  # sqrt(1600 x 1/16 x 15/16)
