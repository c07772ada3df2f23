"""Draw what training reported to a file: the share of replies that are right, steps per canvas, and the losses.

python curve.py curve.jsonl curve.svg
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP, GAP = 640, 150, 60, 40, 60  # of the picture; of a panel and what is around it
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One diagram: its title, and for each curve the figure that it shows, its color and what the legend says."""

    title: str
    curves: tuple[tuple[str, str, str], ...]
    highest: float | None = None
    factor: float = 1


PANELS = (
    Panel("right replies, %", (("val_right", "#2a7de1", ""),), 100, 100),
    Panel("denoising steps per canvas", (("val_steps_per_canvas", "#d1622b", ""),)),
    Panel(
        "loss, nats per token",
        (
            ("train_denoising_loss", "#9ec3f0", "denoising, training"),
            ("val_denoising_loss", "#2a7de1", "denoising, validation"),
            ("train_next_token_loss", "#e9b79c", "next token, training"),
            ("val_next_token_loss", "#d1622b", "next token, validation"),
        ),
    ),
)


def read_curves(lines: Iterable[str]) -> dict[str, Curve]:
    """Read each figure's values by iteration. A run that was resumed repeats some; the later ones count."""
    values: dict[str, dict[float, float]] = {}
    for line in map(json.loads, lines):
        for name, value in line.items():
            values.setdefault(name, {})[line["iteration"]] = value
    return {name: sorted(curve.items()) for name, curve in values.items()}


def draw(curves: dict[str, Curve]) -> str:
    """Draw the panels that have something to show, one below the other, as SVG."""
    panels = [panel for panel in PANELS if any(name in curves for name, _, _ in panel.curves)]
    last = max(iteration for iteration, _ in curves["iteration"]) or 1
    pieces = [_panel(panel, curves, last, TOP + (HEIGHT + GAP) * place) for place, panel in enumerate(panels)]
    height = TOP + (HEIGHT + GAP) * len(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="{WIDTH}" height="{height}" fill="white"/>\n' + "\n".join(pieces) + "\n</svg>\n"
    )


def _panel(panel: Panel, curves: dict[str, Curve], last: float, top: float) -> str:
    right, bottom = WIDTH - 20, top + HEIGHT
    shown = [(curves[name], color, label) for name, color, label in panel.curves if name in curves]
    highest = panel.highest or max(value for curve, _, _ in shown for _, value in curve) * panel.factor or 1
    pieces = [f'<text x="{LEFT}" y="{top - 10}" font-weight="bold">{panel.title}</text>']
    for part in (0, 0.5, 1):
        y = bottom - part * HEIGHT
        pieces.append(f'<path d="M{LEFT} {y}H{right}" stroke="#ddd"/>')
        pieces.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{highest * part:.3g}</text>')
        x = LEFT + part * (right - LEFT)
        pieces.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{last * part:g}</text>')
    for place, (curve, color, label) in enumerate(shown):
        points = " ".join(
            f"{LEFT + iteration / last * (right - LEFT):.1f},{bottom - value * panel.factor / highest * HEIGHT:.1f}"
            for iteration, value in curve
        )
        pieces.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        pieces.append(f'<text x="{right}" y="{top + 12 + 15 * place}" text-anchor="end" fill="{color}">{label}</text>')
    return "\n".join(pieces)


if __name__ == "__main__":
    source, target = sys.argv[1:]
    Path(target).write_text(draw(read_curves(Path(source).read_text().splitlines())))
