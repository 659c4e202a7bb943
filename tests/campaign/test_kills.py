"""Every stage killed: the same command again ends as if nothing had happened, and leaves nothing behind."""

from __future__ import annotations

import pytest
from campaign.chain import (
    PIPELINE,
    SHARE,
    STAGES,
    VOLATILE,
    contents,
    copied,
    differing,
    end_workers,
    hidden,
    rng,
    run,
    run_again,
)

pytestmark = [pytest.mark.campaign, pytest.mark.slow]

KILLS = max(1, round(2 * SHARE))
"""Of each stage, before one of its changes on disk."""
KILLS_OF_THE_PIPELINE = max(2, round(16 * SHARE))
"""In turn after some seconds and before one of its changes."""


@pytest.mark.parametrize("number", range(KILLS))
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_run_again_leaves_what_an_unbroken_one_leaves(chain, counts, tmp_path, stage, number):
    folder = copied(chain.before(stage), tmp_path / "killed")
    first = run(folder, *STAGES[stage], at=int(rng("kill", stage, number).integers(1, chain.ended[stage].changes + 1)))
    killed = first.status == -9
    again = run_again(folder, stage)
    left = differing(contents(folder), contents(chain.after(stage)))
    end_workers(first)
    row = counts[stage]
    row["kills"] += killed
    row["ended before it"] += not killed
    row["equal"] += killed and not left and not hidden(folder)
    assert again.status == 0, again.said
    assert left == []
    assert hidden(folder) == []


def test_a_pipeline_killed_again_and_again_leaves_what_an_unbroken_chain_leaves(chain, counts, tmp_path):
    # `films` is the hash of size and time of the image files, which the pipeline makes anew.
    unbroken = contents(chain.after("explain_report"), VOLATILE | {"films"})
    folder = copied(chain.root / "0", tmp_path / "killed")
    changes, row = sum(chain.ended[stage].changes for stage in STAGES), counts["pipeline"]
    for number in range(KILLS_OF_THE_PIPELINE):
        draw = rng("kill", "pipeline", number)
        if number % 2:
            killed = run(folder, *PIPELINE, at=int(draw.integers(1, 2 * changes // KILLS_OF_THE_PIPELINE)))
        else:
            killed = run(folder, *PIPELINE, after=draw.uniform(4, 20))
        end_workers(killed)
        row["kills"] += killed.status == -9
        row["ended before it"] += killed.status != -9
    again = run(folder, *PIPELINE)
    ours = contents(folder, VOLATILE | {"films"})
    ours = {name: content for name, content in ours.items() if not name.endswith("pipeline.json")}
    left = differing(ours, unbroken)
    row["equal"] += row["kills"] if not left and not hidden(folder) else 0
    assert again.status == 0, again.said
    assert left == []
    assert hidden(folder) == []
