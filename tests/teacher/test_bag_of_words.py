"""The bag of words against scikit-learn's own pipeline, and what it does with odd labels and files."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline

from mlx_cxr.core.files import RecordError
from mlx_cxr.core.labels import LABELS
from mlx_cxr.teacher.bag_of_words import STRENGTHS, BagOfWords

WORDS = ("heart", "lungs", "clear", "no", "mild", "large", "left", "right", "stable", "effusion", "edema", "of", "the")


def reports(count, seed):
    """Texts at random, and labels: the first says 'no effusion' from 'effusion', the second is a word or two."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(6, 20))) for _ in range(count)]
    targets = np.zeros((count, len(LABELS)))
    targets[:, 0] = ["effusion" in text and "no effusion" not in text for text in texts]
    targets[:, 1] = ["edema" in text for text in texts]
    noisy = rng.random(count) < 0.1
    targets[noisy, 1] = 1 - targets[noisy, 1]
    targets[:, 2] = rng.random(count) < 0.3
    return texts, targets


@pytest.fixture(scope="module")
def fitted():
    return BagOfWords.fit(*reports(300, 0), *reports(100, 1))


def test_its_logits_are_those_of_scikit_learn(fitted):
    texts, targets = reports(300, 0)
    new = [*reports(50, 2)[0], "words that training never had", ""]
    for column in (0, 1, 2):
        pipeline = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), min_df=2), LogisticRegression(C=fitted.strength, max_iter=1000)
        ).fit(texts, targets[:, column])
        assert fitted.logits(new)[:, column] == pytest.approx(pipeline.decision_function(new), abs=1e-6)
    # A label that training has one class of: the log-odds of its share, with one more of each.
    assert fitted.logits(new)[:, 5] == pytest.approx(np.log(1 / 301))
    assert not fitted.weights[:, 5].any()


def test_pairs_of_words_tell_negations(fitted):
    texts, targets = reports(400, 3)
    assert roc_auc_score(targets[:, 0], fitted.logits(texts)[:, 0]) > 0.95


def test_validation_chooses_the_strength(fitted):
    texts, targets = reports(300, 0)
    held_out, held_targets = reports(100, 1)
    found = {}
    for strength in STRENGTHS:
        pipeline = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), min_df=2), LogisticRegression(C=strength, max_iter=1000)
        )
        found[strength] = np.mean(
            [
                roc_auc_score(held_targets[:, k], pipeline.fit(texts, targets[:, k]).decision_function(held_out))
                for k in (0, 1, 2)
            ]
        )
    assert fitted.strength == max(found, key=found.get)


def test_labels_that_are_left_out_have_no_influence():
    texts, targets = reports(300, 0)
    masked = targets.copy()
    masked[200:, 1] = np.nan
    validation = reports(100, 1)
    part = BagOfWords.fit(texts, masked, *validation)
    other = masked.copy()
    other[200:, 1] = np.nan
    texts_changed = BagOfWords.fit(texts, np.where(np.isnan(masked), np.nan, masked), *validation)
    assert part.weights[:, 1] == pytest.approx(texts_changed.weights[:, 1])
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2).fit(texts)
    own = LogisticRegression(C=part.strength, max_iter=1000).fit(vectorizer.transform(texts[:200]), targets[:200, 1])
    assert part.weights[:, 1] == pytest.approx(own.coef_[0], abs=1e-6)


def test_it_is_read_back_as_it_was_saved(fitted, tmp_path):
    fitted.save(tmp_path / "bag_of_words.npz")
    again = BagOfWords.load(tmp_path / "bag_of_words.npz")
    texts = reports(20, 4)[0]
    np.testing.assert_array_equal(again.logits(texts), fitted.logits(texts))
    assert again.strength == fitted.strength


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_a_file_that_is_none_is_named(fitted, tmp_path, damage):
    path = tmp_path / "bag_of_words.npz"
    if damage != "missing":
        fitted.save(path)
        path.write_bytes(path.read_bytes()[: 2000 if damage == "cut" else None])
    if damage == "other":
        np.savez(
            path, terms=np.array(["a"]), idf=np.ones(1), weights=np.ones((2, 14)), biases=np.ones(14), strength=1.0
        )
    with pytest.raises(RecordError, match=r"bag_of_words\.npz is missing, damaged or no bag of words .*--overwrite"):
        BagOfWords.load(path)
