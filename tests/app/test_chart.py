"""The chart says what the operating points say, and what comes from elsewhere stays text."""

import re

import numpy as np
import pytest
from cxr_page.chart import chart_html, rows_of, table_html
from cxr_page.look import html_table, network_address, plain, whiskers
from cxr_page.pages import sections_of, show_markdown
from cxr_page.report import coloured_report
from cxr_page.viewer import likeliest

from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation.calibration import Calibration
from mlx_cxr.evaluation.conformal import ConformalBands
from mlx_cxr.evaluation.metrics import Thresholds
from mlx_cxr.evaluation.operating_points import ABSENT, ABSTAIN, PRESENT, OperatingPoints
from mlx_cxr.explain.word_scores import TextExplanation, WordScores


def points_of(threshold=0.4, lower=0.2, upper=0.6) -> OperatingPoints:
    """The same points for all 14 findings, or arrays of 14."""

    def column(value) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, dtype=np.float64), 14).copy()

    counts = np.full(14, 50)
    return OperatingPoints(
        Calibration(np.ones(14), ("validation",) * 14),
        Thresholds(column(threshold), ("validation",) * 14, "f1"),
        "empty_negative",
        ConformalBands(0.1, column(lower), column(upper), counts, counts),
    )


@pytest.mark.parametrize("seed", range(40))
def test_no_call_is_made_inside_the_zone_and_one_everywhere_outside(seed):
    rng = np.random.default_rng(seed)
    threshold, lower, upper = rng.random((3, 14)).round(2)
    points = points_of(threshold, lower, upper)
    grid = np.linspace(0.0005, 0.9995, 1000)
    states = points.states(grid[:, None].repeat(14, axis=1))
    for row in rows_of(grid[:14], states[0], points):
        k = LABELS.index(row.finding)
        inside, outside = (grid > row.low) & (grid < row.high), (grid < row.low) | (grid > row.high)
        assert (states[inside, k] == ABSTAIN).all()
        assert (states[outside, k] != ABSTAIN).all()


def test_calls_come_first_and_each_group_is_sorted_by_how_far_it_is_above_its_threshold():
    probabilities = np.full(14, 0.1)
    probabilities[[3, 9, 1]] = 0.9, 0.7, 0.5
    points = points_of()
    rows = rows_of(probabilities, points.states(probabilities[None])[0], points, {"Edema": "absent"})
    assert [row.finding for row in rows[:3]] == ["Edema", "Pleural Effusion", "Cardiomegaly"]
    assert [row.state for row in rows] == [PRESENT, PRESENT, ABSTAIN] + [ABSENT] * 11
    assert rows[2].reason == "both present and absent are plausible at 90 %"
    assert [row.reason for row in rows if row.state != ABSTAIN] == [""] * 13
    assert (rows[0].label, rows[1].label) == ("absent", "")


def test_bars_marks_and_words_stand_where_the_numbers_are():
    probabilities = np.full(14, 0.125)
    probabilities[3] = 0.875
    points = points_of(threshold=0.25, lower=0.2, upper=0.75)
    rows = rows_of(probabilities, points.states(probabilities[None])[0], points)
    html = chart_html(rows, "cnn", "Edema")
    first = html[html.index('class="cxr-row') :].split('role="row"', 2)
    edema = first[0] + first[1]
    assert "is-present is-chosen" in edema
    assert 'class="bar" style="width:87.50%"' in edema
    assert 'class="tick" style="left:25.00%"' in edema
    assert 'class="zone" style="left:20.00%;width:55.00%"' in edema
    assert "probability 0.88; threshold 0.25; abstains from 0.20 to 0.75" in edema
    assert ">present<" in edema
    assert html.count('role="rowheader"') == 14
    assert "Called absent · 13" in html


def test_the_table_has_what_the_chart_has_and_why_there_is_no_call():
    probabilities = np.full(14, 0.5)
    points = points_of()
    rows = rows_of(probabilities, points.states(probabilities[None])[0], points, {"Edema": "present"})
    html = table_html(rows, "cnn")
    assert html.count("both present and absent are plausible at 90 %") == 14
    edema = re.search(r'<th scope="row">Edema</th>(.*?)</tr>', html)[1]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", edema)
    assert cells[:3] == ["0.500", "0.400", "0.200 to 0.600"]
    assert cells[-1] == "present"
    assert html.count("not mentioned") == 13


class _Model:
    def __init__(self, points):
        self.points = points


class _Opened:
    def __init__(self, points):
        self.model = _Model(points)


class _Said:
    def __init__(self, probabilities, points):
        self.probabilities, self.states = probabilities, points.states(probabilities[None])[0]


def test_the_map_begins_with_the_likeliest_finding_that_is_called():
    probabilities = np.full(14, 0.1)
    probabilities[[LABELS.index("No Finding"), LABELS.index("Edema"), LABELS.index("Fracture")]] = 0.99, 0.7, 0.8
    points = points_of(threshold=np.where(np.arange(14) == LABELS.index("Edema"), 0.1, 0.65), lower=0.05, upper=0.6)
    assert likeliest(_Opened(points), _Said(probabilities, points)) == "Fracture"


def test_where_nothing_is_called_the_map_begins_with_the_top_of_the_chart():
    points = points_of(threshold=np.where(np.arange(14) == LABELS.index("Edema"), 0.25, 0.5))
    probabilities = np.full(14, 0.3)
    assert likeliest(_Opened(points), _Said(probabilities, points)) == "Edema"


def test_text_from_elsewhere_is_text():
    attack = '<img src=x onerror="alert(1)">'
    assert "<img" not in html_table(attack, [attack], [["a"]])
    assert "<img" not in whiskers(attack, {attack: {"value": 0.5, "low": None, "high": None}}, 0, 1, lambda _: attack)
    scores = WordScores((attack, "b"), (0,), np.zeros(2), np.zeros(2), np.zeros(2), 0.0, 0.0)
    words = coloured_report(TextExplanation("s", "Edema", scores, 0.5, 0.5))
    assert "<img" not in words
    assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;" in words
    assert plain("![a](http://b) $x$ `c` :d: <e>") == r"\!\[a\](http\://b) \$x\$ \`c\` \:d\: \<e\>"


def test_words_are_coloured_by_what_they_did():
    effects = np.array([0.5, -0.25, 0.0, 0.1])
    scores = WordScores(("Edema.", "No", "x", "y"), (0,), effects, effects, effects, 0.35, 0.0)
    html = coloured_report(TextExplanation("s", "Edema", scores, 0.9, 0.5))
    # Orange at the full scale of 0.5 logits, half way from white to blue at -0.25, and white at 0.
    assert re.findall(r"background:(#\w{6})\" title", html)[:3] == ["#e69f00", "#aadaf4", "#ffffff"]
    assert "“Edema.” +0.50; “No” −0.25" in html


def test_whiskers_are_placed_on_the_axis():
    html = whiskers("AUC", {"CNN": {"value": 0.75, "low": 0.6, "high": 0.9}}, 0.5, 1.0, lambda _: "0.750")
    assert 'class="ends" style="left:20.00%;width:60.00%"' in html
    assert 'class="dot" style="left:50.00%"' in html


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("127.0.0.1", ""),
        ("localhost", ""),
        ("::1", ""),
        ("0.0.0.0", "0.0.0.0"),
        ("192.168.1.7", "192.168.1.7"),
        ("host.example", "host.example"),
        (None, "all addresses"),
    ],
)
def test_another_address_than_this_machines_is_said(monkeypatch, address, shown):
    monkeypatch.setattr("streamlit.get_option", lambda key: address)
    assert network_address() == shown


def test_a_page_is_cut_at_its_heads():
    parts = sections_of("# Title\nlead\n## One\n\na\n### Sub\nb\n## Two\nc\n")
    assert parts == {"": "# Title\nlead\n", "One": "a\n### Sub\nb", "Two": "c"}


def test_a_page_shows_pictures_of_its_own_folder_only(monkeypatch, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "in.png").write_bytes(b"inside")
    (tmp_path / "out.png").write_bytes(b"outside")
    shown, texts = [], []
    monkeypatch.setattr("cxr_page.pages.picture", lambda image, alt: shown.append((image, alt)))
    monkeypatch.setattr("streamlit.markdown", texts.append)
    page = "a\n\n![one](in.png)\n\n![two](../out.png)\n\n![three](http://elsewhere/x.png)\n\nb ![four](http://y) c"
    show_markdown(page, tmp_path / "run")
    assert shown == [(b"inside", "one")]
    assert "".join(texts).count("is missing") == 2
    assert r"\![four]" in texts[-1]
