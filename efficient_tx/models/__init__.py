"""The shared transformer and the models made of it."""

from efficient_tx.models.classifier import Classifier, TokenClassifier
from efficient_tx.models.dual_encoder import DualEncoder
from efficient_tx.models.transformer import Block, Encoder, Mlp

__all__ = ["Block", "Classifier", "DualEncoder", "Encoder", "Mlp", "TokenClassifier"]
