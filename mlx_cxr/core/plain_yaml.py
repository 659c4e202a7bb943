"""YAML of configurations: plain keys and values, read within a second or refused with a sentence.

YAML 1.1 as PyYAML reads it, with these differences. Keys are text as they are written (`yes`, `10` or `2020-01-01` as
the name of a column), and one given twice is an error. `1e-3` is a number, as everyone who writes a learning rate means
it. A date is text. Tags, and aliases by which a text of a page becomes gigabytes or contains itself, are refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mlx_cxr.core.errors import UserError

LARGEST_BYTES = 128 << 10
"""Of a file; the samples have 3,000. PyYAML takes about a second for so many."""
_MOST_VALUES, _DEEPEST, _LONGEST_NUMBER, _LONGEST_TEXT = 20_000, 20, 40, 8_192
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_UNREADABLE = re.compile("[\0\ud800-\udfff]")


class YamlError(UserError, ValueError):
    """YAML that cannot be used; the message names the file and the line, and is one line."""


def read_yaml_file(path: Path) -> Any:
    """Plain data of a YAML file.

    Raises:
        FileNotFoundError: no such file.
        YamlError: not a file, too large, not UTF-8, or as `read_yaml`.
    """
    if path.exists() and not path.is_file():
        raise YamlError(f"{path} is not a file; give a configuration such as configs/demo.yaml")
    with path.open("rb") as file:
        content = file.read(LARGEST_BYTES + 1)
    if len(content) > LARGEST_BYTES:
        raise YamlError(f"{path} has more than {LARGEST_BYTES:,} bytes; is it a configuration?")
    try:
        return read_yaml(content.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise YamlError(f"{path}: not valid YAML: line {line} is not UTF-8; save it as UTF-8") from None


def read_yaml(text: str, where: str) -> Any:
    """Plain data of a YAML text: None, bool, int, float and str, in lists and in mappings with text as keys.

    Raises:
        YamlError: it is not YAML, or holds what is refused here; begins with `where`.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.plain(node)
    except _RefusedError as error:
        raise YamlError(f"{where}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise YamlError(f"{where}: not valid YAML: {line}{_one_line(error.problem or error.context)}") from None
    except yaml.reader.ReaderError as error:
        line, what = text.count("\n", 0, error.position) + 1, f"the character U+{error.character:04X} cannot stand here"
        raise YamlError(f"{where}: not valid YAML: line {line}: {what}") from None
    except RecursionError:
        raise YamlError(f"{where}: lists and keys stand in each other more than {_DEEPEST} deep") from None


def shorten(text: str) -> str:
    """A text between quotes, for a message; of a long one the beginning."""
    return repr(text if len(text) <= 60 else f"{text[:60]}…")


class _RefusedError(Exception):
    def __init__(self, node: yaml.Node, fault: str) -> None:
        super().__init__(f"line {node.start_mark.line + 1}: {fault}")


class _Loader(yaml.SafeLoader):
    """Parses as PyYAML does, and makes plain data of the parsed nodes itself."""

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        # PyYAML takes seconds for a few thousand open brackets.
        if self.flow_level > _DEEPEST:
            raise RecursionError
        super().fetch_flow_collection_start(token)

    def plain(self, node: yaml.Node, depth: int = 0) -> Any:
        # Counted here, where aliases are written out: a text with nine levels of nine aliases ends at the limit.
        self.values = getattr(self, "values", 0) + 1
        if self.values > _MOST_VALUES:
            raise _RefusedError(node, f"more than {_MOST_VALUES:,} values, aliases written out")
        if depth > _DEEPEST:
            raise _RefusedError(node, f"lists and keys stand in each other more than {_DEEPEST} deep, or in themselves")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if node.tag != self.resolve(type(node), None, True):
            raise _RefusedError(
                node, f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} is not used here; remove it"
            )
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, depth + 1) for item in node.value]
        return self._mapping(node, depth)

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _RefusedError(key, "a list or a mapping stands as a key; a key is a name")
            if key.value in own:
                raise _RefusedError(key, f"key {shorten(key.value)} stands twice")
            inside = self.plain(value, depth + 1)
            if key.tag != "tag:yaml.org,2002:merge":
                self._check_text(key)
                own[key.value] = inside
                continue
            # Of several sources the first that has a key gives it, and the mapping's own keys win.
            for source in inside if isinstance(inside, list) else [inside]:
                if not isinstance(source, dict):
                    raise _RefusedError(value, "'<<' takes the keys of a mapping, or of a list of mappings")
                merged = {**source, **merged}
        return {**merged, **own}

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        self._check_text(node)
        if node.tag not in _NUMBERS:
            return self.construct_object(node)
        if len(node.value) > _LONGEST_NUMBER:
            raise _RefusedError(node, f"a number of {len(node.value):,} digits")
        try:
            return self.construct_object(node)
        except (ValueError, OverflowError):
            raise _RefusedError(node, f"{shorten(node.value)} is not a number") from None

    def _check_text(self, node: yaml.ScalarNode) -> None:
        if node.tag not in ("tag:yaml.org,2002:str", self.resolve(yaml.ScalarNode, node.value, (True, False))):
            raise _RefusedError(
                node, f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} is not used here; remove it"
            )
        if len(node.value) > _LONGEST_TEXT:
            raise _RefusedError(node, f"a text of {len(node.value):,} characters; is this a configuration?")
        if _UNREADABLE.search(node.value):
            raise _RefusedError(node, f"{shorten(node.value)} has a character that no name or path can have")


# A date stays text, and a number may have an exponent without a point.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _one_line(problem: object) -> str:
    return " ".join(str(problem).split())[:200]
