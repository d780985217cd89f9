"""Mixing with weights that do not depend on the tokens: transforms, pooling, means."""
