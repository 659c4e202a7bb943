"""The manifest of a very large cohort: time and memory grow with its images and no faster; see `whole_mimic`."""

import json
import subprocess
import sys

import pytest
from whole_mimic import draw_studies, write_whole_mimic

from mlx_cxr.data.manifest import load_manifest

BUILD = """
import resource, sys, time
import mlx_cxr.build_manifest as stage
begun = time.process_time()
stage.main(sys.argv[1:])
kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
print(time.process_time() - begun, kilobytes)
"""


def test_it_is_as_large_as_mimic():
    studies = draw_studies()
    assert studies.images.sum() == 377_110
    assert len(set(studies.study)) == 227_835
    assert len(set(studies.patient)) == 65_379
    assert studies.images.min() == 1
    pairs = set(zip(studies.patient.tolist(), studies.split.tolist(), strict=True))
    assert len(pairs) == 65_379


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(images, processor seconds, peak kilobytes, manifest) of two cohorts, one twice as large as the other."""
    results = []
    for images in (6_000, 12_000):
        root = tmp_path_factory.mktemp(f"of{images}")
        write_whole_mimic(root / "raw", images)
        config = root / "c.yaml"
        config.write_text(f"name: t\ndata: {{root: {root / 'raw'}, work_dir: {root / 'work'}, views: null}}\n")
        command = [sys.executable, "-c", BUILD, "--config", str(config), "--workers", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, kilobytes = map(float, done.stdout.split()[-2:])
        results.append((images, seconds, kilobytes, root / "work" / "manifest.csv"))
    return results


def test_twice_the_images_take_twice_the_time(built):
    (_, once, _, _), (_, twice, _, _) = built
    assert twice < 2.6 * once


def test_memory_is_bounded_by_image(built):
    (fewer, _, low, _), (more, _, high, _) = built
    # 2.4 KB on 377,110 images: a peak of 1.0 GB.
    assert (high - low) / (more - fewer) < 8.0


def test_nothing_is_lost(built):
    images, _, _, path = built[1]
    manifest = load_manifest(path)
    assert abs(len(manifest) - images) < 3
    summary = json.loads(path.with_name("manifest_summary.json").read_text())
    studies = manifest.frame.drop_duplicates("study_id")
    assert summary["dropped"] == {}
    assert summary["reports"]["found"] == len(studies)
    assert summary["reports"]["missing"] == 0
    # Each report names its study: none is at another's image.
    own = manifest.frame["text"].str.extract(r"This is film (\d+) of (\d+)\.")
    told = own[0].notna()
    assert told.mean() > 0.9
    assert (own[0][told] == manifest.frame["study_id"][told]).all()
    assert (own[1][told] == manifest.frame["patient_id"][told]).all()
