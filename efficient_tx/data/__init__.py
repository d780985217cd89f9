"""From a Task's sources to batches; vision and synthetic tasks."""
