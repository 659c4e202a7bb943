"""Metadata, training prevalences and drawn findings of the studies that a failure analysis looks at."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mlx_cxr.core.config import Config
from mlx_cxr.core.labels import LABELS, label_index
from mlx_cxr.data.manifest import Manifest
from mlx_cxr.data.masks import has_masks, mask_files, mask_folder
from mlx_cxr.evaluation.scored_runs import ScoredRun
from mlx_cxr.evaluation.shortcuts import study_metadata
from mlx_cxr.evaluation.subgroups import age_bands


def study_table(manifest: Manifest, student: ScoredRun) -> pd.DataFrame:
    """Metadata of each test study, in the order of the student's: view, sex, age and age band."""
    wanted = manifest.frame[manifest.frame["study_id"].isin(student.test.study_ids)]
    known = study_metadata(wanted).set_index(wanted["study_id"].drop_duplicates().to_numpy())
    known = known.loc[student.test.study_ids].reset_index(drop=True)
    bands = age_bands(known["age"].to_numpy())
    return pd.DataFrame(
        {"view": student.test.view_groups(), "sex": known["sex"], "age": known["age"], "age_band": bands}
    )


def training_shares(manifest: Manifest) -> np.ndarray:
    """(14,) shares of the training studies that have each finding; 0 without training studies."""
    first = ~manifest.frame["study_id"].duplicated().to_numpy() & (manifest.frame["split"] == "train").to_numpy()
    present = manifest.raw_labels[first] == 1
    return present.mean(axis=0) if len(present) else np.zeros(len(LABELS))


def drawn_findings(config: Config, images: list[list[str]]) -> np.ndarray | None:
    """Findings that show in the images of each study, by the masks of the synthetic cohort.

    Args:
        config: of which `data` is used.
        images: of each of N studies, the paths of its images.

    Returns:
        float64 (N, 14), 1 or 0; No Finding is 1 where nothing but devices shows. None for other cohorts, whose masks
        need not be complete.
    """
    if not (config.data.synthetic and has_masks(config.data.root)):
        return None
    drawn = np.zeros((len(images), len(LABELS)))
    for row, paths in enumerate(images):
        for path in paths:
            for mask in mask_files(mask_folder(config.data.root, path)):
                drawn[row, label_index(mask.stem.replace("_", " "))] = 1
    nothing, devices = label_index("No Finding"), label_index("Support Devices")
    drawn[:, nothing] = ~np.delete(drawn, (nothing, devices), axis=1).any(axis=1)
    return drawn
