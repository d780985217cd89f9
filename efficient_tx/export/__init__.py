"""Export: a trained run taken elsewhere, as a program that jax runs without this package, or as a file of weights."""

from efficient_tx.config.trained import model_of_weights
from efficient_tx.export.archive import export_function
from efficient_tx.export.weights import export_weights

__all__ = ["export_function", "export_weights", "model_of_weights"]
