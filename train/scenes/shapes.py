"""Silhouettes of the kinds, as drawing primitives in a unit square.

A shape is a list of (verb, what, numbers). The verbs are "fill" (part of the silhouette), "hole" (cut out of it) and
"ink" (a line or a spot of contrast drawn on top). What is "oval" (left, top, right, bottom), "poly" (x, y, ...) or
"line" (width, x, y, ...). x goes right, y goes down.
"""

from __future__ import annotations

import math

Primitive = tuple[str, str, tuple[float, ...]]


def _star() -> tuple[float, ...]:
    points: list[float] = []
    for k in range(10):
        radius = 0.53 if k % 2 == 0 else 0.23
        angle = math.pi * k / 5
        points += [0.5 + radius * math.sin(angle), 0.54 - radius * math.cos(angle)]
    return tuple(points)


def _petals() -> list[Primitive]:
    petals: list[Primitive] = []
    for k in range(6):
        x, y = 0.5 + 0.31 * math.sin(math.pi * k / 3), 0.5 - 0.31 * math.cos(math.pi * k / 3)
        petals.append(("fill", "oval", (x - 0.19, y - 0.19, x + 0.19, y + 0.19)))
    return petals


def _heart() -> tuple[float, ...]:
    points: list[float] = []
    for k in range(40):
        t = 2 * math.pi * k / 40
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points += [0.5 + x / 32, 0.46 - y / 31]
    return tuple(points)


SHAPES: dict[str, list[Primitive]] = {
    "ball": [("fill", "oval", (0.02, 0.02, 0.98, 0.98))],
    "box": [
        ("fill", "poly", (0.04, 0.3, 0.3, 0.06, 0.96, 0.06, 0.96, 0.7, 0.7, 0.94, 0.04, 0.94)),
        ("ink", "line", (0.045, 0.04, 0.3, 0.7, 0.3, 0.7, 0.94)),
        ("ink", "line", (0.045, 0.7, 0.3, 0.96, 0.06)),
    ],
    "star": [("fill", "poly", _star())],
    "heart": [("fill", "poly", _heart())],
    "ring": [("fill", "oval", (0.02, 0.02, 0.98, 0.98)), ("hole", "oval", (0.31, 0.31, 0.69, 0.69))],
    "cross": [
        ("fill", "poly", (0.34, 0.02, 0.66, 0.02, 0.66, 0.98, 0.34, 0.98)),
        ("fill", "poly", (0.02, 0.34, 0.98, 0.34, 0.98, 0.66, 0.02, 0.66)),
    ],
    "moon": [("fill", "oval", (0.04, 0.02, 1.0, 0.98)), ("hole", "oval", (0.4, -0.04, 1.16, 0.78))],
    "tree": [
        ("fill", "poly", (0.4, 0.7, 0.6, 0.7, 0.6, 1.0, 0.4, 1.0)),
        ("fill", "poly", (0.5, 0.0, 0.8, 0.38, 0.2, 0.38)),
        ("fill", "poly", (0.5, 0.12, 0.9, 0.6, 0.1, 0.6)),
        ("fill", "poly", (0.5, 0.34, 1.0, 0.84, 0.0, 0.84)),
    ],
    "house": [
        ("fill", "poly", (0.5, 0.0, 1.0, 0.46, 0.0, 0.46)),
        ("fill", "poly", (0.12, 0.44, 0.88, 0.44, 0.88, 0.98, 0.12, 0.98)),
        ("ink", "poly", (0.4, 0.62, 0.6, 0.62, 0.6, 0.98, 0.4, 0.98)),
    ],
    "fish": [
        ("fill", "oval", (0.0, 0.2, 0.74, 0.8)),
        ("fill", "poly", (0.6, 0.5, 1.0, 0.16, 1.0, 0.84)),
        ("ink", "oval", (0.13, 0.36, 0.25, 0.48)),
    ],
    "cup": [
        ("fill", "oval", (0.52, 0.22, 1.0, 0.74)),
        ("hole", "oval", (0.62, 0.34, 0.88, 0.62)),
        ("fill", "poly", (0.04, 0.1, 0.74, 0.1, 0.66, 0.94, 0.12, 0.94)),
    ],
    "flower": [*_petals(), ("fill", "oval", (0.3, 0.3, 0.7, 0.7)), ("ink", "oval", (0.37, 0.37, 0.63, 0.63))],
    "key": [
        ("fill", "oval", (0.0, 0.18, 0.5, 0.74)),
        ("hole", "oval", (0.15, 0.35, 0.35, 0.57)),
        ("fill", "poly", (0.44, 0.36, 1.0, 0.36, 1.0, 0.56, 0.44, 0.56)),
        ("fill", "poly", (0.82, 0.5, 1.0, 0.5, 1.0, 0.84, 0.82, 0.84)),
        ("fill", "poly", (0.56, 0.5, 0.7, 0.5, 0.7, 0.76, 0.56, 0.76)),
    ],
    "diamond": [
        ("fill", "poly", (0.22, 0.12, 0.78, 0.12, 1.0, 0.4, 0.5, 0.98, 0.0, 0.4)),
        ("ink", "line", (0.04, 0.02, 0.4, 0.98, 0.4)),
        ("ink", "line", (0.04, 0.34, 0.4, 0.5, 0.94, 0.66, 0.4)),
    ],
    "drop": [
        ("fill", "poly", (0.5, 0.0, 0.79, 0.5, 0.21, 0.5)),
        ("fill", "oval", (0.15, 0.3, 0.85, 1.0)),
    ],
    "bell": [
        ("fill", "oval", (0.4, 0.78, 0.6, 1.0)),
        ("fill", "oval", (0.42, 0.0, 0.58, 0.2)),
        ("fill", "oval", (0.2, 0.08, 0.8, 0.72)),
        ("fill", "poly", (0.2, 0.4, 0.8, 0.4, 0.82, 0.66, 0.98, 0.84, 0.02, 0.84, 0.18, 0.66)),
    ],
    "hat": [
        ("fill", "poly", (0.2, 0.1, 0.8, 0.1, 0.76, 0.74, 0.24, 0.74)),
        ("fill", "oval", (0.0, 0.66, 1.0, 0.92)),
        ("ink", "line", (0.1, 0.24, 0.6, 0.76, 0.6)),
    ],
    "boat": [
        ("fill", "poly", (0.0, 0.68, 1.0, 0.68, 0.8, 0.98, 0.2, 0.98)),
        ("fill", "poly", (0.44, 0.0, 0.52, 0.0, 0.52, 0.72, 0.44, 0.72)),
        ("fill", "poly", (0.52, 0.02, 0.94, 0.58, 0.52, 0.58)),
        ("fill", "poly", (0.44, 0.14, 0.44, 0.58, 0.12, 0.58)),
    ],
    "car": [
        ("fill", "poly", (0.24, 0.22, 0.68, 0.22, 0.84, 0.48, 0.14, 0.48)),
        ("fill", "poly", (0.0, 0.46, 0.96, 0.46, 1.0, 0.56, 1.0, 0.72, 0.0, 0.72)),
        ("fill", "oval", (0.1, 0.58, 0.38, 0.86)),
        ("fill", "oval", (0.62, 0.58, 0.9, 0.86)),
        ("ink", "oval", (0.15, 0.63, 0.33, 0.81)),
        ("ink", "oval", (0.67, 0.63, 0.85, 0.81)),
    ],
    "apple": [
        ("fill", "oval", (0.04, 0.24, 0.62, 0.98)),
        ("fill", "oval", (0.38, 0.24, 0.96, 0.98)),
        ("fill", "poly", (0.46, 0.34, 0.5, 0.0, 0.58, 0.02, 0.54, 0.34)),
        ("fill", "oval", (0.54, 0.04, 0.9, 0.2)),
    ],
    "crown": [
        ("fill", "poly", (0.0, 0.16, 0.26, 0.5, 0.5, 0.06, 0.74, 0.5, 1.0, 0.16, 0.9, 0.9, 0.1, 0.9)),
        ("ink", "line", (0.05, 0.1, 0.76, 0.9, 0.76)),
    ],
    "flag": [
        ("fill", "poly", (0.06, 0.0, 0.18, 0.0, 0.18, 1.0, 0.06, 1.0)),
        ("fill", "poly", (0.16, 0.04, 0.5, 0.12, 1.0, 0.04, 0.88, 0.32, 1.0, 0.6, 0.5, 0.66, 0.16, 0.58)),
    ],
    "bottle": [
        ("fill", "poly", (0.4, 0.0, 0.6, 0.0, 0.6, 0.3, 0.4, 0.3)),
        ("fill", "oval", (0.24, 0.24, 0.76, 0.64)),
        ("fill", "poly", (0.24, 0.44, 0.76, 0.44, 0.76, 1.0, 0.24, 1.0)),
        ("ink", "line", (0.07, 0.38, 0.14, 0.62, 0.14)),
    ],
    "chair": [
        ("fill", "poly", (0.08, 0.0, 0.3, 0.0, 0.3, 1.0, 0.08, 1.0)),
        ("fill", "poly", (0.08, 0.46, 0.94, 0.46, 0.94, 0.68, 0.08, 0.68)),
        ("fill", "poly", (0.72, 0.5, 0.94, 0.5, 0.94, 1.0, 0.72, 1.0)),
    ],
}
