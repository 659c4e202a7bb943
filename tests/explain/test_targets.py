import mlx.core as mx
import numpy as np
import pytest

from mlx_cxr.core.labels import LABELS
from mlx_cxr.explain.targets import LabelLogit, as_targets

LOGITS = np.random.default_rng(0).normal(size=(3, 14)).astype(np.float32)


def test_a_findings_target_scores_its_own_column():
    target = LabelLogit("Edema")
    np.testing.assert_array_equal(np.array(target(mx.array(LOGITS))), LOGITS[:, 3])
    assert str(target) == "Edema"


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
    with pytest.raises(TypeError, match="pass a list"):
        as_targets("Edema")
    with pytest.raises(TypeError, match="neither"):
        as_targets([3])
    with pytest.raises(ValueError, match="no targets"):
        as_targets([])
