"""The page, and a cohort for it that is made once in a session."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from made_once import made_once

from mlx_cxr.core.config import Config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRIPT = ROOT / "app" / "streamlit_app.py"
for folder in (HERE, SCRIPT.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

pytest.importorskip("streamlit", reason="Streamlit is not installed: the page is not checked here")


@pytest.fixture(scope="session")
def cohort() -> Config:
    """CNN, student, teacher, comparison and failure analysis of a small cohort; tests that change it take a copy."""
    from page_cohort import make_page_cohort, page_config

    return page_config(made_once("page_cohort", make_page_cohort))


@pytest.fixture
def open_page(monkeypatch, tmp_path) -> Callable:
    """Opens the page on an outputs folder, in a working directory of its own."""
    from streamlit.testing.v1 import AppTest

    if not hasattr(AppTest, "html"):
        pytest.skip("the test runner of this Streamlit cannot look at the page's HTML; a newer one can")
    monkeypatch.chdir(tmp_path)

    def opened(outputs: Path) -> AppTest:
        monkeypatch.setattr(sys, "argv", ["streamlit_app.py", "--outputs", str(outputs)])
        return AppTest.from_file(str(SCRIPT), default_timeout=120).run()

    return opened
