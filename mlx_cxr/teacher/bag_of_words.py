"""A bag of words: TF-IDF of a report's words and pairs of words, and a logistic regression per finding.

It is the control of every teacher that reads: what a language model of a billion weights adds to the counting of
words (Wang and Manning, ACL 2012) is what it is worth here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import logit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from mlx_cxr.core.files import RecordError, atomic_path
from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation.metrics import both_classes, macro_auc, roc_auc_per_label

STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""Inverse strengths of the L2 penalty, scikit-learn's C, among which validation chooses; 1 is its default."""
MOST_TERMS = 50_000
_SETTINGS = {"lowercase": True, "ngram_range": (1, 2), "min_df": 2, "max_features": MOST_TERMS}


@dataclass(frozen=True)
class BagOfWords:
    """The fitted model, of V terms.

    Attributes:
        terms: (V,) str.
        idf: float64 (V,).
        weights: float64 (V, 14); zeros for a label that training has only one class of.
        biases: float64 (14,).
        strength: of `STRENGTHS`, that validation chose.
    """

    terms: np.ndarray
    idf: np.ndarray
    weights: np.ndarray
    biases: np.ndarray
    strength: float

    @classmethod
    def fit(
        cls, texts: Sequence[str], targets: np.ndarray, validation_texts: Sequence[str], validation_targets: np.ndarray
    ) -> BagOfWords:
        """Fit on training studies, with the strength of the highest macro ROC-AUC on validation.

        Args:
            texts, validation_texts: of N and M reports.
            targets, validation_targets: (N, 14) and (M, 14), each from 0 to 1 or NaN (left out); 0.5 counts as present.

        Raises:
            ValueError: no term is in two of the texts.
        """
        vectorizer = TfidfVectorizer(**_SETTINGS)
        counts = vectorizer.fit_transform(texts)
        terms, idf = vectorizer.get_feature_names_out(), vectorizer.idf_
        best, best_auc = None, -np.inf
        for strength in STRENGTHS:
            weights, biases = _regressions(counts, targets, strength)
            bag = cls(terms.astype(str), idf, weights, biases, strength)
            found = macro_auc(roc_auc_per_label(validation_targets, bag.logits(validation_texts)))
            if best is None or found > best_auc:
                best, best_auc = bag, found
        assert best is not None
        return best

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """float64 (N, 14)."""
        vectorizer = TfidfVectorizer(**_SETTINGS | {"min_df": 1, "max_features": None}, vocabulary=self.terms)
        vectorizer.idf_ = self.idf
        return vectorizer.transform(texts) @ self.weights + self.biases

    def save(self, path: Path) -> None:
        """Write it as `.npz`, of arrays alone, atomically."""
        with atomic_path(path) as temporary:
            np.savez_compressed(temporary, **vars(self))

    @classmethod
    def load(cls, path: Path) -> BagOfWords:
        """Read it back.

        Raises:
            RecordError: it is missing, damaged, or something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            bag = cls(**arrays | {"strength": float(arrays["strength"])})
            if bag.weights.shape != (len(bag.terms), len(LABELS)) or bag.idf.shape != bag.terms.shape:
                raise ValueError(f"shapes {bag.weights.shape} and {bag.idf.shape}")
            return bag
        except Exception as error:  # what damage does to NumPy and zlib
            raise RecordError(
                f"{path} is missing, damaged or no bag of words ({error}); make it again: "
                "python -m mlx_cxr.bag_of_words --overwrite --config …"
            ) from None


def _regressions(counts: csr_matrix, targets: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (V, 14) and biases (14,): a regression per label, or the log-odds of its share where it has one class."""
    weights, biases = np.zeros((counts.shape[1], targets.shape[1])), np.zeros(targets.shape[1])
    for column, there in enumerate(both_classes(np.where(np.isnan(targets), np.nan, targets >= 0.5))):
        kept = ~np.isnan(targets[:, column])
        present = targets[kept, column] >= 0.5
        if there:
            model = LogisticRegression(C=strength, max_iter=1000).fit(counts[kept], present)
            weights[:, column], biases[column] = model.coef_[0], model.intercept_[0]
        else:
            biases[column] = logit((present.sum() + 1) / (kept.sum() + 2))
    return weights, biases
