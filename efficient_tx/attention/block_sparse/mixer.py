"""BlockSparse: the base class of all mixers with a block pattern."""

from typing import ClassVar

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.attention.block_sparse.patterns import OTHER_QUERIES
from efficient_tx.attention.exact.softmax import softmax


class BlockSparse(MultiHead):
    """Multi-head softmax attention to the keys of a block pattern; exact if the pattern covers all tokens."""

    exact = staticmethod(softmax)
    near_on = ("clustered", "imbalanced")
    refuses: ClassVar = {"cross": OTHER_QUERIES}
    windowed = True
