"""The text of radiology reports: sections by heading, and cleaning. Pure functions; `report_files` reads the files.

MIMIC-CXR's reports have headings in capitals at the start of a line, in hundreds of wordings and misspellings, and
about one in twenty has none that counts. CheXpert's labels were drawn from the Impression, else the Findings, else the
last section (Johnson et al., arXiv:1901.07042), which is the order of `data.report_sections` by default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from mlx_cxr.data.plain_text import plain_text
from mlx_cxr.data.report_headings import (
    BODY,
    BOTH,
    EXAMINATION,
    FINDINGS,
    IMPRESSION,
    INDICATION,
    OTHER,
    SIGNATURE,
    TITLE,
    VIEW_NOUNS,
    VIEWS,
    Heading,
    headings,
)

LAST_PARAGRAPH, WHOLE = "last_paragraph", "whole"
SECTIONS: tuple[str, ...] = (INDICATION, FINDINGS, IMPRESSION, LAST_PARAGRAPH, WHOLE)
"""The parts of a report that can be asked for."""

_HEADER_KINDS = frozenset((INDICATION, "technique", "comparison", EXAMINATION, OTHER))
"""Kinds that end at their first blank line: text that follows without a heading is the report's body."""
_CONTENT_KINDS = frozenset((BODY, OTHER, FINDINGS, IMPRESSION, BOTH))
_ANSWERS = frozenset((FINDINGS, IMPRESSION, BOTH))
"""Kinds that no other section may run into."""

_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_TEXT_MARK = r"\*\*[^\[\]\n]{0,200}?\*\*\]"
_MARK = re.compile(
    rf"[-/_X[](?:(?<=[-/])(?:_{{2,}}|X{{4,}}|\[{_TEXT_MARK})|(?<=_)_+|(?<=X)X{{3,}}|(?<=\[){_TEXT_MARK})"
    r"(?:[-/](?:_{2,}|X{4,})|_{2,}|X{4,})*(?:'s\b|-(?=\w))?"
)
"""De-identification marks. A set of characters comes first, as `re` finds one without a try at each place."""
_MARKUP = re.compile(r"(?<!\[)\*{2,}(?!\])|`+|^ *#{1,6} ", re.MULTILINE)
"""Markdown's bold and code type and the sign of its headings."""
_NUMBER = re.compile(r"\(?(\d{1,2})[.)](?=\s|[A-Z])[ \t]*")
_BULLET = re.compile(r"[-•*▪·–—][ \t]+(?=\S)")
_INLINE_NUMBER = re.compile(r"(?<=[.;:!?])[ \t]+\(?(\d{1,2})[.)](?=\s|[A-Z]|$)")
_NOTHING = frozenset({"", "nan", "none", "na", "n/a", "#n/a", "<na>", "null", "nil", "nat"})
_NEXT_SENTENCE = re.compile(r"[.;?!]\s+\S")
_CAPITAL_INSIDE = re.compile(r"[\w)]\s+(?:[A-Z]|A\s+)[a-z]")
_RESULT = re.compile(
    r"(?<!patient )(?<!pt )(?<!this )\b(?:is|are|appears?|remains?|normal|clear|unremarkable|unchanged|stable"
    r"|negative for|within|no (?:acute|active|change|confluent|consolidation|definite|effusion|evidence|focal|large"
    r"|lobar|pleural|pneumothorax|significant|typical|visible))\b",
    re.IGNORECASE,
)
"""The words of a result: in 99.9 % of the findings and 0.2 % of the indications of the Open-I reports that they were
chosen on."""
_MARGIN = 72
"""Characters that a full line has at least, where nothing but a few short lines show how wide the report is."""
_ENDED = tuple(".;:!?")


@dataclass(frozen=True)
class Section:
    """A stretch of a report.

    Attributes:
        kind: `indication`, `findings`, `impression`, `findings_and_impression`, `examination`, `technique`,
            `comparison`, `recommendation`, `notification`, `wet_read`, `addendum`, `signature`, `other` (a heading
            of no known kind) or `body` (text under no heading).
        heading: as written, without its colon; empty for `body`.
        text: plain text, without its heading.
    """

    kind: str
    heading: str
    text: str


def decode(data: bytes) -> tuple[str, bool]:
    """A report's text, and whether it was UTF-8 (plain ASCII is); if not, it is read as Windows-1252, or UTF-16."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace"), False
    try:
        return data.decode("utf-8-sig"), True
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace"), False


def is_no_report(text: str) -> bool:
    """True for a text that says nothing: blank, or a word that tables write for an empty cell."""
    return len(text) < 100 and plain_text(text).strip().casefold() in _NOTHING


def parse_sections(report: str) -> tuple[Section, ...]:
    """A report cut at its headings, in the order written; sections without text are left out.

    Markup and escapes are undone first (`plain_text`). Headings are recognized at the start of a line in capitals with
    a colon, by the words in them (misspelt ones too); those of known words in any letters, anywhere in a line, with a
    colon, a dash, in bold type or alone on a line (`report_headings`). A heading that only names the views ("PA AND
    LATERAL CHEST:") opens the findings unless these have begun. Inside findings and impression, headings of no known
    kind ("LUNGS:") stay part of the text. Who signed and typed the report ends any section.

    Indication, comparison and the like end at their first blank line, so that a report that goes on without a heading
    does not leak into them. Where no findings are named, an indication ends with a first line that had room for more;
    and if it goes on with a result, or to the end of a report that names no impression either, it is none.
    """
    return _parse(plain_text(report))


def _parse(report: str) -> tuple[Section, ...]:
    sections: list[Section] = []
    kind, name, begin, start, answered = BODY, "", 0, 0, False
    found = [*headings(report), Heading(len(report), len(report), BODY, "")]
    named = {heading.kind for heading in found if heading.sure}
    unnamed = named.isdisjoint((FINDINGS, BOTH, VIEWS))
    width = max(map(len, report.split("\n")))
    margin = max(width, _MARGIN) if unnamed and IMPRESSION not in named else width
    for heading in found:
        inside = kind in _ANSWERS
        if heading.start < start or (inside and heading.kind in (OTHER, VIEWS)):
            continue
        if inside and not heading.firm and heading.kind not in _ANSWERS:
            continue
        # In doubt an indication ends, and findings go on.
        if not heading.sure and (kind not in _HEADER_KINDS or heading.kind not in _ANSWERS):
            continue
        text = report[start : heading.start]
        if unnamed and kind == INDICATION and not text.lstrip(" ").startswith("\n"):
            text = _with_breaks(report[begin : heading.start], width, margin)[start - begin :]
        closed = _closed(kind, name, text, answered)
        answered = answered or not _ANSWERS.isdisjoint(section.kind for section in closed)
        sections += closed
        kind, name = FINDINGS if heading.kind == VIEWS else heading.kind, heading.name
        begin, start = heading.start, heading.end
    for i, section in enumerate(sections):
        last = not answered and i == len(sections) - 1
        if (unnamed or last) and section.kind == INDICATION and _holds_findings(section.text, last):
            sections[i] = replace(section, kind=BODY)
    return tuple(sections)


def section_texts(report: str) -> dict[str, str]:
    """Each of `SECTIONS`, cleaned; "" where the report lacks it.

    Under a heading "findings and impression" both are the same text. The last paragraph is that of findings, impression
    and text under no heading, never of indication, comparison, recommendation, wet read or addendum.
    """
    report = plain_text(report)
    sections = _parse(report)
    return {name: _cleaned(report) if name == WHOLE else _wanted_text(sections, name) for name in SECTIONS}


def texts_of_sections(parts: Mapping[str, str]) -> dict[str, str]:
    """The same as `section_texts`, from a report that comes in parts.

    A part keeps all of its text, even the heading of another; but findings and impression inside an indication are
    taken out of it, and are what their headings say. `whole` is all of them, each under its heading.

    Args:
        parts: of `indication`, `findings` and `impression`, those that there are, as written.
    """
    written = {name: plain_text(parts.get(name, "")) for name in SECTIONS}
    indication = written[INDICATION]
    answer = next(
        (h.start for h in headings(indication) if h.kind in _ANSWERS and (h.firm or h.name.isupper())), len(indication)
    )
    written[INDICATION] = indication[:answer]
    sections = [Section(name, name.upper(), text) for name, text in written.items() if _cleaned(text)]
    sections += _parse(indication[answer:])
    whole = _cleaned("\n\n".join(f"{section.heading}: {section.text}" for section in sections))
    return {name: whole if name == WHOLE else _wanted_text(sections, name) for name in SECTIONS}


def joined_text(texts: Mapping[str, str], wanted: Sequence[str], mode: str = "first") -> tuple[str, tuple[str, ...]]:
    """The text of a report that goes with an image, and the sections of `wanted` that it came from.

    The arguments are those of `select`. A text that serves as two sections is given once; ("", ()) when the report has
    none of them.
    """
    served = tuple(name for name in wanted if texts.get(name))[: 1 if mode == "first" else None]
    return " ".join(text for _, text in select(texts, wanted, mode)), served


def select(texts: Mapping[str, str], wanted: Sequence[str], mode: str = "first") -> list[tuple[str, str]]:
    """The sections of a report that may be read.

    Args:
        texts: section -> cleaned text; one that the report lacks is "" or not there.
        wanted: sections in the order of preference.
        mode: `first`: the first of `wanted` that the report has. `all`: all of them.

    Returns:
        (section, text) in the order of `wanted`; a text that serves as two of them is given once, as the first. Empty
        when the report has none of them.
    """
    chosen: dict[str, str] = {}
    for name in wanted:
        if text := texts.get(name, ""):
            chosen.setdefault(text, name)
    pairs = [(name, text) for text, name in chosen.items()]
    return pairs[:1] if mode == "first" else pairs


def has_headings(report: str) -> bool:
    """True for a text with a findings or impression heading, which makes it a report and not a note."""
    return any(section.kind in (FINDINGS, IMPRESSION, BOTH) for section in parse_sections(report))


def clean(text: str) -> str:
    """One line of plain text; words, negations, hedges and numbers stay.

    Taken out: markup and escapes (`plain_text`), line breaks and runs of blanks, de-identification marks (`___`,
    `XXXX`, `[** **]`), "FINAL REPORT" and ruled lines, list numbers ("1.", "2)", "(3)", but not "2.5 cm" nor a number
    that ends a sentence), bullets, and punctuation that these leave behind. A list item or paragraph that ends without
    a full stop gets one, so that a "no" does not reach into the next.
    """
    return _cleaned(plain_text(text))


@lru_cache(maxsize=16)  # a report's last paragraph is most often its impression
def _cleaned(text: str) -> str:
    text = TITLE.sub("\n\n", text)
    text = (_MARKUP.sub("", text) if "*" in text or "`" in text or "#" in text else text).lstrip(" \n,;:|~=")
    text = _without_list_marks(text)
    if "\n" in text:
        text = re.sub(r"(?<=[\w)%'\"])[ \t]*\n[ \t]*\n\s*(?=\S)", ". ", text)
    text = " ".join(_MARK.sub(" ", text).split())
    text = re.sub(r"\(\s*[,;]?\s*\)", "", text)
    text = re.sub(r"\(\s+", "(", text)
    text = re.sub(r"\s+(?=[.,;:)?!])(?!\.\d)", "", text)
    text = re.sub(r"[,;:](?=[,;.])|\.(?=\.)", "", text)
    return " ".join(text.split()).lstrip(".,;: -|~=").rstrip(" -|~=")


def _wanted_text(sections: Sequence[Section], name: str) -> str:
    if name == LAST_PARAGRAPH:
        paragraphs = (
            paragraph
            for section in reversed(sections)
            if section.kind in _CONTENT_KINDS
            for paragraph in reversed(_BLANK_LINE.split(section.text))
        )
        return next((text for p in paragraphs if not _is_title(p) and (text := _cleaned(p))), "")
    kinds = (name, BOTH) if name in (FINDINGS, IMPRESSION) else (name,)
    return _cleaned("\n\n".join(section.text for section in sections if section.kind in kinds))


def _closed(kind: str, heading: str, text: str, answered: bool) -> list[Section]:
    text = text.strip()
    rest = ""
    # What follows a signature belongs to it, unless it stands before the report.
    short = kind in _HEADER_KINDS or (kind == SIGNATURE and not answered)
    if short and (blank := _BLANK_LINE.search(text)):
        text, rest = text[: blank.start()], text[blank.end() :].strip()
    if kind == BODY and _is_title(text):
        kind = EXAMINATION
    parts = [Section(kind, heading, text)] if text else []
    return [*parts, *(_closed(BODY, "", rest, answered) if rest else [])]


def _with_breaks(text: str, width: int, margin: int) -> str:
    """A text with a blank line where its first line ends though the next word had found room: where no findings are
    named, they may begin there. A next line with a capital has `margin` to find room in, any other `width`."""
    line, _, rest = text.partition("\n")
    word = next(iter(rest.split(maxsplit=1)), "")
    room = (margin if word[:1].isupper() else width) - len(line) - 1
    return f"{line}\n\n{rest}" if word and len(word) <= room else text


def _holds_findings(indication: str, last: bool) -> bool:
    """True where one goes on with a result; or, if nothing after it can hold the answer, where it tells a result or may
    have a second sentence, even without a full stop before it."""
    more = _NEXT_SENTENCE.search(indication)
    if last:
        return bool(more or _RESULT.search(indication) or _CAPITAL_INSIDE.search(indication))
    return bool(more and _RESULT.search(indication, more.start()))


def _is_title(paragraph: str) -> bool:
    """True for a paragraph that only names the examination: "AP CHEST, 6:00 A.M., ___"."""
    line = paragraph.strip()
    words = set(re.findall(r"[A-Z-]+", line))
    return "\n" not in line and len(line) < 100 and line == line.upper() and not VIEW_NOUNS.isdisjoint(words)


def _without_list_marks(text: str) -> str:
    """Take out list numbers, only in sequence from 1 and where an item can begin, so that no figure is lost."""
    lines: list[str] = []
    expected, bullets, blank = 1, False, True
    for line in text.split("\n"):
        line = line.strip()
        fresh = blank or _last_ends(lines)
        number, bullet = _NUMBER.match(line), _BULLET.match(line)
        if number and (int(number[1]) == expected > 1 or (int(number[1]) == 1 and fresh)):
            expected = int(number[1]) + 1
            _end_sentence(lines)
            line = line[number.end() :]
        elif bullet and (fresh or bullets):
            bullets = True
            _end_sentence(lines)
            line = line[bullet.end() :]
        line, expected = _without_inline_numbers(line, expected)
        blank = not line
        lines.append(line)
    return "\n".join(lines)


def _without_inline_numbers(line: str, expected: int) -> tuple[str, int]:
    def replace(match: re.Match[str]) -> str:
        nonlocal expected
        if int(match[1]) not in (1, expected):
            return match[0]
        expected = int(match[1]) + 1
        return " "

    return _INLINE_NUMBER.sub(replace, line), expected


def _last_ends(lines: Sequence[str]) -> bool:
    return not lines or not lines[-1] or lines[-1].endswith(_ENDED)


def _end_sentence(lines: list[str]) -> None:
    if not _last_ends(lines):
        lines[-1] += "."
