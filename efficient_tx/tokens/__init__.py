"""Operations on tokens that mixers share: masks and packing, rotary positions, grids, segments, convolutions."""
