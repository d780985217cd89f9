"""Numerical linear algebra and sampling, each with at least one caller in this project."""
