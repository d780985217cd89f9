"""Attention as a recurrence: every token updates a state."""
