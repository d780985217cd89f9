"""Pretrained: loads published ViT checkpoints from files into our ViT."""

from efficient_tx.models.pretrained.loading import load_pretrained
from efficient_tx.models.pretrained.tensors import SUFFIXES

__all__ = ["SUFFIXES", "load_pretrained"]
