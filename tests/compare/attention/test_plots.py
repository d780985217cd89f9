"""Labels of curves keep apart."""

import numpy as np
import pytest

from efficient_tx.compare.attention import plots

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("heights", [[0.1, 0.5, 0.9], [0.5, 0.5, 0.51, 0.9], [0.0, 0.01, 0.99, 1.0], [0.3] * 9])
def test_labels_keep_their_order_and_their_distance(heights):
    places = plots.spread(heights, 0.1)
    assert np.diff(places).min() > 0.1 - 1e-9
    assert -1e-9 < min(places) <= max(places) < 1 + 1e-9
    if np.diff(heights).min() >= 0.1:
        assert places == pytest.approx(heights)
