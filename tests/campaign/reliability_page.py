"""Write `docs/reliability.md` from the counts in `outputs/campaign/`: `python tests/campaign/reliability_page.py`."""

from __future__ import annotations

from pathlib import Path

from mlx_cxr.core.files import read_json, write_text

ROOT = Path(__file__).resolve().parents[2]
PAGE = """\
# Reliability

A campaign injects faults into every stage, on a tiny synthetic cohort, and counts what follows. To run it (each part
says how long it took) and to write this page from its counts:

```
./scripts/test -m campaign
.venv/bin/python tests/campaign/reliability_page.py
```

Every fault is drawn from a seed that stands in `tests/campaign/chain.py`. No number below is typed by hand.

{parts}"""
PARTS = {
    "kills": (
        "Kills",
        "Each stage as a process of its own, ended by SIGKILL before one of its changes on disk, then run again (with "
        "`--resume` where it trains or predicts). `equal`: every file is then bit-equal to an unbroken run's, and no "
        "hidden file is left. Not compared: times, memory, the command and the commit (`VOLATILE` in `chain.py` lists "
        "the keys); hashes of files are compared by the file that they are of. The pipeline is killed again and again, "
        "after some seconds or before a change, before it may end.",
    ),
    "disks": (
        "Full and read-only disks",
        "`said in a sentence`: the stage ends with one sentence that names the file, and what was there is untouched. "
        "`then as unbroken`: with room to write, the same command leaves what an unbroken run leaves.",
    ),
    "artefacts": (
        "Damaged files between stages",
        "Cut at a random place, a random bit flipped, or a random block of 64 bytes zeroed; then each stage that reads "
        "it is run. `named`: an error, or the pipeline's reason to make it again, names the file. "
        "`mismatch`: it is refused because it does not go with another file, which is named. `harmless`: no output "
        "differs. All else is a fault of this package; `silent` is an output that differs without a word.",
    ),
    "inputs": (
        "Inputs",
        "Damaged, odd and hostile inputs of all kinds, each with a time limit and 2 GB of memory. `silent` would be an "
        "answer where a reference (Pillow, pydicom, Python's csv, safetensors) refuses or reads something else.",
    ),
}


def table(rows: dict[str, dict[str, int]]) -> str:
    """A Markdown table with a line of sums."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    sums = {column: sum(row.get(column, 0) for row in rows.values()) for column in columns}
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for name, row in {**{f"`{name}`": row for name, row in rows.items()}, "**all**": sums}.items():
        lines.append(f"| {name} | {' | '.join(str(row.get(column, 0)) for column in columns)} |")
    return "\n".join(lines)


def part(name: str, path: Path) -> str:
    """A section of the page."""
    title, text = PARTS[name]
    if not path.exists():
        return f"## {title}\n\n{text}\n\nNot run for this page.\n"
    counted = read_json(path)
    dirty = ", with changes that were not committed" if counted["tree_dirty"] else ""
    share = "" if counted["share"] == 1 else f"A quick look at {counted['share']:.0%} of the faults. "
    about = (
        f"{share}Commit {str(counted['commit'])[:10]}{dirty}; {counted['machine']}; {counted['date']}; seed "
        f"{counted['seed']}; {counted['seconds'] / 60:.0f} min."
    )
    return f"## {title}\n\n{text}\n\n{about}\n\n{table(counted['rows'])}\n"


def main() -> None:
    """Entry point."""
    parts = [part(name, ROOT / "outputs" / "campaign" / f"{name}.json") for name in PARTS]
    write_text(ROOT / "docs" / "reliability.md", PAGE.format(parts="\n".join(parts)))


if __name__ == "__main__":
    main()
