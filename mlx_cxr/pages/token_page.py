"""Pages of a text explanation: a report with the words that moved the answer, and all that was read off them as JSON.

The HTML holds no script and asks for nothing from elsewhere; whatever stands in a report is shown as text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_cxr.core.files import write_record, write_text
from mlx_cxr.core.formatting import footer, number
from mlx_cxr.explain.word_scores import READING, TextExplanation, WordScores, shade, shared_scale, signed
from mlx_cxr.pages.overlay import save_picture
from mlx_cxr.pages.token_picture import draw_picture

STRONGEST = 10
"""Words in a page's table."""
_ON_A_LINE = 6
RAMP = ", ".join("#{:02x}{:02x}{:02x}".format(*shade(v, 1.0)) for v in (-1.0, 0.0, 1.0))
"""The scale's colours from lowering to raising, for a CSS gradient."""


def words_html(scores: WordScores, scale: float) -> str:
    """A report's words, escaped, each on a ground that says how it moved the logit; a new section begins a line."""
    parts = []
    rows = zip(scores.words, scores.shown, scores.contributions, scores.left_out, strict=True)
    for i, (word, shown, contribution, without) in enumerate(rows):
        if i and i in scores.line_starts:
            parts.append("<br>")
        colour = "#{:02x}{:02x}{:02x}".format(*shade(shown, scale))
        title = f"{signed(contribution)} logits; leaving it out: {signed(without)}"
        parts.append(f'<span style="background:{colour}" title="{title}">{html.escape(word)}</span>')
    return " ".join(parts)


def html_page(explanation: TextExplanation, scale: float) -> str:
    """The page of one finding in one report, complete in itself; `scale` is of `shared_scale`."""
    e, scores = explanation, explanation.scores
    account = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{signed(value)}</td></tr>" for name, value in explanation.account()
    )
    order = np.argsort(-np.abs(scores.shown), kind="stable")[:STRONGEST]
    strongest = "".join(
        f"<tr><td>{html.escape(scores.words[i])}</td><td>{i + 1}</td><td>{signed(scores.contributions[i])}</td>"
        f"<td>{signed(scores.left_out[i])}</td></tr>"
        for i in order.tolist()
    )
    abstains = f"<br>{html.escape(e.abstention_note())}" if e.abstention else ""
    cut = f"<p>{e.cut_note()}</p>" if e.cut else ""
    return _document(
        f"{e.finding}, study {e.study_id}",
        e.synthetic,
        f"""<p>Study {html.escape(e.study_id)}; the teacher reads: {html.escape(e.reads)}.<br>
{html.escape(e.summary())}{abstains}</p>
<p class="report">{words_html(scores, scale)}</p>
<div class="ramp" style="background:linear-gradient(to right, {RAMP})"></div>
<div class="ticks"><span>{signed(-scale, 1)} and less</span><span>0</span><span>{signed(scale, 1)} and more</span></div>
<p>Effect on the logit: orange words raised it, blue ones lowered it. Figures show where the pointer rests.</p>
{cut}<p>{e.check()}</p>
<p>{READING}</p>
<h2>What the logit is made of</h2>
<table>{account}</table>
<h2>Strongest words</h2>
<table><tr><th>word</th><th>place</th><th>integrated gradients</th><th>leaving it out</th></tr>{strongest}</table>""",
    )


def index_page(
    run: str, rows: Sequence[tuple[TextExplanation, str]], scale: float, notes: Sequence[str], synthetic: bool
) -> str:
    """The page that links to all others.

    Args:
        run: the teacher's name.
        rows: each explanation with its file name, without the ending.
        scale: of `shared_scale`.
        notes: paragraphs before the table: the rule by which these were chosen, and the like.
    """
    cells = "".join(
        f'<tr><td><a href="{html.escape(name)}.html">{html.escape(e.finding)}</a></td>'
        f"<td>{html.escape(e.study_id)}</td><td>{e.probability:.2f}</td><td>{html.escape(e.label) or '–'}</td>"
        f"<td>{signed(e.scores.report)}</td>"
        f"<td>{', '.join(number(r, 2) for r in e.scores.agreement()['integrated_gradients'].values())}</td>"
        f"<td>{'integrated gradients' if e.scores.trusted else 'leave-one-out'}</td>"
        f'<td><a href="{html.escape(name)}.png">picture</a></td></tr>'
        for e, name in rows
    )
    paragraphs = "".join(f"<p>{html.escape(note)}</p>" for note in (*notes, READING))
    return _document(
        f"Which words moved {run}",
        synthetic,
        f"""{paragraphs}
<p>Colours are full at {scale:.1f} logits on every page.</p>
<table><tr><th>finding</th><th>study</th><th>calibrated p</th><th>report label</th><th>report's words, logits</th>
<th>rank and linear correlation with leave-one-out</th><th>colours show</th><th></th></tr>{cells}</table>""",
    )


def write_explanations(
    folder: str | Path,
    run: str,
    explanations: Sequence[TextExplanation],
    rule: str,
    synthetic: bool,
    record: Mapping[str, Any],
) -> Path:
    """Write pictures, pages, `explanations.json` and `index.html`, then remove pages of an earlier call.

    In this order every link of the index works at any moment, also when the command is killed.

    `explanations.json`: `schema` (1), `run`, `synthetic`, `notice`, `rule`, `scale` (logits at full colour),
    `agreement` (`integrated_gradients` and `gradient_x_input`, each to `rank` and `linear`, each to `explanations`,
    `median`, `lowest`, `highest` of the correlations with leave-one-out that are defined), `explanations`,
    `provenance`. An explanation has `file` (of its page), `study_id`, `finding`, `reads`, `probability`, `threshold`,
    `abstention` (why no call is made, or empty), `label`; `logit`, which is `blank` + `film` + `report` + `left_over`;
    `cut` (tokens not read), `agreement`, `colours` (which of the scores they show), `words`, and `scores` of each word:
    `integrated_gradients`, `gradient_x_input`, `leave_one_out`.

    Args:
        run: the teacher's name.
        explanations: in the order of the index; where there are none, the index says so.
        rule: by which they were chosen.
        record: `runs.provenance`.

    Returns:
        The folder.
    """
    folder = Path(folder)
    scale = shared_scale([e.scores.shown for e in explanations])
    rows = list(zip(explanations, _file_names(explanations), strict=True))
    for e, name in rows:
        save_picture(folder / f"{name}.png", draw_picture(e, scale))
        write_text(folder / f"{name}.html", html_page(e, scale))
    agreement = {
        method: {
            kind: _spread([e.scores.agreement()[method][kind] for e in explanations]) for kind in ("rank", "linear")
        }
        for method in ("integrated_gradients", "gradient_x_input")
    }
    write_record(
        folder / "explanations.json",
        {
            "schema": 1,
            "run": run,
            "synthetic": synthetic,
            "notice": footer(synthetic),
            "rule": rule,
            "scale": scale,
            "agreement": agreement,
            "explanations": [{"file": f"{name}.html", **e.plain()} for e, name in rows],
            "provenance": record,
        },
    )
    ours, other = (
        ", ".join(f"{kind} {number(values['median'], 2)}" for kind, values in agreement[method].items())
        for method in agreement
    )
    failed = sum(not e.scores.trusted for e in explanations)
    note = (
        f"Correlation with leave-one-out, median of {len(rows)} explanations: integrated gradients {ours}; "
        f"gradient × input {other}. Integrated gradients failed the check in {failed} of them; there colours show "
        "leave-one-out."
        if rows
        else "There is none."
    )
    write_text(folder / "index.html", index_page(run, rows, scale, [rule, note], synthetic))
    kept = {"index", *(name for _, name in rows)}
    for path in (*folder.glob("*.html"), *folder.glob("*.png")):
        if path.stem not in kept:
            path.unlink()
    return folder


def word_lines(explanations: Sequence[TextExplanation]) -> list[str]:
    """The words that moved each answer most, for a terminal."""
    lines = []
    for e in explanations:
        strongest = np.argsort(-np.abs(e.scores.shown), kind="stable")[:_ON_A_LINE].tolist()
        moved = ", ".join(f"{e.scores.words[i]!r} {signed(e.scores.shown[i])}" for i in strongest)
        lines.append(f"{e.finding} was moved most, in logits, by: {moved}.")
        lines += [note for note in (e.cut_note(),) if note]
    return lines


def _file_names(explanations: Sequence[TextExplanation]) -> list[str]:
    """`<study>_<finding>`, of letters, digits, `.`, `_` and `-`; numbered where two would be alike."""
    names = [re.sub(r"[^A-Za-z0-9.-]+", "_", f"{e.study_id[:80]}_{e.finding}") for e in explanations]
    alike = len(set(map(str.casefold, names))) < len(names)
    return [f"{i}_{name}" for i, name in enumerate(names, start=1)] if alike else names


def _spread(agreements: Sequence[float]) -> dict[str, float | int]:
    """Median, lowest and highest of those that are defined, and how many these are."""
    defined = np.array([value for value in agreements if not np.isnan(value)])
    figures = (np.median(defined), defined.min(), defined.max()) if defined.size else (np.nan,) * 3
    return {"explanations": len(defined)} | dict(zip(("median", "lowest", "highest"), map(float, figures), strict=True))


def _document(title: str, synthetic: bool, body: str) -> str:
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #181a1e;
  background: #fff; color-scheme: light; }}
.notice {{ border-left: 4px solid #e69f00; padding: .3rem .8rem; font-weight: 600; }}
.report {{ font-size: 18px; line-height: 2; border: 1px solid #d2d5da; padding: .6rem 1rem; overflow-wrap: anywhere; }}
.report span {{ padding: .15rem .2rem; border-radius: 3px; }}
.ramp {{ height: 14px; max-width: 24rem; border: 1px solid #d2d5da; }}
.ticks {{ display: flex; justify-content: space-between; max-width: 24rem; font-size: 13px; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #d2d5da; }}
</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p class="notice">{html.escape(footer(synthetic))}</p>
{body}
</body>
</html>
"""
