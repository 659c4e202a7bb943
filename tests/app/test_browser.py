"""The page in a real browser: what a reader clicks, types, uploads and takes home, and what the browser asks for."""

from __future__ import annotations

import io
import re
import urllib.request
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
from page_pictures import ARGUMENTS, chromium, served, settled
from PIL import Image

from mlx_cxr.core.labels import LABELS, label_index
from mlx_cxr.inference.predictor import Predictor

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
EDEMA, HEART = label_index("Edema"), label_index("Cardiomegaly")
TABS = ("Compare models", "Failures", "Explain", "About")


@dataclass
class Server:
    """A running page."""

    url: str
    log: Path

    def model_calls(self) -> list[str]:
        """Lines of the log that say that a model worked."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if re.search(r" answers for | maps .* by | reads \d+ char| explains ", line)]


@pytest.fixture(scope="module")
def server(cohort, tmp_path_factory):
    """The page, started from another folder than the repository's: its settings lie beside it and hold all the same."""
    log = tmp_path_factory.mktemp("server") / "log"
    with served(cohort.outputs, log, tmp_path_factory.mktemp("elsewhere")) as url:
        yield Server(url, log)
    said = log.read_text(errors="replace")
    assert "Traceback" not in said
    assert "deprecat" not in said.lower()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: no real browser here")
    if chromium() is None:
        pytest.skip("there is no Chromium on this machine: no real browser here")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), args=list(ARGUMENTS))
        yield opened
        opened.close()


@pytest.fixture
def visit(server, browser):
    """Opens the page in a window of its own; in the end nothing was logged as an error, and nobody else was asked."""
    contexts, errors, foreign = [], [], []

    def watch(route):
        if urlparse(route.request.url).hostname == "127.0.0.1":
            route.continue_()
        else:
            foreign.append(route.request.url)
            route.abort()

    def opened(**options):
        context = browser.new_context(**{"viewport": {"width": 1440, "height": 1000}} | options)
        contexts.append(context)
        context.route(re.compile("^(http|ws)"), watch)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.locator(".cxr-banner").wait_for()
        settled(page)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert foreign == []
    assert errors == []


@pytest.fixture(scope="module")
def predictor(cohort):
    return Predictor.from_run(cohort.run_dir("cnn"))


def shown(page, finding: str) -> tuple[str, str]:
    """(probability, call) of a finding in the chart."""
    row = (
        page.locator(".cxr-chart")
        .first.get_by_role("row")
        .filter(has=page.get_by_role("rowheader", name=finding, exact=True))
    )
    return row.locator(".num").inner_text(), row.locator(".cxr-state").inner_text()


def upload(page, name: str, content: bytes) -> None:
    page.locator("input[type=file]").first.set_input_files({"name": name, "mimeType": "image/png", "buffer": content})
    page.locator(".stFileUploader").first.get_by_text(name).wait_for()
    settled(page)


def png_of(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def image_pixels(page) -> np.ndarray:
    """The image on the page as the browser got it."""
    address = page.locator("[data-testid=stImage] img").first.get_attribute("src")
    with urllib.request.urlopen(address) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB")).astype(int)


def moved(page, slider, key: str, times: int = 1) -> np.ndarray:
    """The image after a slider was moved by a key; however slow the machine is, it is awaited."""
    before = page.locator("[data-testid=stImage] img").first.get_attribute("src")
    for _ in range(times):
        slider.press(key)
    page.wait_for_function("was => document.querySelector('[data-testid=stImage] img')?.src !== was", arg=before)
    settled(page)
    return image_pixels(page)


def choose(page, label: str, option: str) -> None:
    """Pick an option of a menu as a reader does."""
    page.get_by_role("combobox", name=label).click()
    page.keyboard.type(option)
    page.get_by_role("option", name=option).first.click()
    settled(page)


def called(answer) -> str:
    """The finding, of the two that are drawn, whose map the page shows first."""
    return LABELS[max((EDEMA, HEART), key=lambda k: (int(answer.states[k]) == 1, answer.probabilities[k]))]


def test_sample_model_finding_method_and_slider(visit, server, cohort, predictor):
    page = visit()
    title = page.get_by_role("combobox", name="Test film").input_value()
    study = re.search(r"study s(\d+)", title)[1]
    answer = predictor.predict([predictor.read(cohort.data.root / f"film{study}.png")])[0]
    assert shown(page, "Edema")[0] == f"{answer.probabilities[EDEMA]:.2f}"
    assert shown(page, "Fracture")[1] == "abstains"

    finding = called(answer)
    before, calls = image_pixels(page), server.model_calls()
    slider = page.get_by_role("slider", name="Map opacity")
    slider.focus()
    fainter = moved(page, slider, "ArrowLeft", 12)
    assert np.ptp(before, axis=2).mean() > np.ptp(fainter, axis=2).mean() > 0
    assert np.ptp(moved(page, slider, "Home"), axis=2).max() == 0
    moved(page, slider, "End")
    assert server.model_calls() == calls, "moving the slider ran a model"

    page.get_by_role("radio", name="Grad-CAM", exact=True).click()
    settled(page)
    grad_cam = image_pixels(page)
    page.get_by_role("radio", name="HiResCAM").click()
    settled(page)
    # The same map up to rounding, which may decide between two neighbours of the 256 colours: two gray levels apart.
    np.testing.assert_allclose(image_pixels(page), grad_cam, atol=2)
    page.get_by_role("radio", name="Grad-CAM++").click()
    settled(page)
    assert page.get_by_text(f"{finding}: Grad-CAM++; peak").count() == 1
    assert len(server.model_calls()) == len(calls) + 3

    choose(page, "Finding on the map", "Fracture")
    assert page.get_by_text("Fracture: no map is shown.").is_visible()
    assert np.ptp(image_pixels(page), axis=2).max() == 0
    page.get_by_text("Show withheld maps", exact=True).click()
    settled(page)
    assert page.get_by_text("Shown on request.").is_visible()

    page.get_by_role("radio", name="Student").click()
    settled(page)
    assert page.locator(".cxr-chart").get_attribute("aria-label") == "The 14 findings by student"
    page.get_by_role("radio", name="Side by side").click()
    settled(page)
    names = [chart.get_attribute("aria-label") for chart in page.locator(".cxr-chart").all()]
    assert names == ["The 14 findings by cnn", "The 14 findings by student"]


def test_uploads_good_and_bad(visit, predictor):
    dicom_files = pytest.importorskip("dicom_files", reason="pydicom is not installed: no DICOM is uploaded here")
    from page_cohort import chest

    page = visit()
    page.get_by_role("radio", name="Upload").click()
    settled(page)
    image = chest(3, True, False)
    data = io.BytesIO()
    dicom_files.dicom_dataset(image, "MONOCHROME1", 16).save_as(data, enforce_file_format=True)
    files = {"chest.png": png_of(image), "detector.dcm": data.getvalue(), "lies.gif": png_of(chest(4, False, True))}
    for name, content in files.items():
        upload(page, name, content)
        answer = predictor.predict([predictor.read(content)])[0]
        assert answer.status == "answered"
        assert shown(page, "Edema")[0] == f"{answer.probabilities[EDEMA]:.2f}"
        assert shown(page, "Cardiomegaly")[0] == f"{answer.probabilities[HEART]:.2f}"
        assert "Secret" not in page.inner_text("body")
        for bad, worse in {"empty.png": b"", "paper.png": b"%PDF-1.4\n%", "cut.png": files["chest.png"][:700]}.items():
            upload(page, bad, worse)
            reason = page.get_by_role("alert").inner_text()
            assert reason.endswith(f"{bad}: {predictor.read(worse).error}")
            assert page.locator(".cxr-chart").count() == 0


def test_a_report_is_pasted_and_moves_words(visit, cohort):
    from mlx_cxr.inference.report_reader import ReportReader

    text = "FINDINGS: Edema. Edema. Normal. <b>Normal.</b>"
    reader = ReportReader.from_run(cohort.run_dir("teacher"))
    wanted = reader.read(text)
    page = visit()
    page.get_by_role("textbox", name="Report text").fill(text)
    page.get_by_role("textbox", name="Report text").press("Control+Enter")
    settled(page)
    page.get_by_role("button", name="Read the report").click()
    settled(page)
    row = page.get_by_role("table", name="Film and report").get_by_role("row").filter(has_text="Cardiomegaly")
    if not row.count():
        row = page.locator("table", has_text="Film and report, finding by finding").locator(
            "tr", has_text="Cardiomegaly"
        )
    assert row.locator("td").nth(1).inner_text().startswith(f"{wanted.probabilities[HEART]:.2f}")
    words = page.locator(".cxr-words span")
    words.first.wait_for()
    explained = reader.explain(wanted, ["Cardiomegaly"])[0]
    assert words.all_inner_texts() == list(explained.scores.words)
    assert page.locator(".cxr-words b").count() == 0


def test_tabs_and_a_failure_that_is_opened(visit):
    page = visit()
    for name in TABS:
        page.get_by_role("tab", name=name).click()
        page.get_by_role("heading", name=name, exact=True, level=2).wait_for()
        settled(page)
        assert page.get_by_text("Research only, not for clinical use.").first.is_visible()
        assert page.get_by_role("tabpanel").get_by_text("Something went wrong").count() == 0
        for image in page.get_by_role("tabpanel").locator("img").all():
            assert image.get_attribute("alt") is not None
    page.get_by_role("tab", name="Failures").click()
    page.get_by_role("button", name="Open as a case").wait_for()
    settled(page)
    said = page.get_by_role("combobox", name="A failure").input_value()
    page.get_by_role("button", name="Open as a case").click()
    page.get_by_role("tab", name="Case", selected=True).wait_for()
    settled(page)
    finding, study = re.match(r"(.*?): .*study (\w+)", said).groups()
    assert f"study {study}" in page.get_by_role("combobox", name="Test film").input_value()
    assert page.get_by_role("combobox", name="Finding on the map").input_value().startswith(finding)


@pytest.mark.parametrize("kind", ["PDF", "PNG"])
def test_the_case_is_taken_home(visit, tmp_path, kind):
    page = visit()
    with page.expect_download() as waiting:
        page.get_by_role("button", name=f"Download as {kind}").click()
    path = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(path)
    study = re.search(r"study (\w+)", page.get_by_role("combobox", name="Test film").input_value())[1]
    assert path.name.startswith(f"case_study_{study}")
    content = path.read_bytes()
    if kind == "PDF":
        assert content.startswith(b"%PDF-1.")
        assert content.count(b"/Type /Page ") == 1
        assert b"Research only, not for clinical use" in content
    else:
        image = Image.open(io.BytesIO(content))
        assert image.size == (1190, 1683)
        assert image.text["Description"].startswith("Research only, not for clinical use")
        assert np.asarray(image.convert("L")).std() > 20


def test_the_keyboard_is_enough(visit):
    page = visit()

    def focus(role: str, name: str) -> None:
        for _ in range(60):
            if page.get_by_role(role, name=name).evaluate("element => element === document.activeElement"):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab never reaches {role} {name}")

    focus("tab", "Case")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Compare models", level=2).wait_for()
    settled(page)
    # On a slow machine the tab's own run can end after this, and take the focus with it.
    focus("tab", "Compare models")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    page.get_by_role("combobox", name="Finding on the map").wait_for()
    settled(page)
    page.get_by_role("combobox", name="Finding on the map").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.type("Fract")
    page.keyboard.press("Enter")
    settled(page)
    assert page.get_by_role("combobox", name="Finding on the map").input_value().startswith("Fracture")
    assert page.get_by_text("Fracture: no map is shown.").is_visible()


NAMELESS = """() => [...document.querySelectorAll(
    'button, input, textarea, select, [role=slider], [role=combobox], [role=tab], [role=radio]')]
  .filter(e => e.offsetParent !== null && e.type !== 'file' && !e.closest('[data-testid=stHeader]'))
  .filter(e => !(e.getAttribute('aria-label') || e.getAttribute('title') || e.innerText.trim()
    || (e.labels && [...e.labels].some(l => l.innerText.trim()))
    || (e.getAttribute('aria-labelledby') || '').split(' ').some(i => document.getElementById(i)?.innerText.trim())))
  .map(e => e.outerHTML.slice(0, 200))"""

CONTRAST = """selector => {
  const resolve = colour => { const c = document.createElement('canvas'); c.width = c.height = 1;
    const x = c.getContext('2d'); x.fillStyle = colour; x.fillRect(0, 0, 1, 1);
    return [...x.getImageData(0, 0, 1, 1).data]; };
  const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] / 255 + below[i] * (1 - top[3] / 255));
  const element = document.querySelector(selector), grounds = [];
  for (let e = element; e; e = e.parentElement) grounds.push(resolve(getComputedStyle(e).backgroundColor));
  const ground = grounds.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  const ink = over(resolve(getComputedStyle(element).color), ground);
  const light = rgb => rgb.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
  return (a + .05) / (b + .05); }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_and_has_a_name(visit, scheme):
    page = visit(color_scheme=scheme)
    for selector in (
        ".cxr-banner b",
        ".cxr-row .name",
        ".cxr-row .num",
        ".cxr-note",
        ".cxr-group",
        ".cxr-axis",
        ".cxr-state",
    ):
        assert page.evaluate(CONTRAST, selector) > 4.5, selector
    assert page.evaluate(NAMELESS) == []
    images = page.locator("img").all()
    assert images
    assert all(image.get_attribute("alt") is not None for image in images)
    heads = page.evaluate("() => [...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1])")
    assert heads[:2] == [1, 2]
    assert all(after <= before + 1 for before, after in pairwise(heads))


def test_a_narrow_screen_needs_no_sideways_scrolling(visit):
    page = visit(viewport={"width": 400, "height": 850})
    assert page.evaluate("() => document.querySelector('[data-testid=stMain]').scrollWidth") <= 400
    box = page.locator("[data-testid=stImage] img").first.bounding_box()
    assert box["width"] > 340
    page.mouse.move(200, 500)
    page.mouse.wheel(0, 1500)
    page.wait_for_timeout(500)
    assert page.evaluate("() => document.querySelector('[data-testid=stMain]').scrollTop") > 500
    assert 0 <= page.locator(".cxr-banner").bounding_box()["y"] < 60, "the warning stays in sight"
