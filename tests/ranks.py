"""Programs on several ranks of this machine, by `mlx.launch` and without it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
_LAUNCH = "import sys; from mlx._distributed_utils.launch import main; sys.argv[0] = 'mlx.launch'; main()"


def free_port(ranks: int) -> int:
    """The first of as many ports as there are ranks, all free a moment ago."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
        try:
            for i in range(ranks):
                with socket.socket() as other:
                    other.bind(("127.0.0.1", port + i))
        except OSError:
            continue
        return port


def launched(*command: str, ranks: int = 2, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    """`mlx.launch -n ranks -- python command`, ended, with its output."""
    launch = ("--backend", "ring", "-n", str(ranks), "--starting-port", str(free_port(ranks)))
    process = subprocess.Popen(
        [sys.executable, "-c", _LAUNCH, *launch, "--", sys.executable, *command],
        # Open and silent: it would spin on one that is at its end.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        process.wait(timeout)
    finally:
        process.kill()
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def by_hand(folder: Path, *command: str, ranks: int = 2, **environment: str) -> list[subprocess.Popen[str]]:
    """`python command` on each rank, with a hostfile and nobody who watches over them."""
    port, hostfile = free_port(ranks), folder / "hosts.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port + i}"] for i in range(ranks)]))
    shared = {**os.environ, "MLX_HOSTFILE": str(hostfile), **environment}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**shared, "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def together(folder: Path, *command: str) -> list[subprocess.CompletedProcess[str]]:
    """As `by_hand`, to the end.

    The launcher's threads poll without a pause and take a core from the ranks: half a minute where two ranks take ten
    seconds. What it is tested for are its own ways to end.
    """
    processes = by_hand(folder, *command)
    return [
        subprocess.CompletedProcess(process.args, process.returncode, out, err)
        for process in processes
        for out, err in [process.communicate(timeout=150)]
    ]
