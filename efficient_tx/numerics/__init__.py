"""Numerical linear algebra and sampling."""
