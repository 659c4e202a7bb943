"""The law of the house, read off the source: a room imports from the rooms above it, a stage from rooms only."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mlx_cxr

PACKAGE = Path(mlx_cxr.__file__).parent
ROOMS = (
    *("core", "data", "synthetic", "ops", "models", "evaluation", "explain", "training", "teacher"),
    *("inference", "pages", "publishing", "bench"),
)
"""From the top down. What is below may import what is above."""
WITHOUT_MLX = ("data", "synthetic", "evaluation", "pages")
RUN_STAGES = ("pipeline", "pipeline_steps", "__main__")
STANDALONE = "mlx_cxr.publishing.use_with_pytorch"
"""The file that runs outside the package, in an exported folder; nothing imports it."""

FILES = {
    ".".join(("mlx_cxr", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
STAGES = sorted(
    name.split(".")[1]
    for name, path in FILES.items()
    if path.parent == PACKAGE and path.stem not in ("__init__", "__main__", "pipeline_steps")
)
every_module = pytest.mark.parametrize("name", FILES)


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"), filename=str(FILES[name]))


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of all modules imported anywhere in it, of the package's own the module itself, not its package."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room they reach into"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inner & set(FILES)) or {node.module}
    return names


def room(name: str) -> int:
    """Position of a module's room; the stages at the root come last, the package itself first."""
    first = ([*name.split("."), ""])[1]
    return -1 if not first else ROOMS.index(first) if first in ROOMS else len(ROOMS)


def lawful(importer: str, imports: str) -> bool:
    """A room imports from itself and the rooms above it; a stage from rooms only, `pipeline` apart."""
    if room(importer) == room(imports) == len(ROOMS):
        return importer.split(".")[1] in RUN_STAGES
    return room(imports) <= room(importer)


@every_module
def test_imports_go_up_only(name):
    wrong = [other for other in imported(tree_of(name)) & set(FILES) if name != "mlx_cxr" and not lawful(name, other)]
    assert not wrong, f"{name} must not import {', '.join(wrong)}"


@pytest.mark.parametrize(
    ("importer", "imports", "fine"),
    [
        ("models.resnet", "ops.conv", True),
        ("ops.conv", "models.resnet", False),
        ("pages.overlay", "inference.predictor", True),
        ("inference.predictor", "pages.overlay", False),
        ("train_cnn", "training.loop", True),
        ("training.loop", "train_cnn", False),
        ("train_cnn", "doctor", False),
        ("pipeline", "train_cnn", True),
        ("core.runs", "core.errors", True),
        ("core.runs", "data.tables", False),
    ],
)
def test_the_law_itself(importer, imports, fine):
    assert lawful(f"mlx_cxr.{importer}", f"mlx_cxr.{imports}") is fine


def test_no_two_files_import_each_other_in_a_circle():
    TopologicalSorter({name: imported(tree_of(name)) & set(FILES) - {name} for name in FILES}).prepare()


def test_at_the_root_stand_stages_only():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(ROOMS)
    for stage in STAGES:
        tree = tree_of(f"mlx_cxr.{stage}")
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {"run", "build_parser", "main"} <= set(functions), f"{stage} is no stage"
        assert ast.unparse(functions["main"].args) == "argv: list[str] | None=None"
        assert f"python -m mlx_cxr.{stage}" in ast.get_docstring(tree), f"{stage} does not say its command"


@every_module
def test_each_framework_is_imported_in_its_rooms_only(name):
    tree, here = tree_of(name), ([*name.split("."), ""])[1]
    frameworks = {other.split(".")[0] for other in imported(tree)}
    assert STANDALONE not in imported(tree)
    if name == STANDALONE:
        assert not frameworks & {"mlx", "mlx_cxr", "mlx_vlm", "mlx_lm"}
        return
    assert here not in WITHOUT_MLX or not frameworks & {"mlx", "mlx_vlm", "mlx_lm"}
    assert here == "teacher" or not frameworks & {"mlx_vlm", "mlx_lm"}
    assert here == "bench" or "torch" not in frameworks, "PyTorch is for tests and benchmarks only"
    at_import = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
    outside = {other.split(".")[0] for other in imported(at_import)}
    assert not outside & {"torch", "mlx_vlm", "mlx_lm"}, "slow to import, or not there: inside functions"


@every_module
def test_nothing_is_ever_unpickled(name):
    tree = tree_of(name)
    assert not imported(tree) & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert getattr(node.value, "value", True) is False, f"{name}:{node.value.lineno}: allow_pickle"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "pd.read_pickle", "pandas.read_pickle", "eval", "exec"), called
            if called in ("np.load", "numpy.load"):
                given = {keyword.arg for keyword in node.keywords}
                assert "allow_pickle" in given, f"{name}:{node.lineno}: np.load without allow_pickle=False"


@every_module
def test_everything_public_says_what_it_is(name):
    tree = tree_of(name)
    named = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    for node in (tree, *(node for node in named if not node.name.startswith("_"))):
        said = ast.get_docstring(node)
        assert said, f"{name}:{getattr(node, 'lineno', 1)} has no docstring"
        opening = said.split()[0].strip("`,")
        assert opening not in ("What", "Whether", "Where", "How"), f"{name}: “{said.splitlines()[0]}” is said plainly"


def modules_loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.split())


def test_help_is_quick():
    """Neither the package nor the command line of any stage imports what takes long; a stage does so inside `run`."""
    heavy = {
        "mlx.core",
        "torch",
        "numpy",
        "pandas",
        "matplotlib",
        "sklearn",
        "scipy",
        "cv2",
        "PIL",
        "pydantic",
        "mlx_vlm",
    }
    build = "; ".join(f"import mlx_cxr.{stage}; mlx_cxr.{stage}.build_parser()" for stage in STAGES)
    assert not modules_loaded_by(build) & heavy


def test_rooms_without_mlx_load_none():
    """Also not through something they import."""
    names = [name for name in FILES if ([*name.split("."), ""])[1] in WITHOUT_MLX]
    assert not modules_loaded_by("import " + ", ".join(names)) & {"mlx.core", "torch", "mlx_vlm", "mlx_lm"}


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_help(name):
    parser = importlib.import_module(f"mlx_cxr.{name}").build_parser()
    assert parser.prog == f"python -m mlx_cxr.{name}"
    assert parser.description
    assert parser.format_help()
