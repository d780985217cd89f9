"""Structure: the section of a compressed model's config that says what its layers became.

It maps the path of a layer to the name of its weight structure, sizes and options, and that of a mixer to its number of
heads:

    "encoder.blocks.0.mlp.up": {"name": "low_rank", "in_features": 64, "out_features": 256, "use_bias": true, "rank": 9}
    "encoder.blocks.0.mixer": {"heads": 3}

Layers and mixers without an entry are as the rest of the config says.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from efficient_tx.attention import MultiHead
from efficient_tx.compression.layer_form import LayerForm
from efficient_tx.compression.model import put
from efficient_tx.config.errors import ConfigError, at
from efficient_tx.config.names import structure_class
from efficient_tx.config.objects import with_objects
from efficient_tx.linear import Form
from efficient_tx.linear.replacement import Path, find, is_linear
from efficient_tx.linear.structured import Weight

SECTION = "structure"
SIZES = ("in_features", "out_features", "use_bias")


def entries(config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Dotted path -> entry, of a config."""
    return {path.replace("/", "."): dict(values) for path, values in config[SECTION].items()}


def in_config(structure: Mapping[str, Mapping[str, Any]]) -> ConfigDict:
    """The section of a config, whose keys have no dots.

    Raises:
      ValueError: it is none.
    """
    if not (isinstance(structure, Mapping) and all(isinstance(values, Mapping) for values in structure.values())):
        raise ValueError(f"{SECTION} maps no paths to entries: it is damaged, or of another version")
    return ConfigDict({path.replace(".", "/"): dict(values) for path, values in structure.items()})


def entry(form: LayerForm) -> dict[str, Any]:
    """The entry of a layer of this form."""
    sizes = {size: getattr(form, size) for size in SIZES}
    options = {name: str(value) if isinstance(value, Form) else value for name, value in form.form.options}
    return {"name": form.form.name, **sizes, **options}


def rebuild(model: nnx.Module, structure: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes the layers of a model, in place, those of a structure section; their values are those of a fixed seed.

    Raises:
      ConfigError: an entry names nothing in the model, or is none of a layer or a mixer.
    """
    for text, values in structure.items():
        where, path = f"structure.{text}", path_of(text)
        node = find(model, path)
        if not fits(values, node):
            kind = "no layer" if node is None else f"a {type(node).__name__}"
            raise ConfigError(where, f"does not fit: the model has {kind} there, and the entry has {', '.join(values)}")
        if isinstance(node, MultiHead):
            node.heads = values["heads"]
        else:
            put(model, path, layer(values, where, node))


def fits(values: Mapping[str, Any], node: Any) -> bool:
    """Whether an entry can be that of an object of a model: a layer or a mixer with heads."""
    if isinstance(node, MultiHead):
        return set(values) == {"heads"}
    return is_linear(node) and {"name", *SIZES} <= set(values)


def fitting(structure: Mapping[str, Mapping[str, Any]], model: nnx.Module) -> dict[str, dict[str, Any]]:
    """The entries that a model with other mixers has a layer or a mixer for."""
    return {text: dict(values) for text, values in structure.items() if fits(values, find(model, path_of(text)))}


def layer(values: Mapping[str, Any], where: str, like: nnx.Module) -> Weight:
    """The layer of an entry, with the dtypes of another one."""
    structure = structure_class(values["name"], f"{where}.name")
    options = {name: value for name, value in values.items() if name not in ("name", *SIZES)}
    options = with_objects(structure, options, where)
    with at(where):
        sizes = (values[size] for size in SIZES)
        return LayerForm(Form(structure, **options), *sizes, like.dtype, like.param_dtype).make()


def path_of(text: str) -> Path:
    """The path of dotted text: "encoder.blocks.0.mlp" -> ("encoder", "blocks", 0, "mlp")."""
    return tuple(int(part) if part.isdigit() else part for part in text.split("."))
