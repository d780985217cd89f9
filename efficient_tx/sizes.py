"""Sizes that a person chose: whether they are large enough."""


def at_least(least: int, **options: int | None) -> None:
    """Raises ValueError, one line, for the first of the options that is below `least`; None, left out, is none."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}: it must be at least {least}")
