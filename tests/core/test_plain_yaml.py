"""YAML that is read as it is written, and YAML that is refused at once, with its line."""

from __future__ import annotations

import time

import pytest
import yaml

from mlx_cxr.core.plain_yaml import LARGEST_BYTES, YamlError, read_yaml, read_yaml_file


def laughs(leaf: str, node: str) -> str:
    """Nine levels, each of nine aliases of the level below: 9 ** 9 values where they are written out."""
    lines = [f"v0: &v0 {leaf}"]
    for level in range(1, 10):
        lines.append(f"v{level}: &v{level} {node.replace('_', ', '.join([f'*v{level - 1}'] * 9))}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (laughs("[x]", "[_]"), "more than 20,000 values, aliases written out"),
        (laughs("{x: 1}", "{<<: [_]}"), "more than 20,000 values, aliases written out"),
        (laughs("[x]", "{? [_] : 1}"), "line 2: a list or a mapping stands as a key"),
        ("a: 1\nb: &b [*b]", "line 2: lists and keys stand in each other more than 20 deep, or in themselves"),
        ("&a {k: *a}", "line 1: lists and keys stand in each other"),
        ("&a {<<: *a}", "line 1: lists and keys stand in each other"),
        ("a: 1\n[b]: 1", "line 2: a list or a mapping stands as a key"),
        ("a: 1\nb:\n  c: 1\n  c: 2", "line 4: key 'c' stands twice"),
        ("a: 1\n!!binary aGVsbG8=: 1", "line 2: the tag !!binary is not used here"),
        ("a: !!binary aGVsbG8=", "line 1: the tag !!binary"),
        ("a: !!timestamp 2020-13-45", "line 1: the tag !!timestamp"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: the tag !!python/object/apply:os.system"),
        ("a: !!set {x, y}", "line 1: the tag !!set"),
        ("a: !!int abc", "line 1: the tag !!int"),
        (f"a: 1\nb: {'9' * 5000}", "line 2: a number of 5,000 digits"),
        (f"b: 0x{'f' * 5000}", "line 1: a number of 5,002 digits"),
        (f"b: 1{':59' * 3000}", "a text of 9,001 characters"),
        ("b: 0b_", "line 1: '0b_' is not a number"),
        ("a: " + "[" * 5000 + "]" * 5000, "more than 20 deep"),
        ("a: " + "{b: " * 5000, "more than 20 deep"),
        ("- " * 20_000, "more than 20 deep"),
        ("? " * 20_000, "more than 20 deep"),
        ('a: "x\\0y"', "line 1: 'x\\x00y' has a character"),
        ('a: "\\ud800"', "has a character that no name or path can have"),
        ("a: 1\nb: \x01", "line 2: the character U+0001 cannot stand here"),
        ("a: 1\nb: *c", "line 2: found undefined alias"),
        ("a: 1\n---\nb: 1", "line 2: but found another document"),
        ("a: {<<: 3}", "line 1: '<<' takes the keys of a mapping"),
    ],
    ids=lambda value: None if len(value) > 40 else value,
)
def test_it_is_refused_within_a_second_and_in_one_line(text, words):
    begun = time.perf_counter()
    with pytest.raises(YamlError) as refused:
        read_yaml(text, "c.yaml")
    assert time.perf_counter() - begun < 1
    message = str(refused.value)
    assert message.startswith("c.yaml: ")
    assert words in message
    assert len(message.splitlines()) == 1


def test_values_are_those_of_pyyaml():
    text = (
        "a: [1, -2, 0x1F, 1_000, 2.5, .5, true, No, ~, null, '1', \"tab\\t\", text with blanks]\n"
        "b: &b {c: 1, d: {e: []}}\nf: {<<: *b, c: 2}\ng: {<<: [{x: 1}, {x: 2, y: 3}], z: 4}\nh: *b\n"
        "i: |\n  two\n  lines\n'j': {}\n"
    )
    assert read_yaml(text, "") == yaml.safe_load(text)
    assert read_yaml("", "") is None
    assert read_yaml("3", "") == 3


def test_keys_and_dates_are_text_as_written():
    """PyYAML makes a date, True, 8 and None of these, which as names of columns would be others."""
    found = read_yaml("2020-01-01: a\nyes: b\n010: c\n~: d\nwhen: 2020-01-31\nnever: 2020-99-99\n", "")
    assert found == {"2020-01-01": "a", "yes": "b", "010": "c", "~": "d", "when": "2020-01-31", "never": "2020-99-99"}


def test_files_that_are_none(tmp_path):
    (tmp_path / "large.yaml").write_text("a: 1\n" * LARGEST_BYTES)
    with pytest.raises(YamlError, match=r"large\.yaml has more than 131,072 bytes"):
        read_yaml_file(tmp_path / "large.yaml")
    with pytest.raises(YamlError, match="is not a file"):
        read_yaml_file(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("a: 1\nname: Röntgen\n".encode("latin-1"))
    with pytest.raises(YamlError, match=r"latin\.yaml: not valid YAML: line 2 is not UTF-8"):
        read_yaml_file(tmp_path / "latin.yaml")


def test_a_file_of_the_largest_size_is_read_in_seconds(tmp_path):
    (tmp_path / "c.yaml").write_text("".join(f"column {i:05}: Edema\n" for i in range(5900)))
    begun = time.perf_counter()
    assert len(read_yaml_file(tmp_path / "c.yaml")) == 5900
    assert time.perf_counter() - begun < 10
