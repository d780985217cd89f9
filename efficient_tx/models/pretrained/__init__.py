"""Pretrained: loads published checkpoints of ViT and BERT from files into our models."""

from efficient_tx.models.pretrained.bert import pretrained_bert
from efficient_tx.models.pretrained.loading import load_pretrained
from efficient_tx.models.pretrained.tensors import SUFFIXES, is_published

__all__ = ["SUFFIXES", "is_published", "load_pretrained", "pretrained_bert"]
