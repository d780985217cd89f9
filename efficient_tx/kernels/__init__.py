"""Operations with several implementations: the plain formula, blockwise XLA, and kernels for accelerators."""

from efficient_tx.kernels.block_attention import block_attention as block_attention
from efficient_tx.kernels.delta_rule import delta_rule as delta_rule
from efficient_tx.kernels.flash_attention import flash_attention as flash_attention
from efficient_tx.kernels.gated_linear_attention import gated_linear_attention as gated_linear_attention
from efficient_tx.kernels.linear_scan import linear_scan as linear_scan
from efficient_tx.kernels.monarch import monarch as monarch
from efficient_tx.kernels.pair_attention import pair_attention as pair_attention
from efficient_tx.kernels.sampled_block_attention import sampled_block_attention as sampled_block_attention
