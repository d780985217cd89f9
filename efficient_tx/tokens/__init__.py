"""What any mixer does to tokens: masks and packing, rotary positions, grids, segments, convolutions."""
