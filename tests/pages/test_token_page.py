import html
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from scipy.stats import pearsonr, spearmanr

from mlx_cxr.core.files import read_record
from mlx_cxr.explain.word_scores import (
    LOWERS,
    RAISES,
    SMALLEST_SCALE,
    TextExplanation,
    WordScores,
    linear_correlation,
    rank_correlation,
    shade,
    shared_scale,
    signed,
)
from mlx_cxr.pages.token_page import html_page, index_page, write_explanations
from mlx_cxr.pages.token_picture import draw_picture

WORDS = ("Findings:", "No", "pleural", "effusion.", "Impression:", "Edema.")
SHARES = np.array([0.0, -1.5, 0.25, 0.5, -0.01, 2.0])


def scores(words=WORDS, shares=SHARES, **changes):
    values = {"gradient_x_input": np.zeros(len(words)), "left_out": np.asarray(shares) * 2}
    values |= {"logit": float(np.sum(shares)) - 0.5, "blank": -0.5}
    return WordScores(tuple(words), (0, 4), np.asarray(shares), **(values | changes))


def explanation(study="s1", finding="Edema", of=None, **changes):
    values = {"probability": 0.83, "threshold": 0.41, "label": "present", "reads": "findings", "synthetic": True}
    return TextExplanation(study, finding, of or scores(), **(values | changes))


def test_a_call_that_is_not_made_says_why(tmp_path):
    why = "too few examples with <Edema> on validation (3; 9 needed at alpha 0.1)"
    plain, abstains = explanation(), explanation(abstention=why)
    assert f"The teacher abstains: {why}." in Page(html_page(abstains, 3.0)).text
    assert "<Edema>" not in html_page(abstains, 3.0)
    assert "abstains" not in html_page(plain, 3.0)
    before, after = draw_picture(plain, 3.0), draw_picture(abstains, 3.0)
    assert after.height == before.height + 24
    ink = np.asarray(after.crop((0, 108, after.width, 130)))
    assert np.all(ink == (150, 75, 0), axis=-1).sum() > 100
    folder = write_explanations(tmp_path / "e", "teacher", [abstains], "rule", True, {})
    (saved,) = read_record(folder / "explanations.json")["explanations"]
    assert saved["abstention"] == why


def relative_luminance(colour):
    """WCAG 2."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.words = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "span" and "title" in dict(attributes):
            self.words.append(dict(attributes))

    def handle_data(self, data):
        self.text += data


def test_the_parts_add_up_to_the_logit():
    got = scores(image=0.75, logit=1.0)
    assert got.report == pytest.approx(1.24)
    assert got.left_over == pytest.approx(1.0 + 0.5 - 0.75 - 1.24)
    account = explanation(of=got, reads="film + findings").account()
    assert sum(value for _, value in account[:-1]) == pytest.approx(account[-1][1])
    assert [name for name, _ in account][1] == "film"
    assert "film" not in " ".join(name for name, _ in explanation().account())


def test_agreement_is_spearmans_and_pearsons():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30))
    b[:10] = b[0]
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert linear_correlation(a, b) == pytest.approx(pearsonr(a, b).statistic)
    cubed = scores(left_out=SHARES**3).agreement()
    assert cubed["integrated_gradients"] == pytest.approx(
        {"rank": 1.0, "linear": pearsonr(SHARES, SHARES**3).statistic}
    )
    assert all(math.isnan(value) for value in cubed["gradient_x_input"].values())


@pytest.mark.parametrize(("a", "b"), [([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [0, 0, 0])])
def test_agreement_is_undefined_for_few_words_or_constant_scores(a, b):
    assert math.isnan(rank_correlation(a, b))
    assert math.isnan(linear_correlation(a, b))


@pytest.mark.parametrize(
    ("changes", "trusted"),
    [
        ({}, True),
        ({"logit": 1.24 - 0.5 + 0.06}, True),
        ({"logit": 1.24 - 0.5 + 0.07}, False),
        ({"left_out": -SHARES}, False),
        ({"left_out": np.zeros(6)}, False),
    ],
)
def test_contributions_that_fail_the_check_give_way_to_leave_one_out(changes, trusted):
    """At most 5 % of the effect left over, and a linear correlation of at least 0.5."""
    got = scores(**changes)
    assert got.trusted is trusted
    np.testing.assert_array_equal(got.shown, got.contributions if trusted else got.left_out)
    e = explanation(of=got)
    assert ("failed the check" in html_page(e, 2.0)) is not trusted
    assert e.plain()["colours"] == ("integrated_gradients" if trusted else "leave_one_out")


def test_the_picture_shows_what_the_page_shows():
    e = explanation(of=scores(left_out=-SHARES))
    assert has_colour(report_box(e, 2.0), LOWERS)
    assert not has_colour(report_box(e, 2.0), RAISES)
    assert Page(html_page(e, 2.0)).words[5]["style"] == "background:#56b4e9"


@pytest.mark.parametrize(
    ("top", "scale"),
    [(1e-6, 0.5), (0.49, 0.5), (0.51, 0.7), (1.0, 1.0), (1.01, 1.5), (2.2, 3.0), (7.5, 10.0), (12, 15)],
)
def test_the_scale_is_round_and_has_a_floor(top, scale):
    assert shared_scale([np.full(5, -top), np.zeros(0), np.full(9, top)]) == pytest.approx(scale)


def test_the_scale_is_the_99th_percentile_over_all_pages():
    pages = [np.full(500, 1.0), np.full(499, -1.0), np.array([50.0])]
    assert shared_scale(pages) == 1.0
    assert shared_scale([]) == SMALLEST_SCALE


def test_what_moved_nothing_does_not_glow():
    """A report of tiny contributions stays near white, though the largest of them is its largest."""
    shares = np.array([1e-3, -2e-3, 4e-3])
    scale = shared_scale([shares])
    assert max(255 - min(shade(value, scale)) for value in shares) <= 2
    assert shade(0.0, 1.0) == (255, 255, 255)
    assert (shade(9.0, 1.0), shade(-9.0, 1.0)) == (RAISES, LOWERS)


def test_colours_deepen_with_the_contribution_and_text_stays_readable_on_them():
    for sign in (1, -1):
        luminances = [relative_luminance(shade(sign * v, 1.0)) for v in np.linspace(0, 1, 9)]
        assert (np.diff(luminances) < 0).all()
        assert (min(luminances) + 0.05) / (relative_luminance((24, 26, 30)) + 0.05) > 4.5
    assert abs(relative_luminance(RAISES) - relative_luminance(LOWERS)) < 0.05


@pytest.mark.parametrize(("value", "text"), [(1.234, "+1.23"), (-0.5, "−0.50"), (0.001, "0.00"), (-0.001, "0.00")])
def test_figures_carry_their_sign(value, text):
    assert signed(value) == text


@pytest.mark.parametrize(
    ("p", "threshold", "label", "text"),
    [
        (0.831, 0.41, "present", "calibrated p = 0.83 ≥ threshold 0.41   ·   report label: present"),
        (0.4096, 0.4099, "", "calibrated p = 0.4096 < threshold 0.4099"),
        (0.5, math.nan, "", "calibrated p = 0.50 (no threshold)"),
    ],
)
def test_the_line_says_probability_threshold_and_label(p, threshold, label, text):
    assert explanation(probability=p, threshold=threshold, label=label).summary() == text


def test_a_page_gives_each_word_its_colour_and_figures():
    page = Page(html_page(explanation(), 2.0))
    assert len(page.words) == len(WORDS)
    assert [word["title"].split(" ")[0] for word in page.words] == ["0.00", "−1.50", "+0.25", "+0.50", "−0.01", "+2.00"]
    assert page.words[1]["title"].endswith("leaving it out: −3.00")
    assert page.words[5]["style"] == "background:#e69f00"
    assert page.words[0]["style"] == "background:#ffffff"
    for text in (
        "p = 0.83",
        "−2.0 and less",
        "rank correlation 1.00, linear 1.00 over 6 words",
        "not for clinical use",
        "Synthetic",
    ):
        assert text in page.text
    assert "Synthetic" not in Page(html_page(explanation(synthetic=False), 2.0)).text
    assert page.tags.count("br") == 2  # one of them opens the second section


def test_a_page_is_complete_in_itself():
    for text in (html_page(explanation(), 2.0), index_page("r", [(explanation(), "a")], 2.0, ["rule"], True)):
        page = Page(text)
        assert not {"script", "img", "link", "iframe", "object", "base", "form"} & set(page.tags)
        assert not re.search(r"https?:|//|@import|url\(", text)
        assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
        assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_what_stands_in_a_report_is_shown_as_text():
    nasty = ("<script>alert(1)</script>", '"><img/src=x>', "a&b", "'onmouseover='x", "edema", "no")
    e = explanation(study="<b>", finding="Edema", of=scores(words=nasty), reads="<i>", label="<u>")
    page = Page(html_page(e, 2.0))
    assert not {"script", "img", "b", "i", "u"} & set(page.tags)
    assert all(word in page.text for word in nasty)
    assert html.escape(nasty[0]) in html_page(e, 2.0)
    index = Page(index_page("<b>", [(e, "f")], 2.0, ["<i>"], False))
    assert not {"b", "i", "u"} & set(index.tags)


def test_what_was_cut_is_said():
    assert "no room for 12 more tokens" in html_page(explanation(cut=12), 2.0)
    assert "no room" not in html_page(explanation(), 2.0)


def pixels(e, scale):
    return np.asarray(draw_picture(e, scale)).astype(int)


def has_colour(picture, colour, count=200):
    return (np.abs(picture - colour).sum(axis=-1) <= 3).sum() > count


def report_box(e, scale):
    """The picture's part with the words: all above the legend."""
    picture = pixels(e, scale)
    return picture[119:206]


def test_the_picture_colours_words_on_the_shared_scale():
    strong = report_box(explanation(), 2.0)
    assert has_colour(strong, RAISES)
    assert has_colour(strong, shade(-1.5, 2.0))
    weak = report_box(explanation(of=scores(shares=SHARES / 1000)), 2.0)
    assert (weak.max(axis=-1) - weak.min(axis=-1)).max() <= 8


def test_the_picture_grows_with_the_report_and_keeps_its_margins():
    words = ("opacification",) * 300 + ("x" * 5000,) + ("no",) * 20
    long = scores(words=words, shares=np.tile([3.0, -3.0, 0.0], 107), left_out=np.zeros(321))
    picture = pixels(explanation(of=long, study="s" * 400), 2.0)
    assert picture.shape[0] > 1000 > pixels(explanation(), 2.0).shape[0]
    assert (picture[:, -31:] == 255).all()
    assert (picture[:, :31] == 255).all()


def test_files_are_written_linked_and_replaced(tmp_path):
    nothing = scores(shares=np.zeros(6), left_out=np.ones(6))
    both = [explanation(), explanation("s2", "Lung Lesion", nothing)]
    folder = write_explanations(tmp_path / "text", "run", both, "a rule", True, {"stage": "x"})
    names = {"s1_Edema.html", "s1_Edema.png", "s2_Lung_Lesion.html", "s2_Lung_Lesion.png"}
    assert {path.name for path in folder.iterdir()} == names | {"index.html", "explanations.json"}
    links = {value for name, value in Page((folder / "index.html").read_text("utf-8")).attributes if name == "href"}
    assert links == names
    with Image.open(folder / "s1_Edema.png") as picture:
        assert picture.text["Warning"] == "Research only, not for clinical use"

    saved = read_record(folder / "explanations.json")
    assert saved["scale"] == 2.0
    assert saved["agreement"]["integrated_gradients"]["linear"] == {
        **{"explanations": 1, "median": pytest.approx(1), "lowest": pytest.approx(1), "highest": pytest.approx(1)}
    }
    assert saved["agreement"]["gradient_x_input"]["rank"]["explanations"] == 0
    first = saved["explanations"][0]
    assert first["scores"]["integrated_gradients"] == SHARES.tolist()
    assert first["blank"] + first["film"] + first["report"] + first["left_over"] == pytest.approx(first["logit"])
    assert saved["explanations"][1]["agreement"]["integrated_gradients"] == {"rank": None, "linear": None}

    write_explanations(folder, "run", both[:1], "a rule", True, {})
    assert not list(folder.glob("s2*"))
    assert (folder / "s1_Edema.html").exists()


def test_studies_whose_names_look_alike_get_files_of_their_own(tmp_path):
    folder = write_explanations(tmp_path, "run", [explanation("a/b"), explanation("a b")], "", True, {})
    assert len(list(folder.glob("*.png"))) == 2


def test_scores_go_with_words():
    with pytest.raises(ValueError, match="6 words"):
        replace(scores(), left_out=np.zeros(5))


def test_where_nothing_is_to_be_shown_the_index_says_so(tmp_path):
    write_explanations(tmp_path, "run", [explanation()], "a rule", True, {})
    write_explanations(tmp_path, "run", [], "a rule", False, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["explanations.json", "index.html"]
    page = Page((tmp_path / "index.html").read_text("utf-8"))
    assert "There is none." in page.text
    assert "Synthetic" not in page.text
    assert read_record(tmp_path / "explanations.json")["explanations"] == []
