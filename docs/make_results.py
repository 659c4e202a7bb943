"""Writes `docs/results.md`, the keys of the result files read off the source of what writes them:
`python docs/make_results.py`.

A string below a key of a class describes it and the keys right above it, up to a blank line or another string.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import mlx_cxr
from mlx_cxr.core.files import write_text

FILES = {
    "test_results.json": "Results",
    "operating_points.json": "OperatingPointsFile",
    "final_comparison.json": "Comparison",
    "inference.json": "InferenceRecord",
}
"""Result file to the class of its content."""
SOURCES = (
    *(f"evaluation/{name}.py" for name in ("bootstrap", "operating_points", "abstention", "shortcuts", "external")),
    *("evaluation/results.py", "evaluation/comparison.py", "inference/record_schema.py"),
)
"""Modules of the package that hold the classes."""


def schema_page() -> str:
    """The page, for the source as it is now."""
    sources = [(Path(mlx_cxr.__file__).parent / source).read_text(encoding="utf-8") for source in SOURCES]
    nodes = [node for source in sources for node in ast.parse(source).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    aliases = {ast.unparse(node.targets[0]): node.value for node in nodes if isinstance(node, ast.Assign)}
    lines = [
        "# Result files",
        "",
        "Written by `docs/make_results.py` from the source; a test compares the two. Undefined figures are null.",
        "",
    ]
    shown: set[str] = set()
    for file, root in FILES.items():
        lines += [f"## `{file}`", ""]
        waiting = [root]
        while waiting:
            name = waiting.pop(0)
            if name in shown:
                continue
            shown.add(name)
            bases = [ast.unparse(base) for base in classes[name].bases if ast.unparse(base) in classes]
            keys = _keys(classes[name], aliases)
            lines += [] if name == root else [f"### {name}", ""]
            lines += [" ".join((ast.get_docstring(classes[name]) or "").split()), ""]
            lines += [*(f"- the keys of `{base}`" for base in bases if base != "_Strict"), *keys, ""]
            waiting += [word for word in re.findall(r"\w+", " ".join([*bases, *keys])) if word in classes]
    return "\n".join(lines)


def _keys(node: ast.ClassDef, aliases: dict[str, ast.expr]) -> list[str]:
    """A line per group of keys."""
    lines, keys, end = [], [], 0
    for statement in [*node.body, None]:
        described = isinstance(statement, ast.Expr) and keys
        if keys and (described or statement is None or statement.lineno > end + 1):
            meaning = f": {' '.join(ast.literal_eval(statement.value).split())}" if described else ""
            lines.append(f"- {', '.join(keys)}{meaning}")
            keys = []
        if isinstance(statement, ast.AnnAssign):
            kind = ast.unparse(_Plain(aliases).visit(statement.annotation))
            keys.append(f"`{ast.unparse(statement.target).rstrip('_')}` (`{kind}`)")
        end = getattr(statement, "end_lineno", 0)
    return lines


class _Plain(ast.NodeTransformer):
    """Types without their constraints: `Annotated[float, ...]`, or a name for it, becomes `float`."""

    def __init__(self, aliases: dict[str, ast.expr]) -> None:
        self._aliases = aliases

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self.visit(self._aliases[node.id]) if node.id in self._aliases else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        annotated = ast.unparse(node.value) == "Annotated"
        return self.visit(node.slice.elts[0]) if annotated else self.generic_visit(node)


if __name__ == "__main__":
    write_text(Path(__file__).with_name("results.md"), schema_page())
