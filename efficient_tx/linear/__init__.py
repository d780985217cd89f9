"""Structured weights, built and called like `nnx.Linear`, with its sizes, `use_bias`, dtypes and `rngs`.

A new structure is one file and one row of `LINEAR`.
"""

from efficient_tx.linear.blast import Blast
from efficient_tx.linear.block_diagonal import BlockDiagonal
from efficient_tx.linear.block_tensor_train import BlockTensorTrain
from efficient_tx.linear.dense import Dense
from efficient_tx.linear.dense_shift import DenseShift, PackedDenseShift
from efficient_tx.linear.form import Form
from efficient_tx.linear.hadamard_quotient import HadamardQuotient
from efficient_tx.linear.integer import Integer, PackedInteger
from efficient_tx.linear.kronecker import Kronecker
from efficient_tx.linear.learning_rates import structured_learning_rates
from efficient_tx.linear.low_rank import LowRank
from efficient_tx.linear.low_rank_plus_sparse import LowRankPlusSparse, PackedLowRankPlusSparse
from efficient_tx.linear.monarch_weight import Monarch, monarch
from efficient_tx.linear.replacement import densify, replace, transfer
from efficient_tx.linear.sparse import PackedSparse, Sparse
from efficient_tx.linear.structured import Weight
from efficient_tx.linear.sum import PackedSum, Sum
from efficient_tx.linear.ternary import PackedTernary, Ternary
from efficient_tx.linear.toeplitz import Toeplitz

LINEAR: dict[str, type[Weight]] = {
    "dense": Dense,
    "low_rank": LowRank,
    "monarch": Monarch,
    "block_diagonal": BlockDiagonal,
    "block_tensor_train": BlockTensorTrain,
    "blast": Blast,
    "kronecker": Kronecker,
    "hadamard_quotient": HadamardQuotient,
    "toeplitz": Toeplitz,
    "low_rank_plus_sparse": LowRankPlusSparse,
    "sparse": Sparse,
    "sum": Sum,
    "integer": Integer,
    "ternary": Ternary,
    "dense_shift": DenseShift,
}

__all__ = [
    "LINEAR",
    "Blast",
    "BlockDiagonal",
    "BlockTensorTrain",
    "Dense",
    "DenseShift",
    "Form",
    "HadamardQuotient",
    "Integer",
    "Kronecker",
    "LowRank",
    "LowRankPlusSparse",
    "Monarch",
    "PackedDenseShift",
    "PackedInteger",
    "PackedLowRankPlusSparse",
    "PackedSparse",
    "PackedSum",
    "PackedTernary",
    "Sparse",
    "Sum",
    "Ternary",
    "Toeplitz",
    "densify",
    "monarch",
    "replace",
    "structured_learning_rates",
    "transfer",
]
