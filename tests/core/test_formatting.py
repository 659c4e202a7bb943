import math

import pytest

from mlx_cxr.core.formatting import footer, interval_text, notice_lines, number


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.81249, "0.812"), (1, "1.000"), (-0.05, "-0.050"), (math.nan, "–"), (None, "–")],
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize("nothing", [math.nan, None])
def test_intervals_as_computed_and_as_read_from_json(nothing):
    assert interval_text({"value": 0.8, "low": 0.75, "high": 0.9}) == "0.800 [0.750, 0.900]"
    assert interval_text({"value": 0.8, "low": nothing, "high": nothing}, 2) == "0.80"
    some = {"value": 0.8, "low": 0.75, "high": 0.9, "replicates": 1_958, "drawn": 2_000}
    assert interval_text(some) == "0.800 [0.750, 0.900; 1,958 of 2,000 resamples]"
    assert interval_text({**some, "replicates": 2_000}) == "0.800 [0.750, 0.900]"
    assert interval_text({"value": nothing, "low": 0.1, "high": 0.2}) == "–"


def test_every_page_and_picture_says_what_it_is():
    assert footer(False) == "Research only, not for clinical use."
    assert footer(True) == "Synthetic cohort. Research only, not for clinical use."
    assert footer(True, own_image=True) == "Model trained on a synthetic cohort. Research only, not for clinical use."
    assert footer(False, own_image=True) == footer(False)
    assert len(notice_lines(False)) == 2
    assert "Synthetic cohort" in "".join(notice_lines(True))
    assert all(line.startswith(">") for line in notice_lines(True)[:-1])
