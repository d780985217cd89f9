"""Attention as a recurrence: a state that is updated with every token."""
