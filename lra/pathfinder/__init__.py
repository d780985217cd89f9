"""Pathfinder and Path-X: the task, the drawing of its images, and the reading of the arena's files."""

from lra.pathfinder.task import KIND, get_task, sizes, split_by, state

__all__ = ["KIND", "get_task", "sizes", "split_by", "state"]
