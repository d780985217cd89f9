"""Mixing whose weights do not depend on the tokens: transforms, pooling, means."""
