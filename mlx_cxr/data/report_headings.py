"""The places where a report's sections begin: its headings, and the lines of those who signed it.

A heading is a phrase of a report's own words ("Findings", "Reason for exam", "CLINICAL HISTORY") with a mark after
it: a colon, a dash, bold type, the end of its line. The same words in running text ("Findings consistent with ...")
have none. Where the mark is weak or the letters do not tell, it has to begin a sentence, or look like those that do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from string import ascii_lowercase, ascii_uppercase
from typing import NamedTuple

INDICATION, FINDINGS, IMPRESSION, BOTH = "indication", "findings", "impression", "findings_and_impression"
BODY, OTHER, EXAMINATION, SIGNATURE, VIEWS = "body", "other", "examination", "signature", "views"

# fmt: off
_KEYWORDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (SIGNATURE, ("RADIOLOGIST", "ATTENDING", "PHYSICIAN", "SIGNATURE", "TRANSCRIPTIONIST", "SIGNED", "DICTATED",
                 "TRANSCRIBED")),
    ("addendum", ("ADDENDUM", "AMENDMENT")),
    ("wet_read", ("WET", "WETREAD", "PRELIMINARY", "PFI")),
    ("notification", ("NOTIFICATION", "NOTIFICATIONS", "COMMUNICATION")),
    (EXAMINATION, ("DATE", "ACCESSION", "TIME", "STATUS")),
    (BOTH, ()),
    (IMPRESSION, ("IMPRESSION", "IMPRESSIONS", "CONCLUSION", "CONCLUSIONS", "OPINION", "ASSESSMENT")),
    (FINDINGS, ("FINDINGS", "FINDING", "OBSERVATION", "OBSERVATIONS")),
    ("recommendation", ("RECOMMENDATION", "RECOMMENDATIONS", "PLAN")),
    ("comparison", ("COMPARISON", "COMPARISONS", "COMPARE", "REFERENCE", "PRIOR")),
    (INDICATION, ("INDICATION", "INDICATIONS", "HISTORY", "REASON", "CLINICAL", "COMPLAINT", "COMPLAINTS", "SYMPTOMS",
                  "CHIEF", "PRESENTING", "ADMITTING", "REFERRING", "PROVISIONAL", "WORKING", "PREOPERATIVE")),
    ("technique", ("TECHNIQUE",)),
    ("?impression", ("SUMMARY", "DIAGNOSIS", "DIAGNOSES")),
    ("?findings", ("RESULT", "RESULTS")),
    ("?impression", ("INTERPRETATION",)),
    ("?findings", ("COMMENT", "COMMENTS")),
    (EXAMINATION, ("EXAMINATION", "EXAM", "EXAMS", "STUDY", "PROCEDURE", "PATIENT")),
    (FINDINGS, ("DESCRIPTION", "NARRATIVE")),
    (BODY, ("REPORT",)),
)
# fmt: on
"""Kinds in order of precedence, and the words in a heading that mark them; `BOTH` takes two of them."""
_EITHER = {
    "?findings": (FINDINGS, IMPRESSION),
    "?impression": (IMPRESSION, FINDINGS),
    "?indication": (INDICATION, FINDINGS, IMPRESSION),
}
"""Kinds of words that stand for the first of these sections that the report does not name otherwise, and for none if it
names all. `?indication` is of two words, as in "clinical summary"."""
_NO_SLIPS = frozenset({"COMPLIANT", "FUNDING", "PATENT", "PREVENTING", "RESORT", "STATES", "WORDING"})
"""Words that are a letter from one in a heading and mean something else: "AIRWAYS PATENT:" is no patient."""
_RANK_OF_BOTH = [kind for kind, _ in _KEYWORDS].index(BOTH)
_NAMED_ALONE = frozenset((INDICATION, FINDINGS, IMPRESSION, BOTH))
_KIND_OF_WORD = {word: (rank, kind) for rank, (kind, words) in enumerate(_KEYWORDS) for word in words}
VIEW_NOUNS = frozenset({"CHEST", "CXR", "VIEW", "VIEWS", "FILM", "FILMS", "RADIOGRAPH", "RADIOGRAPHS", "X-RAY"})
# fmt: off
_VIEW_WORDS = VIEW_NOUNS | {
    "PA", "AP", "LATERAL", "LAT", "FRONTAL", "PORTABLE", "BEDSIDE", "UPRIGHT", "ERECT", "SUPINE", "SEMI", "SEMI-ERECT",
    "SEMI-UPRIGHT", "SEMIERECT", "SEMIUPRIGHT", "SINGLE", "ONE", "TWO", "THREE", "OF", "THE", "AND", "&", "WITH",
}
_ADJECTIVES = (
    "clinical", "patient", "patient's", "medical", "relevant", "brief", "pertinent", "past", "present", "chief",
    "presenting", "admitting", "referring", "provisional", "working", "preoperative", "final", "preliminary",
    "radiologic", "radiological", "radiology", "radiographic", "radiologist's", "imaging", "diagnostic", "overall",
    "type of", "date of", "reason for", "history of", "comparison", "reference", "prior", "wet", "critical", "reading",
    "x-ray", "cxr", "this", "the",
)
_NOUNS = (
    "details", "information", "info", "data", "question", "questions", "background", "notes", "problem", "request",
    "read", "film", "films", "findings", "finding", "impression", "impressions", "conclusion",
    "conclusions", "opinion", "assessment", "observation", "observations", "indication", "indications", "history",
    "reason", "complaint", "complaints", "symptoms", "technique", "comparison", "comparisons", "examination", "exam",
    "exams", "study", "procedure", "wetread", "addendum", "recommendation", "recommendations", "plan", "notification",
    "notifications", "interpretation", "summary", "diagnosis", "diagnoses", "result", "results", "comment", "comments",
    "description", "narrative", "report", "radiologist", "attending", "physician", "signature", "transcriptionist",
    "signed", "dictated", "transcribed",
)
_NOT_ITS_OWN = tuple(f"{word} " for word in (
    "cxr", "x-ray", "patient", "preoperative", "present", "past", "prior", "comparison", "reference",
))
_BEFORE_PROSE = frozenset({
    "a", "an", "the", "this", "that", "these", "those", "such", "no", "any", "some", "other", "additional",
    "following", "and", "or", "but", "of", "with", "for", "to", "in", "on", "by", "from",
    "as", "is", "are", "was", "were", "has", "have", "had", "dr",
})
# fmt: on
"""Words that a phrase goes on from: what follows them is no heading where the letters do not say so. `_NOT_ITS_OWN` are
the adjectives of headings that end a phrase as well ("male, preoperative comparison: none")."""


def _any_of(words: Iterable[str]) -> str:
    """A pattern of any of the words, the longest first; by first letter, which `re` rejects without a try."""
    tails: dict[str, list[str]] = {}
    for word in sorted(words, key=len, reverse=True):
        tails.setdefault(word[0], []).append(re.escape(word[1:]))
    return "|".join(f"(?-i:[{first}{first.upper()}])(?:{'|'.join(rest)})" for first, rest in tails.items())


_PHRASE = rf"(?:(?:{_any_of(_ADJECTIVES)})\ ){{0,3}}(?:{_any_of(_NOUNS)})(?:\(s\)|\b)"
_DASH = r"(?:[-\u2010-\u2015\u2212]{1,2}>?|=>?|\|)"
_KNOWN_HEADING = re.compile(
    rf"""(?<![A-Za-z0-9])(?P<name>(?:{_PHRASE})(?:(?:\ ?[/&+,]\ ?|\ (?:and|or|for|of)\ )(?:{_PHRASE})){{0,2}}
    |(?-i:[A-Z])[A-Za-z]{{5,15}}(?=\ ?:))
    (?P<marked>[*_\]"'`|>\#=~]{{0,6}})
    (?:(?P<colon>\ {{0,2}}:[*_`"']{{0,3}})
      |(?P<dash>\ ?{_DASH}\ +|\ +{_DASH}\ ?|\ ?[\u2013\u2014]|-(?=(?-i:[A-Z])))
      |(?P<line>\ *(?=\n|\Z))
      |(?P<bold>(?<=[*_\]|=~\#]))
      |(?P<gap>\ \ (?=\S))
      |(?P<none>\.?\ (?=\S)))
    (?:\n\ *[-=_*~^]{{2,}}\ *(?=\n|\Z))?""",
    re.IGNORECASE | re.VERBOSE,
)
"""A phrase of heading words, or one capitalized word that may be misspelt, with what makes it a heading."""
_LINE_HEADING = re.compile(
    r"(?m)^[ \t]*[#*_>]{0,6} ?([A-Za-z](?:[A-Za-z0-9_ &()/,.'-]|:(?=\d)){1,80}?)[*_]{0,3}[ \t]{0,2}:[*_]{0,3}(?=\s|$)"
)
_MARKS = "*_#[|~=<{\"'`,"
"""What may stand right before a heading and belongs to it."""
_OPENED = re.compile(r"(?:^|\n) *((?:[#>*|=~\u2022-]{1,6} ?|\(?\d{1,2}[.)] ?)+)$")
"""The signs and numbers that a line of a heading begins with."""
TITLE = re.compile(
    r"(?m)^[ \t]*(?:(?:FINAL|PRELIMINARY|INTERIM)[ \t]+)?REPORT[ \t]*(?::|$)|FINAL REPORT\b:?|^[ \t]*[_=*-]{8,}[ \t]*$"
)
"""Lines that announce a report, and ruled lines: an open section ends there."""

_NAME = r"(?:(?!D[Rr]\.?\ )(?:(?:[A-Z][a-z]{0,2}\.-?){1,3}|[A-Z_][\w'-]*))"
"""A word of a name, or initials; a longer word with a full stop is a sentence ("Negative.", "COPD.")."""
_DAY = (
    r"(?:\d{1,4}[-/.]\d{1,2}[-/.]\d{2,4}|\d{1,2}[- ][A-Z][A-Za-z]{2,8}[- ,]{1,2}\d{2,4}"
    r"|[A-Z][a-z]{2,8}\.?\ \d{1,2},?\ \d{4})"
)
_WHEN = rf"(?:{_DAY}(?:[ ,T]{{1,3}}(?:at\ )?\d{{1,2}}:\d{{2}}(?::\d{{2}})?(?:\ ?[AaPp]\.?[Mm]\.?)?)?)"
_DEGREE = r"(?:M\.?D\.?|D\.?O\.?|M\.?B\.?B\.?S\.?|M\.?B\.?Ch\.?B\.?|Ph\.?D\.?|FRCR|FRANZCR|FRCPC|FACR|MBBCh)"
# fmt: off
_DONE = _any_of((
    "dictated", "signed", "cosigned", "co-signed", "transcribed", "authenticated", "verified", "approved", "finalised",
    "finalized", "interpreted", "read", "reviewed", "reported", "released", "typed", "attested", "validated", "edited",
))
_AROUND = _any_of((
    "this", "the", "final", "report", "study", "examination", "exam", "was", "has", "been", "electronically",
    "digitally", "preliminarily", "and", "&", "/",
))
# fmt: on
_SIGNATURE = re.compile(
    rf"""(?:(?m:^)\ *|(?<=[.;:!?)])\ {{1,2}})(?P<words>[*_]{{0,3}}(?:
    (?i:(?:(?:{_AROUND}|{_DONE})[ ]?){{0,8}}(?:{_DONE})
        (?:\ electronically|\ digitally)?(?:\ by\b|\ on\ \d|\ at\ \d|\ date\b|:))
    |(?i:I,?\ (?:the\ attending|(?:have\ )?personally|have\ reviewed|attest|certify)\b)
    |(?i:as\ the\ (?:attending|teaching)\b)
    |(?i:electronic(?:ally)?\ sign)
    |(?:D|T|R|DD|DT|TD|TT|TR)\ ?[:=]\ ?\d{{1,4}}[-/]\d|(?i:job\ ?(?:id|no\.?|number|\#)\ ?[:\#]?\ ?\w)
    |(?:Dr\.?\ |DR\.?\ )?{_NAME}(?:\ {_NAME}){{0,3}}?,?\ {_DEGREE}(?:,?\ {_DEGREE}){{0,3}}
        [ ,.;/:()\d]{{0,40}}(?:{_WHEN}\ *)?(?m:$)
    |(?P<weak>(?:Dr\.?|DR\.?)\ {_NAME}(?:\ {_NAME}){{0,2}}[ ,.]{{0,3}}(?:{_WHEN}\ *)?(?m:$)(?!\n\ *[a-z])
        |(?i:(?:date|time|on)\ ?:?\ ?)?{_WHEN}\ *\.?(?m:$))))""",
    re.VERBOSE,
)
"""Who dictated, read, signed or typed a report, and when; it begins a line or follows a sentence."""
_SIGNED_INLINE = re.compile(
    rf"""(?<=\ )(?:(?:E|e)lectronically\ signed|(?:Dictated|Signed|Transcribed|Authenticated|Verified|Approved|Finalized
    |Interpreted|Reported|Reviewed)(?:\ (?:and|&)\ \w+)?(?:\ electronically)?(?:\ by\b|:)
    |(?:Dr\.?|DR\.?)\ {_NAME}(?:\ {_NAME}){{0,2}},?\ {_DEGREE}[ ,.]{{0,3}}(?:{_WHEN}\ *)?(?m:$))""",
    re.VERBOSE,
)
"""The same within a line, after a section without a full stop; in letters that leave no doubt."""
_SENTENCE_END = re.compile(r"[.;?!]\s")
_SMALL, _CAPITAL = ascii_lowercase.encode(), ascii_uppercase.encode()
_OPENS = re.compile(r"[A-Z][a-z]|A |X{4}|_{2}|\[\*\*|\d")
"""The begin of a section's text, where nothing but capitals tells its heading from it."""
_ENDS = '.;:!?|~>*)]"'


class Heading(NamedTuple):
    """A place where a section begins.

    Attributes:
        start, end: of the heading in the text, its marks included.
        kind: one of `reports.Section`'s, or `views` for one that only names the views.
        name: as written, without its marks; empty for a line that announces a report, and for a signature.
        firm: it begins the text, a line, a paragraph or a sentence.
        sure: False where the letters and the place leave it open; to be believed where it would end an indication.
    """

    start: int
    end: int
    kind: str
    name: str
    firm: bool = True
    sure: bool = True


def headings(text: str) -> list[Heading]:
    """All that looks like a heading in a text of `plain_text`, by position, the longest first where two begin."""
    letters = text.encode("ascii", "ignore")
    small, capital = (len(letters) - len(letters.translate(None, case)) for case in (_SMALL, _CAPITAL))
    shouting = small * 10 < capital
    found = [Heading(match.start(), match.end(), BODY, "") for match in TITLE.finditer(text)]
    found += [Heading(start, end, SIGNATURE, "") for start, end in _signatures(text)]
    for match in _LINE_HEADING.finditer(text):
        name = " ".join(match[1].split())
        if shouting and (_SENTENCE_END.search(name) or not _begins_sentence(text, match.start(1))):
            continue
        if kind := _kind_of_line(name, shouting):
            found.append(Heading(match.start(), match.end(), kind, name))
    found += _known_headings(text, shouting)
    return _settled(sorted(found, key=lambda heading: (heading.start, -heading.end)))


def _signatures(text: str) -> Iterator[tuple[int, int]]:
    for match in _SIGNATURE.finditer(text):
        start = match.start("words")
        if _begins_sentence(text, start) or (not match["weak"] and not _goes_on(text, start)):
            yield match.span("words")
    yield from (match.span() for match in _SIGNED_INLINE.finditer(text) if not _goes_on(text, match.start()))


def _known_headings(text: str, shouting: bool) -> list[Heading]:
    """Headings of known words anywhere; where letters and place leave it open, the style of the others decides."""
    candidates: list[tuple[Heading, tuple[bool, str]]] = []
    for match in _KNOWN_HEADING.finditer(text):
        name, mark = match["name"], match.lastgroup or ""
        if mark == "none" and (shouting or name.islower()):  # running text
            continue
        start = match.start()
        end = match.end()
        if mark == "none" and not name.isupper() and name.split()[0].isupper():  # "COMPARISON Comparison was made"
            name = name.split()[0]
            end = start + len(name) + 1
        if not name[0].isupper() and (capital := re.search(r"(?<=[ /&+,])[A-Z]", name)):
            name, start = name[capital.start() :], start + capital.start()
        if name.lower().startswith(_NOT_ITS_OWN) and not _begins_sentence(text, start):
            own = name.partition(" ")[2]
            if (shouting or not name[0].isupper() or name.startswith("CXR ")) and kind_of_words(own):
                name, start = own, start + len(name) - len(own)
        kind = kind_of_words(name)
        while start and text[start - 1] in _MARKS:
            start -= 1
        if opened := _OPENED.search(text[max(0, start - 12) : start]):
            start -= len(opened[1])
        if text[match.end() : match.end() + 1] == ",":  # a row of a table: the comma before it divides, too
            start -= len(text[max(0, start - 3) : start]) - len(text[max(0, start - 3) : start].rstrip(" ,"))
        before = text[max(0, start - 100) : start].rstrip(" ")
        line_start = before[-1:] in ("", "\n")
        marked = name[0].isupper() and not shouting
        firm = (line_start and marked) or _begins_sentence(text, start)
        if kind is None or name.lower().startswith(("the ", "this ")) or (mark == "line" and not line_start):
            continue
        if (mark == "bold" and start == match.start()) or (mark == "gap" and not (line_start and marked)):
            continue
        if mark == "none":
            opens = _OPENS.match(text, end) is not None
            alone = marked and name.isupper() and (line_start or (opens and kind in _NAMED_ALONE))
            if not alone:
                continue
            firm, sure = firm and opens, opens and (firm or not _shouts(before))
        else:
            sure = firm or mark == "bold" or (marked and mark == "colon")
        candidates.append((Heading(start, end, kind, name, firm, sure), (marked, mark)))
    trusted = {style for heading, style in candidates if heading.firm}
    return [
        heading
        if heading.sure or style not in trusted or _goes_on(text, heading.start)
        else heading._replace(sure=True)
        for heading, style in candidates
    ]


def _begins_sentence(text: str, start: int) -> bool:
    """True at a text's begin, after a blank line, a sentence or a mark that divides."""
    before = text[max(0, start - 100) : start]
    written = before.rstrip(" \n")
    blank = before[len(written) :]
    return not written or written[-1] in _ENDS or (written[-1] == "," and not blank) or blank.count("\n") > 1


def _goes_on(text: str, start: int) -> bool:
    """True after a word that a phrase goes on from."""
    words = text[max(0, start - 30) : start].split()
    return bool(words) and words[-1].rstrip(".").lower() in _BEFORE_PROSE


def _shouts(before: str) -> bool:
    """True after a word in capitals, which with the next makes a longer phrase."""
    word = before.split()[-1:] or [""]
    return len(word[0]) > 1 and word[0].isupper() and word[0].isalpha()


def _settled(found: list[Heading]) -> list[Heading]:
    """Give the headings that may stand for findings or impression the one that the report does not name otherwise."""
    named = {heading.kind for heading in found if heading.sure}
    named |= {FINDINGS, IMPRESSION} if BOTH in named else set()
    kinds: dict[str, str] = {}
    for name in sorted({h.name.upper() for h in found if h.sure and h.kind in _EITHER}, key=_rank):
        kinds[name] = next((kind for kind in _EITHER[kind_of_words(name) or ""] if kind not in named), OTHER)
        named.add(kinds[name])
    return [
        heading._replace(kind=kinds.get(heading.name.upper(), OTHER)) if heading.kind in _EITHER else heading
        for heading in found
    ]


def _kind_of_line(name: str, shouting: bool) -> str | None:
    """The kind of heading that a line begins with, in capitals or naming views; None if it is no heading. Where all is
    in capitals, one that names views has no other words ("BACK PAIN CHEST: CLEAR")."""
    words = _words(name)
    views = len(words) > 1 and _VIEW_WORDS.issuperset(words) and not VIEW_NOUNS.isdisjoint(words)
    if not words or not name[0].isupper() or (name != name.upper() and not views):
        return None
    return kind_of_words(name) or (VIEWS if views or not (shouting or VIEW_NOUNS.isdisjoint(words)) else OTHER)


@lru_cache(maxsize=4096)
def kind_of_words(name: str) -> str | None:
    """The kind of section that the words of a heading name, misspelt ones too; None if they name none."""
    kinds = {kind for _, kind in _ranked(name)}
    if FINDINGS in kinds and not kinds.isdisjoint((IMPRESSION, "?impression")):
        return BOTH if _rank(name) >= _RANK_OF_BOTH else min(_ranked(name))[1]
    if INDICATION in kinds and not kinds.isdisjoint((*_EITHER, FINDINGS)) and min(_ranked(name))[1] == INDICATION:
        return "?indication"
    return min(_ranked(name))[1] if kinds else None


def _rank(name: str) -> int:
    return min(_ranked(name))[0]


def _ranked(name: str) -> tuple[tuple[int, str], ...]:
    return tuple(found for word in _words(name) if (found := _kind_of_word(word)))


def _words(name: str) -> list[str]:
    return re.findall(r"[A-Z&-]+", name.upper())


@lru_cache(maxsize=4096)
def _kind_of_word(word: str) -> tuple[int, str] | None:
    if word in _VIEW_WORDS or word in _KIND_OF_WORD or word in _NO_SLIPS or len(word) < 6:
        return _KIND_OF_WORD.get(word)
    return next((kind for right, kind in _KIND_OF_WORD.items() if len(right) > 5 and _is_misspelt(word, right)), None)


def _is_misspelt(word: str, right: str) -> bool:
    """True for one letter wrong, missing, doubled or too many, or two changed about; the first may only be missing."""
    if word == right[1:]:
        return True
    same = next((i for i, (a, b) in enumerate(zip(word, right, strict=False)) if a != b), min(len(word), len(right)))
    ends = (word[same + 1 :], right[same:]), (word[same:], right[same + 1 :]), (word[same + 1 :], right[same + 1 :])
    swapped = word[same : same + 2] == right[same : same + 2][::-1] and word[same + 2 :] == right[same + 2 :]
    return same > 0 and (swapped or any(a == b for a, b in ends))
