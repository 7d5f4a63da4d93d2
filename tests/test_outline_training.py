"""The head that outlines defects: what it learns from, that it learns, and that nothing else does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import picture, save
from tqdm import tqdm

import config
import data_loader
import engine
import outline_training
from outline_training import N_DEFECTS, painted_crops, train_head

CPU = engine.Runtime(torch.device("cpu"))
SETTINGS = config.TrainSettings(learning_rate=0.01)


@pytest.fixture
def training(tmp_path):
    paths = [save(tmp_path / f"{index}.png", picture(seed=index)) for index in range(6)]
    return data_loader.GoodImages(paths, 64, "stretch", config.AugmentSettings(), 0.75, 0)


def silent():
    return tqdm(disable=True)


def test_how_many_images_it_takes():
    asked = [outline_training.n_images(SETTINGS.replace(outline_images=n), shown) for n, shown in ((0, 4), (0, 800), (0, 80_000), (7, 80_000))]
    assert asked == [1, 100, outline_training.MOST_IMAGES, 7]


@pytest.mark.parametrize("backbone", ["none", "efficientnet_lite0"])
def test_crops_hold_what_the_model_paints_of_drawn_defects(make_model, training, backbone):
    model = make_model(backbone, base_channels=8).eval()
    model.fit_feature_scale(training.plain_batches(4))
    images, reconstruction, painted, logvar, taps, mask = painted_crops(model, training, 3, CPU, silent()).tensors
    assert len(images) == 3 * N_DEFECTS and taps.shape[1:] == (len(model.tap_channels), 8, 8)
    numbers = [0, 1] * N_DEFECTS + [2] * N_DEFECTS  # batches of two, cropped in rounds; a crop is all of an image of 64 px
    for row, number in enumerate(numbers):
        damaged, where = training.with_defects(number, N_DEFECTS)
        assert torch.equal(mask[row].float(), where)
        torch.testing.assert_close(images[row].float(), damaged, atol=1e-3, rtol=0)
    told = model.describe(torch.stack([training.with_defects(number, N_DEFECTS)[0] for number in numbers]))
    torch.testing.assert_close(reconstruction.float(), told.vae.reconstruction.detach(), atol=2e-3, rtol=0)
    torch.testing.assert_close(logvar.float(), told.pixel_logvar.detach(), atol=2e-2, rtol=0)
    assert not torch.equal(painted, reconstruction) and painted.min() >= 0 and painted.max() <= 1


def test_crops_of_larger_images_lie_around_a_defect_and_belong_together(make_model, tmp_path):
    paths = [save(tmp_path / f"{index}.png", picture(256, 256, index)) for index in range(3)]
    training = data_loader.GoodImages(paths, 256, "stretch", config.AugmentSettings(), 0.75, 0)
    model = make_model("efficientnet_lite0").eval()
    images, *_, taps, mask = painted_crops(model, training, 2, CPU, silent()).tensors
    assert images.shape == (2 * N_DEFECTS, 3, 64, 64) and taps.shape[2:] == (8, 8) and mask.flatten(1).any(1).all()
    for row in range(len(images)):
        damaged, where = training.with_defects(row % 2, N_DEFECTS)
        found = [
            (top, left)
            for top in range(0, 193, 8)
            for left in range(0, 193, 8)
            if torch.equal(where[:, top : top + 64, left : left + 64], mask[row].float()) and (damaged[:, top : top + 64, left : left + 64] - images[row].float()).abs().max() < 1e-3
        ]
        assert len(found) == 1


def dark_square(training, number):
    """An image (3, 64, 64) with a dark square, and where it is, (1, 64, 64)."""
    y, x = np.random.default_rng(number).integers(0, 52, 2)
    mask = torch.zeros(1, 64, 64)
    mask[:, y : y + 12, x : x + 12] = 1.0
    return data_loader.to_tensor(training.images[number % 6])[0] * (1 - 0.7 * mask), mask


def test_the_head_learns_to_outline_and_nothing_else_changes(make_model, training, monkeypatch):
    monkeypatch.setattr(training, "with_defects", lambda number, n: dark_square(training, number))
    model = make_model("efficientnet_lite0")
    model.fit_feature_scale(training.plain_batches(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    chance = torch.get_rng_state()
    train_head(model, training, 1, SETTINGS, CPU)
    first = {name: value.clone() for name, value in model.state_dict().items() if name not in before}
    train_head(model, training, 1, SETTINGS, CPU)
    assert first and all(name.startswith("defect_head.") for name in first)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in first.items())  # anew, and the same for the same seed
    loss = train_head(model, training, 100, SETTINGS, CPU)
    assert torch.equal(torch.get_rng_state(), chance) and 0 < loss < 0.69
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    damaged, masks = (torch.stack(each) for each in zip(*(dark_square(training, 1000 + number) for number in range(8)), strict=True))
    found = (model.eval().describe(damaged).defect_logits > 0) == (masks > 0)
    assert found[masks > 0].float().mean() > 0.9 and found[masks == 0].float().mean() > 0.98
