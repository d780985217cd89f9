"""What all token mixers share: the contract, its multi-head form, options, and the way into flax's own modules."""
