"""What a training step takes on a chip, known before there is one: compiled ahead of time, never run."""
