"""Checks of the settings that all tasks have."""


def check_settings(items: str, *, seed: int = 0, max_len: int = 1, **sizes: int | None) -> None:
    """Raises ValueError, one line, for a size (None is unset) or `max_len` below 1, or a `seed` below 0.

    Args:
      items: what a split consists of, in the singular.
      **sizes: train_size, val_size and test_size.
    """
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"task.{name}={size}: a split needs at least one {items}")
    if max_len < 1:
        raise ValueError(f"task.max_len={max_len}: must be at least 1")
    if seed < 0:
        raise ValueError(f"task.seed={seed}: must be 0 or more")
