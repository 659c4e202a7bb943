"""Texts and figures of the page in each of its states, by Streamlit's own test runner: no browser."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from dicom_files import dicom_bytes
from PIL import Image, ImageFile
from simulated_runs import write_external

from mlx_cxr import compare_models
from mlx_cxr.core.files import read_record, write_record
from mlx_cxr.core.formatting import interval_text
from mlx_cxr.core.labels import LABELS, label_index
from mlx_cxr.data import dicom
from mlx_cxr.data.manifest import load_manifest
from mlx_cxr.evaluation import results
from mlx_cxr.evaluation.operating_points import ABSENT, ABSTAIN, PRESENT, STATE_WORDS, read_operating_points
from mlx_cxr.evaluation.predictions import read_predictions
from mlx_cxr.inference import Predictor, ReportReader
from mlx_cxr.pages import overlay
from mlx_cxr.pages.case_page import draw_case

ROOT = Path(__file__).resolve().parents[2]
TABS = ("Case", "Compare models", "Failures", "Explain", "About")
EDEMA, HEART = label_index("Edema"), label_index("Cardiomegaly")


def html_of(page) -> str:
    return "\n".join(element.proto.body for element in page.html)


def text_of(page) -> str:
    """All text of the page, without tags."""
    parts = [re.sub(r"<[^>]+>", " ", html_of(page))]
    for kind in ("markdown", "info", "warning", "error", "success", "header", "subheader", "caption", "code"):
        parts += [str(element.value) for element in getattr(page, kind)]
    return re.sub(r"\\(.)", r"\1", re.sub(r"\s+", " ", "\n".join(parts)))


def rows_shown(page, name: str) -> dict[str, list[str]]:
    """Finding to the cells of the table of findings."""
    table = re.search(rf"<caption>The 14 findings by {name}</caption>.*?</table>", html_of(page), re.DOTALL)[0]
    cells = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', table)
    return {head: [re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<td.*?</td>", rest)] for head, rest in cells}


def refused(page) -> list[str]:
    return [re.sub(r"\\(.)", r"\1", error.value) for error in page.error]


def answers(config, run: str, paths) -> list:
    """By a Predictor of the test's own, as the page computes in another thread."""
    predictor = Predictor.from_run(config.run_dir(run))
    return predictor.predict([predictor.read(path) for path in paths])


def test_without_a_run_it_says_what_to_run(open_page, tmp_path):
    page = open_page(tmp_path / "nothing")
    assert not page.exception
    assert [header.value for header in page.header] == ["No model to show yet"]
    assert page.code[0].value == "./scripts/demo"
    assert "train_cnn" in page.code[1].value
    assert "Research only, not for clinical use" in text_of(page)


def test_a_run_that_cannot_be_read_is_named_with_its_reason(open_page, tmp_path):
    for name, content in {"torn": "{", "older": "[]"}.items():
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "config.json").write_text(content)
    write_record(tmp_path / "outputs" / "other" / "config.json", {"stage": "export"})
    page = open_page(tmp_path / "outputs")
    assert not page.exception
    (torn,) = (error for error in refused(page) if error.startswith("torn"))
    assert "is not readable JSON" in torn
    (older,) = (error for error in refused(page) if error.startswith("older"))
    assert "of its own: it is damaged, or of an earlier version" in older
    (other,) = (error for error in refused(page) if error.startswith("other"))
    assert "was made by the stage" in other


def test_the_page_is_for_this_machine_alone_and_reports_nothing():
    """As Streamlit reads it beside the script; the page in the browser is started from elsewhere."""
    command = [sys.executable, "-m", "streamlit", "config", "show"]
    done = subprocess.run(command, cwd=ROOT / "app", capture_output=True, text=True, timeout=120, check=True)
    settings = dict(re.findall(r"^(\w+) = (.*)$", done.stdout, re.MULTILINE))
    wanted = {
        "address": '"127.0.0.1"',
        "gatherUsageStats": "false",
        "enableXsrfProtection": "true",
        "showErrorDetails": '"none"',
        "maxUploadSize": "100",
        "showEmailPrompt": "false",
    }
    assert {key: settings.get(key) for key in wanted} == wanted
    hosts = re.search(r"^allowedHosts = \[(.*?)\]", done.stdout, re.MULTILINE | re.DOTALL)[1]
    assert re.findall(r'"(.*?)"', hosts) == ["localhost", "127.0.0.1"]


def test_a_large_upload_never_touches_the_disk(open_page, tmp_path):
    """Starlette's parser, which the server uses, puts what is over 1 MB into a file unless it is told otherwise."""
    formparsers = pytest.importorskip("starlette.formparsers", reason="this Streamlit does not use Starlette")
    import anyio
    from starlette.datastructures import Headers

    open_page(tmp_path)
    body = (
        b'--b\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\n' + b"a" * 5_000_000 + b"\r\n--b--\r\n"
    )

    async def chunks():
        yield body

    async def parsed():
        headers = Headers({"content-type": "multipart/form-data; boundary=b"})
        return await formparsers.MultiPartParser(headers, chunks()).parse()

    upload = anyio.run(parsed)["f"]
    assert upload.size == 5_000_000
    assert not upload.file._rolled


@pytest.fixture
def page(cohort, open_page):
    return open_page(cohort.outputs)


@pytest.mark.slow
class TestWithRuns:
    def test_a_sample_shows_what_the_predictor_says(self, cohort, page):
        assert not page.exception
        assert not page.error
        image_id = page.selectbox(key="sample").value
        manifest = load_manifest(cohort.manifest_path)
        row = int(np.flatnonzero(manifest.frame["image_id"] == image_id)[0])
        said = answers(cohort, "cnn", [cohort.data.root / manifest.frame["path"].iloc[row]])[0]
        shown = rows_shown(page, "cnn")
        assert set(shown) == set(LABELS)
        for k, label in enumerate(LABELS):
            probability, *_, call, reason, report = shown[label]
            assert float(probability) == pytest.approx(said.probabilities[k], abs=5.1e-4)
            assert call == {**STATE_WORDS, ABSTAIN: "abstains"}[int(said.states[k])]
            assert (reason == "–") == (int(said.states[k]) != ABSTAIN)
            raw = manifest.raw_labels[row, k]
            assert report == ("not mentioned" if np.isnan(raw) else ["absent", "present"][int(raw)])
        assert f"{said.probabilities[EDEMA]:.2f}" in html_of(page)

    def test_samples_are_test_images_and_every_one_of_them_opens(self, cohort, page):
        manifest = load_manifest(cohort.manifest_path).frame.set_index("image_id")
        titles = page.selectbox(key="sample").options
        assert len(titles) == len(set(titles)) > 3
        for title in titles[1:4]:
            page.selectbox(key="sample").select(title).run()
            image_id = page.selectbox(key="sample").value
            assert manifest.loc[image_id, "split"] == "test"
            assert f"study {manifest.loc[image_id, 'study_id']}" in title
            assert not page.error

    def test_switching_the_model_keeps_the_finding_and_another_image_resets_it(self, page):
        page.selectbox(key="finding").set_value("Cardiomegaly").run()
        page.segmented_control(key="model").set_value("Student").run()
        assert page.selectbox(key="finding").value == "Cardiomegaly"
        assert set(rows_shown(page, "student")) == set(LABELS)
        titles = page.selectbox(key="sample").options
        page.selectbox(key="finding").set_value("Fracture").run()
        page.selectbox(key="sample").select(titles[1]).run()
        assert page.selectbox(key="finding").value in ("Edema", "Cardiomegaly")

    def test_side_by_side_names_every_finding_that_is_called_differently(self, cohort, page):
        page.segmented_control(key="model").set_value("Side by side").run()
        assert not page.error
        shown = {name: rows_shown(page, name) for name in ("cnn", "student")}
        differ = [label for label in LABELS if shown["cnn"][label][3] != shown["student"][label][3]]
        assert f"The two say the same of {14 - len(differ)} of 14 findings" in text_of(page)
        for label in differ:
            assert f"{label}: cnn {shown['cnn'][label][3]} (p" in text_of(page)

    def test_a_map_is_withheld_where_there_is_no_call_and_shown_on_request(self, page):
        page.selectbox(key="finding").set_value("Fracture").run()
        assert "Fracture: no map is shown. Reason: the model abstains on Fracture: too few examples" in text_of(page)
        page.selectbox(key="finding").set_value("No Finding").run()
        assert "No Finding has no map" in text_of(page)
        withheld = next(label for label in ("Edema", "Cardiomegaly") if rows_shown(page, "cnn")[label][3] != "present")
        page.selectbox(key="finding").set_value(withheld).run()
        assert f"{withheld}: no map is shown" in text_of(page)
        assert "Colour scale of the map" not in html_of(page)
        page.toggle(key="show_withheld").set_value(True).run()
        assert "Shown on request. The map is otherwise withheld" in text_of(page)
        assert "Colour scale of the map" in html_of(page)

    def test_the_samples_report_is_read_as_the_teacher_read_it_when_it_was_scored(self, cohort, page):
        page.button(key="load_report").click().run()
        assert not page.error
        study = re.search(r"study (\w+)", page.selectbox(key="sample").options[0])[1]
        predictions = read_predictions(cohort.run_dir("teacher") / "predictions.csv").predictions
        points = read_operating_points(cohort.run_dir("teacher") / "operating_points.json")[0]
        wanted = points.decide(predictions.logits[predictions.study_ids == study])
        table = html_of(page).split("<caption>Film and report, finding by finding</caption>")[1]
        for k in (EDEMA, HEART):
            cells = re.search(rf'<th scope="row">{LABELS[k]}</th>(.*?)</tr>', table)[1]
            report = re.sub("<[^>]+>", "", cells.split("<td")[2])
            assert report.split(">")[-1].startswith(f"{wanted.probabilities[0, k]:.2f}")
        assert "teacher may read: findings. Read here: findings." in text_of(page)
        assert 'class="cxr-words"' in html_of(page)
        assert "Checked against leave-one-out" in text_of(page) or "failed the check" in text_of(page)

    def test_a_report_that_says_the_other_thing_is_set_against_the_image_in_words(self, cohort, page):
        reader = ReportReader.from_run(cohort.run_dir("teacher"))
        hearts = ("Normal. Normal. Normal.", "Cardiomegaly. Cardiomegaly. Cardiomegaly.")
        lungs = ("", "Clear. Clear. Clear. Clear.", "Edema. Edema. Edema. Edema.")
        read = {text: reader.read(text) for text in (f"FINDINGS: {a} {b}" for a in lungs for b in hearts)}
        other = {"present": ABSENT, "absent": PRESENT, "abstains": None}
        found = None
        for title in page.selectbox(key="sample").options:
            page.selectbox(key="sample").select(title).run()
            probability, _, _, call, *_ = rows_shown(page, "cnn")["Cardiomegaly"]
            # This small teacher reads some of the texts only.
            found = next((text for text, answer in read.items() if answer.states[HEART] == other[call]), None)
            if found:
                break
        assert found
        page.text_area(key="report").set_value(found).run()
        page.button(key="read_report").click().run()
        words = {"absent": "present", "present": "denies it or does not mention it"}[call]
        said = re.search(rf"Cardiomegaly: film (\w+) \(p (\S+)\), report ({words}) \(p (\S+)\)", text_of(page))
        assert said is not None
        assert said[1] == call
        assert float(said[2]) == pytest.approx(float(probability), abs=5.1e-3)
        assert float(said[4]) == pytest.approx(read[found].probabilities[HEART], abs=5.1e-3)

    def test_markup_in_a_report_is_text(self, page):
        page.text_area(key="report").set_value(
            "FINDINGS: Edema. <img src=x onerror=alert(1)> ![a](http://b/c) Edema."
        ).run()
        page.button(key="read_report").click().run()
        assert not page.exception
        assert "&lt;img" in html_of(page)
        assert "<img src=x" not in html_of(page)
        assert "![a](http" not in "".join(str(m.value) for m in page.markdown)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("....", "there is no text to read"),
            ("a " * 20_000, "a report has at most 20,000"),
            ("IMPRESSION: Edema.", "none of what"),
        ],
    )
    def test_a_report_that_cannot_be_read_is_a_sentence(self, page, text, reason):
        page.text_area(key="report").set_value(text).run()
        page.button(key="read_report").click().run()
        assert [reason in error for error in refused(page)] == [True]
        assert rows_shown(page, "cnn")

    def test_bad_files_are_sentences_and_a_good_one_is_read_after_them(self, cohort, page):
        from page_cohort import chest

        page.segmented_control(key="film_from").set_value("Upload").run()
        gif, good = io.BytesIO(), io.BytesIO()
        frames = [Image.new("L", (64, 64), level) for level in (0, 90)]
        frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
        image = chest(1, True, False)
        Image.fromarray(image).save(good, "PNG")
        predictor = Predictor.from_run(cohort.run_dir("cnn"))
        bad = {"empty.png": b"", "paper.png": b"%PDF-1.7 x", "a.gif": gif.getvalue(), "cut.png": good.getvalue()[:900]}
        for name, content in bad.items():
            page.file_uploader(key="upload").set_value((name, content, "image/png")).run()
            assert not page.exception
            assert refused(page) == [f"{name}: {predictor.read(content).error}"]
            assert "The 14 findings by" not in html_of(page)
        page.file_uploader(key="upload").set_value(("../../etc/lies.gif", good.getvalue(), "image/gif")).run()
        assert not page.error
        said = predictor.predict([predictor.read(good.getvalue())])[0]
        assert float(rows_shown(page, "cnn")["Edema"][0]) == pytest.approx(said.probabilities[EDEMA], abs=5.1e-4)

    def test_an_upload_is_decoded_once_and_a_map_upsampled_once_on_the_way_to_screen_and_pdf(self, page, monkeypatch):
        from cxr_page import downloads
        from page_cohort import chest

        calls, cases = Counter(), []

        def counted(owner, name):
            original = getattr(owner, name)

            def call(*arguments, **keywords):
                calls[name] += 1
                return original(*arguments, **keywords)

            monkeypatch.setattr(owner, name, call)

        counted(dicom, "read_dicom")
        counted(overlay, "upsample")
        counted(ImageFile.ImageFile, "load")
        counted(Image.Image, "save")
        made = downloads.case_page
        monkeypatch.setattr(downloads, "case_page", lambda *given: cases.append(made(*given)) or cases[-1])
        page.segmented_control(key="model").set_value("Side by side").run()
        page.segmented_control(key="film_from").set_value("Upload").run()
        calls.clear()
        content = dicom_bytes(chest(1, True, True), "MONOCHROME1", 12)
        page.file_uploader(key="upload").set_value(("film", content, "application/dicom")).run()
        assert not page.error
        assert calls["read_dicom"] == 1
        page.selectbox(key="finding").set_value("Edema").run()
        calls.clear()
        page.toggle(key="show_withheld").set_value(True).run()
        drawn = html_of(page).count("Colour scale of the map")
        assert drawn == 2, "a map of each model"
        icon = 1
        assert calls == {"upsample": drawn, "save": 2 * drawn + icon}, "picture and scale each; nothing is decoded"
        calls.clear()
        page.toggle(key="as_seen").set_value(True).run()
        assert calls == {"upsample": 2, "save": 4 + icon}
        calls.clear()
        assert draw_case(cases[-1], "pdf").startswith(b"%PDF")
        assert (calls["read_dicom"], calls["load"], calls["upsample"]) == (0, 0, 1)

    def test_an_image_that_does_not_look_like_a_chest_gets_no_answer_unasked(self, page):
        page.segmented_control(key="film_from").set_value("Upload").run()
        photo = io.BytesIO()
        ramp = np.linspace(0, 255, 128).astype(np.uint8)
        Image.fromarray(
            np.stack([np.tile(ramp, (128, 1)), np.tile(ramp[:, None], (1, 128)), np.full((128, 128), 40, np.uint8)], 2)
        ).save(photo, "PNG")
        page.file_uploader(key="upload").set_value(("photo.png", photo.getvalue(), "image/png")).run()
        assert "No answer is given: this may be no upright frontal chest film" in text_of(page)
        assert "The 14 findings by" not in html_of(page)
        page.toggle[0].set_value(True).run()
        assert set(rows_shown(page, "cnn")) == set(LABELS)

    @pytest.mark.parametrize("name", TABS)
    def test_every_tab_has_the_warning_and_no_error(self, page, name):
        page.session_state["tab"] = name
        page.run()
        assert not page.exception
        assert not page.error
        assert "Research only, not for clinical use" in html_of(page)
        assert "Synthetic cohort" in html_of(page)
        if name != "Case":
            assert name in [header.value for header in page.header]

    def test_the_comparison_is_the_files(self, cohort, page):
        record = read_record(cohort.outputs / "comparison_trial" / "final_comparison.json")
        page.session_state["tab"] = "Compare models"
        page.run()
        models = record["protocols"][record["fitted_under"]]["models"]
        for run in ("cnn", "teacher", "student"):
            assert f"{models[run]['macro']['roc_auc']['value']:.3f}" in html_of(page)
        page.segmented_control(key="protocol").set_value("empty_masked").run()
        assert not page.error
        assert f"{record['protocols']['empty_masked']['models']['cnn']['macro']['brier']['value']:.3f}" in html_of(page)

    def test_a_failure_opens_as_a_case(self, cohort, page):
        page.session_state["tab"] = "Failures"
        page.run()
        options = page.selectbox(key="filter_error").options
        page.selectbox(key="filter_error").set_value(options[-1]).run()
        assert re.search(r"\d+ of \d+ failures", text_of(page))
        chosen = next(box for box in page.selectbox if box.label == "A failure")
        finding, study = re.match(r"(.*?): ", chosen.options[0])[1], re.search(r"study (\w+)", chosen.options[0])[1]
        page.button(key="open_case").click().run()
        assert page.session_state["tab"] == "Case"
        assert page.session_state["finding"] == finding
        assert page.segmented_control(key="model").value == "Student"
        assert rows_shown(page, "student")
        assert page.selectbox(key="sample").value == f"film{study[1:]}.png"

    def test_a_fault_in_one_tab_leaves_the_rest(self, page, monkeypatch):
        def broken(record):
            raise ValueError("boom")

        monkeypatch.setattr("cxr_page.compare.statement", broken)
        page.session_state["tab"] = "Compare models"
        page.run()
        assert not page.exception
        assert any("Something went wrong here (ValueError)" in error for error in refused(page))
        assert not any("boom" in error for error in refused(page))
        assert "Research only" in html_of(page)

    def test_a_network_address_is_in_the_banner(self, page, monkeypatch):
        monkeypatch.setattr("cxr_page.look.network_address", lambda: "0.0.0.0")
        page.run()
        assert "Served on 0.0.0.0, not on this machine alone" in text_of(page)


@pytest.mark.slow
def test_other_cohorts_are_beside_the_comparison_and_a_run_has_a_page_of_each(cohort, open_page, tmp_path):
    outputs = tmp_path / "outputs"
    shutil.copytree(cohort.outputs, outputs)
    results = read_record(write_external(outputs / "cnn", "nih", 0.5))["against_own"]
    compare_models.run(cohort.model_copy(update={"outputs": outputs}), cohorts=["nih"])
    page = open_page(outputs)
    page.session_state["tab"] = "Compare models"
    page.run()
    table = re.search(r"<caption>Figures of each model</caption>.*?</table>", html_of(page), re.DOTALL)[0]
    assert "ROC-AUC on nih" in table
    cells = {side: interval_text(results["macro"][side]) for side in ("external", "own")}
    (cnn,) = (row for row in table.split("<tr>") if ">cnn<" in row)
    assert [re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<td.*?</td>", cnn)][-2:] == list(cells.values())
    (student,) = (row for row in table.split("<tr>") if ">student<" in row)
    assert [re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<td.*?</td>", student)][-2:] == ["–", "–"]
    assert "Never seen outside its own cohort: teacher, student." in text_of(page).replace("`", "")
    assert "evaluate_external --run teacher --config" in text_of(page)
    page.segmented_control(key="protocol").set_value("empty_masked").run()
    assert "ROC-AUC on nih" not in html_of(page)
    page.session_state["tab"] = "About"
    page.run()
    assert not page.error
    assert "nih" in [one.label for one in page.expander]
    assert f"mean ROC-AUC is {cells['external']} here and {cells['own']} on the run's own test split" in text_of(page)
    write_record(outputs / "cnn" / "external" / "nih" / "external_results.json", {"schema": 1})
    page.run()
    assert any("is not of schema 2; run" in error for error in refused(page))
    assert cells["external"] not in text_of(page)


@pytest.mark.slow
def test_damaged_runs_are_listed_beside_those_that_work(cohort, open_page, tmp_path):
    outputs = tmp_path / "outputs"
    shutil.copytree(cohort.outputs, outputs)
    old = outputs / "student" / "test_results.json"
    write_record(old, read_record(old) | {"schema": 99})
    write_record(outputs / "comparison_trial" / "final_comparison.json", {"schema": 99})
    page = open_page(outputs)
    assert not page.exception
    assert list(page.segmented_control(key="model").options) == ["CNN"]
    assert f"test_results.json is not of schema {results.SCHEMA}" in text_of(page)
    assert set(rows_shown(page, "cnn")) == set(LABELS)
    page.session_state["tab"] = "Compare models"
    page.run()
    assert any("run compare_models again" in error for error in refused(page))
    assert not page.exception
