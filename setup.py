"""The packages, for which setup.cfg has no words: configs/ is installed inside efficient_tx, never as `configs`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["efficient_tx*", "lra*"]), "efficient_tx.configs"],
    package_dir={"efficient_tx.configs": "configs"},
)
