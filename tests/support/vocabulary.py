"""A small WordPiece vocabulary, and the greedy algorithm that splits a text by it."""

import re

TOKENS = """
[PAD] [UNK] [CLS] [SEP] [MASK] the of un ##aff ##able ##a a b c e ##b ##e ##d buy now ##s , . ! 1 ##1 dear reader Dear é
""".split()  # noqa: SIM905, as a vocabulary has it


def write(folder, config=None):
    """A vocab.txt in the folder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(config)
    return folder


def pieces(text):
    """The ids of a text in lower case: of each word the longest piece, then the longest of the rest, and so on."""
    ids = [TOKENS.index("[CLS]")]
    for word in re.findall(r"\w+|[^\w\s]", text.lower()):
        found, start = [], 0
        while start < len(word):
            ends = [end for end in range(start + 1, len(word) + 1) if "##" * (start > 0) + word[start:end] in TOKENS]
            if not ends:
                found = ["[UNK]"]
                break
            found.append("##" * (start > 0) + word[start : ends[-1]])
            start = ends[-1]
        ids += [TOKENS.index(piece) for piece in found]
    return [*ids, TOKENS.index("[SEP]")]
