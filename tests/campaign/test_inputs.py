"""A thousand damaged, hostile and odd inputs: an answer or a sentence, soon, in bounded memory, never in silence."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydicom
import pytest
from campaign.chain import ROOT, SHARE, rng
from campaign.forks import calls
from chest_images import chest_image
from dicom_files import dicom_bytes
from mutated_files import mutations
from PIL import Image, ImageFile
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from mlx_cxr import build_manifest
from mlx_cxr.core.config import config_from_plain, load_config
from mlx_cxr.core.config_schema import DataConfig
from mlx_cxr.core.files import read_record
from mlx_cxr.core.labels import LABELS
from mlx_cxr.data.decoding import Transform, decode
from mlx_cxr.data.report_files import read_reports
from mlx_cxr.models.weight_files import read_safetensors

pytestmark = [pytest.mark.campaign, pytest.mark.slow]

SECONDS = 15
"""Longer than an answer may take, on a busy machine."""
TOGETHER = 25
"""Inputs that one process is given, as long as it lives: it takes .4 s to begin."""
Case = tuple[str, bytes]


# Mutations of bytes, for inputs of all kinds.


def _damaged(content: bytes, draw: np.random.Generator, other: bytes) -> bytes:
    at, to = sorted(int(place) for place in draw.integers(0, len(content) + 1, 2))
    way = int(draw.integers(7))
    if way == 0:
        return content[:at]
    if way in (1, 2):
        bad = bytearray(content)
        for place in draw.integers(0, len(bad) if way == 1 else min(len(bad), 600), int(draw.integers(1, 9))):
            bad[place] ^= 1 << int(draw.integers(8))
        return bytes(bad)
    if way == 3:
        return content[:at] + bytes(to - at) + content[to:]
    if way == 4:
        return content[:at] + content[to:]
    if way == 5:
        return content[:to] + content[at:]
    return content[:at] + other[: int(draw.integers(1, len(other) + 1))] + content[at:]


def _many(sound: dict[str, bytes], count: int) -> Iterator[Case]:
    """Damaged copies of sound files in turn."""
    names = list(sound)
    for number in range(count):
        name, draw = names[number % len(names)], rng("input", number, *names)
        yield f"{number}-{name}", _damaged(sound[name], draw, sound[names[int(draw.integers(len(names)))]])


# Images.


def answer_image(path: Path) -> tuple[Any, ...]:
    """(size, mode) of the square, and whether the reference refuses the file."""
    gray = decode(path, Transform(64)).gray
    return (gray.size, gray.mode, reference_refuses(path))


def reference_refuses(path: Path) -> bool:
    """True where the reference decoder, told to be strict, does not read an image to its end."""
    content = path.read_bytes()
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if content[128:132] == b"DICM":
                return pydicom.dcmread(io.BytesIO(content)).pixel_array.size == 0
            with Image.open(io.BytesIO(content)) as image:
                image.load()
    except Exception:
        return True
    return False


def image_cases() -> Iterator[Case]:
    """Damaged files of all types, then sound ones whose headers say what is not so."""
    image = chest_image(3)
    for number, (name, content) in enumerate(mutations(image, seed=14, rounds=5)):
        if number < 340:
            yield name, content
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    for width, height, bits, colours in (
        *((1, 1, 8, 0), (128, 1, 8, 0), (128, 60_000, 8, 0), (2**31 - 1, 2**31 - 1, 8, 0), (0, 0, 8, 0)),
        *((128, 128, 16, 0), (128, 128, 8, 2), (128, 128, 8, 6), (128, 128, 1, 0), (128, 128, 3, 0)),
    ):
        header = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
        yield (
            f"header-{width}x{height}-{bits}-{colours}.png",
            png.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + png.getvalue()[33:],
        )
    elements: dict[str, tuple[Any, ...]] = {
        "Rows": (0, 1, 127, 129, 65_535),
        "Columns": (0, 1, 127, 129, 65_535),
        "BitsStored": (0, 1, 7, 9, 12, 15, 17, 255),
        "HighBit": (0, 3, 8, 15, 16),
        "BitsAllocated": (1, 8, 12, 24, 32, 64),
        "SamplesPerPixel": (0, 2, 3, 4),
        "PixelRepresentation": (1, 2),
        "PhotometricInterpretation": ("", "RGB", "PALETTE COLOR", "X" * 99),
        "NumberOfFrames": ("0", "2", "1000000"),
        "PixelData": (b"", b"\0\0", bytes(10**6)),
        "RescaleSlope": ("0", "1e30", "-1"),
    }
    for key, values in elements.items():
        for number, value in enumerate(values):
            yield f"{key}-{number}.dcm", dicom_bytes(image, bits=16, **{key: value})


# Tables.

TABLE = {"Patient": "patient", "Study": "study", "Image": "image", "Split": "split", "View": "view"}


MUST_REFUSE = (
    "open-quote",
    "twice-a-column",
    "a-cell-more",
    "nan-patient",
    "spread-spellings",
    "outside",
    "two-splits",
)
"""Tables of which no reading of all rows is right."""


def answer_table(path: Path) -> tuple[Any, ...]:
    """(rows read, rows kept, rows named as dropped) of the manifest that is built of a table."""
    source = {"table": str(path), **{role.lower(): role for role in TABLE}}
    data = {"source": "csv", "root": str(path.parent), "work_dir": str(path.parent / "made"), "csv": source}
    for row in range(24):
        (path.parent / f"i{row:03}.png").touch()
    (path.parent.parent / "i006.png").touch()
    build_manifest.run(config_from_plain({"name": "trial", "data": {**data, "views": None}}, path))
    summary = read_record(path.parent / "made" / "manifest_summary.json")
    kept = len(pd.read_csv(path.parent / "made" / "manifest.csv", dtype=str))
    return (summary["images_read"], kept, sum(summary["dropped"].values()))


def _table(rows: int = 24, separator: str = ",") -> str:
    lines = [separator.join([*TABLE, *LABELS[:3]])]
    for row in range(rows):
        cells = [f"p{row // 2:03}", f"s{row:03}", f"i{row:03}.png", ("train", "validate", "test")[row // 2 % 3], "PA"]
        lines.append(separator.join([*cells, "1", "0", "-1"]))
    return "\n".join(lines) + "\n"


def table_cases() -> Iterator[Case]:
    """Damaged tables of all types, then whole ones in forms that people and programs give them."""
    text = _table()
    header, *rows = text.splitlines()
    lines = [json.dumps(dict(zip(header.split(","), row.split(","), strict=True))) for row in rows]
    sheet = io.BytesIO()
    with zipfile.ZipFile(sheet, "w") as book:
        book.writestr("[Content_Types].xml", "<Types/>")
        book.writestr("xl/worksheets/sheet1.xml", "<worksheet><sheetData/></worksheet>")
    sound = {"a.csv": text.encode(), "a.csv.gz": gzip.compress(text.encode(), mtime=0)}
    sound |= {"a.jsonl": "\n".join(lines).encode(), "a.xlsx": sheet.getvalue(), "b.csv": text.encode("utf-16")}
    yield from _many(sound, 160)
    at = rows[6]
    odd = {
        "open-quote": text.replace(at, f'"{at}'),
        "open-quote-inside": text.replace("p003", '"p003', 1),
        "quote-in-a-cell": text.replace("s006", 's0"06'),
        "twice-a-column": text.replace("Study", "Patient", 1),
        "no-header": "\n".join(rows),
        "only-header": header + "\n",
        "a-cell-more": text.replace(at, at + ",1"),
        "a-cell-less": text.replace(at, at.rsplit(",", 1)[0]),
        "row-twice": text + at + "\n",
        "nan-patient": text.replace("p003", "nan"),
        "blank-patient": text.replace("p003", " "),
        "huge-number": text.replace("-1\n", "1e999\n", 1),
        "half-label": text.replace(",0,-1\n", ",0.5,-1\n", 1),
        "long-cell": text.replace("PA", "P" * 300_000, 1),
        "many-columns": "\n".join(line + ",x" * 5000 for line in text.splitlines()),
        "nul": text.replace("PA", "P\0A", 1),
        "carriage-returns": text.replace("\n", "\r"),
        "mixed-ends": text.replace("\n", "\r\n", 9),
        "return-in-a-name": text.replace("i006.png", '"i006\r.png"'),
        "spread-spellings": text.replace("p003", "3").replace("p004", "3.0"),
        "outside": text.replace("i006.png", "../i006.png"),
        "absolute": text.replace("i006.png", "/etc/passwd"),
        "formula": text.replace("s006", "=1+1"),
        "two-splits": text.replace(at, at.replace("train", "test").replace("validate", "test")),
        "html": f"<html><body>{text}</body></html>",
        "binary": "\x00\x01\x02" * 400,
    }
    for name, content in odd.items():
        yield f"{name}.csv", content.encode()
    for separator in (";", "\t", "|"):
        yield "separated.csv", _table(separator=separator).encode()
    for name, line in {
        "array": "[1]",
        "number": "1",
        "deep": "[" * 100_000,
        "digits": '{"Patient": ' + "9" * 5000 + "}",
        "nested": '{"Patient": {"a": 1}}',
        "twice": '{"Patient": "a", "Patient": "b"}',
        "infinite": '{"Patient": Infinity}',
        "cut": '{"Patient": "a',
        "return": json.dumps({"Patient": "a\rb", "Study": "s", "Image": "x\r.png", "Split": "train", "View": "PA"}),
    }.items():
        yield f"{name}.jsonl", ("\n".join([*lines, line]) + "\n").encode()
    yield "bomb.csv.gz", gzip.compress(b"a" * 200_000_000, compresslevel=1, mtime=0)


def _rows_of_reference(name: str, content: bytes) -> int | None:
    """Rows by Python's own strict reader, None where it refuses or another reading is possible."""
    try:
        if name.endswith(".csv"):
            rows = list(csv.reader(io.StringIO(content.decode("utf-8"), newline=""), strict=True))
            return sum(bool(row) for row in rows) - 1
        if name.endswith(".jsonl"):
            return sum(bool(json.loads(line)) for line in content.decode("utf-8").split("\n") if line.strip())
    except (ValueError, csv.Error, RecursionError):
        return None
    return None


# Reports.


def answer_report(path: Path) -> tuple[Any, ...]:
    """(texts found, missing) of the one study that the file, or the archive, is of."""
    top = path.parent / "files" / "p10" / "p10000001"
    data = {"source": "mimic-cxr-jpg", "root": str(path.parent), "work_dir": str(path.parent)}
    if path.suffix == ".zip":
        data["reports"] = str(path)
    else:
        top.mkdir(parents=True)
        path.rename(top / "s50000001.txt")
    texts = read_reports(DataConfig.model_validate_json(json.dumps(data)), ["10000001"], ["50000001"], 1)
    return (texts.counts["found"], texts.counts["missing"])


def _zipped(text: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("mimic-cxr-reports/files/p10/p10000001/s50000001.txt", text)
        archive.writestr("mimic-cxr-reports/files/p10/p10000001/s50000002.txt", text)
    return out.getvalue()


def report_cases() -> Iterator[Case]:
    """Damaged reports and archives, then whole ones that are long, odd or hostile."""
    text = (
        b"                                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n\n INDICATION:  ___F with "
        b"cough  // ?pneumonia\n\n TECHNIQUE:  Chest PA and lateral\n\n COMPARISON:  ___\n\n FINDINGS: \n \n The lungs "
        b"are clear. No effusion.\n\n IMPRESSION: \n \n No acute process.\n"
    )
    yield from _many({"report.txt": text, "reports.zip": _zipped(text)}, 90)
    for name, piece in {
        "brackets": b"[**",
        "closed": b"[**x**]",
        "colons": b"FINDINGS: ",
        "blanks": b" ",
        "newlines": b"\n",
        "headings": b"\nIMPRESSION:\n",
        "underscores": b"___ ",
        "numbers": b"1. ",
        "dashes": b" - ",
        "zero-width": "​".encode(),
        "letters": b"A",
        "nul": b"\0",
        "high": b"\xff",
        "tags": b"<p>",
        "full-width": "：".encode(),
        "line-ends": b"\\.br\\",
    }.items():
        for size in (100_000, 1_000_000):
            yield f"{name}-{size}.txt", piece * (size // len(piece))
            yield f"{name}-{size}-after.txt", text + piece * (size // len(piece))
    yield "bomb.zip", _zipped(b"A" * 400_000_000)
    yield "empty.zip", b"PK\x05\x06" + bytes(18)
    yield "empty.txt", b""


# Configurations.


def answer_yaml(path: Path) -> tuple[Any, ...]:
    """The names of the experiment and of its run."""
    config = load_config(path)
    return (config.name, config.run_name)


def yaml_cases() -> Iterator[Case]:
    """Damaged configurations, then some that say nothing or refer to what is not there.

    Those that are hostile by their form are in `tests/core/test_plain_yaml.py`.
    """
    yield from _many({path.name: path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))}, 200)
    odd = ("", "hello", "seed: .nan", "training: {learning_rate: .inf}", "name: ${" + "A" * 100_000, "name: ${A:-${A}}")
    for number, content in enumerate((*(text.encode() for text in odd), "name: a".encode("utf-16"), b"name: \xe9")):
        yield f"odd-{number}.yaml", content


# Weights.


def answer_weights(path: Path) -> tuple[Any, ...]:
    """Name -> type, shape and bytes of each array."""
    arrays, _ = read_safetensors(path)
    return (sorted((name, np.array(array).shape, np.array(array).tobytes()) for name, array in arrays.items()),)


def weight_cases() -> Iterator[Case]:
    """Damaged files; headers that cannot be true are in `tests/core/test_safetensors.py`."""
    draw = np.random.default_rng(0)
    arrays = {f"layer{n}.weight": draw.normal(size=(3, n + 2)).astype(np.float32) for n in range(4)}
    return _many({"a.safetensors": save_safetensors(arrays)}, 200)


def _silent_weights(content: bytes, answer: list[tuple[str, tuple[int, ...], bytes]]) -> bool:
    """True where safetensors itself refuses, or reads other arrays."""
    try:
        arrays = load_safetensors(content)
    except Exception:
        return True
    return sorted((name, array.shape, array.tobytes()) for name, array in arrays.items()) != answer


def _silent(kind: str, name: str, content: bytes, value: Any) -> bool:
    """True for an answer that the reference contradicts."""
    if kind == "images":
        return value != ((64, 64), "L", False)
    if kind == "tables":
        read, kept, dropped = value
        expected = _rows_of_reference(name, content)
        lost = read != kept + dropped or (expected is not None and read != expected)
        return lost or (name.startswith(MUST_REFUSE) and not dropped)
    return kind == "weights" and _silent_weights(content, value[0])


KINDS: dict[str, tuple[Callable[[Path], Any], Callable[[], Iterator[Case]]]] = {
    "images": (answer_image, image_cases),
    "tables": (answer_table, table_cases),
    "reports": (answer_report, report_cases),
    "configurations": (answer_yaml, yaml_cases),
    "weights": (answer_weights, weight_cases),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_gets_an_answer_or_a_sentence(counts, tmp_path, kind):
    answer, cases = KINDS[kind]
    row, faults = counts[kind], []
    chosen = list(cases())[:: max(1, round(1 / SHARE))]
    for first in range(0, len(chosen), TOGETHER):
        some, folder = chosen[first : first + TOGETHER], tmp_path / str(first)
        paths = [folder / str(number) / name.replace("/", "_") for number, (name, _) in enumerate(some)]
        for path, (_, content) in zip(paths, some, strict=True):
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
        for (name, content), outcome in zip(some, calls(answer, [(path,) for path in paths], SECONDS), strict=True):
            verdict = {"answer": "answered", "refusal": "refused"}.get(outcome.kind, outcome.kind)
            if verdict == "refused" and not outcome.said.strip():
                verdict = "without a word"
            if verdict == "answered" and _silent(kind, name, content, outcome.value):
                verdict = "silent"
            row["inputs"] += 1
            row[verdict] += 1
            if verdict not in ("answered", "refused"):
                faults.append((name, verdict, outcome.said[-300:]))
        shutil.rmtree(folder)
    assert faults == []
