"""Shared by all tabs: the warning, the styles, and the showing of text, pictures and errors."""

from __future__ import annotations

import base64
import html
import inspect
import ipaddress
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import streamlit as st
from PIL import Image, ImageDraw

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.formatting import NOT_CLINICAL, SYNTHETIC
from mlx_cxr.core.formatting import escaped as plain

log = logging.getLogger("mlx_cxr.page")

T = TypeVar("T")

STYLES = """<style>
.stMainBlockContainer { max-width: 92rem; padding-top: .9rem; padding-bottom: 3rem; }
[data-testid="stTabs"] [role="tabpanel"] { padding-top: .7rem; }
[data-testid="stHeader"] { height: 2.4rem; background: transparent; pointer-events: none; }
[data-testid="stHeader"] button, [data-testid="stHeader"] [role="button"] { pointer-events: auto; }
.stMain h2 { font-size: 1.45rem; padding: .4rem 0 .2rem; } .stMain h3 { font-size: 1.12rem; padding: .2rem 0; }
.stMain h4, .stMain h5, .stMain h6 { font-size: 1rem; padding: .3rem 0 .1rem; }
.cxr { --line: color-mix(in srgb, currentColor 18%, transparent);
  --soft: color-mix(in srgb, currentColor 72%, transparent);
  --faint: color-mix(in srgb, currentColor 6%, transparent);
  --present: light-dark(#b84f00, #ff9a4d); --absent: light-dark(#0072b2, #56b4e9);
  --abstains: light-dark(#6b7480, #a8b1bb); line-height: 1.45; }
.cxr-title { display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem .9rem; padding-right: 3rem; }
.cxr-title h1 { font-size: 1.55rem; font-weight: 700; padding: 0; margin: 0; }
.cxr-title span { color: var(--soft); }
.cxr-banner { border-left: 5px solid #e69f00; border-radius: 4px; padding: .45rem .8rem;
  background: light-dark(#fff4dc, #33270f); color: light-dark(#4a3000, #ffe2a8); }
.cxr-banner b { margin-right: .4rem; }
.st-key-banner, [data-testid="stLayoutWrapper"]:has(> .st-key-banner) { position: sticky; top: 0; z-index: 50; }
.cxr-hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
[data-testid="stElementContainer"]:has(> .stHtml > h2.cxr-hidden) { position: absolute; width: 1px; }
.cxr table { border-collapse: collapse; width: 100%; font-size: .9rem; }
.cxr caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
.cxr th, .cxr td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
.cxr .num { font-variant-numeric: tabular-nums; white-space: nowrap; }
.cxr-scroll { overflow-x: auto; }
.cxr-note { color: var(--soft); font-size: .875rem; }
.cxr-state { white-space: nowrap; font-weight: 600; }
.cxr-state.is-absent { font-weight: 400; }
.cxr-state i { display: inline-block; box-sizing: border-box; width: .74em; height: .74em; margin-right: .4rem;
  border-radius: 50%; border: 2px solid var(--mark); }
.is-present { --mark: var(--present); } .is-absent { --mark: var(--absent); } .is-abstains { --mark: var(--abstains); }
.cxr-state.is-present i { background: var(--mark); }
.cxr-state.is-abstains i { background: linear-gradient(90deg, var(--mark) 50%, transparent 50%); }
.cxr-chart { margin-top: .1rem; }
.cxr-group { font-size: .8rem; letter-spacing: .02em; color: var(--soft); padding: .5rem 0 .1rem; font-weight: 600; }
.cxr-row { display: grid; grid-template-columns: minmax(7.5rem, 14.2rem) minmax(6rem, 1fr) 2.6rem 6rem; gap: 0 .8rem;
  align-items: center; padding: .16rem 0; border-bottom: 1px solid var(--faint); }
.cxr-row.is-chosen { background: var(--faint); box-shadow: -4px 0 0 var(--soft); }
.cxr-row.is-present .name { font-weight: 650; }
.cxr-track { position: relative; height: 18px; }
.cxr-track .base { position: absolute; inset: 5px 0; background: color-mix(in srgb, currentColor 11%, transparent);
  border-radius: 4px; }
.cxr-track .zone { position: absolute; top: 0; bottom: 0; min-width: 2px; border: 1px dashed var(--abstains);
  background: repeating-linear-gradient(135deg, color-mix(in srgb, var(--abstains) 38%, transparent) 0 2px,
  transparent 2px 6px); border-radius: 2px; }
.cxr-track .bar { position: absolute; top: 5px; bottom: 5px; left: 0; border-radius: 4px; background: var(--mark); }
.cxr-track .tick { position: absolute; top: -1px; bottom: -1px; width: 3px; margin-left: -1.5px;
  background: currentColor;  border-radius: 1px; outline: 1px solid light-dark(#fff, #11151a); }
.cxr-axis { display: flex; justify-content: space-between; font-size: .75rem; color: var(--soft); }
.cxr-legend { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; font-size: .8rem; color: var(--soft);
  padding-top: .3rem; }
.cxr-legend span { display: inline-flex; align-items: center; gap: .4rem; }
.cxr-legend .cxr-track { width: 34px; display: inline-block; }
.cxr-bar img { display: block; width: 100%; height: 12px; border-radius: 2px; }
.cxr-words { background: #fff; color: #16181c; border: 1px solid #c9cfd6; border-radius: 6px; padding: .5rem .9rem;
  line-height: 2; overflow-wrap: anywhere; }
.cxr-words span { padding: .12rem .18rem; border-radius: 3px; }
.cxr-ramp { height: 12px; max-width: 22rem; border: 1px solid var(--line); border-radius: 2px; }
.cxr-ramp + .cxr-axis { max-width: 22rem; }
.cxr-figures { display: grid; grid-template-columns: minmax(8rem, 16rem) minmax(8rem, 1fr) 11rem; gap: 0 .9rem;
  align-items: center; }
.cxr-figures > div { padding: .22rem 0; }
.cxr-whisker { position: relative; height: 20px; }
.cxr-whisker .rule { position: absolute; inset: 9.5px 0; background: var(--line); }
.cxr-whisker .ends { position: absolute; top: 7px; height: 6px; border: solid var(--absent); border-width: 0 2px;
  background: linear-gradient(var(--absent), var(--absent)) center / 100% 2px no-repeat; }
.cxr-whisker .dot { position: absolute; top: 4px; width: 12px; height: 12px; margin-left: -6px; border-radius: 50%;
  background: var(--present); border: 1px solid light-dark(#fff, #11151a); }
@media (max-width: 760px) {
  .stMainBlockContainer { padding-left: .8rem; padding-right: .8rem; }
  .cxr-row { grid-template-columns: 1fr 3rem 6rem; }
  .cxr-row .track-cell { grid-column: 1 / -1; grid-row: 2; }
  .cxr-figures { grid-template-columns: 1fr 9.5rem; grid-auto-flow: dense; }
  .cxr-figures .cxr-axis { grid-column: 1 / -1; }
  .cxr-figures .cxr-whisker { grid-column: 1 / -1; }
}
@media print { [data-testid="stHeader"] { display: none; } }
</style>"""


def icon() -> Image.Image:
    """The page's icon, drawn here: Streamlit would ask another machine for one of its own."""
    image = Image.new("RGB", (64, 64), (16, 18, 22))
    draw = ImageDraw.Draw(image)
    for left, right in ((8, 29), (35, 56)):
        draw.ellipse((left, 10, right, 54), fill=(120, 128, 138))
    draw.ellipse((38, 30, 54, 46), fill=(255, 196, 61))
    return image


def esc(text: object) -> str:
    """Text as HTML shows it, attributes included."""
    return html.escape(str(text), quote=True)


def block(body: str) -> None:
    """HTML of this page's own making, in which every text from elsewhere is escaped."""
    st.html(f'<div class="cxr">{body}</div>')


def note(text: str) -> None:
    """A sentence in small print."""
    block(f'<div class="cxr-note">{esc(text)}</div>')


def accepted(function: Callable, **wanted: Any) -> dict[str, Any]:
    """Those of some keywords that the installed Streamlit knows: `alt` is younger than the oldest that is supported."""
    known = inspect.signature(function).parameters
    return {key: value for key, value in wanted.items() if key in known}


def choose(title: str, options: Sequence[T], name: Callable[[T], str], key: str) -> T:
    """One of the options, whose names differ; the reader is asked where there are several."""
    if len(options) == 1:
        return options[0]
    # By name: what Streamlit keeps of an earlier choice is that option as it was then.
    named = {name(option): option for option in options}
    return named[st.selectbox(title, list(named), key=key)]


def picture(content: bytes, alt: str, caption: str | None = None) -> None:
    """A PNG as wide as its place, with a description for those who do not see it.

    It travels in the page itself: Streamlit drops a file that it serves when the next run ends, and a slider that is
    moved quickly ends runs before the browser has asked for their files.
    """
    address = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    st.image(address, caption=caption and plain(caption), width="stretch", **accepted(st.image, alt=alt))


@contextmanager
def guarded(part: str) -> Iterator[None]:
    """Around a part of the page: what goes wrong in it becomes a sentence, and the rest of the page goes on."""
    try:
        yield
    except (UserError, OSError) as error:
        st.error(plain(error))
    except Exception as error:
        log.exception("%s", part)
        st.error(
            f"Something went wrong here ({type(error).__name__}). Details are in the terminal that the page was "
            "started from; the rest of the page goes on."
        )


def banner(synthetic: Sequence[str], others: Sequence[str]) -> None:
    """The warning that stays in sight on every tab.

    Args:
        synthetic: names of the runs that were trained on the synthetic cohort.
        others: names of the runs that were not.
    """
    words = f"<b>{esc(NOT_CLINICAL)}.</b>"
    if synthetic:
        which = f" ({esc(', '.join(synthetic))})" if others else ""
        words += (
            f" <b>{esc(SYNTHETIC)}{which}:</b> the models were trained on drawn films and reports; their figures and "
            "answers say nothing about patients."
        )
    if address := network_address():
        words += (
            f"<br><b>Served on {esc(address)}, not on this machine alone.</b> Films and reports that are opened here "
            "travel over the network, unencrypted unless you took care of it, and whoever reaches the address can use "
            "the page. Start it with <code>--server.address 127.0.0.1</code> to end that."
        )
    with st.container(key="banner"):
        st.html(f'<div class="cxr cxr-banner" role="note" aria-label="Warning">{words}</div>')


def network_address() -> str:
    """The address that the page is served on where that is not this machine's own; else an empty string."""
    address = st.get_option("server.address") or "all addresses"
    if address == "localhost":
        return ""
    try:
        return "" if ipaddress.ip_address(address).is_loopback else address
    except ValueError:
        return address


def html_table(caption: str, head: list[str], rows: list[list[str]], numbers: frozenset[int] = frozenset()) -> str:
    """A table of cells that are HTML already; the first cell of a row is its head."""
    heads = "".join(f'<th scope="col">{esc(name)}</th>' for name in head)
    body = ""
    for first, *rest in rows:
        kinds = (' class="num"' if column in numbers else "" for column in range(1, len(rest) + 1))
        cells = "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, rest, strict=True))
        body += f'<tr><th scope="row">{first}</th>{cells}</tr>'
    return (
        f'<div class="cxr-scroll" tabindex="0" role="region" aria-label="{esc(caption)}"><table>'
        f"<caption>{esc(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def whiskers(caption: str, rows: Mapping[str, Mapping[str, Any]], low: float, high: float, text: Callable) -> str:
    """Estimates with their intervals on one axis from `low` to `high`, a line each, and the figures in words."""

    def place(value: float) -> float:
        return 100 * (min(max(value, low), high) - low) / (high - low)

    lines = ""
    for title, interval in rows.items():
        marks = '<span class="rule"></span>'
        if interval["value"] is not None:
            if interval["low"] is not None and interval["high"] is not None:
                left, right = place(interval["low"]), place(interval["high"])
                marks += f'<span class="ends" style="left:{left:.2f}%;width:{right - left:.2f}%"></span>'
            marks += f'<span class="dot" style="left:{place(interval["value"]):.2f}%"></span>'
        lines += (
            f'<div>{esc(title)}</div><div class="cxr-whisker" aria-hidden="true">{marks}</div>'
            f'<div class="num">{esc(text(interval))}</div>'
        )
    ends = f"<span>{low:g}</span><span>{high:g}</span>"
    axis = f'<div></div><div class="cxr-axis" aria-hidden="true">{ends}</div><div></div>'
    return f'<div role="group" aria-label="{esc(caption)}"><div class="cxr-figures">{lines}{axis}</div></div>'
