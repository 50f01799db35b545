"""The rules between the rooms of the house: who imports whom, and that the map is true."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "reasoners"

# What each module may import of the package; a folder stands for the modules in it.
MAY_IMPORT = {
    "__init__": set(),
    "ops": {"_C"},
    "reference": set(),
    "cache": {"ops"},
    "sampling": set(),
    "model": {"ops", "cache"},
    "checkpoint": {"model"},
    "decode": {"ops", "model", "cache", "sampling"},
    "engine": {"ops", "model", "cache", "decode", "sampling"},
    "llm": {"ops", "model", "checkpoint", "engine", "sampling"},
    "distill": {"ops", "checkpoint", "distill", "interrupt", "model", "scaling"},
    "interrupt": set(),
    "trio": set(),
    "scaling": {"scaling", "interrupt", "__version__"},
    "integrations": {"checkpoint", "llm", "model", "sampling"},
    "doctor": {"ops", "reference", "__version__"},
    "cli": {
        "checkpoint",
        "distill",
        "doctor",
        "integrations",
        "llm",
        "model",
        "sampling",
        "scaling",
        "trio",
    },
}


def imported(tree):
    """Names of the package's modules that a file imports, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "reasoners":
            names = [f"reasoners.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("reasoners."))


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_point_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    tree = ast.parse(path.read_text())
    assert set(imported(tree)) <= MAY_IMPORT[room]
    roots = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        (node.module or "").split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    assert not roots & {"tests", "bench"}
    if room == "scaling":
        assert "torch" not in roots


def test_only_ops_knows_the_extension():
    users = [
        p.name
        for p in PACKAGE.rglob("*.py")
        if re.search(r"torch\.ops\.reasoners|_C\b", p.read_text())
    ]
    assert set(users) == {"ops.py"}


@pytest.mark.parametrize("path", sorted((ROOT / "csrc/cuda").glob("*.cu*")), ids=lambda p: p.name)
def test_device_code_is_free_of_torch(path):
    assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text())


def test_every_operator_has_its_whole_story():
    """Schema, check, CPU kernel, face, test: grep for one word finds all of them."""
    schemas = re.findall(r'"(\w+)\(Tensor', (ROOT / "csrc/ops.cpp").read_text())
    assert len(schemas) == 33
    ops = (PACKAGE / "ops.py").read_text()
    kernels = "".join(p.read_text() for p in (ROOT / "csrc/cpu").glob("*.cpp"))
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    for name in schemas:
        assert f'm.impl("{name}"' in kernels, name
        assert f'register_fake("reasoners::{name}")' in ops, name
        assert re.search(rf"ops\.(reasoners\.)?{name}\b", tests), name


def test_readme_names_only_paths_that_exist():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`((?:reasoners|csrc|tests|bench|third_party)/[\w./]*)`", text))
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]
