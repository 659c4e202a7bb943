"""Make a small stand-in for the published base: `python -m mlx_cxr.make_tiny_teacher --config configs/demo.yaml`.

Writes a complete checkpoint of LFM2.5-VL's architecture (about a million parameters) to `teacher.base`, its language
model trained on the reports of the training split: for machines and tests without the published base. No result of a
teacher on it carries over to the published one.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_cxr.core import device
from mlx_cxr.core.claim import claims
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import RecordError, hash_of, read_record, sha256_file, write_record
from mlx_cxr.core.runs import RunExistsError, provenance
from mlx_cxr.core.stage import add_config_arguments, configuration, stage_parser, started

if TYPE_CHECKING:
    from mlx_cxr.core.config import Config

log = logging.getLogger("mlx_cxr")

_NOT_HASHED = ("tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja")
"""Files beside `hub.base_files`; a base's hash does not count them."""


def _folder(config: Config) -> Path:
    from mlx_cxr.core.config_schema import TeacherConfig

    if config.teacher.base == TeacherConfig().base:
        raise UserError(
            f"teacher.base is {config.teacher.base}, the published base, which is fetched and not made here; "
            "name a folder, such as --set teacher.base=weights/tiny-lfm2.5-vl"
        )
    return Path(config.teacher.base)


@claims(lambda config, *_, **__: _folder(config))
def run(config: Config, overwrite: bool = False) -> Path:
    """Write the checkpoint, and return its folder.

    Args:
        config: the experiment.
        overwrite: replace a base that teachers were tuned on.

    Raises:
        UserError: `teacher.base` is a hub id, or a folder that holds something that was not made here.
        RunExistsError: teachers under `outputs` were tuned on the base that is there.
        DataError: no manifest, no reports, or no training study with one.
    """
    from mlx_cxr.core.config_schema import TinyTeacherConfig
    from mlx_cxr.data.manifest import load_manifest
    from mlx_cxr.data.study_reports import load_reports
    from mlx_cxr.data.tables import DataError
    from mlx_cxr.models.hub import MADE_HERE, base_files
    from mlx_cxr.teacher.tiny import make_tiny_teacher

    machine = device.start("make_tiny_teacher")
    folder = _folder(config)
    if not (folder / MADE_HERE).exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} holds something that was not made here; name another folder as teacher.base")

    manifest = load_manifest(config.manifest_path)
    reports = load_reports(config.reports_path, manifest)
    training = manifest.frame.loc[manifest.frame["split"] == "train", "study_id"].drop_duplicates()
    texts = [reports.sections[study] for study in training if study in reports.sections]
    if not texts:
        raise DataError(f"{config.reports_path}: no training study has a report to train the language model on")

    inputs = {"manifest": config.manifest_path, "reports": config.reports_path}
    record = provenance("make_tiny_teacher", config.plain(), inputs, machine)
    if not overwrite:
        _keep_what_was_tuned(folder, config.outputs, record)

    # The record comes first: it marks a folder that may be written again, should this be stopped. The hashes of what
    # was made come last: without them the base is refused, and its making advised.
    write_record(folder / MADE_HERE, record)
    made = make_tiny_teacher(folder, texts, config.teacher.tiny or TinyTeacherConfig(), config.seed)
    files = {
        path.name: {"sha256": sha256_file(path)}
        for path in (*base_files(folder), *(folder / name for name in _NOT_HASHED))
    }
    write_record(folder / MADE_HERE, {**record, "made": made, "files": files})
    figures = f"{made['parameters']:,}", made["reports"], made["loss"], made["seconds"]
    log.info("%s: %s parameters, %d reports, %.3f nats per token, %.0f s", folder, *figures)
    return folder


def _keep_what_was_tuned(folder: Path, outputs: Path, record: Mapping[str, Any]) -> None:
    """Refuse to make a base of other reports, settings or seed over one that teachers under `outputs` stand on."""
    from mlx_cxr.models.hub import MADE_HERE

    def made_from(of: Mapping[str, Any]) -> list[Any]:
        files = [of["inputs"][role]["sha256"] for role in ("manifest", "reports")]
        return [*files, of["seed"], of["config"]["teacher"]["tiny"]]

    with suppress(RecordError, KeyError):
        before = read_record(folder / MADE_HERE)
        base = hash_of({name: file["sha256"] for name, file in before["files"].items() if name not in _NOT_HASHED})
        if made_from(before) == made_from(record):
            return
        tuned = []
        for path in sorted(outputs.glob("*/teacher.json")):
            with suppress(RecordError):
                tuned += [str(path.parent)] if read_record(path).get("base_sha256") == base else []
        if tuned:
            raise RunExistsError(
                f"{folder} is the base of {', '.join(tuned[:3])}{' and others' if len(tuned) > 3 else ''}, and the one "
                "to be made now differs from it; set another teacher.base, or pass --overwrite: these teachers can "
                "then no longer be used"
            )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = stage_parser("make_tiny_teacher", __doc__)
    add_config_arguments(parser)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--overwrite", action="store_true", help="replace a base that teachers were tuned on")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    with started(build_parser(), argv) as args:
        run(configuration(args, seed=args.seed), args.overwrite)


if __name__ == "__main__":
    main()
