"""EoRA: a low-rank layer beside a compressed one, which compensates its error on the layer's own inputs."""

raise NotImplementedError
