"""Few rows that stand for many: places of maps as rows, a greedy coreset of them, and how far others lie from it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

N_PROJECTED = 64
"""Dimensions in which candidates are compared."""
FARTHEST_FRAC = 1 / 16
"""Share of the candidates that are compared with each one chosen."""
ROWS_AT_ONCE = 8192
"""Rows that are multiplied at once where all are."""


def rows_of(maps: Tensor) -> Tensor:
    """Every place of maps (B, C, h, w) as a row, (B, h * w, C)."""
    return maps.flatten(2).transpose(1, 2)


def some_rows(maps: Tensor, n_each: int, generator: torch.Generator) -> Tensor:
    """At most so many places of each map (B, C, h, w), drawn at random, as rows (N, C)."""
    return torch.cat([rows[torch.randperm(len(rows), generator=generator)[:n_each]] for rows in rows_of(maps)])


def sample_rows(maps: Iterable[Tensor], n_maps: int, n: int, generator: torch.Generator) -> Tensor:
    """About n places (N, C), all where there are fewer, drawn at random from n maps, as many from each; the maps come
    in batches (B, C, h, w), of one size, and none is kept.
    """
    n_each, found, n_found = math.ceil(n / max(1, n_maps)), torch.empty(0), 0
    for batch in maps:
        rows = some_rows(batch, n_each, generator)
        if not n_found:
            found = torch.empty(n_maps * (len(rows) // len(batch)), rows.shape[1])
        found[n_found : n_found + len(rows)] = rows
        n_found += len(rows)
    return found[:n_found]


def cell_means(rows: Tensor, centres: Tensor) -> Tensor:
    """The mean of those rows (N, C) that are nearer to each centre (M, C) than to any other, (M, C): a step of Lloyd
    1982; a centre that no row is nearest to stays where it is.
    """
    lengths = centres.square().sum(1)
    nearest = torch.cat(
        [torch.addmm(lengths, part, centres.T, alpha=-2).argmin(1) for part in rows.split(ROWS_AT_ONCE)]
    )
    sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
    n_rows = torch.bincount(nearest, minlength=len(centres))[:, None]
    return torch.where(n_rows > 0, sums / n_rows.clamp_min(1), centres)


def farthest_points(rows: Tensor, n: int, generator: torch.Generator) -> list[int]:
    """Indices of n rows (N, C), each the farthest from those chosen before it, in a random projection (greedy
    k-center); repeats where N < n.

    Computed lazily: only the distances of the farthest rows are updated after each choice, those of all rows once
    another row may be farther.
    """
    projected = rows @ torch.randn(rows.shape[1], N_PROJECTED, generator=generator)
    nearest, chosen, n_compared = torch.full((len(rows),), torch.inf), [0], 0
    while len(chosen) < n:
        since = projected[chosen[n_compared:]]
        n_compared = len(chosen)
        nearest = torch.minimum(nearest, torch.cat(nearest_squares(projected.split(ROWS_AT_ONCE), since)))
        distances, indices = nearest.topk(math.ceil(FARTHEST_FRAC * len(rows)))
        far, at_least = projected[indices], distances[-1].item()
        for _ in range(n - n_compared):
            last = int(distances.argmax())
            chosen.append(int(indices[last]))
            distances = torch.minimum(distances, nearest_squares([far], far[last, None])[0])
            if distances.max() < at_least:
                break
    return chosen


def nearest_squares(parts: Iterable[Tensor], others: Tensor) -> list[Tensor]:
    """Squared distance of every row of each part (N, C) to its nearest neighbour among others (M, C), (N,) each; may be
    slightly negative by rounding. A part at a time, so that memory is N * M numbers.
    """
    lengths = others.square().sum(1)
    return [torch.addmm(lengths, rows, others.T, alpha=-2).amin(1) + rows.square().sum(1) for rows in parts]
