"""Which mixers are near what they approximate, on which inputs: `near_on` of their classes, measured."""

import pytest

from efficient_tx.attention import ATTENTION
from efficient_tx.compare.attention.inputs import FAMILIES
from efficient_tx.compare.attention.measure import Settings, errors


@pytest.mark.quick
@pytest.mark.parametrize("name", ATTENTION)
def test_families_exist_and_belong_to_approximations(name):
    cls = ATTENTION[name]
    assert set(cls.near_on) <= FAMILIES.keys()
    assert cls.exact is not None or not cls.near_on


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ATTENTION if ATTENTION[name].exact])
def test_the_error_is_below_a_fifth_where_the_class_says_so(name):
    """And not elsewhere, where a query meets a quarter of 1,024 keys; of 128 where the exact sum is cubic."""
    length = 128 if "n·w·w₂" in ATTENTION[name].cost else 1024
    settings = Settings(lengths=(length,), budget=length // 4, batch=4, error_length=length)
    found = errors(name, settings)[1]
    near = {family for family, error in found.items() if error < 0.2}
    assert near == set(ATTENTION[name].near_on), found
