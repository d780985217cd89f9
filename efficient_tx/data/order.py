"""Order: texts and names in an order that is drawn by a seed."""

import hashlib


def place(text: bytes, seed: int) -> bytes:
    """What to sort by: it depends on the text and the seed only, and equal texts are neighbours."""
    return hashlib.blake2b(text, key=str(seed).encode(), digest_size=16).digest()
