"""Reports of any export as plain text: escapes, markup and unusual characters made what they stand for."""

from __future__ import annotations

import html
import re
import unicodedata

_LINE_ENDS = "\n\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_COLONS = "\u02d0\u02f8\u2236\ua789"
_SAME_LETTER = frozenset({"<wide>", "<narrow>", "<small>", "<vertical>", "<font>"})
"""Compatibility forms that are the same character in another shape; not superscripts, fractions or units."""

_HL7_COMMAND = re.compile(r"\\\.(?:br|sp|ce|in|ti|fi|nf|sk)[ +-]?\d{0,3}\\?")
_HL7_CHARACTER = re.compile(r"\\([HNFSTRE])\\|\\X((?:[0-9A-Fa-f]{2}){1,8})\\")
_HL7 = {"H": "", "N": "", "F": "|", "S": "^", "T": "&", "R": "~", "E": "\\"}
_CODE = re.compile(r"_x([0-9A-Fa-f]{4})_|\\{1,2}u([0-9A-Fa-f]{4})|[=%](0[AaDd])")
"""A character by its number, as Excel, JSON, and quoted-printable or URLs have it (the last for line ends only)."""
_LITERAL_LINE_END = re.compile(r"\\{1,4}r(?:\\{1,4}n)?(?![a-z])|\\{1,4}n")
_LITERAL_TAB = re.compile(r"\\{1,4}t(?![a-z])")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]{0,15})(?![A-Za-z0-9])([^<>]{0,300})>|<!--|-->")
_LABEL = re.compile(r"\b[Ll]abel=[\"']([^\"'<>]{1,60})[\"']")
_BOLD = frozenset({"b", "strong", "i", "em", "u"})
_INLINE = frozenset({"span", "font", "a", "sub", "sup", "small", "big", "code", "tt", "mark", "s"})
_LINES = frozenset({"br", "li", "tr", "td", "th", "dt", "dd", "hr"})
_BLOCKS = frozenset(
    [
        "p",
        "div",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "ul",
        "ol",
        "dl",
        "table",
        "tbody",
        "thead",
        "pre",
        "section",
        "article",
        "title",
        "paragraph",
        "text",
        "html",
        "head",
        "body",
        "header",
        "footer",
        "blockquote",
        "center",
    ]
)
_SECTIONS = frozenset({"indication", "history", "findings", "impression", "conclusion", "comparison", "technique"})
_USUAL = re.compile(r"[^\n -~]|\r|\\|_x|<|-->|&|[=%]0|  \s")
"""What a text has to have for anything to be done about it."""


class _Characters(dict[int, str]):
    """Unicode character -> what it stands for in plain text, found when first met."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if character in _LINE_ENDS:
            plain = "\n"
        elif category == "Zs":
            plain = " "
        elif category in ("Cc", "Cf", "Cs"):  # zero-width and control characters
            plain = "  " if character == "\t" else ""
        elif character in _COLONS:
            plain = ":"
        elif unicodedata.decomposition(character).partition(" ")[0] in _SAME_LETTER:
            plain = unicodedata.normalize("NFKC", character)
        else:
            plain = character
        self[code] = plain
        return plain


_CHARACTERS = _Characters()


def plain_text(text: str) -> str:
    r"""A text with line ends as "\n", no markup, no escapes, and no character that only looks like another.

    Undone are the escapes of HL7 (`\.br\`), Excel (`_x000D_`) and JSON (`\n`), HTML and XML (tags of known names;
    bold ones become Markdown's `**`, an element named or labelled like a section that heading), and Unicode's
    no-break and zero-width spaces and full-width forms. A tab or a longer run of blanks becomes two, which is what
    shows that it was one. Takes time proportional to the length.
    """
    if not _USUAL.search(text):
        return text
    if "\\" in text or "_x" in text or "%0" in text or "=0" in text:
        text = _HL7_COMMAND.sub("\n", text)
        text = _HL7_CHARACTER.sub(_hl7_character, text)
        text = _LITERAL_TAB.sub("\t", _LITERAL_LINE_END.sub("\n", _CODE.sub(_coded, text)))
    if "&" in text:  # twice: an export of an export
        text = _entities(_entities(text))
    if "<" in text or "-->" in text:
        text = _TAG.sub(_tag, text)
    text = re.sub(r"\r+(\n?)", lambda match: match[1] or "\n" * len(match[0]), text)
    text = text.translate(_CHARACTERS)
    return re.sub(r" {3,}", "  ", text)


def _hl7_character(match: re.Match[str]) -> str:
    return _HL7[match[1]] if match[1] else bytes.fromhex(match[2]).decode("latin-1")


def _coded(match: re.Match[str]) -> str:
    return chr(int(match[1] or match[2] or match[3], 16))


def _entities(text: str) -> str:
    return _ENTITY.sub(lambda match: html.unescape(match[0]), text)


def _tag(match: re.Match[str]) -> str:
    name = (match[2] or "").lower()
    if not name or name in _INLINE:
        return ""
    if name in _BOLD:
        return "**"
    if name in _LINES:
        return "\n"
    if name in _SECTIONS:
        return "\n\n" if match[1] else f"\n\n{match[2].upper()}: "
    if label := _LABEL.search(match[3]):
        return f"\n\n{label[1].upper()}: "
    return "\n\n" if name in _BLOCKS or match[1] else match[0]
