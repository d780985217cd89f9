"""The packages: no function hides a module, names stay importable, and library messages name no flag."""

import ast
import importlib
import pkgutil
import re

import pytest

import efficient_tx.attention
import efficient_tx.kernels
import efficient_tx.linear
import efficient_tx.models
import lra.pathfinder
from tests.support import ROOT

pytestmark = pytest.mark.quick


def packages():
    """Every package of this project, imported."""
    found = []
    for top in ("efficient_tx", "lra"):
        package = importlib.import_module(top)
        inside = pkgutil.walk_packages(package.__path__, f"{top}.")
        found += [package, *(importlib.import_module(module.name) for module in inside if module.ispkg)]
    return found


def test_every_module_keeps_its_name():
    """`package.name` is the module `package/name.py`, unless the kernels export a function of that name."""
    hidden = set()
    for package in packages():
        for module in pkgutil.iter_modules(package.__path__):
            if module.name != "__main__":
                itself = importlib.import_module(f"{package.__name__}.{module.name}")
                if getattr(package, module.name) is not itself:
                    hidden.add(f"{package.__name__}.{module.name}")
    kernels = [module.name for module in pkgutil.iter_modules(efficient_tx.kernels.__path__) if module.ispkg]
    assert hidden <= {f"efficient_tx.kernels.{name}" for name in kernels}


# What could be imported from the packages before their files moved, beside classes and functions of the tables.
NAMES = {
    "efficient_tx.attention": """
        ATTENTION GLA S3 BigBird Cosformer Fourier Hyper Kernelized Lev LevState LinearAttention Linformer Local
        Longformer Mixer MultiHead Nystromformer Performer Pool Sigmoid Skeinformer Skyformer Soft Softmax Sparse
        Strassen Tensor VMean as_attention_fn bigbird cosformer fourier gla gla_step hyper kernelized lev lev_init
        lev_step linear linformer local longformer nystromformer performer pool s3 sigmoid skeinformer skyformer soft
        softmax sparse strassen tensor vmean
    """,
    "efficient_tx.linear": """
        LINEAR Blast BlockDiagonal BlockTensorTrain Dense DenseShift Kronecker LowRank LowRankPlusSparse Monarch
        PackedTernary Ternary Toeplitz densify monarch replace structured_learning_rates transfer
    """,
    "efficient_tx.models": "Block Classifier DualEncoder Encoder Mlp Pyramid TokenClassifier ViT",
    "efficient_tx.config": "ConfigError make_config",
    "lra.pathfinder": "KIND get_task sizes split_by state",
}


@pytest.mark.parametrize("package", NAMES)
def test_names_are_importable_from_their_package(package):
    module = importlib.import_module(package)
    assert [name for name in NAMES[package].split() if not hasattr(module, name)] == []
    assert [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)] == []


def test_rows_of_the_tables_are_names_of_their_package():
    for package, table in ((efficient_tx.attention, "ATTENTION"), (efficient_tx.linear, "LINEAR")):
        for row in getattr(package, table).values():
            assert getattr(package, row.__name__) is row
    assert lra.pathfinder.KIND == "tokens"


# Commands, which put the dashes in front of an option; all other modules name options, never flags.
COMMANDS = {
    "efficient_tx/config/flags.py", "efficient_tx/train.py", "efficient_tx/eval.py",
    "efficient_tx/compress/__main__.py", "efficient_tx/compare/flags.py", "efficient_tx/compare/__main__.py",
    "efficient_tx/data/fetch.py", "lra/export.py", "lra/__main__.py",
    "lra/pathfinder/preview.py", "lra/pathfinder/__main__.py",
}  # fmt: skip


COMMAND_FOLDERS = (
    "efficient_tx/compare/commands/",
    "efficient_tx/kernels/verify/",
    "efficient_tx/sweep/",
    "efficient_tx/report/",
    "efficient_tx/fit/",
    "efficient_tx/inspect/",
    "efficient_tx/predict/__main__.py",
)


def literals(path):
    """Line and text of each string in a file, docstrings aside."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def flags_in(path):
    return [(line, text) for line, text in literals(path) if re.search(r"(?<![-\w<])--[a-z]", text)]


def test_library_messages_name_no_flag():
    found = {}
    for path in sorted([*(ROOT / "efficient_tx").rglob("*.py"), *(ROOT / "lra").rglob("*.py")]):
        name = path.relative_to(ROOT).as_posix()
        if name not in COMMANDS and not name.startswith(COMMAND_FOLDERS):
            found |= {f"{name}:{line}": text for line, text in flags_in(path)}
    # A whole command to copy, and the mark in README.md, are no flags of the caller's own.
    assert {
        place: text for place, text in found.items() if "python -m" not in text and " --data_dir=" not in text
    } == {}


@pytest.mark.parametrize("path", ["efficient_tx/data/fetch.py", "lra/export.py", "lra/pathfinder/preview.py"])
def test_functions_beside_a_command_raise_no_flag(path):
    """Where library and command share a file, only main and what it calls to parse know dashes of their own flags."""
    tree = ast.parse((ROOT / path).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            text = " ".join(
                part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)
            )
            assert "--" not in text, f"{path}:{node.lineno}: {text}"
