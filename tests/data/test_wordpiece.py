"""WordPiece: texts become the ids of the greedy algorithm, and what is no vocabulary is one line."""

import json
import sys

import numpy as np
import pytest
import tokenizers

from efficient_tx.data.wordpiece import WordPiece
from tests.support import vocabulary
from tests.support.vocabulary import TOKENS, pieces

pytestmark = pytest.mark.quick

TEXTS = ["The unaffable!", "", "  a,bed of abe\n\n the\tb ", "xylophone of the", "DEAR reader 11 1x"]


@pytest.fixture
def folder(tmp_path):
    return vocabulary.write(tmp_path / "vocabulary")


def test_ids_are_the_greedy_pieces_between_cls_and_sep(folder):
    wordpiece = WordPiece(folder, max_len=32)
    assert [ids.tolist() for ids in wordpiece(TEXTS)] == [pieces(text) for text in TEXTS]
    assert wordpiece.vocab_size == len(TOKENS) and wordpiece.symbols == list(TOKENS)
    assert [TOKENS[i] for i in wordpiece(TEXTS)[0]] == ["[CLS]", "the", "un", "##aff", "##able", "!", "[SEP]"]


def test_long_texts_are_cut_on_the_right(folder):
    (ids,) = WordPiece(folder, max_len=5)(["the unaffable of the the"])
    assert [TOKENS[i] for i in ids] == ["[CLS]", "the", "un", "##aff", "[SEP]"]


def test_batches_are_padded_to_their_longest_text(folder):
    inputs, mask = WordPiece(folder, max_len=6).batch(TEXTS)
    assert inputs.shape == mask.shape == (5, 6) and inputs.dtype == np.int32
    assert mask.sum(axis=1).tolist() == [min(len(pieces(text)), 6) for text in TEXTS]
    assert (inputs[~mask] == 0).all() and inputs[1, :2].tolist() == pieces("")


def test_case_and_accents_are_as_the_files_say(tmp_path):
    folder = vocabulary.write(tmp_path / "cased", json.dumps({"do_lower_case": False}))
    (ids,) = WordPiece(folder, max_len=9)(["Dear dear É é"])
    assert ids[1:-1].tolist() == [TOKENS.index(token) for token in ("Dear", "dear", "[UNK]", "é")]
    (ids,) = WordPiece(vocabulary.write(tmp_path / "uncased"), max_len=9)(["Dear É"])
    assert ids[1:-1].tolist() == [TOKENS.index("dear"), TOKENS.index("e")]  # lower case drops accents


def test_tokenizer_json_says_all_itself_and_comes_first(tmp_path, folder):
    """With padding and another length in it, as all-MiniLM-L6-v2 has; and cased, unlike the vocab.txt beside it."""
    made = tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=False)
    made.enable_padding(length=20)
    made.enable_truncation(4)
    made.save(str(folder / "tokenizer.json"))
    (ids,) = WordPiece(folder, max_len=9)(["Dear dear the of the"])
    assert ids.tolist() == [TOKENS.index(t) for t in ("[CLS]", "Dear", "dear", "the", "of", "the", "[SEP]")]
    assert WordPiece(folder / "vocab.txt", max_len=9)(["Dear"])[0].tolist() == pieces("dear")


def test_without_the_package_its_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'efficient-tx\[data\]'"):
        WordPiece(folder, max_len=8)


def test_what_is_no_wordpiece_vocabulary_is_one_line(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"no vocabulary in .*nowhere.*data\.fetch minilm gets one"):
        WordPiece(tmp_path / "nowhere", max_len=8)
    with pytest.raises(ValueError, match="max_len is 2: it must be at least 3"):
        WordPiece(folder, max_len=2)
    other = tmp_path / "other" / "tokenizer.json"
    other.parent.mkdir()
    bare = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    for text, message in [
        (tokenizers.Tokenizer(tokenizers.models.BPE()).to_str(), "of the kind BPE, not WordPiece"),
        (bare.to_str(), "it puts nothing around a text"),
        ("{}", "cannot be read: "),
        ("", "cannot be read: "),
    ]:
        other.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            WordPiece(other, max_len=8)
        assert str(error.value).startswith(f"{other} cannot be read: ") and "\n" not in str(error.value)
    other = tmp_path / "vocab.txt"
    other.write_text("the\n[UNK]\n[CLS]\n")
    with pytest.raises(ValueError, match=r"vocab\.txt cannot be read: it has no \[SEP\]"):
        WordPiece(other, max_len=8)
    other.write_bytes(b"\xff\xfe the")
    with pytest.raises(ValueError, match=r"vocab\.txt cannot be read: "):
        WordPiece(other, max_len=8)
