"""The sizes of the Monarch product that are verified: layers of transformers, few wide blocks and √n of them."""

from efficient_tx.kernels.case import Case, shape
from efficient_tx.kernels.monarch import monarch

AXES = {
    "tokens": (1024, 16384, 65536),
    "widths": ("1024x1024", "1024x4096", "4096x1024"),
    "blocks": (4, 32),
    "dtype": ("bfloat16", "float32"),
}
SMALL = {"tokens": (1, 200), "widths": ("64x128", "96x32"), "blocks": (4, 8)}


def case(tokens: int, widths: str, blocks: int, dtype: str) -> Case:
    n, m = map(int, widths.split("x"))
    inner = -(-min(n, m) // blocks**2) * blocks
    arrays = shape(dtype, tokens, n), shape(dtype, blocks, inner, n // blocks), shape(dtype, blocks, m // blocks, inner)
    return Case(monarch, arrays)
