"""The page's pictures in `.github/images`, taken anew from runs that are there:

    python tests/app/page_pictures.py outputs .github/images [STUDY]

from the folder that `outputs` lies in, as the runs name their data relative to it.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "app" / "streamlit_app.py"
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def chromium() -> str | None:
    """The browser's path, or None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.contextmanager
def served(outputs: Path, log: Path, folder: Path | None = None) -> Iterator[str]:
    """The page on a free port while the block runs; gives its address.

    Args:
        outputs: of the runs.
        log: gets what the server says.
        folder: that it works in, None takes the present one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", str(SCRIPT)]
    command += ["--server.port", str(port), "--server.headless", "true", "--", "--outputs", str(outputs)]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/_stcore/health", timeout=2):
                break
            if process.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def settled(page) -> None:
    """Wait until the page's script has run to its end, and no other run began within half a second of it."""
    at_rest = """() => {
      const app = document.querySelector('[data-testid=stApp]'), now = performance.now();
      if (!app || app.dataset.testScriptState !== 'notRunning') window.busy = now;
      window.busy ??= now;
      return now - window.busy > 500; }"""
    page.evaluate("() => { window.busy = performance.now(); }")
    page.wait_for_function(at_rest, polling=50)


def take(url: str, folder: Path, study: str = "") -> None:
    """`page_case.png` and `page_compare.png`, each under 400 KB."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(ARGUMENTS))
        page = browser.new_page(viewport={"width": 1360, "height": 960})
        page.set_default_timeout(120_000)
        page.goto(url)
        page.locator(".cxr-chart").wait_for()
        settled(page)
        if study:
            page.get_by_role("combobox", name="Test film").click()
            page.keyboard.type(study)
            page.get_by_role("option", name=study).first.click()
            settled(page)
        _save(page, folder / "page_case.png")
        page.get_by_role("tab", name="Compare models").click()
        page.locator(".cxr-whisker").first.wait_for()
        settled(page)
        _save(page, folder / "page_compare.png")
        browser.close()


def _save(page, path: Path) -> None:
    """Save the window's content."""
    page.evaluate("() => document.activeElement.blur()")
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    place = Path(sys.argv[2])
    with served(Path(sys.argv[1]), place / ".server.log") as address:
        take(address, place, *sys.argv[3:4])
    (place / ".server.log").unlink()
