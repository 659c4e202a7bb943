"""Files that are written whole and read as written, with real kills, a disk that really is full, and flipped bits."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import (
    SEAL,
    UNSEALED,
    RecordError,
    append_jsonl,
    atomic_path,
    check_weights,
    hash_of,
    read_json,
    read_record,
    seal_weights,
    sha256_file,
    sweep,
    told,
    write_json,
    write_record,
    write_text,
)


def python(code: str, *arguments: object, **options: object) -> subprocess.Popen:
    """A Python process with the package on its path, its output piped."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_new_file_and_replacement(tmp_path):
    path = tmp_path / "deep" / "er" / "a.json"
    write_text(path, "old")
    assert write_text(path, "néw") == path
    assert path.read_bytes() == "néw".encode()
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_the_suffix_is_kept_for_writers_that_look_at_it(tmp_path):
    with atomic_path(tmp_path / "a.npy") as temporary:
        assert temporary.parent == tmp_path
        np.save(temporary, np.arange(3))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy", allow_pickle=False), [0, 1, 2])
    assert len(list(tmp_path.iterdir())) == 1


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        write_text(tmp_path / "private", "x")
        os.umask(0o022)
        write_text(tmp_path / "usual", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "usual").stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_a_failing_writer_keeps_the_old_file(tmp_path, error):
    path = write_text(tmp_path / "a.txt", "old")

    def write() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half of")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_errors_name_the_file_that_was_to_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"could not write .*file/a.json: .*; what was there before is kept"):
        write_text(tmp_path / "file" / "a.json", "x")
    with (
        pytest.raises(FileNotFoundError, match=r"could not write .*a.json: No such file.*absent.csv"),
        atomic_path(tmp_path / "a.json"),
    ):
        (tmp_path / "absent.csv").read_text()


def test_an_error_with_its_own_words_passes(tmp_path):
    class GoneError(UserError, FileNotFoundError):
        pass

    with pytest.raises(GoneError) as caught, atomic_path(tmp_path / "a"):
        raise GoneError("film 7 is gone")
    assert str(caught.value) == "film 7 is gone"


def test_a_kill_in_the_middle_keeps_the_old_file(tmp_path):
    path = write_text(tmp_path / "a.bin", "old")
    writer = python(
        """
        import sys
        from mlx_cxr.core.files import atomic_path
        with atomic_path(sys.argv[1]) as temporary, temporary.open("wb") as out:
            while True:
                out.write(b"x" * 100_000)
                print("wrote", flush=True)
        """,
        path,
    )
    for _ in range(3):
        assert writer.stdout.readline() == "wrote\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate(timeout=20)
    assert writer.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


FULL_DISK = """
    import resource, signal, sys
    sys.dont_write_bytecode = True  # It would be cut short for all others.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    import numpy as np
    import mlx_cxr
    from mlx_cxr.core.errors import readable_errors
    from mlx_cxr.core.files import atomic_path, write_text
    {imports}
    # Files may grow to 100 kB: what a full disk does, by the same system call failing.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    with readable_errors():
        {action}
    """
WRITERS = {
    "a.txt": ("", "write_text(sys.argv[1], 'x' * 1_000_000)"),
    "a.npy": (
        "",
        "exec('with atomic_path(sys.argv[1]) as t:\\n np.save(t.open(\"wb\"), np.zeros(10**6, np.uint8))')",
    ),
    "weights.safetensors": (
        "import mlx.core as mx; from mlx_cxr.models.weight_files import write_safetensors",
        "write_safetensors(sys.argv[1], {'a': mx.zeros((10**6,))}, {})",
    ),
    "state.safetensors": (
        "import mlx.nn as nn, mlx.optimizers as optim; from pathlib import Path; "
        "from mlx_cxr.training.checkpoint import Progress, save_state",
        "save_state(Path(sys.argv[1]), nn.Linear(500, 500), optim.SGD(0.1), Progress())",
    ),
}


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path, name):
    imports, action = WRITERS[name]
    path = write_text(tmp_path / name, "old")
    process = python(FULL_DISK.format(imports=imports, action=action), path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1
    assert f"could not write {path}" in errors
    assert "what was there before is kept" in errors
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_holds_plain_data(tmp_path):
    value = {
        "path": Path("a/b"),
        "array": np.array([[1.5, math.nan]]),
        "scalar": np.float32(0.25),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "infinite": math.inf,
        3: (1, 2),
        "none": None,
    }
    path = write_json(tmp_path / "a.json", value)
    assert read_json(path) == {
        "path": "a/b",
        "array": [[1.5, None]],
        "scalar": 0.25,
        "count": 3,
        "flag": True,
        "infinite": None,
        "3": [1, 2],
        "none": None,
    }
    assert list(json.loads(path.read_text())) == [str(key) for key in value]


def test_unreadable_json_is_named(tmp_path):
    with pytest.raises(RecordError, match=r"absent.json is missing"):
        read_json(tmp_path / "absent.json")
    for content in (b'{"a": ', b"\xff\xfe\x00", b""):
        (tmp_path / "cut.json").write_bytes(content)
        with pytest.raises(RecordError, match=r"cut.json is not readable JSON"):
            read_json(tmp_path / "cut.json")


def test_one_json_object_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"step": 1, "loss": np.float32(0.5)})
    append_jsonl(path, {"step": 2, "loss": math.nan, "note": "a\nb"})
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None, "note": "a\nb"},
    ]


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_file_hash_is_sha256(tmp_path, size):
    data = np.random.default_rng(0).bytes(size)
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_hash_of_a_value_does_not_depend_on_key_order_or_container():
    text = b'{"a":[1,2.5,null],"b":"x/y"}'
    assert hash_of({"b": Path("x/y"), "a": (1, 2.5, None)}) == hashlib.sha256(text).hexdigest()
    assert hash_of({"a": [1.0, 2.5, math.nan], "b": "x/y"}) == hash_of({"b": "x/y", "a": np.array([1, 2.5, np.nan])})
    assert hash_of({"a": 1}) != hash_of({"a": 2})


VALUE = {"schema": 1, "auc": 0.1 + 0.2, "nothing": math.nan, "names": ("a", "é"), "deep": {"b": [1, 2.5e-17, None]}}


class TestRecords:
    """Records and weights that carry their own hash."""

    def test_a_record_is_read_as_it_was_written(self, tmp_path):
        path = write_record(tmp_path / "a.json", VALUE)
        plain = {**VALUE, "nothing": None, "names": ["a", "é"]}
        assert read_record(path) == plain
        text = json.loads(path.read_text())
        assert list(text)[-1] == "self_sha256"
        canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
        assert text[SEAL] == hashlib.sha256(canonical.encode()).hexdigest()

    def test_every_flipped_bit_is_noticed_or_harmless(self, tmp_path):
        path = write_record(tmp_path / "a.json", VALUE)
        content, whole = path.read_bytes(), read_record(path)

        def said(bit):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            try:
                return read_record(path)
            except RecordError as error:
                return str(error)

        answers = [said(bit) for bit in range(8 * len(content))]
        noticed = [answer for answer in answers if isinstance(answer, str)]
        assert all(str(path) in answer for answer in noticed)
        assert all(answer == whole for answer in answers if not isinstance(answer, str))
        assert len(noticed) > 0.9 * len(answers)

    @pytest.mark.parametrize("content", ["[1]", "{}", '{"schema": 1}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}", ""])
    def test_what_is_no_record_is_refused(self, tmp_path, content):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(RecordError, match=r"a\.json"):
            read_record(tmp_path / "a.json")

    @pytest.fixture
    def weights(self, tmp_path):
        path = tmp_path / "w.safetensors"
        numbers = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
        save_file({"layer": numbers}, path, metadata={"config": "{}", SEAL: UNSEALED})
        seal_weights(path)
        return path

    def test_weights_carry_the_hash_of_their_file(self, weights):
        check_weights(weights)
        with safe_open(weights, "np") as opened:
            said = opened.metadata()[SEAL]
            assert opened.get_tensor("layer").shape == (7, 5)
        content = weights.read_bytes()
        assert said == hashlib.sha256(content.replace(said.encode(), UNSEALED.encode())).hexdigest()

    def test_every_flipped_byte_of_weights_is_noticed(self, weights):
        content = weights.read_bytes()
        for place in range(len(content)):
            flipped = bytearray(content)
            flipped[place] ^= 16
            weights.write_bytes(flipped)
            with pytest.raises(RecordError, match=re.escape(str(weights))):
                check_weights(weights)

    @pytest.mark.parametrize("cut", [0, 7, 8, 60, -1])
    def test_weights_cut_short(self, weights, cut):
        weights.write_bytes(weights.read_bytes()[:cut])
        with pytest.raises(RecordError, match=r"w\.safetensors"):
            check_weights(weights)

    def test_weights_without_a_hash(self, tmp_path):
        save_file({"layer": np.zeros(3, np.float32)}, tmp_path / "w.safetensors")
        with pytest.raises(RecordError, match="carries no hash"):
            check_weights(tmp_path / "w.safetensors")


def test_leftovers_of_killed_writers_are_swept(tmp_path):
    code = """
        import os, signal, sys
        from pathlib import Path
        from mlx_cxr.core.files import atomic_path
        with atomic_path(Path(sys.argv[1])):
            os.kill(os.getpid(), signal.SIGKILL)
        """
    (tmp_path / "sub").mkdir()
    for name in ("a.csv", "sub/b.json"):
        assert python(code, tmp_path / name).wait() == -signal.SIGKILL
    (tmp_path / ".hidden").write_text("theirs")
    assert len(list(tmp_path.rglob(".tmp-*"))) == 2
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [".hidden"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_told_by_the_name_of_the_file(tmp_path):
    with pytest.raises(OSError, match=r"could not write /dev/full: No space left on device") as full:
        append_jsonl("/dev/full", {"step": 1})
    assert full.value.errno == 28
    # What names a file already, or is a sentence of ours, stays as it is.
    with pytest.raises(FileNotFoundError, match="absent"), told(tmp_path / "other"):
        (tmp_path / "absent").read_bytes()
    with pytest.raises(RecordError, match="a sentence"), told(tmp_path):
        raise RecordError("a sentence")
