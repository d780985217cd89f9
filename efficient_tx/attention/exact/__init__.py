"""Exact attention to every token: blockwise, time quadratic in the length."""
