"""Large images as overlapping tiles: where they lie, and blending what was found on them into one map."""

from __future__ import annotations

import math

import numpy as np

OVERLAP = 0.25
"""Least share of its side that a tile has in common with the next."""


def tile_corners(height: int, width: int, side: int) -> list[tuple[int, int]]:
    """(top, left) of square tiles that cover an image, row by row, evenly spread; each side of the image is ``side`` or
    more.

    >>> tile_corners(100, 160, 100)
    [(0, 0), (0, 60)]
    """
    return [(top, left) for top in _starts(height, side) for left in _starts(width, side)]


def window(top: int, left: int, side: int) -> tuple[slice, slice]:
    """Rows and columns of the tile at (top, left): ``image[window(...)]``, or ``image[(..., *window(...))]`` where they
    come last.
    """
    return slice(top, top + side), slice(left, left + side)


def _starts(length: int, side: int) -> list[int]:
    n_steps = max(0, math.ceil((length - side) / (side * (1 - OVERLAP))))
    return [round(step * (length - side) / n_steps) for step in range(n_steps + 1)] if n_steps else [0]


class Blend:
    """The weighted mean, at every pixel, of arrays found on tiles; a tile counts most in its middle and least at its
    edge.
    """

    def __init__(self, height: int, width: int, side: int):
        ramp = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2 + 1e-3
        self.window = np.outer(ramp, ramp).astype(np.float32)
        self.total, self.weight = None, np.zeros((height, width), np.float32)

    def add(self, found: np.ndarray, top: int, left: int) -> None:
        """Put in an array (..., side, side) found on the tile at (top, left)."""
        if self.total is None:
            self.total = np.zeros((*found.shape[:-2], *self.weight.shape), np.float32)
        here = window(top, left, len(self.window))
        self.total[(..., *here)] += found * self.window
        self.weight[here] += self.window

    def mean(self) -> np.ndarray:
        """float32 (..., height, width)."""
        return self.total / self.weight
