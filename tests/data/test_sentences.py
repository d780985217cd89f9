"""Sentences: those of the addresses, each once, in an order of the seed alone."""

import pytest

from efficient_tx.data.sentences import sentences
from tests.support.fetched import store

pytestmark = pytest.mark.quick

FILES = {
    "1790_a_n.txt": b" Fellow-Citizens of the Senate: All is well. The first of two long sentences stands here! No.",
    "1791_b_n.txt": b"Does the second address ask  one\tthing? The first of two long sentences stands here! ",
    "1792_c_n.txt": ("Word " + "word " * 50 + "is too long.").encode(),
}
KEPT = {
    "Fellow-Citizens of the Senate: All is well.",
    "The first of two long sentences stands here!",
    "Does the second address ask one thing?",
}


def test_each_sentence_once_in_an_order_of_the_seed(tmp_path):
    store(tmp_path / "sotu", FILES)
    found = sentences(3, data_dir=tmp_path)
    assert set(found) == KEPT
    assert sentences(2, data_dir=tmp_path) == found[:2]
    orders = {tuple(sentences(3, data_dir=tmp_path, seed=seed)) for seed in range(10)}
    assert len(orders) > 2
    store(tmp_path / "sotu", dict(reversed(FILES.items())))
    assert sentences(3, data_dir=tmp_path) == found


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no addresses in .*fetch sotu gets them"):
        sentences(3, data_dir=tmp_path)
    store(tmp_path / "sotu", FILES)
    for options, message in [
        ({"count": 4}, "count is 4: there are 3 sentences"),
        ({"count": 0}, "count is 0"),
        ({"count": 1, "seed": -1}, "seed is -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            sentences(**options, data_dir=tmp_path)
    (tmp_path / "sotu" / "1790_a_n.txt").write_text("other")
    with pytest.raises(ValueError, match="is missing or damaged"):
        sentences(1, data_dir=tmp_path)
