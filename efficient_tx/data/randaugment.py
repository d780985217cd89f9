"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719): a few random operations on an image, all of the same strength.

The 16 operations and the meaning of their levels are those of big_vision's `randaug` (google-research/big_vision,
pp/autoaugment.py), with its quirks. At level 10 `solarize` inverts the whole image, because its threshold of 256 is 0
in a byte (its issue 110). `contrast` stretches about 196, the number of pixels of its images divided by 256, and not
about their mean (its issue 109). `posterize` is stronger at lower levels. Distances in pixels are for images of 224
there; here they are shares of the side.

PIL does the image processing. No library for the rest is a suitable dependency: torchvision, kornia and timm need
torch; keras-cv needs TensorFlow; albumentations is no longer maintained; its successor has licence AGPL-3.0; dm-pix has
no such operation.
"""

import numpy as np

_GREY = 128  # of pixels outside the image
_PIVOT = 224**2 // 256
_MOST_DEGREES, _MOST_SHEAR = 30.0, 0.3
_MOST_SHIFT, _MOST_CUT = 100 / 224, 40 / 224  # of the side
_MOST_ADDED = 110


def randaugment(image, rng: np.random.Generator, *, operations: int, level: float):
    """Applies `operations` elements of `OPERATIONS`, drawn with replacement, to a `PIL.Image` in grey or colour.

    Args:
      operations: how many.
      level: the strength of each, from 0 to 10.
    """
    for _ in range(operations):
        image = OPERATIONS[int(rng.integers(len(OPERATIONS)))](image, level / 10, rng)
    return image


def _fill(image):
    return _GREY if image.mode == "L" else (_GREY,) * 3


def _sign(rng: np.random.Generator) -> float:
    return 1.0 if rng.random() < 0.5 else -1.0


def _affine(image, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
    """The output at (x, y) is the image at (a x + b y + c, d x + e y + f)."""
    from PIL import Image

    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), fillcolor=_fill(image))


def autocontrast(image, strength, rng):
    from PIL import ImageOps

    return ImageOps.autocontrast(image)


def equalize(image, strength, rng):
    from PIL import ImageOps

    return ImageOps.equalize(image)


def invert(image, strength, rng):
    from PIL import ImageOps

    return ImageOps.invert(image)


def rotate(image, strength, rng):
    return image.rotate(_sign(rng) * strength * _MOST_DEGREES, fillcolor=_fill(image))


def posterize(image, strength, rng):
    """Keeps the highest 4 · strength bits."""
    mask = 0xFF & ~((1 << (8 - int(strength * 4))) - 1)
    return image.point(lambda value: value & mask)


def solarize(image, strength, rng):
    from PIL import ImageOps

    return ImageOps.solarize(image, int(strength * 256) % 256)


def solarize_add(image, strength, rng):
    """Makes pixels below 128 brighter."""
    added = int(strength * _MOST_ADDED)
    return image.point(lambda value: min(value + added, 255) if value < 128 else value)


def _factor(strength):
    """From 0.1 (nearly nothing of a property) to 1.9 (nearly twice of it)."""
    return 0.1 + 1.8 * strength


def contrast(image, strength, rng):
    from PIL import Image

    pivot = Image.new(image.mode, image.size, _PIVOT if image.mode == "L" else (_PIVOT,) * 3)
    return Image.blend(pivot, image, _factor(strength))


def _enhance(name):
    def operation(image, strength, rng):
        from PIL import ImageEnhance

        return getattr(ImageEnhance, name)(image).enhance(_factor(strength))

    return operation


def shear_x(image, strength, rng):
    return _affine(image, b=_sign(rng) * strength * _MOST_SHEAR)


def shear_y(image, strength, rng):
    return _affine(image, d=_sign(rng) * strength * _MOST_SHEAR)


def translate_x(image, strength, rng):
    return _affine(image, c=_sign(rng) * strength * _MOST_SHIFT * image.width)


def translate_y(image, strength, rng):
    return _affine(image, f=_sign(rng) * strength * _MOST_SHIFT * image.height)


def cutout(image, strength, rng):
    """A grey square around a random pixel, cut off at the border (DeVries and Taylor 2017, arXiv 1708.04552)."""
    x, y = int(rng.integers(image.width)), int(rng.integers(image.height))
    reach = int(strength * _MOST_CUT * image.width)
    image = image.copy()
    image.paste(_fill(image), (max(x - reach, 0), max(y - reach, 0), x + reach, y + reach))
    return image


# (image, strength in [0, 1], generator) -> image.
OPERATIONS = (
    autocontrast,
    equalize,
    invert,
    rotate,
    posterize,
    solarize,
    solarize_add,
    _enhance("Color"),
    contrast,
    _enhance("Brightness"),
    _enhance("Sharpness"),
    shear_x,
    shear_y,
    translate_x,
    translate_y,
    cutout,
)
