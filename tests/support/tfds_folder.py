"""Writes a small data set as TensorFlow Datasets does, in array_record and without TensorFlow."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds


def write(
    root: Path,
    name: str,
    features: Mapping[str, Any],
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    *,
    config: str | None = None,
    version: str = "1.0.0",
) -> Path:
    """The folder of a data set of this name, configuration and version under `root`."""

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(dict(features)))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(list(items)) for split, items in splits.items()}

        def _generate_examples(self, items):
            yield from enumerate(items)

    Tiny.name = name
    builder = Tiny(data_dir=root, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def as_tfrecord(folder: Path) -> None:
    """Lets the folder say that it is stored as TFRecords."""
    path = folder / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fileFormat": "tfrecord"}))
