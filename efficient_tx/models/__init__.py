"""The shared transformer and the models built from it."""

from efficient_tx.models.bert import Bert
from efficient_tx.models.classifier import Classifier, TokenClassifier
from efficient_tx.models.dual_encoder import DualEncoder
from efficient_tx.models.pyramid import Pyramid
from efficient_tx.models.transformer import Block, Encoder, Mlp
from efficient_tx.models.vit import ViT

__all__ = ["Bert", "Block", "Classifier", "DualEncoder", "Encoder", "Mlp", "Pyramid", "TokenClassifier", "ViT"]
