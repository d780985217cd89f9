"""Batches from the sources of a Task; vision and synthetic tasks."""
