"""Which of the good images are taken for defective."""

from __future__ import annotations

import pytest
import torch
from conftest import picture, save

import config
import engine
import trimming
from coresets import rows_of

CPU = engine.Runtime(torch.device("cpu"))


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_image_with_places_like_no_other_is_the_least_like_the_rest():
    maps = noise(0, 1, 6, 8, 8) + 0.1 * noise(1, 9, 6, 8, 8)
    maps[4, :, 2:4, 5] += 4.0
    found = trimming.unlikeness(maps, range(9))
    assert found.argmax() == 4 and found[4] > 2 * found[torch.arange(9) != 4].max()
    others = [torch.cdist(rows_of(maps[4:5])[0], rows_of(each[None])[0]).amin(1) for each in maps]
    second = torch.stack([each for index, each in enumerate(others) if index != 4]).sort(0).values[1]
    assert found[4].item() == pytest.approx(second.topk(4).values.mean().item(), rel=1e-3)  # 5 % of 64 places
    maps[6] = maps[4]  # the same defect on another image
    assert set(trimming.unlikeness(maps, range(9)).topk(2).indices.tolist()) == {4, 6}
    maps[7] = maps[4]  # and on one more
    assert trimming.unlikeness(maps, range(9)).argmax() not in {4, 6, 7}
    assert set(trimming.unlikeness(maps, [0, 1, 2, 3, 5, 6, 8]).topk(3).indices.tolist()) == {4, 6, 7}
    assert trimming.unlikeness(maps[:2], [0, 1]).isfinite().all()


def test_a_faint_spot_is_told_from_an_edge_that_is_another_in_every_image(make_model, monkeypatch):
    """By their features alone the images differ at the edge; where the model is sure a small deviation is odd."""
    monkeypatch.setattr(trimming, "N_SHOWN", 120)
    model = make_model("efficientnet_lite0")
    generator = torch.Generator().manual_seed(2)
    features = 0.05 * torch.randn(12, model.n_features, 8, 8, generator=generator)
    features[:, :, 5] = 3 * torch.randn(12, model.n_features, 8, generator=generator)
    features[7, :, 1, 3] += 1.5
    assert trimming.unlikeness(features, range(12)).argmax() != 7
    settings = config.TrainSettings(feature_noise=0.05, learning_rate=0.01)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        deviations = trimming.learned_deviations(model, features, settings, CPU)
    assert deviations.shape == features.shape and not model.training
    assert trimming.unlikeness(deviations, range(12)).argmax() == 7


def test_the_suspects_are_the_same_each_time_and_chance_goes_on_as_before(tmp_path, tiny_backbone, monkeypatch):
    monkeypatch.setattr(trimming, "N_SHOWN", 20)
    monkeypatch.setattr(trimming, "SIDE_PX", 64)
    paths = [save(tmp_path / f"{index}.png", picture(96, 96, seed=index / 8)) for index in range(10)]
    spotted = picture(96, 96, seed=0.5)
    spotted[30:45, 60:75] = (0, 255, 0)
    save(paths[4], spotted)
    settings = config.TrainSettings(trim_frac=0.1, image_size=96)
    chance, compare, sizes = torch.get_rng_state(), trimming.unlikeness, []
    monkeypatch.setattr(
        trimming, "unlikeness", lambda maps, among: sizes.append((*maps.shape, len(among))) or compare(maps, among)
    )
    assert trimming.suspects(paths, settings, CPU) == trimming.suspects(paths, settings, CPU) == [paths[4]]
    assert torch.equal(torch.get_rng_state(), chance)
    first, then = ((10, tiny_backbone.channels, 8, 8, n) for n in (10, 9))  # at 64 px, with all and with the usual ones
    assert sizes == [first, then] * 2
    assert len(trimming.suspects(paths[:2], settings.replace(trim_frac=0.5), CPU)) == 1
