"""Making a pixel store: in parallel, in one array file or in several, so that a stopped run can be resumed.

The array of a small store, and each shard of a large one, is a `PartialStore` until it is finished. A shard is complete
when its own index is there; the index of the whole is written last, by whichever process finds all shards complete.
Until then there is the old store or none.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from mlx_cxr.core.files import hash_of, known_sha256, write_record
from mlx_cxr.data.decode_pool import decode_images
from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.manifest import Manifest
from mlx_cxr.data.partial_store import PartialStore, StoreBusyError, claimed, discard_stopped, remove_partial
from mlx_cxr.data.pixel_store import (
    SCHEMA,
    SHARDED_SCHEMA,
    files_of_shards,
    partial_paths,
    read_index,
    shard_paths,
)
from mlx_cxr.data.tables import DataError

log = logging.getLogger("mlx_cxr")

SHARD_IMAGES = 65_536
"""Rows of an array file by default: 3.3 GB at 224 px."""
_POLL_SECONDS = 2.0
_BLOCK = 4096
_LOOKERS = 8


@dataclass(frozen=True)
class StoreReport:
    """The outcome of `build_store`.

    Attributes:
        images: rows of the store; where shards are lacking, of those that this process was to make.
        decoded: images that were decoded by this call; the others were there before.
        seconds: taken by the call.
        unreadable: image_id -> reason.
        notes: image_id -> anything unusual about it.
        lacking: shards that others still have to make.
    """

    images: int
    decoded: int
    seconds: float
    unreadable: dict[str, str]
    notes: dict[str, list[str]]
    lacking: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Shard:
    """An array file to be made: its path, its rows of the manifest, and the first entries of its index."""

    path: Path
    frame: pd.DataFrame
    key: dict[str, Any]


def build_store(
    path: str | Path,
    manifest: Manifest,
    transform: Transform,
    root: str | Path,
    workers: int = 0,
    rebuild: bool = False,
    shard_films: int = SHARD_IMAGES,
    share: tuple[int, int] | None = None,
) -> StoreReport:
    """Make the pixel store of a manifest, resume one that was stopped, or find that it is up to date.

    It is up to date when manifest, transform, and the names, sizes, times and a block of all image files are those it
    was made from, and all of its bytes those that were written.

    A store of several shards may be made by several processes at once, also on several machines that share the disk:
    each makes the shards that no other has claimed, waits in the end for those of the others, and takes over from one
    that dies. That needs a disk with file locks across the machines; where there are none, give each its `share`.

    Args:
        path: `images_<size>.npy`.
        manifest: its images are stored, in its order.
        root: folder that the manifest's paths are relative to.
        workers: decoding processes; 0 takes one per core.
        rebuild: decode every image again.
        shard_films: rows of an array file at most; a store of more images lies in shards.
        share: (k, n): every n-th shard from the k-th on, and no other; None takes all.

    Raises:
        DataError: no images, more than half of those of an array file unusable, or `root` is gone.
        OSError: the disk is full or not writable; the images written are kept and the next call resumes from them.
        StoreBusyError: another process is writing the store.
        WorkerDiedError: a decoding process was killed.
    """
    path, root = Path(path), Path(root)
    if not len(manifest):
        raise DataError(f"the manifest has no films; see the counts that build_manifest wrote beside {path}")
    # The shards: all of the store, those of this process, those that it still has to make.
    places = shard_paths(path, -(-len(manifest) // shard_films))
    frames = [manifest.frame.iloc[n * shard_films : (n + 1) * shard_films] for n in range(len(places))]
    planned = [_planned(*shard, manifest.sha256, transform, root) for shard in zip(places, frames, strict=True)]
    shards = planned if share is None else planned[share[0] - 1 :: share[1]]
    own = {} if rebuild else {s.path: index for s in shards if (index := _up_to_date(s)) is not None}
    todo = [shard for shard in shards if shard.path not in own]
    for array in own:
        discard_stopped(array)
    begun, decoded = time.perf_counter(), 0
    if todo:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_space(path, todo)
        waits = share is None and len(places) > 1
        made, decoded = _make_all(todo, path, transform, root, workers, rebuild, waits)
        own |= made
    seconds = time.perf_counter() - begun

    # The index of the whole, once no shard is lacking.
    indexes = {shard.path: own.get(shard.path) or _up_to_date(shard) for shard in planned}
    lacking = tuple(place for place, index in indexes.items() if index is None)
    if not lacking:
        if len(places) > 1:
            _write_whole(path, list(indexes.values()), manifest, transform)
        # Arrays, begun or finished, of a store of fewer or more shards than these are removed.
        kept = {file for array in places for file in (array, array.with_suffix(".json"), *partial_paths(array))}
        for file in {*files_of_shards(path), path} - kept:
            file.unlink(missing_ok=True)
    parts = [own[shard.path] for shard in shards] if lacking else list(indexes.values())
    unreadable, notes = (
        {image_id: said for part in parts for image_id, said in part[key].items()} for key in ("unreadable", "notes")
    )
    return StoreReport(sum(part["shape"][0] for part in parts), decoded, seconds, unreadable, notes, lacking)


def _make_all(
    todo: Sequence[_Shard], whole: Path, transform: Transform, root: Path, workers: int, rebuild: bool, waits: bool
) -> tuple[dict[Path, dict[str, Any]], int]:
    """Make array files, those that another process is making last: (path -> its index, images decoded)."""
    indexes: dict[Path, dict[str, Any]] = {}
    decoded, busy = 0, set()
    while left := [shard for shard in todo if shard.path not in indexes]:
        for shard in left:
            try:
                # A shard that another process has made in the meantime is not made again.
                fresh = rebuild and shard.path not in busy
                indexes[shard.path], count = _build(shard, whole, transform, root, workers, fresh)
                decoded += count
            except StoreBusyError:
                if not waits:
                    raise
                if shard.path not in busy:
                    log.info("%s is being made by another process; it is waited for in the end", shard.path.name)
                busy.add(shard.path)
        if all(shard.path not in indexes for shard in left):
            time.sleep(_POLL_SECONDS)
    return indexes, decoded


def _planned(path: Path, frame: pd.DataFrame, manifest_sha256: str, transform: Transform, root: Path) -> _Shard:
    """Plan the array file of some rows; refuses when most images are not there."""
    names = frame["path"].tolist()
    seen, there = _look_at(names, root)
    missing = [(root / names[row], "no such file") for row in np.flatnonzero(~there)]
    _refuse_if_most(missing, len(names), root)
    key = {
        "schema": SCHEMA,
        "manifest": manifest_sha256,
        "transform": transform.plain(),
        "films": seen,
        "shape": [len(names), transform.size, transform.size],
    }
    return _Shard(path, frame, key)


def _look_at(names: Sequence[str], root: Path) -> tuple[str, np.ndarray]:
    """(SHA-256 over what a look at the image files gives, bool (N,): True for those that are there).

    Of each file: name, size, time of modification, and `_BLOCK` bytes from its middle, so that one that was replaced by
    another of the same size is noticed even where a tool kept its time.
    """
    start = os.path.join(root, "")  # noqa: PTH118

    def look(name: str) -> bytes:
        # Without `Path` and file objects, in half the time for 377,000 images.
        try:
            file = os.open(start + name, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return b""
        try:
            about = os.fstat(file)
            block = os.pread(file, _BLOCK, max(0, about.st_size - _BLOCK) // 2) if S_ISREG(about.st_mode) else b""
            return b"%d %d %s" % (about.st_size, about.st_mtime_ns, hashlib.sha256(block).digest())
        except OSError:
            return b"unreadable"
        finally:
            os.close(file)

    # In threads: on a cold disk it is the disk that takes the time.
    parts = [names[first : first + 1000] for first in range(0, len(names), 1000)]
    with ThreadPoolExecutor(_LOOKERS) as pool:
        seen = [said for part in pool.map(lambda part: [look(name) for name in part], parts) for said in part]
    digest = hashlib.sha256()
    for name, said in zip(names, seen, strict=True):
        digest.update(b"%d %s%d %s" % (len(name), name.encode(errors="surrogateescape"), len(said), said))
    return digest.hexdigest(), np.array([bool(said) for said in seen])


def _build(
    shard: _Shard, whole: Path, transform: Transform, root: Path, workers: int, fresh: bool
) -> tuple[dict[str, Any], int]:
    """Make an array file unless another process has just done so: (its index, images decoded)."""
    ids, names = shard.frame["image_id"].tolist(), shard.frame["path"].tolist()
    with claimed(shard.path) as journal:
        if not fresh and (index := _up_to_date(shard)):
            remove_partial(shard.path)
            return index, 0
        with PartialStore(shard.path, shard.key, journal, fresh) as partial:
            jobs = [(row, root / name) for row, name in enumerate(names) if row not in partial.done]
            if there := len(partial.done):
                log.info("going on with a stopped run: %d of %d films are there already", there, len(names))
            reasons: dict[int, str] = {}
            what = "films" if shard.path == whole else shard.path.stem
            with tqdm(total=len(names), initial=there, unit="img", desc=what, disable=None) as bar:
                for decoded in decode_images(jobs, transform, workers):
                    if decoded.reason is None:
                        partial.write(decoded)
                    elif root.is_dir():
                        reasons[decoded.row] = decoded.reason
                    else:
                        raise DataError(
                            f"data.root {root} is gone while {root / names[decoded.row]} was to be read: is its disk "
                            "still there? What was written is kept; run the same command again"
                        )
                    bar.update()
            _refuse_if_most([(root / names[row], reasons[row]) for row in sorted(reasons)], len(names), root)
            unreadable = {ids[row]: reasons[row] for row in sorted(reasons)}
            notes = {ids[row]: partial.notes[row] for row in sorted(partial.notes)}
            index = partial.finish({"unreadable": unreadable, "notes": notes, "image_ids": ids}, whole)
    return index, len(jobs)


def _write_whole(path: Path, parts: Sequence[Mapping[str, Any]], manifest: Manifest, transform: Transform) -> None:
    """Write the index of a store whose shards have these indexes, unless it is there."""
    places = shard_paths(path, len(parts))
    index = {
        "schema": SHARDED_SCHEMA,
        "manifest": manifest.sha256,
        "transform": transform.plain(),
        "films": hash_of([part["films"] for part in parts]),
        "shape": [sum(part["shape"][0] for part in parts), transform.size, transform.size],
        "stored": sum(part["stored"] for part in parts),
        "shards": [
            {"file": place.name, "films": part["shape"][0], "pixels": part["pixels"]}
            for place, part in zip(places, parts, strict=True)
        ],
        "unreadable": {image: reason for part in parts for image, reason in part["unreadable"].items()},
        "notes": {image: notes for part in parts for image, notes in part["notes"].items()},
        "image_ids": manifest.frame["image_id"].tolist(),
    }
    if _read(path) != index:
        write_record(path.with_suffix(".json"), index)


def _up_to_date(shard: _Shard) -> dict[str, Any] | None:
    """The index of an array file that need not be made again; None where it must."""
    index = _read(shard.path)
    if index is None or any(index[name] != value for name, value in shard.key.items()):
        return None
    if known_sha256(shard.path) == index["pixels"]:
        return index
    log.warning("%s is not what its index says: it is damaged or was changed; it is made again", shard.path)
    return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_index(path)
    except DataError:
        return None


def _check_space(path: Path, todo: Sequence[_Shard]) -> None:
    """Raise OSError when the disk has not enough room for the pixels still to be written."""
    needed = sum(int(np.prod(shard.key["shape"])) for shard in todo)
    for shard in todo:
        with suppress(FileNotFoundError):
            needed -= partial_paths(shard.path)[0].stat().st_blocks * 512
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{path} needs {needed / 1e6:,.1f} MB more, {free / 1e6:,.1f} MB are free there; make room, set "
            "data.work_dir to another disk, or choose a smaller pixels.size or data.n_studies",
        )


def _refuse_if_most(failed: Sequence[tuple[Path, str]], images: int, root: Path) -> None:
    if 2 * len(failed) <= images:
        return
    kinds = Counter(reason for _, reason in failed).most_common(3)
    first = "\n".join(f"  {path}: {reason}" for path, reason in failed[:5])
    raise DataError(
        f"{len(failed)} of {images} films cannot be used ({'; '.join(f'{n} x {reason}' for reason, n in kinds)}). "
        f"The first:\n{first}\nIs data.root right ({root})? The manifest's paths are relative to it; "
        "were the films downloaded?"
    )
