"""Greedy coresets against comparing every row with every other."""

from __future__ import annotations

import torch

import coresets


def test_farthest_points_spread_over_all_clusters_and_repeat_only_when_rows_run_out():
    generator = torch.Generator().manual_seed(3)
    centres = 10 * torch.eye(5)
    rows = torch.cat([centres[:1].expand(200, 5), centres]) + 0.01 * torch.randn(205, 5, generator=generator)
    chosen = coresets.farthest_points(rows, 5, generator)
    assert {int(rows[index].argmax()) for index in chosen} == set(range(5))
    everything = coresets.farthest_points(rows[-5:], 8, generator)
    assert len(everything) == 8 and set(everything[:5]) == set(range(5))
    rows[7] = torch.nan  # of a model that has diverged
    assert len(coresets.farthest_points(rows, 9, generator)) == 9


def test_farthest_points_are_those_of_comparing_every_row_with_every_one_chosen(monkeypatch):
    monkeypatch.setattr(coresets, "ROWS_AT_ONCE", 64)
    rows = torch.randn(400, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [9.0, 5.0, 3.0, 1.0, 1.0, 1.0]
    )
    projected = rows @ torch.randn(6, coresets.N_PROJECTED, generator=torch.Generator().manual_seed(2))
    expected = [0]
    while len(expected) < 120:
        expected.append(int(torch.cdist(projected, projected[expected]).amin(1).argmax()))
    assert coresets.farthest_points(rows, 120, torch.Generator().manual_seed(2)) == expected
