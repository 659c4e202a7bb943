import mlx.core as mx
import numpy as np
import pytest

from mlx_cxr.core.labels import LABELS
from mlx_cxr.explain.targets import AbsenceLogit, LabelDifference, LabelLogit, LabelProbability, as_targets

LOGITS = np.random.default_rng(0).normal(size=(3, 14)).astype(np.float32)


@pytest.mark.parametrize(
    ("target", "expected", "name"),
    [
        (LabelLogit("Edema"), LOGITS[:, 3], "Edema"),
        (LabelProbability("Edema", 2.0), 1 / (1 + np.exp(-LOGITS[:, 3] / 2)), "p(Edema)"),
        (LabelDifference("Pneumonia", "Edema"), LOGITS[:, 11] - LOGITS[:, 3], "Pneumonia - Edema"),
        (AbsenceLogit("Pneumothorax"), -LOGITS[:, 12], "no Pneumothorax"),
    ],
)
def test_each_target_scores_its_own_column(target, expected, name):
    np.testing.assert_allclose(np.array(target(mx.array(LOGITS))), expected, rtol=1e-6)
    assert str(target) == name


def test_names_become_logits_and_callables_stay():
    def largest(logits: mx.array) -> mx.array:
        return mx.max(logits, axis=1)

    assert as_targets(["Edema", largest]) == (LabelLogit("Edema"), largest)
    assert [str(target) for target in as_targets(LABELS)] == list(LABELS)


def test_bad_targets_are_named():
    with pytest.raises(KeyError, match="Oedema"):
        LabelLogit("Oedema")
    with pytest.raises(KeyError, match="Oedema"):
        as_targets(["Edema", "Oedema"])
    with pytest.raises(ValueError, match="temperature is 0"):
        LabelProbability("Edema", 0.0)
    with pytest.raises(ValueError, match="temperature is nan"):
        LabelProbability("Edema", float("nan"))
    with pytest.raises(ValueError, match="against itself"):
        LabelDifference("Edema", "Edema")
    with pytest.raises(TypeError, match="pass a list"):
        as_targets("Edema")
    with pytest.raises(TypeError, match="neither"):
        as_targets([3])
    with pytest.raises(ValueError, match="no targets"):
        as_targets([])
