"""All stages by one command: `python -m mlx_cxr [STAGE …]`, or `mlx-cxr [STAGE …]`.

Without a stage it lists them in the order in which they are used.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from pathlib import Path

from mlx_cxr.core.errors import UserError, readable_errors

STAGES = (
    *("doctor", "pipeline", "make_demo_data", "build_manifest", "prepare_images"),
    *("train_cnn", "evaluate_cnn", "fetch_weights", "make_tiny_teacher", "lfm_finetune", "cache_teacher_outputs"),
    *("bag_of_words", "evaluate_external"),
    *("distillation", "compare_models", "failure_analysis", "explain_report", "predict", "export", "benchmark"),
)
"""In the order in which they are used."""


def stage_list() -> str:
    """A line for each stage: its name, and the first sentence of its module's docstring. Nothing is imported for it."""
    width = max(map(len, STAGES))
    lines = []
    for name in STAGES:
        source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        sentence = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0].split(": `python -m")[0]
        lines.append(f"  {name:{width}}  {sentence.rstrip('.')}")
    return "\n".join(
        [
            "usage: mlx-cxr STAGE [OPTION …]    or: python -m mlx_cxr.STAGE [OPTION …]",
            "",
            "The stages, in the order in which they are used; STAGE --help says more:",
            "",
            *lines,
            "",
            "Research only, not for clinical use.",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Run the stage that the first argument names, with the other arguments; without one, list the stages.

    Raises:
        SystemExit: with status 2 for a name that is no stage's, with the nearest; else as the stage says.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(stage_list())
        return
    with readable_errors():
        stage = name.replace("-", "_")
        if stage not in STAGES:
            near = difflib.get_close_matches(stage, STAGES, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else "run mlx-cxr without arguments for the list"
            raise UserError(f"{name!r} is no stage; {hint}")
    importlib.import_module(f"mlx_cxr.{stage}").main(rest)


if __name__ == "__main__":
    main()
