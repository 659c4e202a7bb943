import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from mlx_cxr.pages import figures


def test_notes_stand_in_their_corner_and_do_not_cover_each_other():
    figure = figures.page("title", "subtitle")
    ax = figures.finding_panels(figure, "x", "y")[0]
    for corner in ("lower right", "upper left"):
        for line in range(3):
            figures.note(ax, "AUC 0.123", corner, line=line)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    panel = ax.get_window_extent()
    assert all(panel.contains(box.x0, box.y0) and panel.contains(box.x1, box.y1) for box in boxes)
    assert boxes[0].x1 > panel.x0 + 0.9 * panel.width
    assert boxes[3].x0 < panel.x0 + 0.1 * panel.width
    assert boxes[0].y0 < boxes[1].y0
    assert boxes[3].y0 > boxes[4].y0


def test_a_panel_of_one_class_says_so_and_is_not_to_be_drawn_in():
    ax = Figure().add_subplot()
    assert figures.title_panel(ax, "Edema", np.array([0.0, 1.0, 1.0]))
    assert ax.get_title() == "Edema\n2 of 3"
    assert not ax.texts
    assert not figures.title_panel(ax, "Edema", np.array([1.0, 1.0]))
    assert ax.texts[0].get_text() == "one class only:\nno curve"
    assert not figures.title_panel(ax, "Edema", np.array([]))


def test_the_footer_is_drawn_and_in_the_file(tmp_path):
    figure = figures.page("title", "subtitle")
    path = figures.save(figure, tmp_path / "a.png", synthetic=False)
    with Image.open(path) as picture:
        assert picture.size == (1500, 1020)
        assert picture.text["Warning"] == "Research only, not for clinical use."
    assert figure.texts[-1].get_text() == "Research only, not for clinical use."
