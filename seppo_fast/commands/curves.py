"""Curves of a run as inline SVG: no scripts, colours by the page's style sheet, gaps where a value was not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 420, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 10, 26
_MOST_POINTS = 1500  # a line of the page; longer runs are shown by means

STYLE = """
figure.curve > svg { width: 100%; height: auto; display: block; }
figure.curve text { font-size: 11px; fill: var(--dim); }
figure.curve .grid { stroke: var(--line); stroke-width: 1; }
figure.curve polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
figure.curve .spell { fill: var(--warn); opacity: 0.16; }
figure.curve .skipped { stroke: var(--warn); stroke-width: 1.5; stroke-dasharray: 3 3; }
.line-0 { stroke: var(--first); } .dot-0 { fill: var(--first); }
.line-1 { stroke: var(--second); stroke-dasharray: 5 3; } .dot-1 { fill: var(--second); }
.key { white-space: nowrap; } .key svg { width: 1.4em; height: 0.7em; vertical-align: middle; }
"""


def curve(
    title: str,
    updates: Sequence[int],
    lines: Mapping[str, Sequence[float | None]],
    *,
    spells: Sequence[tuple[int, int]] = (),
    skipped: Sequence[int] = (),
) -> str:
    """A `<figure>` of one or two lines over updates.

    Args:
        title: of the figure.
        updates: x, ascending; at least one.
        lines: y by name; None, NaN and infinities are gaps.
        spells: first and last update of what is shaded.
        skipped: updates that are marked.
    """
    drawn = {name: _thinned(updates, values) for name, values in lines.items()}
    known = [y for points in drawn.values() for _, y in points if y is not None]
    keys = "".join(
        f' <span class="key"><svg viewBox="0 0 20 10"><line class="line-{index}" x1="0" y1="5" x2="20" y2="5" '
        f'stroke-width="3"/></svg> {escape(name)}</span>'
        for index, name in enumerate(lines)
        if len(lines) > 1
    )
    caption = f"<figcaption><strong>{escape(title)}</strong>{keys}</figcaption>"
    if not known:
        return f'<figure class="curve">{caption}<p class="dim">no finite value</p></figure>'
    x_of = _Axis(_widened(updates[0], updates[-1], 1.0), _LEFT, _WIDTH - _RIGHT)
    low, high = _widened(min(known), max(known), abs(known[0]) * 0.01 or 1.0)
    y_of = _Axis((low, high), _HEIGHT - _BOTTOM, _TOP)
    body = [
        *_axes(x_of, y_of, (updates[0], updates[-1]), (low, high)),
        *(_spell(x_of(first), x_of(last)) for first, last in spells),
        *(
            f'<line class="skipped" x1="{x_of(x):.1f}" x2="{x_of(x):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}">'
            f"<title>update {x} was skipped: not finite</title></line>"
            for x in skipped
        ),
        *(part for index, points in enumerate(drawn.values()) for part in _line(index, points, x_of, y_of)),
    ]
    label = escape(f"{title}, updates {updates[0]} to {updates[-1]}")
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(body)}</svg>'
    return f'<figure class="curve">{caption}{svg}</figure>'


class _Axis:
    """A linear map from values to the picture's units."""

    def __init__(self, values: tuple[float, float], start: float, end: float) -> None:
        self._low, self._start = values[0], start
        self._factor = (end - start) / (values[1] - values[0])

    def __call__(self, value: float) -> float:
        return self._start + (value - self._low) * self._factor


def _widened(low: float, high: float, by: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - by, high + by)


def _thinned(updates: Sequence[int], values: Sequence[float | None]) -> list[tuple[float, float | None]]:
    """Points (x, y), of long runs the means of as many neighbours as needed."""
    finite = [value if value is not None and math.isfinite(value) else None for value in values]
    size = math.ceil(len(updates) / _MOST_POINTS)
    points: list[tuple[float, float | None]] = []
    for start in range(0, len(updates), size):
        some = [value for value in finite[start : start + size] if value is not None]
        xs = updates[start : start + size]
        points.append((sum(xs) / len(xs), sum(some) / len(some) if some else None))
    return points


def _line(index: int, points: list[tuple[float, float | None]], x_of: _Axis, y_of: _Axis) -> Iterator[str]:
    """Pieces between gaps; a dot for a point that stands alone."""
    pieces: list[list[str]] = [[]]
    for x, y in points:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append(f"{x_of(x):.1f},{y_of(y):.1f}")
    for piece in pieces:
        if len(piece) > 1:
            yield f'<polyline class="line-{index}" points="{" ".join(piece)}"/>'
        elif piece:
            left, top = piece[0].split(",")
            yield f'<circle class="dot-{index}" cx="{left}" cy="{top}" r="2.5"/>'


def _spell(first: float, last: float) -> str:
    width = max(last - first, 2.0)
    return f'<rect class="spell" x="{first:.1f}" y="{_TOP}" width="{width:.1f}" height="{_HEIGHT - _TOP - _BOTTOM}"/>'


def _axes(x_of: _Axis, y_of: _Axis, xs: tuple[int, int], ys: tuple[float, float]) -> Iterator[str]:
    from matplotlib.ticker import MaxNLocator

    for value in MaxNLocator(nbins=4).tick_values(*ys):
        if ys[0] <= value <= ys[1]:
            y = y_of(value)
            yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>'
    yield f'<text x="6" y="{_HEIGHT - 8}">update</text>'
    for value in MaxNLocator(nbins=6, integer=True).tick_values(*xs):
        if xs[0] <= value <= xs[1]:
            yield f'<text x="{x_of(value):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{value:.0f}</text>'
