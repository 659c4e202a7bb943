"""A trained run opened and asked: `Predictor` for images, `ReportReader` for reports.

Both need MLX, so they are imported when they are asked for; the room's plain modules load without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_cxr.inference.predictor import Predictor
    from mlx_cxr.inference.report_reader import ReportReader

__all__ = ["Predictor", "ReportReader"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'predictor' if name == 'Predictor' else 'report_reader'}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
