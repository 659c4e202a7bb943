"""The unbroken chain that all faults start from, and the counts that the page on reliability is made of."""

from __future__ import annotations

import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest
from campaign.chain import ROOT, SEED, SHARE, Chain

from mlx_cxr.core.files import write_json
from mlx_cxr.core.runs import git_state

Counts = defaultdict[str, dict[str, int]]


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The chain, made once in a process."""
    return Chain.unbroken(tmp_path_factory.mktemp("campaign") / "chain")


@pytest.fixture(scope="module")
def counts(request: pytest.FixtureRequest) -> Iterator[Counts]:
    """Row of the page -> column -> number; written to `outputs/campaign/` when the module's tests have run."""
    print(f"seed {SEED}")
    begun, rows = time.monotonic(), defaultdict(lambda: defaultdict(int))
    yield rows
    commit, dirty = git_state()
    name = Path(request.node.name).stem.removeprefix("test_")
    about = {
        "seed": SEED,
        "share": SHARE,
        "commit": commit,
        "tree_dirty": dirty,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "seconds": round(time.monotonic() - begun),
    }
    write_json(ROOT / "outputs" / "campaign" / f"{name}.json", {**about, "rows": rows})
