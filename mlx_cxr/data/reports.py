"""The text of radiology reports: sections by heading, and cleaning. Pure functions; `report_files` reads the files.

MIMIC-CXR's reports have headings in capitals at the start of a line, in hundreds of wordings and misspellings, and
about one in twenty has none that counts. CheXpert's labels were drawn from the Impression, else the Findings, else the
last section (Johnson et al., arXiv:1901.07042), which is the order of `data.report_sections` by default.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

INDICATION, FINDINGS, IMPRESSION, BOTH = "indication", "findings", "impression", "findings_and_impression"
LAST_PARAGRAPH, WHOLE = "last_paragraph", "whole"
BODY, OTHER, EXAMINATION = "body", "other", "examination"
SECTIONS: tuple[str, ...] = (INDICATION, FINDINGS, IMPRESSION, LAST_PARAGRAPH, WHOLE)
"""The parts of a report that can be asked for."""

_KEYWORDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("addendum", ("ADDENDUM", "AMENDMENT")),
    ("wet_read", ("WET", "WETREAD", "PRELIMINARY", "PFI")),
    ("notification", ("NOTIFICATION", "NOTIFICATIONS")),
    ("recommendation", ("RECOMMENDATION", "RECOMMENDATIONS")),
    ("comparison", ("COMPARISON", "COMPARISONS", "COMPARE", "REFERENCE", "PRIOR")),
    (BOTH, ()),
    (IMPRESSION, ("IMPRESSION", "IMPRESSIONS", "CONCLUSION", "CONCLUSIONS", "OPINION")),
    (FINDINGS, ("FINDINGS", "FINDING")),
    (INDICATION, ("INDICATION", "INDICATIONS", "HISTORY", "REASON", "CLINICAL")),
    ("technique", ("TECHNIQUE",)),
    (EXAMINATION, ("EXAMINATION", "EXAM", "EXAMS", "STUDY", "PROCEDURE", "DATE", "ACCESSION")),
)
"""Kinds in order of precedence, and the words in a heading that mark them; `BOTH` takes two of them."""
_KIND_OF_WORD = {word: kind for kind, words in _KEYWORDS for word in words}
_RANK = {kind: rank for rank, (kind, _) in enumerate(_KEYWORDS)}
_VIEW_NOUNS = frozenset({"CHEST", "CXR", "VIEW", "VIEWS", "FILM", "FILMS", "RADIOGRAPH", "RADIOGRAPHS", "X-RAY"})
# fmt: off
_VIEW_WORDS = _VIEW_NOUNS | {
    "PA", "AP", "LATERAL", "LAT", "FRONTAL", "PORTABLE", "BEDSIDE", "UPRIGHT", "ERECT", "SUPINE", "SEMI", "SEMI-ERECT",
    "SEMI-UPRIGHT", "SEMIERECT", "SEMIUPRIGHT", "SINGLE", "ONE", "TWO", "THREE", "OF", "THE", "AND", "&", "WITH",
}
_PLAIN_HEADINGS = frozenset({
    "findings", "finding", "impression", "impressions", "conclusion", "conclusions", "findings and impression",
    "findings/impression", "impression and findings", "indication", "indications", "history", "clinical history",
    "clinical information", "clinical indication", "patient history", "reason for exam", "reason for examination",
    "reason for study", "technique", "comparison", "comparisons", "examination", "exam", "type of examination",
    "procedure", "wet read", "addendum", "recommendation", "recommendations", "recommendation(s)", "notification",
    "notifications", "notification(s)",
})
# fmt: on
"""Headings that also count in mixed case, in the middle of a line, or alone on a line without a colon."""

_HEADER_KINDS = frozenset((INDICATION, "technique", "comparison", EXAMINATION, OTHER))
"""Kinds that end at their first blank line: text that follows without a heading is the report's body."""
_CONTENT_KINDS = frozenset((BODY, OTHER, FINDINGS, IMPRESSION, BOTH))

_LINE_HEADING = re.compile(r"(?m)^[ \t]*([A-Za-z](?:[A-Za-z0-9_ &()/,.'-]|:(?=\d)){1,80}?)[ \t]*(:(?=\s|$)|$)")
_INLINE_HEADING = re.compile(
    r"(?:(?<=\s)|(?<=[.;]))((?:{0})|(?<=[.;] )(?i:{0})|(?<=[.;])(?i:{0})):(?=\s|$)".format(
        "|".join(re.escape(name).upper() for name in sorted(_PLAIN_HEADINGS, key=len, reverse=True))
    )
)
_TITLE = re.compile(
    r"(?m)^[ \t]*(?:(?:FINAL|PRELIMINARY|INTERIM)[ \t]+)?REPORT[ \t]*(?::|$)|FINAL REPORT\b:?|^[ \t]*[_=*-]{8,}[ \t]*$"
)
"""Lines that announce a report, and ruled lines: an open section ends there."""
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_MARK = re.compile(r"[-/]?(?:_{2,}|X{4,}|\[\*\*.*?\*\*\])(?:[-/](?:_{2,}|X{4,})|_{2,}|X{4,})*(?:'s\b|-(?=\w))?")
_NUMBER = re.compile(r"\(?(\d{1,2})[.)](?=\s|[A-Z])[ \t]*")
_BULLET = re.compile(r"[-•*▪·–—][ \t]+(?=\S)")
_INLINE_NUMBER = re.compile(r"(?<=[.;:!?])[ \t]+\(?(\d{1,2})[.)](?=\s|[A-Z])")
_ENDED = tuple(".;:!?")


@dataclass(frozen=True)
class Section:
    """A stretch of a report.

    Attributes:
        kind: `indication`, `findings`, `impression`, `findings_and_impression`, `examination`, `technique`,
            `comparison`, `recommendation`, `notification`, `wet_read`, `addendum`, `other` (a heading of no known
            kind) or `body` (text under no heading).
        heading: as written, without its colon; empty for `body`.
        text: as written, without its heading.
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


def parse_sections(report: str) -> tuple[Section, ...]:
    """A report cut at its headings, in the order written; sections without text are left out.

    Headings are recognized at the start of a line in capitals with a colon, by the words in them (misspelt ones too);
    well-known ones also in mixed case, after a sentence's end in the same line, or alone on a line. A heading that
    only names the views ("PA AND LATERAL CHEST:") opens the findings unless these have begun. Inside findings and
    impression, headings of no known kind ("LUNGS:") stay part of the text. Indication, comparison and the like end at
    their first blank line, so that a report that goes on without a heading does not leak into them.
    """
    report = report.replace("\r\n", "\n").replace("\r", "\n")
    sections: list[Section] = []
    kind, heading, start = BODY, "", 0
    for begin, end, new_kind, name in [*_headings(report), (len(report), len(report), BODY, "")]:
        if begin < start:
            continue
        inside = kind in (FINDINGS, IMPRESSION, BOTH)
        if new_kind in (OTHER, "views"):
            if inside:
                continue
            new_kind = FINDINGS if new_kind == "views" else OTHER
        sections += _closed(kind, heading, report[start:begin])
        kind, heading, start = new_kind, name, end
    return tuple(sections)


def section_texts(report: str) -> dict[str, str]:
    """Each of `SECTIONS`, cleaned; "" where the report lacks it.

    Under a heading "findings and impression" both are the same text. The last paragraph is that of findings, impression
    and text under no heading, never of indication, comparison, recommendation, wet read or addendum.
    """
    sections = parse_sections(report)
    return {name: clean(report) if name == WHOLE else _wanted_text(sections, name) for name in SECTIONS}


def texts_of_sections(parts: Mapping[str, str]) -> dict[str, str]:
    """The same as `section_texts`, from a report that comes in parts.

    A part keeps all of its text, even the heading of another; `whole` is all of them, each under its heading.

    Args:
        parts: of `indication`, `findings` and `impression`, those that there are, as written.
    """
    sections = [Section(name, name.upper(), text) for name in SECTIONS if clean(text := parts.get(name, ""))]
    whole = clean("\n\n".join(f"{section.heading}: {section.text}" for section in sections))
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


@lru_cache(maxsize=16)  # a report's last paragraph is most often its impression
def clean(text: str) -> str:
    """One line of plain text; words, negations, hedges and numbers stay.

    Taken out: line breaks and runs of blanks, de-identification marks (`___`, `XXXX`, `[** **]`), "FINAL REPORT" and
    ruled lines, list numbers ("1.", "2)", "(3)", but not "2.5 cm" nor a number that ends a sentence), bullets, and
    punctuation that these leave behind. A list item or paragraph that ends without a full stop gets one, so that a "no"
    does not reach into the next.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ")
    text = _TITLE.sub("\n\n", text)
    text = _without_list_marks(text)
    text = re.sub(r"(?<=[\w)%'\"])[ \t]*\n[ \t]*\n\s*(?=\S)", ". ", text)
    text = " ".join(_MARK.sub(" ", text).split())
    text = re.sub(r"\(\s*[,;]?\s*\)", "", text)
    text = re.sub(r"\(\s+", "(", text)
    text = re.sub(r"\s+(?=[.,;:)?!])(?!\.\d)", "", text)
    text = re.sub(r"[,;:](?=[,;.])|\.(?=\.)", "", text)
    return " ".join(text.split()).lstrip(".,;: -")


def _wanted_text(sections: Sequence[Section], name: str) -> str:
    if name == LAST_PARAGRAPH:
        paragraphs = (
            paragraph
            for section in reversed(sections)
            if section.kind in _CONTENT_KINDS
            for paragraph in reversed(_BLANK_LINE.split(section.text))
        )
        return next((text for p in paragraphs if not _is_title(p) and (text := clean(p))), "")
    kinds = (name, BOTH) if name in (FINDINGS, IMPRESSION) else (name,)
    return clean("\n\n".join(section.text for section in sections if section.kind in kinds))


def _headings(report: str) -> list[tuple[int, int, str, str]]:
    """(start, end of the heading, kind, name) of everything that looks like one, by position."""
    found = [(match.start(), match.end(), BODY, "") for match in _TITLE.finditer(report)]
    for match in _LINE_HEADING.finditer(report):
        name = " ".join(match[1].split())
        if kind := _kind(name, colon=bool(match[2])):
            found.append((match.start(), match.end(), kind, name))
    for match in _INLINE_HEADING.finditer(report):
        if kind := _kind(match[1].upper(), colon=True):
            found.append((match.start(), match.end(), kind, match[1]))
    return sorted(found)


@lru_cache(maxsize=4096)
def _kind(name: str, colon: bool) -> str | None:
    """The kind of heading that a line begins with; None if it is no heading."""
    plain = name.casefold() in _PLAIN_HEADINGS
    words = re.findall(r"[A-Z&-]+", name.upper())
    if not words or not name[0].isupper() or not (plain or colon):
        return None
    views = len(words) > 1 and _VIEW_WORDS.issuperset(words) and not _VIEW_NOUNS.isdisjoint(words)
    if name != name.upper() and not (plain or views):
        return None
    kinds = {kind for word in words if (kind := _kind_of_word(word))}
    if {FINDINGS, IMPRESSION} <= kinds:
        kinds = kinds - {FINDINGS, IMPRESSION} | {BOTH}
    if kinds:
        return min(kinds, key=_RANK.__getitem__)
    return "views" if views or not _VIEW_NOUNS.isdisjoint(words) else OTHER


def _kind_of_word(word: str) -> str | None:
    if word in _VIEW_WORDS or len(word) < 3:
        return None
    if kind := _KIND_OF_WORD.get(word):
        return kind
    near = difflib.get_close_matches(word, _KIND_OF_WORD, n=1, cutoff=0.8) if len(word) > 5 else []
    return _KIND_OF_WORD[near[0]] if near else None


def _closed(kind: str, heading: str, text: str) -> list[Section]:
    text = text.strip()
    rest = ""
    if kind in _HEADER_KINDS and (blank := _BLANK_LINE.search(text)):
        text, rest = text[: blank.start()], text[blank.end() :].strip()
    if kind == BODY and _is_title(text):
        kind = EXAMINATION
    parts = [Section(kind, heading, text)] if text else []
    return [*parts, *(_closed(BODY, "", rest) if rest else [])]


def _is_title(paragraph: str) -> bool:
    """True for a paragraph that only names the examination: "AP CHEST, 6:00 A.M., ___"."""
    line = paragraph.strip()
    words = set(re.findall(r"[A-Z-]+", line))
    return "\n" not in line and len(line) < 100 and line == line.upper() and not _VIEW_NOUNS.isdisjoint(words)


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
