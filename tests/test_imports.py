"""Imports point one way, modules meant for reuse bring nothing along, and files stay small."""

import ast
import subprocess
import sys

import pytest

from tests.support import ROOT

# What each part may import of this project, beside itself; the first ones stand at the bottom.
BOTTOM = {"efficient_tx.checks", "efficient_tx.extras", "efficient_tx.signatures"}
MODULES = {*BOTTOM, "efficient_tx.numerics", "efficient_tx.tokens", "efficient_tx.kernels"}
ALLOWED = {
    "efficient_tx.files": set(),
    "efficient_tx.tables": set(),
    "efficient_tx.checks": set(),
    "efficient_tx.signatures": set(),
    "efficient_tx.extras": set(),
    "efficient_tx.commands": {"efficient_tx.checks"},
    "efficient_tx.task": {*BOTTOM, "efficient_tx.files"},
    "efficient_tx.numerics": BOTTOM,
    "efficient_tx.tokens": {*BOTTOM, "efficient_tx.numerics"},
    "efficient_tx.kernels": {*BOTTOM, "efficient_tx.numerics", "efficient_tx.tokens"},
    "efficient_tx.linear": {*BOTTOM, "efficient_tx.numerics", "efficient_tx.tokens", "efficient_tx.kernels"},
    "efficient_tx.attention": {*MODULES, "efficient_tx.linear"},
    "efficient_tx.models": {*MODULES, "efficient_tx.files", "efficient_tx.linear", "efficient_tx.attention"},
    "efficient_tx.compression": {
        *MODULES,
        "efficient_tx.linear",
        "efficient_tx.attention",
        "efficient_tx.models",
        "efficient_tx.task",
    },
    "efficient_tx.data": {"efficient_tx.checks", "efficient_tx.commands", "efficient_tx.files", "efficient_tx.task"},
    "efficient_tx.training": {
        "efficient_tx.checks",
        "efficient_tx.files",
        "efficient_tx.numerics",
        "efficient_tx.task",
    },
    "efficient_tx.config": {
        *MODULES,
        "efficient_tx.commands",
        "efficient_tx.files",
        "efficient_tx.linear",
        "efficient_tx.attention",
        "efficient_tx.models",
        "efficient_tx.compression",
        "efficient_tx.task",
        "efficient_tx.training",
    },
    "efficient_tx.compare": {
        *MODULES,
        "efficient_tx.compress",
        "efficient_tx.compression",
        "efficient_tx.config",
        "efficient_tx.data",
        "efficient_tx.task",
        "efficient_tx.commands",
        "efficient_tx.files",
        "efficient_tx.linear",
        "efficient_tx.attention",
        "efficient_tx.train",
        "efficient_tx.training",
    },
    "lra": {
        "efficient_tx.checks",
        "efficient_tx.commands",
        "efficient_tx.data",
        "efficient_tx.files",
        "efficient_tx.task",
    },
}
# Commands, and what is exported of their runs, may know everything but lra: tasks are loaded by their module's name.
COMMANDS = (
    "efficient_tx.train",
    "efficient_tx.eval",
    "efficient_tx.compress",
    "efficient_tx.kernels.verify",
    "efficient_tx.sweep",
    "efficient_tx.report",
    "efficient_tx.fit",
    "efficient_tx.inspect",
    "efficient_tx.predict",
    "efficient_tx.export",
)


def part_of(module):
    """The part that a module belongs to: "efficient_tx.attention.base.mixer" -> "efficient_tx.attention"."""
    if module.startswith("efficient_tx.kernels.verify"):
        return "efficient_tx.kernels.verify"
    names = module.split(".")
    return names[0] if names[0] in ("lra", "configs") else ".".join(names[:2])


def project_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", sources("efficient_tx", "lra"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    part = part_of(module)
    ours = {part_of(name) for name in project_imports(path) if name.split(".")[0] in ("efficient_tx", "lra", "configs")}
    if part in COMMANDS:
        assert not {name for name in ours if name in ("lra", "configs")}
    elif part != "efficient_tx":
        assert ours - {part} <= ALLOWED[part]


def test_reusable_parts_bring_nothing_along():
    """Importing all of them loads no module that `import flax.nnx` has not loaded, this project's own aside."""
    parts = ", ".join(f"efficient_tx.{name}" for name in ("attention", "linear", "kernels", "tokens", "numerics"))
    program = (
        "import sys, flax.nnx; before = set(sys.modules); "
        f"import {parts}; new = set(sys.modules) - before; "
        "print(sorted(m for m in new if not m.startswith('efficient_tx')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_imports_tensorflow():
    program = (
        "import sys; import efficient_tx.train, efficient_tx.eval; "
        "import lra.listops, lra.text, lra.image; "
        "print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_private_jax_modules_are_not_imported():
    for path in sources("efficient_tx", "lra", "configs", "benchmarks"):
        assert not [name for name in project_imports(path) if name.startswith("jax._src")], path


def test_files_stay_small():
    files = [*sources("efficient_tx", "lra", "configs", "benchmarks", "tests"), ROOT / "train.py", ROOT / "eval.py"]
    assert {str(f): n for f in files if (n := len(f.read_text().splitlines())) > 410} == {}
