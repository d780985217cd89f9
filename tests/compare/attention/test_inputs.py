"""What variants are measured with."""

import numpy as np
import pytest

from efficient_tx.attention import ATTENTION
from efficient_tx.compare.attention import inputs

pytestmark = pytest.mark.quick


def test_an_argument_that_nothing_is_known_of_is_named():
    class Needy(ATTENTION["softmax"]):
        function = staticmethod(lambda q, k, v, *, whims, mask=None, key=None: v)

    with pytest.raises(ValueError, match=r"^Needy requires 'whims': let its `measured_with` say what"):
        inputs.arguments(Needy, inputs.tokens("random", 1, 4, 1, 2), 8)


@pytest.mark.parametrize(("family", "share"), [("clustered", 1 / 8), ("imbalanced", 0.96)])
def test_clusters_have_their_shares_and_queries_find_their_keys(family, share):
    q, k, v = (np.asarray(x)[0, :, 0] for x in inputs.tokens(family, 1, 600, 1, 32).values())
    # Two tokens of one centre are 2·32·0.09 = 5.8 apart in squares, on average; two of different ones more than 30.
    near = {
        name: np.square(x[:, None] - y[None]).sum(-1) < 15 for name, x, y in (("k", k, k), ("v", v, v), ("qk", q, k))
    }
    assert near["k"].mean(axis=1).max() == pytest.approx(share, abs=0.045)  # three standard deviations of 600 draws
    for name in ("v", "qk"):
        assert (near[name] == near["k"]).mean() > 0.999
    assert np.diagonal(near["qk"]).all()
