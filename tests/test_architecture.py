"""The rules of the house that can be read off the source: who imports whom, what is never called, how long it is."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_cxr

PACKAGE = Path(mlx_cxr.__file__).parent
LEVEL_0 = {
    "labels",
    "config",
    "config_sections",
    "config_file",
    "errors",
    "runs",
    "runtime",
    "wording",
    "freshness",
    "readme",
    "workers",
}
ROOMS_1 = {"data", "phantom", "evaluation", "models", "explain"}
ROOMS_WITHOUT_MLX = {"data", "phantom", "evaluation"}
ROOMS = {**dict.fromkeys(ROOMS_1, 1), "training": 2, "teacher": 3, "bench": 3}
LEVEL_3_MODULES = (
    "trained_run",
    "inference",
    "explanation",
    "showcase",
    "scoring_report",
    "failure_films",
    *("evaluated_run", "model_card", "export_files", "pytorch_script"),
    "report_reading",
    "case_page",
    "prediction_files",
)
"""A later one may import an earlier one, and each the teacher's room, which imports none of them."""
STAGES_THAT_RUN_STAGES = {"pipeline", "pipeline_steps"}
LONGEST = 400

FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(PACKAGE).with_suffix("").as_posix() for path in FILES]
STAGES = sorted(
    name
    for name in NAMES
    if "/" not in name and name not in {*LEVEL_0, *LEVEL_3_MODULES, "__init__", "__main__", "pipeline_steps"}
)
every_module = pytest.mark.parametrize("path", FILES, ids=NAMES)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, anywhere in it; `from a import b` counts as `a` and `a.b`."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room they reach into"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def parts_of_package(names: set[str]) -> set[str]:
    """First component below `mlx_cxr` of each import that leads there: a room or a top-level module."""
    parts = {name.split(".")[1] for name in names if name.startswith("mlx_cxr.")}
    return parts & ({name.split("/")[0] for name in NAMES} - {"__init__"})


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def level(part: str) -> int:
    if part in LEVEL_0 or part == "__init__":
        return 0
    return ROOMS.get(part, 3 if part in LEVEL_3_MODULES else 4)


def allowed(importer: str, imports: str) -> bool:
    if importer == imports:
        return True
    if level(importer) == level(imports) == 0:
        return True
    if importer in STAGES_THAT_RUN_STAGES and imports in {*STAGES, *STAGES_THAT_RUN_STAGES}:
        return True
    if importer in {*LEVEL_3_MODULES, "bench"} and imports == "teacher":
        return True
    if imports == "bench":
        return importer == "benchmark"
    if importer in LEVEL_3_MODULES and imports in LEVEL_3_MODULES:
        return LEVEL_3_MODULES.index(imports) < LEVEL_3_MODULES.index(importer)
    return level(imports) < level(importer)


@every_module
def test_imports_go_down_only(path):
    here = room_of(path)
    wrong = {part for part in parts_of_package(imported(path)) if not allowed(here, part)}
    assert not wrong, f"{path}: {here} (level {level(here)}) must not import {', '.join(sorted(wrong))}"


@every_module
def test_only_the_rooms_of_arrays_on_the_device_import_mlx(path):
    here, names = room_of(path), imported(path)
    if here in ROOMS_WITHOUT_MLX:
        assert not {name for name in names if name.split(".")[0] in ("mlx", "mlx_vlm", "mlx_lm")}
    if here != "teacher":
        assert not {name for name in names if name.split(".")[0] in ("mlx_vlm", "mlx_lm")}
    if here != "bench":
        assert "torch" not in {name.split(".")[0] for name in names}, "PyTorch is for tests and benchmarks only"


@every_module
def test_pytorch_is_imported_inside_functions_only(path):
    """So that the benchmark runs, and says what is missing, where PyTorch is not installed."""
    outside = [node for node in tree_of(path).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert "torch" not in {alias.name.split(".")[0] for node in outside for alias in node.names}
    assert not {node.module for node in outside if isinstance(node, ast.ImportFrom) and node.module.startswith("torch")}


@every_module
def test_nothing_is_ever_unpickled(path):
    assert not imported(path) & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert getattr(node.value, "value", True) is False, f"{path}:{node.value.lineno}: allow_pickle"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "pd.read_pickle", "pandas.read_pickle", "eval", "exec"), called
            if called in ("np.load", "numpy.load"):
                given = {keyword.arg for keyword in node.keywords}
                assert "allow_pickle" in given, f"{path}:{node.lineno}: np.load without allow_pickle=False"


@every_module
def test_no_module_is_too_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


@every_module
def test_modules_say_what_they_are(path):
    tree = tree_of(path)
    assert ast.get_docstring(tree), f"{path} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}:{node.lineno}: {node.name} has no docstring"


def test_every_room_and_module_has_a_level():
    rooms = {name.split("/")[0] for name in NAMES if "/" in name}
    assert rooms <= set(ROOMS), f"no level is given for {rooms - set(ROOMS)}"
    assert {"train_cnn", "doctor", "fetch_weights"} <= set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_every_top_level_module_else_is_a_stage(name):
    tree = tree_of(PACKAGE / f"{name}.py")
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {"run", "build_parser", "main"} <= set(functions), f"{name} is no stage, and of no lower level"
    main = functions["main"]
    assert [argument.arg for argument in main.args.args] == ["argv"]
    assert ast.unparse(main.args.defaults[0]) == "None"
    assert "readable_errors()" in ast.unparse(main), f"{name}.main lets tracebacks of user errors through"
    assert any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)
    assert f"python -m mlx_cxr.{name}" in ast.get_docstring(tree), f"{name}'s docstring does not say its command"


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_help(name):
    stage = importlib.import_module(f"mlx_cxr.{name}")
    parser = stage.build_parser()
    assert parser.prog == f"python -m mlx_cxr.{name}"
    assert parser.description
    assert parser.format_help()


def modules_loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.split())


def test_importing_the_package_is_cheap():
    loaded = modules_loaded_by("import mlx_cxr")
    heavy = {"mlx", "mlx.core", "torch", "numpy", "matplotlib", "pandas", "sklearn", "scipy", "cv2", "PIL", "mlx_vlm"}
    assert not loaded & heavy


def test_rooms_of_data_and_evaluation_load_no_mlx():
    """Also not through something they import."""
    rooms = [name for name in NAMES if name.split("/")[0] in ROOMS_WITHOUT_MLX]
    statement = "import " + ", ".join(f"mlx_cxr.{name.replace('/', '.').removesuffix('.__init__')}" for name in rooms)
    assert not modules_loaded_by(statement) & {"mlx.core", "torch", "mlx_vlm", "mlx_lm"}


@pytest.mark.parametrize(
    ("importer", "imports", "fine"),
    [
        ("data", "config", True),
        ("data", "models", False),
        ("models", "explain", False),
        ("training", "models", True),
        ("models", "training", False),
        ("labels", "data", False),
        ("inference", "training", True),
        ("explanation", "inference", True),
        ("inference", "explanation", False),
        ("train_cnn", "training", True),
        ("train_cnn", "doctor", False),
        ("training", "train_cnn", False),
        ("pipeline", "train_cnn", True),
        ("bench", "teacher", True),
        ("teacher", "bench", False),
        ("benchmark", "bench", True),
        ("doctor", "bench", False),
        ("inference", "bench", False),
    ],
)
def test_the_rule_itself(importer, imports, fine):
    assert allowed(importer, imports) is fine
