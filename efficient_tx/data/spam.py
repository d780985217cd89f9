"""Spam: is an e-mail unsolicited? It is read in WordPiece tokens, as a pretrained BERT reads texts.

The e-mails are those of `python -m efficient_tx.data.fetch spam`, the vocabulary is that of `... fetch minilm`.
"""

import numpy as np

from efficient_tx.checks import OptionError, at_least
from efficient_tx.data import emails, fetched, order
from efficient_tx.data.wordpiece import WordPiece
from efficient_tx.task import Example, Task, data_directory

KIND = "tokens"


def sizes(*, max_len: int = 128, vocab_size: int = 30522, **_) -> dict[str, int]:
    """The sizes that a model needs to know of the task, from the options of `get_task` alone."""
    return {"num_classes": 2, "vocab_size": vocab_size, "max_len": max_len}


def split_by(source: str, split: str) -> tuple[str, ...]:
    """Options that may move a training example into `split`; an evaluation must not do that."""
    del source
    return ("val_size", "seed") if split == "validation" else ("seed",)


def get_task(
    *,
    data_dir: str | None = None,
    vocabulary: str | None = None,
    vocab_size: int = 30522,
    train_size: int | None = None,
    val_size: int | None = None,
    test_size: int | None = None,
    max_len: int = 128,
    seed: int = 0,
) -> Task:
    """The bodies of e-mails, labelled 1 if they are spam; a fifth is for testing, a tenth of the others for validation.

    Args:
      data_dir: folder of the data, default $EFFICIENT_TX_DATA or ~/.cache/efficient_tx.
      vocabulary: tokenizer.json or vocab.txt, or their folder, see `WordPiece`; None is minilm in the folder of the
        data.
      vocab_size: number of tokens in it.
      train_size, test_size: number of e-mails, or as many as there are; None is all.
      val_size: number of e-mails; None is a tenth of those that are not for testing.
      max_len: longer e-mails are cut to this many tokens, [CLS] and [SEP] included.
      seed: of the splits. Equal texts are neighbours in the drawn order, so hardly any is in two splits.

    Raises:
      ValueError: a setting is out of range, a file is damaged, or the vocabulary has another number of tokens.
      FileNotFoundError: the e-mails or the vocabulary are not there.
      ModuleNotFoundError: the package tokenizers is not installed.
    """
    at_least(1, train_size=train_size, val_size=val_size, test_size=test_size)
    at_least(0, seed=seed)
    wordpiece = WordPiece(vocabulary or data_directory(data_dir) / "minilm", max_len=max_len)
    if wordpiece.vocab_size != vocab_size:
        raise OptionError("vocab_size", vocab_size, f"the vocabulary has {wordpiece.vocab_size} tokens")
    folder = fetched.find("spam", data_dir, "e-mails")
    texts = sorted(emails.bodies(folder), key=lambda item: (order.place(item[0], seed), item[1]))
    cut = max(len(texts) // 5, 1)
    test, pool = texts[:cut][:test_size], texts[cut:]
    val_size = max(len(pool) // 10, 1) if val_size is None else val_size
    if val_size >= len(pool):
        raise OptionError("val_size", val_size, f"of {len(pool)} training e-mails at least one has to be left")
    splits = [Emails(split, wordpiece) for split in (pool[val_size:][:train_size], pool[:val_size], test)]
    labels = np.array([label for _, label in test])
    constant = max(0, 1, key=[label for _, label in splits[0].texts].count)
    return Task(
        *splits,
        kind=KIND,
        **sizes(max_len=max_len, vocab_size=vocab_size),
        name="spam",
        source=f"spam in {folder}, {'/'.join(f'{len(split):,}' for split in splits)} e-mails, seed {seed}",
        baselines={"constant": float(np.mean(labels == constant))},
        symbols=wordpiece.symbols,
    )


class Emails:
    """Labelled e-mails, a random-access source; one is tokenised when it is asked for."""

    def __init__(self, texts: emails.Labelled, wordpiece: WordPiece):
        self.texts, self.wordpiece = texts, wordpiece

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"e-mail {index} of {len(self)}")
        text, label = self.texts[index]
        return {"inputs": self.wordpiece([text.decode(errors="replace")])[0], "label": label}
