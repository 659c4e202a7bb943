"""Report what this machine has and lacks for a run: `python -m mlx_cxr.doctor [--config configs/demo.yaml]`.

Ends with status 1 only where something required is broken: a package, the configuration that was asked for,
or weights that changed. Anything merely missing is listed with the way to get it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import sys
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlx_cxr import __version__
from mlx_cxr.core import device
from mlx_cxr.core.files import RecordError
from mlx_cxr.core.stage import stage_parser, started
from mlx_cxr.models import hub

if TYPE_CHECKING:
    from mlx_cxr.core.config import Config

Mark = Literal["ok", "note", "slow", "missing", "broken"]

SLOW_GFLOPS = 50.0
"""Below this the CPU backend runs on the reference BLAS (7; OpenBLAS on two cores: 100 to 220)."""
TEXT_WIDTH = 120
LOW_DISK_GB = 10.0
LOW_MEMORY_GB = 8.0
DEFAULT_CONFIG = Path("configs/demo.yaml")


@dataclass(frozen=True)
class Finding:
    """One item that was checked.

    Attributes:
        area: `machine`, `software`, `weights` or `data`.
        name: of the item.
        mark: `ok`, `note`, `slow`, `missing`, or `broken` (only this one fails the command).
        detail: what was found.
        remedy: what to do about it; empty when there is nothing to do.
    """

    area: str
    name: str
    mark: Mark
    detail: str
    remedy: str = ""


def _existing(area: str, name: str, exists: bool, detail: str, remedy: str) -> Finding:
    return Finding(area, name, "ok", detail) if exists else Finding(area, name, "missing", detail, remedy)


def run(config_path: Path | None = None, weights_dir: Path | None = None) -> dict[str, Any]:
    """Check machine, software, weights and data.

    Args:
        config_path: configuration of the data and weights; None takes `configs/demo.yaml`, if present.
        weights_dir: the weights folder; None takes the configuration's, or `weights`.

    Returns:
        JSON-ready: `schema`, `version`, `config`, `device` (`device.describe`), `healthy` (nothing is
        broken) and `findings`, a list of `Finding` as mappings.
    """
    machine = device.start("doctor", verbose=False)
    findings = [*check_machine(machine), *check_software()]
    config, config_findings = _configuration(config_path)
    folder = weights_dir or (config.weights_dir if config else Path("weights"))
    findings += [*check_weights(folder, config), *config_findings]
    if config:
        findings += check_data(config, config_path or DEFAULT_CONFIG)
    return {
        "schema": 1,
        "version": __version__,
        "config": str(config_path or DEFAULT_CONFIG) if config else None,
        "device": machine,
        "healthy": all(finding.mark != "broken" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }


def check_machine(machine: dict[str, Any]) -> list[Finding]:
    """Device, memory, measured speed and free disk; `machine` comes from `device.describe`."""
    memory = machine["memory_bytes"] / 1e9
    disk = shutil.disk_usage(Path.cwd()).free / 1e9
    return [
        Finding("machine", "device", "ok", f"{machine['kind']} ({machine['name']}), {machine['cores']} cores"),
        Finding("machine", "memory", "ok", f"{memory:.0f} GB")
        if memory >= LOW_MEMORY_GB
        else Finding("machine", "memory", "note", f"{memory:.1f} GB", "use a smaller training.batch_size (8 or 16)"),
        judge_speed(machine["kind"], device.measure_gflops(), machine["blas"]),
        Finding("machine", "ResNet-18", "ok", f"{_forward_ms():.1f} ms per 224 px film, forward, batch of 8"),
        Finding("machine", "disk", "ok", f"{disk:.0f} GB free here")
        if disk >= LOW_DISK_GB
        else Finding(
            "machine", "disk", "note", f"{disk:.1f} GB free here", "make room, or point data.work_dir elsewhere"
        ),
    ]


def judge_speed(kind: str, gflops: float, blas: str | None) -> Finding:
    """Judge the speed of float32 matrix products, which on the CPU is a matter of BLAS."""
    if kind != "cpu":
        return Finding("machine", "speed", "ok", f"{gflops:.0f} GFLOP/s, float32 matrix product")
    detail = f"{gflops:.0f} GFLOP/s, float32 matrix product, {blas}"
    if gflops >= SLOW_GFLOPS:
        return Finding("machine", "speed", "ok", detail)
    if blas and blas.startswith("OpenBLAS"):
        return Finding(
            "machine", "speed", "slow", detail, "other programs may be using the cores; look again when idle"
        )
    return Finding(
        "machine",
        "speed",
        "slow",
        detail,
        "OpenBLAS is not linked, so training is about 30 times slower: apt-get install libopenblas0, or "
        "pip install opencv-python, or set MLX_CXR_OPENBLAS=/path/to/libopenblas.so.0",
    )


def check_software() -> list[Finding]:
    """Python, every dependency this package declares with the version it has, and the optional ones."""
    version = platform.python_version()
    good = sys.version_info >= (3, 10)
    findings = [
        Finding("software", "Python", "ok", version)
        if good
        else Finding("software", "Python", "broken", version, "install Python 3.10 or newer and make a new .venv")
    ]
    faults, present = _dependencies()
    if faults:
        detail = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
        findings.append(Finding("software", "packages", "broken", detail, "python -m pip install -e ."))
    findings.append(Finding("software", "packages", "ok", ", ".join(f"{n} {v}" for n, v in present.items())))
    for module, use in (
        ("torch", "parity tests and the PyTorch benchmark"),
        ("pydicom", "DICOM files at inference"),
    ):
        if importlib.util.find_spec(module) is None:
            remedy = f"python -m pip install {module}"
            findings.append(Finding("software", module, "note", f"not installed (optional: {use})", remedy))
        else:
            found = importlib.metadata.version(module)
            findings.append(Finding("software", module, "ok", f"{found} (optional: {use})"))
    return findings


def _dependencies() -> tuple[dict[str, str], dict[str, str]]:
    """(name -> what is wrong, name -> version) for every requirement that applies to this machine."""
    from packaging.requirements import Requirement

    faults: dict[str, str] = {}
    present: dict[str, str] = {}
    try:
        declared = importlib.metadata.requires("mlx-cxr") or []
    except importlib.metadata.PackageNotFoundError:
        return {"mlx-cxr": "not installed"}, present
    for text in declared:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            faults[requirement.name] = "not installed"
            continue
        present[requirement.name] = found
        if not requirement.specifier.contains(found, prereleases=True):
            faults[requirement.name] = f"{found}, needs {requirement.specifier}"
    return faults, present


def check_weights(weights_dir: Path, config: Config | None) -> list[Finding]:
    """The ImageNet weights, the teacher's base, and the file that a configuration names."""

    findings = [
        _weights("ImageNet", hub.IMAGENET, weights_dir, "resnet18"),
        _weights("LFM base", hub.LFM, weights_dir, "lfm"),
    ]
    if config and config.teacher.base != hub.LFM.repo:
        base, remedy = (
            Path(config.teacher.base),
            "python -m mlx_cxr.make_tiny_teacher --config … makes a small one there",
        )
        finding = _existing("weights", "teacher.base", base.is_dir(), str(base), remedy)
        findings.append(_checked_base("teacher.base", base) if base.is_dir() else finding)
    if config and config.model.weights not in ("imagenet", "scratch"):
        path, remedy = Path(config.model.weights), "put the file there, or change model.weights"
        findings.append(_existing("weights", "model.weights", path.is_file(), str(path), remedy))
    return findings


def _weights(name: str, source: hub.Source, weights_dir: Path, what: str) -> Finding:

    path = source.path(weights_dir)
    if not path.exists():
        remedy = f"python -m mlx_cxr.fetch_weights --what {what}"
        if source is hub.IMAGENET:
            remedy += " (without it, training starts from random weights)"
        else:
            remedy += " (needed by the teacher stages only)"
        return Finding("weights", name, "missing", f"{path}: {source.what}", remedy)
    if source is hub.LFM:
        return _checked_base(name, path)
    try:
        record = hub.check_record(source, weights_dir)
    except (hub.WeightsCorruptError, RecordError) as error:
        return Finding("weights", name, "broken", str(error), f"python -m mlx_cxr.fetch_weights --what {what}")
    sha256 = record["files"][path.name]["sha256"]
    return Finding("weights", name, "ok", f"{path}, sha256 {sha256[:12]}…, {record['source']}")


def _checked_base(name: str, folder: Path) -> Finding:
    try:
        hub.check_base(folder)
    except (hub.WeightsCorruptError, RecordError) as error:
        return Finding("weights", name, "broken", str(error), hub.way_to(folder))
    return Finding("weights", name, "ok", str(folder))


def _configuration(path: Path | None) -> tuple[Config | None, list[Finding]]:
    from mlx_cxr.core.config import ConfigError, load_config

    if path is None and not DEFAULT_CONFIG.exists():
        return None, [Finding("data", "configuration", "note", "none given", "pass --config to look for its data")]
    try:
        return load_config(path or DEFAULT_CONFIG), []
    except ConfigError as error:
        return None, [Finding("data", "configuration", "broken", str(error), "correct what it names")]


def check_data(config: Config, config_path: Path) -> list[Finding]:
    """The inputs of a configuration, then the outputs that its stages have made so far."""
    from mlx_cxr.data.pixel_store import store_files

    findings = _csv_source(config) if config.data.csv else _mimic_source(config, config_path)
    made = (
        ("manifest", [config.manifest_path], "build_manifest"),
        ("pixel store", store_files(config.pixels_path), "prepare_images"),
        ("trained CNN", [config.run_dir() / "best_model.safetensors"], "train_cnn"),
    )
    for name, paths, stage in made:
        remedy = f"python -m mlx_cxr.{stage} --config {config_path}"
        gone = [path for path in paths if not path.exists()]
        findings.append(_existing("data", name, not gone, str(gone[0] if gone else paths[-1]), remedy))
    return findings


def _mimic_source(config: Config, config_path: Path) -> list[Finding]:
    root = config.data.root
    if config.data.synthetic:
        remedy = f"python -m mlx_cxr.make_demo_data --config {config_path}"
        origin = "synthetic cohort"
    else:
        remedy = "download it from https://physionet.org/content/mimic-cxr-jpg/ (credentialed; see the README)"
        origin = "MIMIC-CXR-JPG"
    findings = []
    for table in ("metadata", "split", config.data.labeler):
        found = sorted(root.glob(f"mimic-cxr-2.*-{table}.csv*"))
        detail = str(found[0]) if found else f"{root / f'mimic-cxr-2.0.0-{table}.csv.gz'} ({origin})"
        findings.append(_existing("data", f"{table} table", bool(found), detail, remedy))
    images = root / "files"
    findings.append(_existing("data", "films", images.is_dir(), f"{images} ({origin})", remedy))
    if (reports := config.data.reports) is not None:
        correct = "put them there, or correct data.reports"
        findings.append(_existing("data", "reports", reports.exists(), str(reports), correct))
    return findings


def _csv_source(config: Config) -> list[Finding]:
    wanted = (("table", config.data.csv.table, "data.csv.table"), ("films", config.data.root, "data.root"))
    return [
        _existing("data", name, path.exists(), str(path), f"put it there, or correct {key}")
        for name, path, key in wanted
    ]


def _forward_ms() -> float:
    """Milliseconds per 224 px image of a forward pass in batches of 8; the better of two."""
    import mlx.core as mx

    from mlx_cxr.models.resnet import ResNet18, ResNetConfig

    model = ResNet18(ResNetConfig())
    model.eval()
    images = mx.random.normal((8, 224, 224, 1))
    mx.eval(model(images))
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        mx.eval(model(images))
        times.append(time.perf_counter() - begin)
    return min(times) * 1000 / images.shape[0]


def render(report: dict[str, Any]) -> str:
    """A report as text: one aligned table, then the remedies, each once."""
    findings = [Finding(**finding) for finding in report["findings"]]
    width = max(len(finding.name) for finding in findings)
    lines = [f"mlx_cxr {report['version']}"]
    for area in dict.fromkeys(finding.area for finding in findings):
        title = f"{area} ({report['config']})" if area == "data" and report["config"] else area
        lines += ["", title]
        for finding in (finding for finding in findings if finding.area == area):
            start = f"  {finding.mark:<8} {finding.name:<{width}}  "
            lines += textwrap.wrap(
                start + finding.detail,
                TEXT_WIDTH,
                subsequent_indent=" " * len(start),
                break_long_words=False,
                break_on_hyphens=False,
            )
    remedies: dict[str, list[str]] = {}
    for finding in findings:
        if finding.remedy:
            remedies.setdefault(finding.remedy, []).append(finding.name)
    if remedies:
        lines += ["", "what to do"]
        lines += [f"  {', '.join(names)}: {remedy}" for remedy, names in remedies.items()]
    lines += [
        "",
        "nothing is broken" if report["healthy"] else "something is broken: see the lines marked so",
    ]
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = stage_parser("doctor", __doc__)
    parser.add_argument("--config", type=Path, help=f"default: {DEFAULT_CONFIG} where there is one")
    parser.add_argument("--weights_dir", type=Path, help="default: the configuration's")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point; ends with status 1 where something required is broken."""
    with started(build_parser(), argv, verbose=False) as args:
        report = run(args.config, args.weights_dir)
    print(json.dumps(report, indent=2) if args.json else render(report))
    if not report["healthy"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
