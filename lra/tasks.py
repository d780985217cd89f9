"""The tasks, by their names on the command line."""

from typing import Any

# Name -> module and options of its `get_task`. Stand-ins use data from package registries and have their own names:
# their numbers must not stand in a column of Long Range Arena.
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
