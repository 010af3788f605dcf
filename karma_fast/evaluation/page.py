"""A document of a few kinds of blocks, written as one self-contained HTML page or as Markdown for a terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from string import Template
from typing import Literal

import numpy as np

from .charts import Series, columns, heat_legend, heat_map, heat_size, line_chart, short, sparkline, text_heat_map
from .style import PAGE, STYLE


@dataclass
class Text:
    """A paragraph. lead: the main finding. note: small print. warning: something a reader must not miss."""

    text: str
    kind: Literal["body", "lead", "note", "warning"] = "body"


@dataclass
class Table:
    """rows: cells as text, the first of each row its name. best: (row, column) of cells to mark. strong: a row to
    mark. bars: a share of 0 to 1 for each row, drawn in a last column. wraps: cells are prose, not numbers."""

    head: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]] = field(default_factory=set)
    strong: int | None = None
    bars: list[float] | None = None
    wraps: bool = False


@dataclass
class Chart:
    """note: a few words below the title."""

    title: str
    series: Series
    note: str = ""


@dataclass
class Charts:
    """Small multiples; each chart has its own axis."""

    charts: list[Chart]
    last_step: float


@dataclass
class HeatMaps:
    """maps: name -> (T, T) weights 0..1, all on one colour scale."""

    labels: list[str]
    maps: dict[str, np.ndarray]


@dataclass
class Example:
    """One request. top: (title, score, is it the target?). facts: further (name, text) lines."""

    name: str
    history: list[str]
    left_out: int  # earlier items of the history that are not listed
    top: list[tuple[str, str, bool]]
    facts: list[tuple[str, str]]


@dataclass
class Code:
    text: str


Block = Text | Table | Charts | HeatMaps | Example | Code


@dataclass
class Section:
    title: str
    blocks: Sequence[Block]


def clean(text: object) -> str:
    """One line that any encoding, terminal and parser takes: no control, direction or lone surrogate characters.

    >>> clean("a\\nb\\u202e\\ud800c")
    'a b�c'
    """
    return re.sub(r"\s+", " ", printable(text)).strip()


def printable(text: object) -> str:
    """`clean`, with line ends and tabs kept."""
    text = re.sub("[\ud800-\udfff]", "\ufffd", str(text))
    return re.sub("[\u202a-\u202e\u2066-\u2069\ufeff\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f]", "", text)


# ---- HTML --------------------------------------------------------------------------------------------------------


def to_html(title: str, sections: Sequence[Section]) -> str:
    """The page. Nothing in it needs a network or a script."""
    body = []
    for n, section in enumerate(sections):
        heading = f"<h1>{_bdi(section.title)}</h1>" if n == 0 else f"<h2>{_bdi(section.title)}</h2>"
        blocks = "\n".join(_HTML[type(block)](block) for block in section.blocks)
        body.append(f"<section>\n{heading}\n{blocks}\n</section>")
    return Template(PAGE).substitute(title=escape(clean(title)), style=STYLE, body="\n".join(body))


def _bdi(text: object) -> str:
    """Text of any script, kept from turning the direction of what is around it."""
    return f"<bdi>{escape(clean(text))}</bdi>"


def _text_html(block: Text) -> str:
    return f'<p class="{block.kind}">{escape(clean(block.text))}</p>'


def _table_html(block: Table) -> str:
    last = "<th></th>" if block.bars is not None else ""
    head = "".join(f'<th scope="col">{escape(clean(cell))}</th>' for cell in block.head) + last
    rows = []
    for r, row in enumerate(block.rows):
        cells = [f'<th scope="row">{_bdi(row[0])}</th>']
        cells += [f'<td class="best">{_bdi(cell)}</td>' if (r, c) in block.best else f"<td>{_bdi(cell)}</td>"
                  for c, cell in enumerate(row[1:], 1)]
        if block.bars is not None:
            bar = f'<i style="width:{100 * block.bars[r]:.1f}%"></i>' if block.bars[r] > 0 else ""
            cells.append(f'<td class="bar">{bar}</td>')
        strong = ' class="strong"' if r == block.strong else ""
        rows.append(f"<tr{strong}>{''.join(cells)}</tr>")
    head = f"<thead><tr>{head}</tr></thead>\n" if any(block.head) else ""
    kind = "prose" if block.wraps else "numbers"
    return (f'<div class="scroll" tabindex="0"><table class="{kind}">{head}<tbody>' + "\n".join(rows)
            + "</tbody></table></div>")


def _charts_html(block: Charts) -> str:
    figures = []
    for chart in block.charts:
        change = "" if len(chart.series) > 1 else f"<span>{_change(next(iter(chart.series.values()))[1])}</span>"
        note = f"<small>{escape(clean(chart.note))}</small>" if chart.note else ""
        figures.append(f"<figure><figcaption><b>{escape(clean(chart.title))}</b>{change}{note}</figcaption>"
                       f"{line_chart(chart.title, chart.series, block.last_step)}</figure>")
    return f'<div class="charts">{"".join(figures)}</div>'


def _heat_html(block: HeatMaps) -> str:
    labels = [clean(label) for label in block.labels]
    figures = "".join(f'<figure><figcaption><b>{escape(clean(name))}</b></figcaption><div class="scroll" tabindex="0">'
                      f"{heat_map(name, labels, matrix)}</div></figure>" for name, matrix in block.maps.items())
    # side by side only where both are seen whole
    return f'<div class="maps" style="--map:{heat_size(labels)[2]}px">{figures}</div>\n{heat_legend()}'


def _example_html(block: Example) -> str:
    left_out = f'<li class="more">{block.left_out} earlier</li>' if block.left_out else ""
    history = "".join(f"<li>{_bdi(title)}</li>" for title in block.history)
    top = "".join(f'<li{" class=hit" if hit else ""}><span>{_bdi(title)}{" <em>target</em>" if hit else ""}</span>'
                  f"<data>{escape(score)}</data></li>" for title, score, hit in block.top)
    lists = (f"<div><h4>History, oldest first</h4><ul>{left_out}{history}</ul></div>" if history else "") \
        + (f"<div><h4>Top {len(block.top)}</h4><ol>{top}</ol></div>" if top else "")
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{_bdi(text)}</dd>" for name, text in block.facts)
    return f'<article><h3>{_bdi(block.name)}</h3><div class="lists">{lists}</div><dl>{facts}</dl></article>'


def _code_html(block: Code) -> str:
    return f'<pre class="scroll" tabindex="0">{escape(printable(block.text))}</pre>'


_HTML: dict[type, Callable[..., str]] = {
    Text: _text_html, Table: _table_html, Charts: _charts_html, HeatMaps: _heat_html, Example: _example_html,
    Code: _code_html}


# ---- Markdown ----------------------------------------------------------------------------------------------------


def to_markdown(sections: Sequence[Section]) -> str:
    parts = []
    for n, section in enumerate(sections):
        parts.append(f"{'#' if n == 0 else '##'} {_md(section.title)}")
        parts += [_MARKDOWN[type(block)](block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _md(text: object) -> str:
    r"""Text that Markdown shows as it is.

    >>> print(_md("<b> & *x* [y](z)"))
    \<b> & \*x\* \[y\](z)
    """
    text = re.sub(r"([\\`*<\[\]~]|(?<!\w)_|_(?!\w))", r"\\\1", clean(text))
    return re.sub(r"&(?=#?\w+;)", r"\\&", text)


def _wrap(text: str, indent: str = "") -> str:
    r"""Lines of at most 100 characters; none but the first may read as a list item, a heading or a quote.

    >>> print(_wrap("word " * 20 + "- no list 1999. " + "word " * 17 + "1. no"))
    word word word word word word word word word word word word word word word word word word word word
    \- no list 1999. word word word word word word word word word word word word word word word word word
    1\. no
    """
    lines = textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False, subsequent_indent=indent)
    text = re.sub(r"\n(\s*)([-+#=]+(?=\s|$)|>)", r"\n\1\\\2", "\n".join(lines))
    return re.sub(r"\n(\s*\d+)([.)])(?=\s)", r"\n\1\\\2", text)


def _text_md(block: Text) -> str:
    text = _wrap(_md(block.text))
    return {"lead": f"**{text}**", "warning": "> " + text.replace("\n", "\n> ")}.get(block.kind, text)


def _table_md(block: Table) -> str:
    rows = [[_md(cell).replace("|", "\\|") for cell in row] for row in [block.head, *block.rows]]
    for c in range(len(block.head)):
        if any((r, c) in block.best for r in range(len(block.rows))):
            for r, row in enumerate(rows[1:]):  # the digits stay below one another
                row[c] = f"**{row[c]}**" if (r, c) in block.best else f"{row[c]}  "
            rows[0][c] += "  "
    if block.strong is not None:
        rows[1 + block.strong][0] = f"**{rows[1 + block.strong][0]}**"
    if block.bars is not None:
        rows[0].append("")
        for row, share in zip(rows[1:], block.bars, strict=True):
            row.append("█" * round(share * 30))
    widths = [max(3, *(columns(row[c]) for row in rows)) for c in range(len(rows[0]))]
    left = [c == 0 or block.wraps or (block.bars is not None and c == len(rows[0]) - 1) for c in range(len(widths))]

    def line(row: list[str]) -> str:
        cells = [(cell + " " * (w - columns(cell))) if lft else (" " * (w - columns(cell)) + cell)
                 for cell, w, lft in zip(row, widths, left, strict=True)]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * w if lft else "-" * (w - 1) + ":" for w, lft in zip(widths, left, strict=True)]
    return "\n".join(map(line, [rows[0], rule, *rows[1:]]))


def _change(values: Sequence[float]) -> str:
    known = [v for v in values if np.isfinite(v)]
    ends = [known[0], known[-1]] if len(known) > 1 else known
    return " → ".join(short(v, beside=max(ends, key=abs)) for v in ends) or "–"


def _charts_md(block: Charts) -> str:
    lines = []
    for chart in block.charts:
        several = len(chart.series) > 1
        for name, (_, values) in chart.series.items():
            label = f"{chart.title}: {name}" if several else chart.title
            lines.append((clean(label), sparkline(values), f"{_change(values):<16}", chart.note))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "```text\n" + "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip()
                                   for line in lines) + "\n```"


def _heat_md(block: HeatMaps) -> str:
    labels = [clean(label) for label in block.labels]
    return "\n\n".join(f"{_md(name)}:\n\n```text\n{text_heat_map(labels, matrix)}\n```"
                       for name, matrix in block.maps.items())


def _example_md(block: Example) -> str:
    lines = [f"### {_md(block.name)}", ""]
    if block.history:
        earlier = f" ({block.left_out} earlier left out)" if block.left_out else ""
        lines.append(_wrap(f"- History, oldest first{earlier}: {'; '.join(map(_md, block.history))}", "  "))
    if block.top:
        lines.append(f"- Top {len(block.top)}:")
        lines += [f"  {n}. {_md(title)} ({score}){' **← target**' if hit else ''}"
                  for n, (title, score, hit) in enumerate(block.top, 1)]
    return "\n".join(lines + [_wrap(f"- {name}: {_md(text)}", "  ") for name, text in block.facts])


def _code_md(block: Code) -> str:
    text = printable(block.text).strip("\n")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


_MARKDOWN: dict[type, Callable[..., str]] = {
    Text: _text_md, Table: _table_md, Charts: _charts_md, HeatMaps: _heat_md, Example: _example_md, Code: _code_md}
