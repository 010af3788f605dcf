"""Small charts from plain numbers: line charts and heat maps as inline SVG, and both as text for a terminal.

Colours are left to the page: it may set those of a series by its class ``s-NAME`` and those of heat maps by ``cells``.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from html import escape

import numpy as np

BLOCKS = "▁▂▃▄▅▆▇█"
SHADES = " ·░▒▓█"
LEVELS = 24  # colours of a heat map; one path each keeps the file small
# name -> (steps, values); values within +-1e100, NaN or infinite
Series = dict[str, tuple[Sequence[float], Sequence[float]]]


def short(value: float, beside: float = 0.0) -> str:
    """About three digits, thousands in full; with the decimals of ``beside`` if that is the larger number.

    >>> short(0.12345), short(4.2), short(31415.9), short(0.12345, beside=4.2), short(float("nan"))
    ('0.123', '4.20', '31,416', '0.12', '–')
    """
    if not math.isfinite(value):
        return "–"
    size = max(abs(value), abs(beside))
    decimals = 2 - math.floor(math.log10(size)) if size > 0 else 0
    return f"{value:,.{min(max(decimals, 0), 8)}f}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``.

    >>> ticks(0, 340)
    [0.0, 100.0, 200.0, 300.0]
    """
    width = (high - low) / max(1, count - 1)
    if not (math.isfinite(width) and width > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(width))
    step = power * min((1, 2, 2.5, 5, 10), key=lambda m: abs(math.log(m * power / width)))
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) + 0.0 for n in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The numbers with just the decimals that tell them apart; thousands as k and M.

    >>> tick_labels([0.0, 0.05, 0.1]), tick_labels([0.0, 1000.0, 1500.0])
    (['0', '0.05', '0.10'], ['0', '1k', '1.5k'])
    """
    largest = max((abs(v) for v in values), default=0)
    unit, letter = next(((u, x) for u, x in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if largest >= u), (1.0, ""))
    scaled = [v / unit for v in values]
    if letter or len(values) < 2:
        return [f"{v:.4g}{letter if v else ''}" for v in scaled]
    decimals = next((d for d in range(8) if all(abs(v - round(v, d)) < 1e-9 for v in scaled)), 8)
    return [f"{v:.{decimals if v else 0}f}" for v in scaled]


def line_chart(title: str, series: Series, last_step: float, height: int = 150) -> str:
    """One chart with its own axes. Values that are not finite leave a gap. One series needs no legend; of several,
    each has its name beside its end."""
    several = len(series) > 1
    width, left, right, top, bottom = 270, 40, 44 if several else 10, 8, 22
    points = {name: [(float(x), float(y)) for x, y in zip(*xy, strict=True)] for name, xy in series.items()}
    known = [y for xy in points.values() for _, y in xy if math.isfinite(y)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = (low - pad if low < 0 or low > pad else 0.0), high + pad
    last_step = last_step or 1.0

    def px(x: float) -> float:
        return left + (width - left - right) * x / last_step

    def py(y: float) -> float:
        return top + (height - top - bottom) * (1 - (y - low) / (high - low))

    out = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    marks = ticks(low, high)
    for y, label in zip(marks, tick_labels(marks), strict=True):
        out.append(f'<path class="grid" d="M{left} {py(y):.1f}H{width - right}"/>'
                   f'<text class="tick" x="{left - 6}" y="{py(y) + 3.5:.1f}" text-anchor="end">{label}</text>')
    marks = ticks(0, last_step, 4)
    for x, label in zip(marks, tick_labels(marks), strict=True):
        if px(x) < width - right - 36:
            out.append(f'<text class="tick" x="{px(x):.1f}" y="{height - 6}" text-anchor="middle">{label}</text>')
    step = f"step {last_step:,.0f}"
    out.append(f'<text class="tick" x="{width - right}" y="{height - 6}" text-anchor="end">{step}</text>')
    ends = []
    for name, xy in points.items():
        path, gap = [], True
        for x, y in xy:
            if not math.isfinite(y):
                gap = True
                continue
            path.append(f"{'M' if gap else 'L'}{px(x):.1f} {py(y):.1f}")
            gap = False
        style = f"s-{escape(name)}"
        out.append(f'<path class="line {style}" d="{"".join(path)}"/>')
        x, y = next(((x, y) for x, y in reversed(xy) if math.isfinite(y)), (None, None))
        if x is not None:
            out.append(f'<circle class="dot {style}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.6"/>')
            ends.append((py(y), name, px(x)))
    if several:
        floor = -math.inf
        for y, name, x in sorted(ends):
            floor = max(y, floor + 12)  # names never lie on one another
            name = escape(name)
            out.append(f'<text class="name s-{name}" x="{x + 7:.1f}" y="{floor + 3.5:.1f}">{name}</text>')
    return "".join(out) + "</svg>"


def columns(text: str) -> int:
    """Columns that a text takes in a terminal."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def sparkline(values: Sequence[float], width: int = 48) -> str:
    """A curve in one line of text; a dot where nothing is finite.

    >>> sparkline([4, 3, 2, float("nan"), 1])
    '█▆▃·▁'
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return ""
    parts = [part[np.isfinite(part)] for part in np.array_split(array, min(width, len(array)))]
    means = [part.mean() if len(part) else math.nan for part in parts]
    known = [m for m in means if math.isfinite(m)]
    low, span = min(known, default=0.0), (max(known, default=0.0) - min(known, default=0.0)) or 1.0
    return "".join("·" if math.isnan(m) else BLOCKS[round((m - low) / span * (len(BLOCKS) - 1))] for m in means)


def shade(matrix: np.ndarray, levels: int) -> np.ndarray:
    """(T, T) weights 0..1 -> integers 0..levels; the square root keeps small weights visible. Not finite: 0."""
    return np.rint(np.sqrt(np.clip(np.nan_to_num(matrix, nan=0.0, posinf=0.0, neginf=0.0), 0, 1)) * levels).astype(int)


def heat_size(labels: Sequence[str], cell: int = 13) -> tuple[int, int, int, int]:
    """(space for the names on the left, above, width, height) of a heat map, in pixels."""
    room = [5.8 * columns(label) + 10 for label in labels]  # a generous guess, as the font is not known
    left = round(max(room, default=0))
    top = round(max((need - n * cell for n, need in enumerate(room)), default=0))
    return left, top, left + len(labels) * cell + 8, top + len(labels) * cell + 4


def heat_map(title: str, labels: Sequence[str], matrix: np.ndarray, cell: int = 13) -> str:
    """A causal (T, T) map: row = where the model stands, column = what it looks at. Column names stand in the empty
    triangle above the diagonal."""
    left, top, width, height = heat_size(labels, cell)
    level = shade(matrix, LEVELS)
    out = [f'<svg class="heat" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
           f'aria-label="{escape(title)}">']
    out.append(f'<path class="field" d="M{left} {top}' + "".join(f"h{cell}v{cell}" for _ in labels)
               + f'H{left}z"/>')  # the part a causal model can fill
    for n in range(1, LEVELS + 1):
        places = np.argwhere(level == n) * cell + (top, left)
        cells = "".join(f"M{x} {y}h{cell}v{cell}h-{cell}z" for y, x in places)
        if cells:
            out.append(f'<path class="cells" fill-opacity="{n / LEVELS:.2f}" d="{cells}"/>')
    for n, label in enumerate(labels):
        middle = n * cell + cell / 2 + 3.2
        label = escape(label)
        out.append(f'<text class="label" x="{left - 6}" y="{top + middle:.1f}" text-anchor="end">{label}</text>')
        x, y = left + middle, top + n * cell - 5
        out.append(f'<text class="label top" transform="translate({x:.1f} {y})rotate(-90)">{label}</text>')
    return "".join(out) + "</svg>"


def heat_legend() -> str:
    """The colour scale that every heat map shares."""
    at, step = 8, 8
    width = step * LEVELS
    cells = "".join(f'<rect x="{at + n * step}" y="2" width="{step}" height="10" fill-opacity="{n / LEVELS:.2f}"/>'
                    for n in range(LEVELS + 1))
    marks = "".join(f'<text class="label" x="{at + step / 2 + width * math.sqrt(v):.1f}" y="25" '
                    f'text-anchor="middle">{v:g}</text>' for v in (0, 0.05, 0.25, 0.5, 1))
    return (f'<svg class="legend" viewBox="0 0 {width + 130} 30" width="{width + 130}" height="30" role="img" '
            f'aria-label="colour scale, attention weight 0 to 1"><g class="cells">{cells}</g>{marks}'
            f'<text class="label" x="{width + 28}" y="11">attention weight</text></svg>')


def text_heat_map(labels: Sequence[str], matrix: np.ndarray) -> str:
    """The map in shades of text, a row each; columns stand in the order of the rows.

    >>> print(text_heat_map(["a", "b"], np.array([[1.0, 0.0], [0.3, 0.7]])))
    1 a  ██
    2 b  ▒▒▓▓
    """
    level = shade(matrix, len(SHADES) - 1)
    width, digits = max(map(columns, labels), default=0), len(str(len(labels)))
    lines = []
    for n, (label, row) in enumerate(zip(labels, level, strict=True)):
        cells = "".join(SHADES[v] * 2 for v in row[:n + 1])
        lines.append(f"{n + 1:>{digits}} {label}{' ' * (width - columns(label))}  {cells}".rstrip())
    return "\n".join(lines)
