"""Swapping: a trained model gets other mixers, which take over the parameters that both kinds have."""

from typing import NamedTuple

from flax import nnx

from efficient_tx.attention import Mixer
from efficient_tx.linear.replacement import Path, dotted, find, is_linear
from efficient_tx.models import Pyramid
from efficient_tx.models.transformer import Block


class Swapped(NamedTuple):
    """What became of the parameters of the mixers, by their paths.

    Attributes:
      kept: those that the old and the new mixer have, with their trained values.
      new: those that only the new one has, or that have another shape there, with initial values.
      dropped: those of the old one that are gone.
    """

    kept: list[Path]
    new: list[Path]
    dropped: list[Path]

    def __str__(self) -> str:
        """In words, a line for those that are not kept."""
        lines = [f"{len(self.kept)} parameters of theirs are kept"]
        for name, paths in (("new, with initial values", self.new), ("dropped", self.dropped)):
            lines += [f"  {name}: {', '.join(map(dotted, paths))}"] if paths else []
        return "\n".join(lines)


def swap(source: nnx.Module, target: nnx.Module) -> Swapped:
    """Gives a model with other mixers, in place, the parameters of a trained one: those of equal path and shape.

    With trained projections, an efficient mixer starts from the queries, keys and values that it approximates; what is
    left to learn is little (attention transfer, Zhang et al. 2024, arXiv 2410.10254): see `distillation`.

    Args:
      source: the trained model; not changed.
      target: a model of the same sizes with its mixers, and their own parameters as a training starts with them.

    Raises:
      ValueError: a linear layer of a mixer has other sizes in the other mixer, or the models differ elsewhere; one
        line. The target is then as before.
    """
    old, new = (dict(nnx.to_flat_state(nnx.state(model))) for model in (source, target))
    mixers = [path for model in (source, target) for path, node in nnx.iter_modules(model) if isinstance(node, Mixer)]
    inside = {path for path in {*old, *new} if any(path[: len(mixer)] == mixer for mixer in mixers)}
    alike = {path for path in old.keys() & new.keys() if old[path].shape == new[path].shape}
    for mixer in mixers:
        check_projections(source, target, mixer)
    if outside := sorted({*old, *new} - alike - inside, key=str):
        shapes = [variables[outside[0]].shape if outside[0] in variables else "absent" for variables in (old, new)]
        raise ValueError(f"{dotted(outside[0])} is {shapes[0]} there and {shapes[1]} here")
    for path in alike:
        variable = find(target, path)
        variable.set_value(find(source, path)[...].astype(variable.dtype))
    return Swapped(
        [path for path in new if path in alike & inside],
        [path for path in new if path not in alike],
        [path for path in old if path not in alike],
    )


def check_projections(source: nnx.Module, target: nnx.Module, mixer: Path) -> None:
    """Raises ValueError if a linear layer of a mixer has other sizes in the mixer that replaces it."""
    before, after = find(source, mixer), find(target, mixer)
    for path, layer in nnx.iter_modules(before):
        other = find(after, path)
        if path and is_linear(layer) and is_linear(other):
            sizes = [f"{one.in_features} × {one.out_features}" for one in (layer, other)]
            if sizes[0] != sizes[1]:
                kinds = [type(one).__name__ for one in (before, after)]
                raise ValueError(
                    f"{dotted((*mixer, *path))} is {sizes[0]} in {kinds[0]} and {sizes[1]} in {kinds[1]}, which "
                    "therefore cannot replace it"
                )


def mixer_places(model: nnx.Module) -> int:
    """How many mixers a pattern names in a model: one for each block, in a pyramid one for each stage."""
    if isinstance(model, Pyramid):
        return len(model.stages)
    return sum(isinstance(node, Block) for _, node in nnx.iter_modules(model))
