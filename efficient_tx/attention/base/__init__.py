"""Base of all token mixers: the interface, its multi-head form, options, and the adapter to flax's own modules."""
