"""Spam in WordPiece tokens: every e-mail is in one split with its own label, and mistakes are one line."""

import numpy as np
import pytest

from efficient_tx.checks import OptionError
from efficient_tx.data import spam
from efficient_tx.data.batching import check_examples, evaluation_batches
from tests.support import vocabulary
from tests.support.fetched import store
from tests.support.vocabulary import TOKENS, pieces

pytestmark = pytest.mark.quick

HAM = [f"dear reader, {'the ' * i}a." for i in range(14)]
SPAM = [f"buy now{'!' * i}" for i in range(1, 7)]


@pytest.fixture
def root(tmp_path):
    files = {f"easy-ham-1/{i}.txt": f"From: a\n\n{text}\n".encode() for i, text in enumerate(HAM)}
    files |= {f"spam-1/{i}.txt": f"From: b\r\n\r\n{text}".encode() for i, text in enumerate(SPAM)}
    store(tmp_path / "spam", files | {"spam-2/0.txt": b"From: c\n\nBUY  now!"})  # one that is there already
    vocabulary.write(tmp_path / "minilm")
    return tmp_path


def task(root, **options):
    return spam.get_task(data_dir=str(root), vocab_size=len(TOKENS), **options)


def test_every_email_is_in_one_split_with_its_label(root):
    made = task(root, max_len=32)
    check_examples(made)
    splits = (made.train, made.validation, made.test)
    assert [len(split) for split in splits] == [15, 1, 4]
    examples = [split[i] for split in splits for i in range(len(split))]
    everything = [(tuple(example["inputs"].tolist()), example["label"]) for example in examples]
    assert sorted(everything) == sorted([(tuple(pieces(t)), 0) for t in HAM] + [(tuple(pieces(t)), 1) for t in SPAM])
    assert made.source == f"spam in {root}/spam, 15/1/4 e-mails, seed 0"
    assert [made.symbols[i] for i in (everything[0][0][0], everything[0][0][-1])] == ["[CLS]", "[SEP]"]
    test = [label for _, label in everything[-4:]]
    assert made.baselines == {"constant": pytest.approx(test.count(0) / 4)}  # most e-mails are no spam
    with pytest.raises(IndexError, match="e-mail 4 of 4"):
        made.test[4]
    (batch,) = evaluation_batches(made.test, made, batch_size=4)
    assert batch["inputs"].shape == (4, 32) and batch["mask"].sum() == sum(len(ids) for ids, _ in everything[-4:])


def test_splits_depend_on_the_seed_and_not_on_the_length(root):
    def texts(**options):
        made = task(root, **options)
        return [split.texts for split in (made.train, made.validation, made.test)]

    assert texts() == texts(max_len=8) != texts(seed=1)
    small = task(root, train_size=3, val_size=2, test_size=2, max_len=4)
    assert [len(small.train), len(small.validation), len(small.test)] == [3, 2, 2]
    assert max(len(small.train[i]["inputs"]) for i in range(3)) == 4


def test_sizes_are_known_without_data(root):
    assert spam.sizes(max_len=64, vocab_size=7, seed=3) == {"num_classes": 2, "vocab_size": 7, "max_len": 64}
    assert spam.sizes() == {"num_classes": 2, "vocab_size": 30522, "max_len": 128}


def test_mistakes_are_one_line(root, tmp_path):
    with pytest.raises(OptionError, match=f"vocab_size is 30522: the vocabulary has {len(TOKENS)} tokens"):
        spam.get_task(data_dir=str(root))
    for options, message in [
        ({"val_size": 16}, "val_size is 16: of 16 training e-mails at least one"),
        ({"max_len": 2}, "max_len is 2"),
        ({"train_size": 0}, "train_size is 0"),
        ({"seed": -1}, "seed is -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            task(root, **options)
    with pytest.raises(FileNotFoundError, match=r"no vocabulary in .*/minilm: .*fetch minilm"):
        spam.get_task(data_dir=str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match=r"no e-mails in .*fetch spam gets them"):
        spam.get_task(data_dir=str(tmp_path / "empty"), vocabulary=str(root / "minilm"), vocab_size=len(TOKENS))
    (root / "spam" / "spam-1" / "3.txt").write_bytes(b"From: b\n\nother")
    with pytest.raises(ValueError, match=r"spam-1/3\.txt is missing or damaged"):
        task(root)


def test_other_vocabularies_can_be_named(root):
    folder = vocabulary.write(root / "cased", '{"do_lower_case": false}')
    made = task(root, vocabulary=str(folder / "vocab.txt"))
    assert np.array_equal(made.train[0]["inputs"], task(root).train[0]["inputs"])
