"""The shell scripts' set-up, and that of the tests: what is imported is compiled once, and not beside the sources."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("given", "cache"), [("1", f"{ROOT}/.venv/bytecode"), ("", "")])
def test_scripts_keep_what_python_compiled(given, cache):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    said = 'source scripts/env.sh; echo "${PYTHONDONTWRITEBYTECODE-unset} ${PYTHONPYCACHEPREFIX-}"'
    done = subprocess.run(
        ["bash", "-c", said],
        env=environment | {"PYTHONDONTWRITEBYTECODE": given},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{'unset' if given else ''} {cache}\n"


def test_commands_that_tests_start_do_not_compile_all_anew(tmp_path):
    (tmp_path / "module.py").write_text("")
    code = "import module, sys; print(sys.dont_write_bytecode, module.__cached__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    forbidden, compiled = done.stdout.split()
    assert forbidden == "False"
    assert Path(compiled).is_file()
