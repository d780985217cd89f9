"""WordPiece: texts to the token ids that a BERT reads, by the vocabulary beside its weights."""

import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from efficient_tx.checks import at_least
from efficient_tx.files import local_path

FILES = ("tokenizer.json", "vocab.txt")


class WordPiece:
    """A WordPiece vocabulary (Wu et al. 2016, arXiv 1609.08144), with [CLS] in front of a text and [SEP] after it.

    Args:
      path: tokenizer.json, or a vocab.txt with one token a line, or a folder with one of them. What is done to a text
        before (lower case, accents) is said in tokenizer.json, and for vocab.txt in the tokenizer_config.json beside
        it; without that, it is that of the uncased BERT.
      max_len: longer texts are cut on the right to this many ids, of which the last one is [SEP].

    Attributes:
      vocab_size: ids are in [0, vocab_size).
      symbols: the token of each id; that of an id without one is the number.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: one line: a file cannot be read, or has no WordPiece vocabulary with [CLS], [SEP] and [UNK].
      ModuleNotFoundError: the package tokenizers is not installed.
    """

    def __init__(self, path: str | os.PathLike, *, max_len: int):
        at_least(3, max_len=max_len)
        file = vocabulary_file(local_path(path))
        try:
            self._tokenizer = _from_json(file) if file.suffix == ".json" else _from_vocab(file)
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "a WordPiece vocabulary needs the package tokenizers: pip install 'efficient-tx[data]'"
            ) from None
        except Exception as error:  # tokenizers raises plain Exceptions
            raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
        self._tokenizer.enable_truncation(max_len)
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.symbols = [self._tokenizer.id_to_token(i) or str(i) for i in range(self.vocab_size)]

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32 `[length]`, of any length from 2 to `max_len`."""
        # Many texts have long runs of white space, which mean nothing to it but take its time.
        encodings = self._tokenizer.encode_batch([" ".join(text.split()) for text in texts])
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids, int32 `[texts, length of the longest]`, and a mask of the same shape, True for real tokens."""
        rows = self(texts)
        length = max(map(len, rows), default=0)
        inputs = np.zeros((len(rows), length), np.int32)
        for row, ids in zip(inputs, rows):
            row[: len(ids)] = ids
        return inputs, np.arange(length) < np.array([len(ids) for ids in rows])[:, None]


def vocabulary_file(path: pathlib.Path) -> pathlib.Path:
    """The file of a vocabulary: the path itself, or the first of FILES in the folder.

    Raises:
      FileNotFoundError: there is none.
    """
    if path.is_file():
        return path
    if file := next(filter(pathlib.Path.is_file, map(path.joinpath, FILES)), None):
        return file
    raise FileNotFoundError(
        f"no vocabulary in {path}: give {' or '.join(FILES)}, or their folder; "
        "python -m efficient_tx.data.fetch minilm gets one"
    )


def _from_json(file: pathlib.Path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    if (kind := type(tokenizer.model).__name__) != "WordPiece":
        raise ValueError(f"its vocabulary is of the kind {kind}, not WordPiece")
    tokenizer.no_padding()
    if (around := tokenizer.encode("").tokens) != ["[CLS]", "[SEP]"]:
        raise ValueError(f"it puts {' '.join(around) or 'nothing'} around a text, not [CLS] and [SEP]")
    return tokenizer


def _from_vocab(file: pathlib.Path):
    from tokenizers import BertWordPieceTokenizer

    tokens = file.read_text(encoding="utf-8").splitlines()
    if missing := [token for token in ("[CLS]", "[SEP]", "[UNK]") if token not in tokens]:
        raise ValueError(f"it has no {missing[0]}")
    beside = file.with_name("tokenizer_config.json")
    said = json.loads(beside.read_text()) if beside.is_file() else {}
    return BertWordPieceTokenizer(
        str(file),
        lowercase=said.get("do_lower_case", True),
        strip_accents=said.get("strip_accents"),
        handle_chinese_chars=said.get("tokenize_chinese_chars", True),
    )
