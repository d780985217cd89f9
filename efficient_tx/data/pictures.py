"""Pictures: stored images, their view in evaluation, and their random augmentation in training."""

import io
from collections.abc import Callable

import numpy as np

from efficient_tx.data.randaugment import randaugment

# Zero padding of flip_crop, as a share of the side: 4 pixels at 32 (He et al. 2015, arXiv 1512.03385).
_PADDING = 1 / 8
# Of inception: ranges of area and of width / height (Szegedy et al. 2014, arXiv 1409.4842), and tries for a crop.
_AREAS, _RATIOS, _TRIES = (0.05, 1.0), (3 / 4, 4 / 3), 100


class Picture:
    """A stored image that is decoded on access; as a numpy array it is the view of evaluation.

    This view is the square in the middle with 1/`margin` of the smaller side, resized to `shape` and normalised.

    Args:
      stored: uint8 `[height, width, channels]`, or the bytes of a JPEG or PNG file.
      shape: (side, side, channels) of the array; three channels are red, green and blue, one is grey.
      margin: at least 1.
      name: used in error messages.

    Raises:
      ValueError: (on access) the file is damaged.
    """

    def __init__(
        self,
        stored: bytes | np.ndarray,
        shape: tuple[int, int, int],
        margin: float = 1.0,
        name: str = "an image",
    ):
        self.stored, self.shape, self.margin, self.name = stored, shape, margin, name

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """Float32 of `shape`, in [-1, 1]."""
        as_it_is = isinstance(self.stored, np.ndarray) and self.stored.shape == self.shape and self.margin == 1
        array = normalise(self.stored if as_it_is else self.middle())
        return array if dtype is None else array.astype(dtype)

    def image(self):
        """The whole picture, a `PIL.Image` in grey or RGB."""
        from PIL import Image

        mode = "L" if self.shape[-1] == 1 else "RGB"
        if not isinstance(self.stored, bytes):
            return Image.fromarray(self.stored[..., 0] if self.stored.shape[-1] == 1 else self.stored).convert(mode)
        try:
            return Image.open(io.BytesIO(self.stored)).convert(mode)
        except Exception as error:  # a damaged file can raise almost anything
            raise ValueError(f"{self.name} cannot be decoded ({error})") from None

    def middle(self):
        """The view of evaluation, as a `PIL.Image`."""
        image = self.image()
        width, height = image.size
        side = min(width, height) / self.margin
        return self._view(image, (width - side) / 2, (height - side) / 2, side, side)

    def crop(self, rng: np.random.Generator):
        """A part of random area, aspect ratio and place, as a `PIL.Image`; the whole picture if no try fits."""
        image = self.image()
        width, height = image.size
        for _ in range(_TRIES):
            ratio = rng.uniform(*_RATIOS)
            low, high = np.sqrt(np.multiply(_AREAS, width * height) / ratio)
            high = min(high, height, width / ratio)
            if low <= high:
                tall = rng.uniform(low, high)
                wide = tall * ratio
                return self._view(image, rng.uniform(0, width - wide), rng.uniform(0, height - tall), wide, tall)
        return self._view(image, 0, 0, width, height)

    def _view(self, image, left: float, top: float, width: float, height: float):
        from PIL import Image

        box = (left, top, min(left + width, image.width), min(top + height, image.height))
        return image.resize((self.shape[1], self.shape[0]), Image.Resampling.BILINEAR, box=box)


def normalise(image) -> np.ndarray:
    """A `PIL.Image` or uint8 array to float32 `[height, width, channels]`: 0 becomes -1 and 255 becomes 1."""
    array = np.asarray(image, np.uint8).astype(np.float32) / np.float32(127.5) - np.float32(1)
    return array[..., None] if array.ndim == 2 else array


def _flipped(image, rng: np.random.Generator):
    """The image or, with probability 1/2, its mirror image."""
    from PIL import ImageOps

    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def none(picture: Picture, rng: np.random.Generator):
    """The view of evaluation."""
    return picture.middle()


def flip(picture: Picture, rng: np.random.Generator):
    """The view of evaluation, mirrored with probability 1/2."""
    return _flipped(picture.middle(), rng)


def flip_crop(picture: Picture, rng: np.random.Generator):
    """`flip`, then a shift by up to an eighth of the side in both directions, with zeros outside."""
    image = flip(picture, rng)
    reach = round(_PADDING * image.width)
    left, top = (int(shift) for shift in rng.integers(-reach, reach + 1, 2))
    return image.crop((left, top, left + image.width, top + image.height))


def inception(picture: Picture, rng: np.random.Generator):
    """A random part (Szegedy et al. 2014, arXiv 1409.4842), mirrored with probability 1/2."""
    return _flipped(picture.crop(rng), rng)


def inception_randaugment(picture: Picture, rng: np.random.Generator):
    """`inception`, then RandAugment with two operations of level 10, as Beyer et al. 2022 (arXiv 2205.01580) use it."""
    return randaugment(inception(picture, rng), rng, operations=2, level=10)


# (picture, generator) -> a `PIL.Image` of the picture's shape, by its name in a config.
AUGMENTATIONS: dict[str, Callable] = {
    "none": none,
    "flip": flip,
    "flip_crop": flip_crop,
    "inception": inception,
    "randaugment": inception_randaugment,
}
