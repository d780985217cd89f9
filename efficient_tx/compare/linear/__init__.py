"""The weight structures side by side."""
