"""Attention through few landmarks or mixtures of tokens: the matrix of weights has a low rank."""
