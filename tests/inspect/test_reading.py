"""The picture of what is read: which example it is of, its words, and its marks."""

import numpy as np
import pytest
from matplotlib.collections import LineCollection

from efficient_tx.inspect import reading
from efficient_tx.inspect.example import IN_FRONT, Example, longest_example
from efficient_tx.inspect.look import Layer, Look
from efficient_tx.inspect.reading import plain
from efficient_tx.task import Task

pytestmark = pytest.mark.quick
WORDS = ["<pad>", "so", "$it$", "naïve", "a"]


def task(kind="tokens", **changes):
    sizes = {"num_classes": 2, "vocab_size": 5, "max_len": 4, "name": "toy", "source": "here"}
    return Task((), (), (), kind=kind, **{**sizes, **changes})


def batch(inputs, **others):
    return {"inputs": np.array(inputs), "label": np.zeros(len(inputs)), **others}


def test_the_longest_example_is_told_in_words():
    some = batch([[1, 0, 0, 0], [2, 3, 4, 0], [4, 4, 4, 0]], mask=np.arange(4) < np.array([[1], [3], [3]]))
    found = longest_example(task(symbols=WORDS), some)
    assert (found.number, found.picture, found.texts) == (1, None, [["$it$", "naïve", "a"]])
    assert found.batch["inputs"].tolist() == [[2, 3, 4, 0]] and len(found.batch["label"]) == 1
    assert found.names(0, 3) == ["$it$", "naïve", "a"] and found.names(0, 4) == [IN_FRONT, "$it$", "naïve", "a"]
    assert found.names(0, 2) == ["0", "1"]  # of other tokens than those of the text
    assert longest_example(task(), some).texts == [["2", "3", "4"]]


def test_of_a_pair_both_texts_are_told():
    masks = {"mask": np.arange(4) < np.array([[2], [1]]), "mask2": np.arange(4) < np.array([[1], [3]])}
    some = batch([[1, 1, 0, 0], [4, 0, 0, 0]], inputs2=np.array([[2, 0, 0, 0], [1, 2, 4, 0]]), **masks)
    found = longest_example(task("token_pairs", symbols=WORDS), some)
    assert (found.number, found.texts) == (1, [["a"], ["so", "$it$", "a"]])


def test_tokens_of_masks_of_their_own_are_the_real_ones():
    some = batch([[1, 2, 3, 4]], mask=np.array([[True, False, False, True]]))
    assert longest_example(task(symbols=WORDS, own_masks=True), some).texts == [["so", "a"]]


def test_images_are_pictures():
    pixels = np.arange(8).reshape(2, 4)
    found = longest_example(task(vocab_size=256), batch(pixels))
    assert found.number == 0 and found.texts == [] and found.picture.tolist() == [[0, 1], [2, 3]]
    images = np.random.default_rng(0).random((2, 3, 4, 2))
    given = task("image", vocab_size=None, image_shape=(3, 4, 2))
    np.testing.assert_allclose(longest_example(given, batch(images)).picture, images[0].mean(-1), rtol=1e-6)


@pytest.fixture
def drawn(monkeypatch):
    """Draws, and gives the axes of the figure in place of its bytes; it can be saved."""

    def draw(tokens, chosen, picture=None, texts=(), heads=1):
        rows = np.random.default_rng(0).random((2, heads, tokens)).tolist()
        told = {"sequence": 0, "queries": [0, 2], "rows": rows, "received": rows[0], "chosen": chosen}
        found = Look([Layer("encoder.blocks.0.mixer", "some", None, attention=told)], {}, {}, tokens, 1)
        kept = []
        monkeypatch.setattr(reading, "png", lambda figure: kept.append(figure) or png(figure))
        assert reading.attention(found, Example(0, {}, picture, list(texts)), "$title").startswith(b"\x89PNG")
        return kept[0]

    png = reading.png
    return draw


def marked(axes):
    """The marks, by what is drawn first."""
    return [c for c in axes.collections if c.get_label().startswith("chosen of ")]


def marks(axes):
    """Where they are."""
    return [[tuple(place) for place in c.get_offsets().tolist()] for c in marked(axes)]


def lines(axes):
    """Where the ends of the border lines are."""
    drawn = [path for c in axes.collections if isinstance(c, LineCollection) for path in c.get_paths()]
    return sorted((*start, *end) for start, end in (path.vertices.tolist() for path in drawn))


def words(axes):
    """What is written in which place."""
    paths = [c for c in axes.collections if not isinstance(c, LineCollection) and c not in marked(axes)]
    return {(x, y): c.get_label() for c in paths for x, y in c.get_offsets().tolist()}


def test_a_text_has_its_words_and_marks_below(drawn):
    figure = drawn(3, {"q": [[[0], [2]]], "k": [[[0, 1], [2]]]}, texts=[["$it$", "naïve", "a"]])
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["$it$", "na\\xefve", "a"]
    told = ["all", "query 0: $it$", "query 2: a", "chosen of q", "chosen of k"]
    assert [label.get_text() for label in axes.get_yticklabels()] == told
    assert axes.images[0].get_array().shape == (5, 3)
    # Below three lines of what is read: two queries; one key, and a border on each side of the mean of two.
    assert marks(axes) == [[(0, 3), (2, 3)], [(2, 4)]]
    assert [x for x, *_ in lines(axes)] == [-0.5, 1.5, 2.5]
    said = figure.get_suptitle()
    assert "circles: tokens chosen from q" in said and "squares: tokens chosen from k" in said
    assert "lines: borders of the parts of k whose means are landmarks" in said


def test_a_long_text_is_a_page_of_words(drawn):
    count = reading.LINE + 4
    text = [("a", "$b$", " ", "naïve")[i % 4] for i in range(count)]
    (axes,) = drawn(count, {"k": [[[0], [reading.COLUMNS + 1]]]}, texts=[text]).axes
    shown = {(i % reading.COLUMNS, i // reading.COLUMNS): plain(word) for i, word in enumerate(text) if word != " "}
    assert words(axes) == shown
    assert marks(axes) == [[(0, 0), (1, 1)]] and axes.images[0].get_array().shape == (2, reading.COLUMNS)


def test_an_image_has_its_marks_on_it(drawn):
    """With a class token in front, which is no part of the image."""
    figure = drawn(10, {"q": [[[0], [1], [9]]]}, picture=np.zeros((6, 6)))
    assert marks(figure.axes[0]) == [[(0, 0), (2, 2)]]
    assert figure.axes[0].get_xlabel() == "class token: chosen"
    (axes,) = drawn(4, {"q": [[[0, 1], [2, 3]]]}, picture=np.zeros((4, 4))).axes
    inside = [line for line in lines(axes) if line[0] != line[2] and line[1] == 0.5]
    assert inside == [(-0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 1.5, 0.5)]


def test_heads_that_have_no_room_are_left_to_the_file(drawn, monkeypatch):
    monkeypatch.setattr(reading, "TALLEST", 6)
    figure = drawn(200, {}, texts=[["a"] * 200], heads=9)
    assert len(figure.axes) == 5 and figure.get_size_inches()[1] < 7.1  # one inch of titles
    assert "5 of 9 heads; the others are in inspect.json" in figure.get_suptitle()
