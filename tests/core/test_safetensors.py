"""Headers of safetensors files: what the library writes is read, what cannot be true is refused at once."""

from __future__ import annotations

import json
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from mlx_cxr.core.safetensors import SafetensorsError, TensorEntry, read_header, safetensors_files


def written(path: Path, header: object, data: bytes = b"\0" * 16) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensor(shape: object, offsets: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_what_the_library_and_mlx_write_is_read(tmp_path):
    arrays = {"x": np.zeros(3, np.float32), "y": np.zeros((2, 5), np.float16), "none": np.zeros((0, 4), np.int64)}
    save_file({**arrays, "point": np.array(1.0)}, tmp_path / "a.safetensors", {"format": "pt"})
    entries, metadata = read_header(tmp_path / "a.safetensors")
    assert {name: (e.dtype, e.shape) for name, e in entries.items()} == {
        "x": ("F32", (3,)),
        "y": ("F16", (2, 5)),
        "none": ("I64", (0, 4)),
        "point": ("F64", ()),
    }
    assert metadata == {"format": "pt"}
    mx.save_safetensors(str(tmp_path / "b"), {"z": mx.zeros((4, 2), mx.bfloat16)}, metadata={"a": "b"})
    assert read_header(tmp_path / "b.safetensors") == ({"z": TensorEntry("BF16", (4, 2), 0, 16)}, {"a": "b"})


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": tensor([1] * 1000 + [4], [0, 16])}, "'a' has axes or offsets that no tensor has"),
        ({"a": tensor([2**60], [0, 16])}, "axes or offsets"),
        ({"a": tensor([-4], [0, 16])}, "axes or offsets"),
        ({"a": tensor([4], [16, 0])}, "not as long as its shape and type say"),
        ({"a": tensor([4], [-16, 0])}, "axes or offsets"),
        ({"a": tensor([4.0], [0, 16])}, "axes or offsets"),
        ({"a": tensor([True, 4], [0, 16])}, "axes or offsets"),
        ({"a": tensor([5], [0, 16])}, "not as long"),
        ({"a": tensor([4], [0, 16], "F16")}, "not as long"),
        ({"a": tensor([4], [0, 16], "PICKLE")}, "no known type"),
        ({"a": tensor([4], [0, 16], ["F32"])}, "no known type"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "no known type, or not dtype, shape and data_offsets"),
        ({"a": tensor([4], [0, 16]), "b": tensor([2], [8, 16])}, "'b' begins at byte 8, where 16 is next"),
        ({"a": tensor([1], [0, 4]), "b": tensor([2], [8, 16])}, "'b' begins at byte 8, where 4 is next"),
        ({"a": tensor([2], [0, 8])}, "its header says"),
        ({"a": tensor([8], [0, 32])}, "its header says"),
        ({"a": [4]}, "no known type"),
        ([1], "cannot be parsed"),
        ({"__metadata__": {"format": 3}, "a": tensor([4], [0, 16])}, "something else than texts"),
        ({"__metadata__": ["x"], "a": tensor([4], [0, 16])}, "cannot be parsed"),
        (b"[" * 200_000, "cannot be parsed"),
        (b'{"a": ' * 50_000, "cannot be parsed"),
        (b'{"a":' + b"9" * 5000 + b"}", "is damaged"),
        (b'{"a": 1, "a": 2}', "a name stands twice"),
        (b"\xff\xfe{}", "cannot be parsed"),
        (b"{}", "its header says"),
        (b" " * (17 << 20), "a header of 17,825,792 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_header_that_cannot_be_true_is_refused_at_once(tmp_path, header, words):
    path = written(tmp_path / "w.safetensors", header)
    begun = time.perf_counter()
    with pytest.raises(SafetensorsError) as refused:
        read_header(path)
    assert time.perf_counter() - begun < 1
    assert str(refused.value).startswith(f"{path} is damaged, cut short or not safetensors: ")
    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("start", [b"", b"abc", b"\xff" * 40, (2**63).to_bytes(8, "little") + b"{}", b"\0" * 100])
def test_a_length_that_cannot_be_true(tmp_path, start):
    (tmp_path / "w.safetensors").write_bytes(start)
    with pytest.raises(SafetensorsError, match="no safetensors header"):
        read_header(tmp_path / "w.safetensors")


def test_random_flips_of_a_header_are_refused_or_leave_it_readable(tmp_path):
    """Whatever is flipped: a sentence, or tensors of the same bytes; never another exception."""
    whole = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(4, np.int8)}, {"k": "v"})
    rng, path = np.random.default_rng(0), tmp_path / "w.safetensors"
    refused = 0
    for _ in range(500):
        content = bytearray(whole)
        for place in rng.integers(0, len(whole) - 28, rng.integers(1, 4)):
            content[place] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        try:
            entries, _ = read_header(path)
        except SafetensorsError:
            refused += 1
        else:
            assert sorted((e.start, e.stop) for e in entries.values()) in ([(0, 4), (4, 28)], [(0, 24), (24, 28)])
    assert refused > 250


def test_companions_of_macos_are_no_weights(tmp_path):
    for name in ("model-2.safetensors", "._model-1.safetensors", "model-1.safetensors", ".x.safetensors", "a.json"):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in safetensors_files(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]
