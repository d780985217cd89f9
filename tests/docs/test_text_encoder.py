"""docs/reusing.md, "A pretrained text encoder": its block on the real MiniLM, fetched; and what MiniLM is there for."""

import numpy as np
import pytest

from efficient_tx.compare.embeddings import agreement, embed
from efficient_tx.data.wordpiece import WordPiece
from efficient_tx.models.pretrained import pretrained_bert
from tests.docs.pages import blocks
from tests.support.fetched import fetched

pytestmark = pytest.mark.slow


@pytest.fixture
def data(monkeypatch):
    root = fetched("minilm")
    monkeypatch.setenv("EFFICIENT_TX_DATA", str(root))
    return root


def test_the_block_of_the_page_runs(data, capsys):
    fetched("sotu")
    (block,) = [block for block in blocks("docs/reusing.md") if "pretrained_bert(folder)" in block.text]
    space = {}
    exec(compile(block.text, "docs/reusing.md", "exec"), space)
    found = agreement(*(embed(space[name], space["inputs"], space["mask"]) for name in ("original", "small")))
    assert capsys.readouterr().out == f"{found}\n"
    assert found.pairs == 4950 and 0.5 < found.rank_correlation < 1  # rank 256 of at most 384 keeps most of it
    assert space["inputs"].shape == space["mask"].shape


def test_sentences_that_mean_the_same_are_near(data):
    """Which a wrong norm, position or pooling would not leave so."""
    texts = ["A man is playing a guitar.", "Someone plays an instrument.", "The parliament passed the budget."]
    inputs, mask = WordPiece(data / "minilm", max_len=32).batch(texts)
    x = np.asarray(pretrained_bert(data / "minilm").embed(inputs, mask=mask))
    assert x[0] @ x[1] > 0.5 > 0.2 > max(x[0] @ x[2], x[1] @ x[2])
