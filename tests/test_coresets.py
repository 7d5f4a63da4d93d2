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


def test_rows_are_drawn_evenly_from_maps_in_batches_and_all_where_there_are_few():
    maps = torch.arange(5 * 2 * 3 * 4.0).view(5, 2, 3, 4)
    every = coresets.rows_of(maps)
    drawn = coresets.sample_rows(maps.split(2), 5, 17, torch.Generator().manual_seed(0))
    assert drawn.shape == (20, 2) and len(torch.unique(drawn, dim=0)) == 20
    for number, of_one in enumerate(drawn.split(4)):
        assert all((row == every[number]).all(1).any() for row in of_one)
    whole = coresets.sample_rows(maps.split(2), 5, 1000, torch.Generator().manual_seed(0))
    assert torch.equal(torch.unique(whole, dim=0), torch.unique(every.flatten(0, 1), dim=0))
    assert coresets.sample_rows([], 0, 10, torch.Generator()).numel() == 0


def test_a_centre_moves_into_the_middle_of_its_rows_and_stays_where_it_has_none(monkeypatch):
    monkeypatch.setattr(coresets, "ROWS_AT_ONCE", 2)
    rows = torch.tensor([[0.0, 0.0], [0.0, 2.0], [1.0, 1.0], [9.0, 9.0], [10.0, 9.0]])
    centres = torch.tensor([[0.0, 2.0], [10.0, 9.0], [-50.0, 0.0]])
    expected = torch.stack([rows[:3].mean(0), rows[3:].mean(0), centres[2]])
    torch.testing.assert_close(coresets.cell_means(rows, centres), expected)
