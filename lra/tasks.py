"""The tasks by the names that the command line knows them by."""

from typing import Any

# Name -> the module that makes it and the options of its `get_task`. The stand-ins, of data out of package registries,
# have names of their own: their numbers belong in no column of Long Range Arena.
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "listops": ("lra.listops", {}),
    "text": ("lra.text", {}),
    "retrieval": ("lra.retrieval", {}),
    "image": ("lra.image", {}),
    "pathfinder": ("lra.pathfinder", {}),
    "path-x": ("lra.pathfinder", {"resolution": 128}),
    "text-spam": ("lra.text", {"source": "spam"}),
    "retrieval-sotu": ("lra.retrieval", {"source": "sotu"}),
    "image-fashion_mnist": ("lra.image", {"source": "fashion_mnist"}),
}
