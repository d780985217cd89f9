"""Labels of curves keep apart, and curves are told from each other."""

import numpy as np
import pytest

from efficient_tx.attention import ATTENTION
from efficient_tx.compare.attention.plots import COLOURS, MARKERS, family_of, looks
from efficient_tx.compare.labels import spread

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("heights", [[0.1, 0.5, 0.9], [0.5, 0.5, 0.51, 0.9], [0.0, 0.01, 0.99, 1.0], [0.3] * 9])
def test_labels_keep_their_order_and_their_distance(heights):
    places = spread(heights, 0.1)
    assert np.diff(places).min() > 0.1 - 1e-9
    assert -1e-9 < min(places) <= max(places) < 1 + 1e-9
    if np.diff(heights).min() >= 0.1:
        assert places == pytest.approx(heights)


def test_no_two_mixers_look_alike_and_a_colour_is_a_family():
    found = looks(ATTENTION, family_of)
    assert len({tuple(look.values()) for look in found.values()}) == len(ATTENTION)
    colours = {family_of(name): look["color"] for name, look in found.items()}
    assert len(set(colours.values())) == len(colours)
    assert all(look["color"] == colours[family_of(name)] for name, look in found.items())


def test_names_without_families_look_different_too():
    names = [str(i) for i in range(len(COLOURS) * len(MARKERS))]
    assert len({tuple(look.values()) for look in looks(names).values()}) == len(names)
