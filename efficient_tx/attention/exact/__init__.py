"""Attention to every token, exactly: any score, blockwise, quadratic in the length."""
