import csv

import numpy as np
import pandas as pd
import pytest
from chest_views import TEST_SEED, drawn_images, drawn_part
from PIL import Image, ImageOps
from prepared_images import apply

from mlx_cxr.core.config import load_config
from mlx_cxr.core.files import read_record
from mlx_cxr.core.labels import LABELS
from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.manifest import load_manifest
from mlx_cxr.data.pixel_store import PixelStore
from mlx_cxr.data.source_rows import TEXT_COLUMNS
from mlx_cxr.prepare_images import main, run

CONFIG = """
name: small
data: {{source: csv, root: {root}, work_dir: {root}/work, csv: {{table: unused.csv}}}}
pixels: {{size: 32, workers: 1}}
"""


@pytest.fixture
def root(tmp_path):
    """Six images, and the manifest and configuration that go with them."""
    (tmp_path / "work").mkdir()
    rows = []
    for number in range(6):
        image = np.linspace(10, 200, 60 * 40).reshape(60, 40) + number * 5
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / f"f{number}.png")
        rows.append({"image_id": f"00{number}", "path": f"f{number}.png"})
    frame = pd.DataFrame(rows).assign(patient_id="p", study_id="s", split="train")
    frame = frame.reindex(columns=[*TEXT_COLUMNS, *LABELS], fill_value="")
    frame.to_csv(tmp_path / "work" / "manifest.csv", index=False)
    (tmp_path / "config.yaml").write_text(CONFIG.format(root=tmp_path))
    return tmp_path


def table(path):
    with path.open(newline="") as data:
        return list(csv.DictReader(data))


def test_the_store_opens_with_what_the_next_stage_has(root, capsys):
    config = load_config(root / "config.yaml")
    assert run(config) == root / "work" / "images_32.npy"
    manifest = load_manifest(config.manifest_path)
    store = PixelStore.open(config.pixels_path, manifest, Transform.of(config))
    row = store.rows(["004"])[0]
    assert row == 4
    image = np.asarray(Image.open(root / "f4.png"))
    assert (store.images[row] == apply(image, Transform(32))).all()
    # Ramps are no chest films, and are listed as such.
    files = {"images_32.json", "images_32.npy", "images_32_objections.csv", "manifest.csv"}
    assert {path.name for path in (root / "work").iterdir()} == files


def test_command_line_options(root, caplog):
    caplog.set_level("INFO")
    config = ["--config", str(root / "config.yaml")]
    main([*config, "--set", "pixels.size=48", "--set", "pixels.fit=center_crop", "--workers", "2"])
    assert np.load(root / "work" / "images_48.npy").shape == (6, 48, 48)
    assert read_record(root / "work" / "images_48.json")["transform"]["fit"] == "center_crop"
    assert "6 of 6 films, center_crop-48-v1-window; 6 decoded" in caplog.text
    assert "films/s" in caplog.text


def test_a_second_call_says_that_nothing_changed(root, caplog):
    config = load_config(root / "config.yaml")
    run(config)
    caplog.set_level("INFO")
    run(config)
    assert "up to date" in caplog.text
    assert " decoded" not in caplog.text
    caplog.clear()
    main(["--config", str(root / "config.yaml"), "--rebuild"])
    assert "6 decoded" in caplog.text


def test_a_store_in_shards_by_two_calls(root, caplog):
    caplog.set_level("INFO")
    (root / "f5.png").write_bytes(b"")
    config = ["--config", str(root / "config.yaml"), "--set", "pixels.shard_films=2"]
    main([*config, "--shard", "2/2"])
    assert "images_32.npy: 2 of 2 films, letterbox-32-v1-window; 2 decoded" in caplog.text
    assert "still to be made: images_32-1-of-3.npy, images_32-3-of-3.npy" in caplog.text
    assert not (root / "work" / "images_32_unreadable.csv").exists()
    caplog.clear()
    main([*config, "--shard", "1/2"])
    assert "5 of 6 films, letterbox-32-v1-window; 4 decoded" in caplog.text
    assert [row["image_id"] for row in table(root / "work" / "images_32_unreadable.csv")] == ["005"]
    plain = load_config(root / "config.yaml")
    store = PixelStore.open(plain.pixels_path, load_manifest(plain.manifest_path), Transform.of(plain))
    image = np.asarray(Image.open(root / "f3.png"))
    assert (store.images[store.rows(["003"])] == apply(image, Transform(32))).all()


@pytest.mark.parametrize("share", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_share_that_is_none(root, capsys, share):
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(root / "config.yaml"), "--shard", share])
    assert ended.value.code == 2
    assert f"{share!r} is no share; give K/N" in capsys.readouterr().err


def test_bad_and_odd_images_are_listed(root, caplog):
    config = load_config(root / "config.yaml")
    good = (root / "f1.png").read_bytes()
    (root / "f1.png").write_bytes(good[:100])
    image = np.asarray(Image.open(root / "f2.png"))
    Image.fromarray(image.astype(np.uint16) * 16).save(root / "f2.png")
    negative = 255 - np.pad(np.full((40, 40), 200, np.uint8), ((20, 0), (10, 10)))
    Image.fromarray(negative).save(root / "f3.png")
    run(config)
    (bad,) = table(root / "work" / "images_32_unreadable.csv")
    assert (bad["image_id"], bad["path"]) == ("001", "f1.png")
    assert "cut short" in bad["reason"]
    notes = table(root / "work" / "images_32_notes.csv")
    assert {"image_id": "002", "path": "f2.png", "note": "16-bit"} in notes
    assert {"image_id": "003", "path": "f3.png", "note": "looks inverted"} in notes
    assert "1 film(s) could not be used" in caplog.text
    assert "f1.png: damaged or cut short" in caplog.text
    assert "look like negatives" in caplog.text
    # The lists come back with an up-to-date store, and go when there is nothing to list.
    (root / "work" / "images_32_unreadable.csv").unlink()
    run(config)
    assert len(table(root / "work" / "images_32_unreadable.csv")) == 1
    (root / "f1.png").write_bytes(good)
    run(config)
    assert not (root / "work" / "images_32_unreadable.csv").exists()


def test_what_is_no_frontal_chest_film_is_listed_and_kept(root, caplog):
    config = load_config(root / "config.yaml")
    chest = drawn_images(TEST_SEED, patients=5)
    for number, image in enumerate((*chest["PA"][:3], chest["LATERAL"][0], ImageOps.invert(chest["AP"][0]))):
        image.save(root / f"f{number}.png")
    drawn_part("hand", np.random.default_rng(0)).save(root / "f5.png")
    run(config)
    listed = {row["path"]: row["objection"] for row in table(root / "work" / "images_32_objections.csv")}
    assert listed == {
        "f3.png": "looks like a lateral view",
        "f4.png": "looks inverted (like a negative)",
        "f5.png": "does not look like a frontal chest film",
    }
    assert "3 of 6 film(s) may be no upright frontal chest films; none is left out for that" in caplog.text
    assert np.load(root / "work" / "images_32.npy")[3:].std(axis=(1, 2)).min() > 5
    for number in (3, 4, 5):
        chest["PA"][number].save(root / f"f{number}.png")
    run(config)
    assert not (root / "work" / "images_32_objections.csv").exists()


def test_a_wrong_root_ends_with_status_2_and_the_first_reasons(root, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(root / "config.yaml"), "--set", f"data.root={root}/nowhere"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("error: 6 of 6 films cannot be used")
    assert f"{root}/nowhere/f0.png: no such file" in said
    assert "data.root" in said


def test_a_manifest_of_reports_alone(root, capsys):
    manifest = root / "work" / "manifest.csv"
    manifest.write_text(
        "".join(line.replace(f"f{n - 1}.png", "") + "\n" for n, line in enumerate(manifest.read_text().splitlines()))
    )
    assert load_manifest(manifest).text_only
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(root / "config.yaml")])
    assert ended.value.code == 2
    assert "manifest.csv has no films to prepare: it is one of reports alone" in capsys.readouterr().err
    assert {path.name for path in (root / "work").iterdir()} == {"manifest.csv"}


def test_no_manifest(root, capsys):
    (root / "work" / "manifest.csv").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(root / "config.yaml")])
    assert ended.value.code == 2
    assert "run build_manifest" in capsys.readouterr().err
