"""Attention through a few landmarks or mixtures of tokens: the attention matrix has a low rank."""
