"""From an experiment's YAML and the command line to plain settings, not yet checked against the schema in `config`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mlx_cxr.errors import UserError


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used; the message names the file, each key and the way out."""


def read_settings(path: str | Path, overrides: Sequence[str], direct: Mapping[str, Any]) -> dict[str, Any]:
    """The keys and values of a YAML file, with those of the command line put in their place.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value` texts; values are parsed as YAML.
        direct: dotted keys written with `__`; None leaves the YAML's value. They win over `overrides`.

    Returns:
        Nested mappings; `${NAME}` and `${NAME:-default}` in texts are replaced by environment variables.

    Raises:
        ConfigError: a missing file, invalid YAML, a key given twice, an override that is none, an unset `${NAME}`.
    """
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        near = ", ".join(sorted(str(p) for p in Path("configs").glob("*.yaml"))) or "none in ./configs"
        raise ConfigError(f"{path}: no such file; configurations here: {near}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(raw).__name__}")
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {text!r}: write it as KEY=VALUE, such as training.epochs=3")
        try:
            parsed = yaml.load(value, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text!r}: not a YAML value: {error}") from None
        _set_key(raw, key, parsed, f"--set {text}")
    for key, value in direct.items():
        if value is not None:
            _set_key(raw, key.replace("__", "."), value, f"--{key}")
    return _expand(raw, path, "")


def _set_key(raw: dict[str, Any], dotted: str, value: Any, origin: str) -> None:
    *parents, last = dotted.split(".")
    node = raw
    for part in parents:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"{origin}: {part!r} is not a section of the configuration")
    node[last] = value


def _expand(value: Any, path: Path, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _expand(item, path, f"{key}.{name}".lstrip(".")) for name, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, path, key) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(3)
        if (found := os.environ.get(name, default)) is None:
            raise ConfigError(
                f"{path}: key '{key}' needs the environment variable {name}; set it, or pass --set {key}=…"
            )
        return found

    return re.sub(r"\$\{(\w+)(:-([^}]*))?\}", replace, value)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `1e-3` is a number, as everyone who writes a learning rate means it.

    A key given twice is an error: PyYAML would keep the second and say nothing.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for position, key in enumerate(keys):
            if key.value in (earlier.value for earlier in keys[:position]):
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
