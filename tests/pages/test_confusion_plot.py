import numpy as np
from judged_studies import K, judged
from PIL import Image

from mlx_cxr.core.labels import label_index
from mlx_cxr.evaluation.bootstrap import patient_resamples
from mlx_cxr.evaluation.confusions import confusions
from mlx_cxr.pages.confusion_plot import plot_confusions

EDEMA, EFFUSION = label_index("Edema"), label_index("Pleural Effusion")


def found_in(raw, p):
    studies = judged(raw, p)
    return confusions(studies, patient_resamples(studies.patient_ids, 200, 0))


def test_the_matrix_is_written_with_its_warning(tmp_path):
    raw, p = np.zeros((100, K)), np.full((100, K), 0.1)
    raw[:20, EFFUSION] = 1
    p[:8, EDEMA] = p[40:42, EDEMA] = 0.9
    path = plot_confusions(tmp_path / "c.png", found_in(raw, p), "line", True)
    with Image.open(path) as picture:
        assert picture.size == (1500, 1020)
        assert "Synthetic cohort" in picture.text["Warning"]
        with_cell = np.asarray(picture.convert("RGB")).astype(int)
    none = found_in(np.zeros((10, K)), np.full((10, K), 0.1))
    path = plot_confusions(tmp_path / "none.png", none, "line", False)
    with Image.open(path) as picture:
        assert "Synthetic" not in picture.text["Warning"]
        empty = np.asarray(picture.convert("RGB")).astype(int)

    def orange(pixels):
        """Pixels of the matrix (not of the bar beside it) in the colour of a high lift."""
        inside = pixels[110:800, 290:1290]
        return int(((inside[..., 0] - inside[..., 2] > 90) & (inside[..., 0] > 100)).sum())

    assert orange(empty) == 0
    assert orange(with_cell) > 1000, "the planted cell is filled"
