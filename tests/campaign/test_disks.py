"""Disks that are full and disks that may not be written: one sentence, nothing lost, and the same command goes on."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from campaign.chain import STAGES, contents, copied, differing, end_workers, hidden, rng, run, run_again

from mlx_cxr.core.files import sha256_file

pytestmark = [pytest.mark.campaign, pytest.mark.slow]

FULL = tuple(stage for stage in STAGES if stage != "evaluate_cnn@student")
READ_ONLY = ("build_manifest", "prepare_images", "train_cnn", "export")
PAGE = 4096


class Disk:
    """A file system in memory, mounted for as long as a test lasts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        _mount("-t", "tmpfs", "-o", "size=1g", "tmpfs", str(folder))

    def room(self, size: int) -> None:
        """Leave so many bytes free."""
        used = int(subprocess.check_output(["df", "-B1", "--output=used", self.folder]).split()[-1])
        _mount("-o", f"remount,size={used + size // PAGE * PAGE}", str(self.folder))

    def change(self, options: str) -> None:
        """Mount again with other options."""
        _mount("-o", f"remount,{options}", str(self.folder))


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(done.stderr.strip())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        disk = Disk(tmp_path / "disk")
    except (OSError, FileNotFoundError) as error:
        pytest.skip(f"no file system of its own may be mounted here ({error}): a disk that is full is not tried")
    yield disk
    subprocess.run(["umount", "--lazy", disk.folder], check=True)


def _files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def _try(folder: Path, stage: str, row: dict[str, int], before: dict[str, str], largest: int = 0) -> list[str]:
    """Run a stage that cannot write, count what it did, and return what was wrong with it."""
    ended = run(folder, *STAGES[stage], largest=largest)
    end_workers(ended)
    row["faults"] += 1
    wrong = [] if ended.status in (1, 2) else [f"ended with status {ended.status}"]
    if not re.search(r"\b(data|outputs)\b", ended.error):
        wrong.append(f"no sentence that names a file: {ended.said[-2000:]}")
    after = _files(folder)
    wrong += [f"{name} is not what it was" for name, digest in before.items() if after.get(name) != digest]
    row["said in a sentence"] += not wrong
    return wrong


def _go_on(chain, folder: Path, stage: str, row: dict[str, int]) -> list[str]:
    """Run the same command again, with room to write, and return in what it differs from an unbroken one."""
    again = run_again(folder, stage)
    wrong = [] if again.status == 0 else [again.said]
    wrong += differing(contents(folder), contents(chain.after(stage))) + hidden(folder)
    row["then as unbroken"] += not wrong
    return wrong


@pytest.mark.parametrize("stage", FULL)
def test_a_full_disk(chain, counts, disk, stage):
    folder = copied(chain.before(stage), disk.folder / "work")
    before, row = _files(folder), counts[f"full disk, {stage}"]
    grows = sum(path.stat().st_size for path in chain.after(stage).rglob("*") if path.is_file())
    grows -= sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    disk.room(int(rng("full", stage).uniform(0, 0.8) * grows))
    wrong = _try(folder, stage, row, before)
    disk.change("size=1g")
    assert wrong + _go_on(chain, folder, stage, row) == []


@pytest.mark.parametrize("stage", READ_ONLY)
def test_a_disk_that_may_only_be_read(chain, counts, disk, stage):
    folder = copied(chain.before(stage), disk.folder / "work")
    before, row = _files(folder), counts[f"read-only, {stage}"]
    disk.change("ro")
    wrong = _try(folder, stage, row, before)
    disk.change("rw")
    assert wrong + _go_on(chain, folder, stage, row) == []


def test_a_file_that_may_not_grow(chain, counts, tmp_path):
    stage = "cache_teacher_outputs"
    folder = copied(chain.before(stage), tmp_path / "work")
    row = counts[f"file size limited, {stage}"]
    wrong = _try(folder, stage, row, _files(folder), largest=1500)
    assert wrong + _go_on(chain, folder, stage, row) == []
