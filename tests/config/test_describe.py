"""Every key has a line on its meaning: of every shipped config, mixer, structure and optimizer."""

import pytest

from efficient_tx.attention import ATTENTION
from efficient_tx.config import describe, keys, load, make_config, resolve
from efficient_tx.linear import LINEAR

pytestmark = pytest.mark.quick


def missing(config):
    lines = describe.describe(config)
    return [key for key in keys.flatten(config) if not lines.get(key, "").strip()]


@pytest.mark.parametrize("name", load.shipped())
def test_every_key_of_a_shipped_config_has_a_line(name):
    config = load.load(name)
    assert missing(config) == []
    assert all("\n" not in line for line in describe.describe(config).values())


@pytest.mark.parametrize("name", ATTENTION)
def test_every_option_of_a_mixer_has_a_line(name):
    assert missing(make_config("lra.listops", name)) == []


@pytest.mark.parametrize("name", LINEAR)
def test_every_option_of_a_structure_has_a_line(name):
    assert missing(make_config("lra.listops", f"softmax+{name}+{name}")) == []


def test_every_option_of_the_other_model_has_a_line():
    config = resolve.resolve(load.load("vit_fashion:softmax"), {"model.name": "pyramid"})
    assert missing(config) == []


def test_arguments_are_read_from_docstrings():
    def call():
        """Does.

        Args:
          one, two: of both,
            on two lines.
          three: itself.

        Raises:
          ValueError: never.
        """

    assert describe.arguments(call) == {
        "one": "of both, on two lines.",
        "two": "of both, on two lines.",
        "three": "itself.",
    }
    assert describe.arguments(lambda: None) == {}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("of mine.", "of mine"),
        ("one. And two.", "one"),
        ("by Chen et al. 2021. More.", "by Chen et al. 2021"),
        ("0.5 of them", "0.5 of them"),
    ],
)
def test_a_line_is_the_first_sentence(text, line):
    assert describe.sentence(text) == line


def test_a_users_class_is_described_by_its_function_and_its_bases():
    class Mine(ATTENTION["skyformer"]):
        """Mine.

        Args:
          extra: of mine.
        """

    known = describe.arguments(Mine)
    assert known["extra"] == "of mine." and known["landmarks"]
