"""What learns last, from crops: what it learns from, that it learns, and that nothing else does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import picture, save

import config
import crop_training
import data_loader
import engine
from crop_training import (
    N_DEFECTS,
    N_PERCEPTUAL,
    N_STRANGE,
    PIXEL_BATCH,
    drawn_crops,
    learn_last,
    painted,
    strange_places,
    train_pixels,
)
from vae_model import DetailLoss, cut

CPU = engine.Runtime(torch.device("cpu"))
SETTINGS = config.TrainSettings(learning_rate=0.01, perceptual_weight=0.0)
LOSS = DetailLoss(SETTINGS, None)


@pytest.fixture
def training(tmp_path):
    paths = [save(tmp_path / f"{index}.png", picture(seed=index)) for index in range(6)]
    return data_loader.GoodImages(paths, 64, "stretch", config.AugmentSettings(), 0.75, 0)


def test_how_many_images_it_takes():
    asked = [
        crop_training.n_images(SETTINGS.replace(crop_images=n), shown)
        for n, shown in ((0, 3), (0, 800), (0, 80_000), (7, 80_000))
    ]
    assert asked == [1, 200, crop_training.MOST_IMAGES, 7]


@pytest.mark.parametrize("backbone", ["none", "efficientnet_lite0"])
def test_crops_hold_the_images_and_what_the_model_says_of_them(make_model, training, backbone):
    model = make_model(backbone, base_channels=8).eval()
    model.fit_feature_scale(training.plain_batches(4))
    crops = drawn_crops(model, training, range(3), N_STRANGE, CPU)
    assert len(crops.mask) == 3 * N_DEFECTS
    assert crops.taps.shape[1:] == (len(model.tap_channels), 8, 8) and crops.features.shape[1:] == (
        2 * model.n_features,
        8,
        8,
    )
    # batches of two, cropped in rounds; a crop is all of an image of 64 px
    numbers = [0, 1] * N_DEFECTS + [2] * N_DEFECTS
    clean, damaged, where = (
        torch.stack(each)
        for each in zip(*(training.with_defects(number, N_DEFECTS) for number in numbers), strict=True)
    )
    assert torch.equal(crops.mask.float(), where)
    torch.testing.assert_close(crops.images.float(), damaged, atol=1e-3, rtol=0)
    torch.testing.assert_close(crops.clean.float(), clean, atol=1e-3, rtol=0)
    told, painting = model.describe(damaged), painted(model, crops, CPU)
    torch.testing.assert_close(crops.trunk.float(), told.trunk.detach(), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(painting.reconstruction.float(), told.vae.reconstruction.detach(), atol=4e-3, rtol=0)
    torch.testing.assert_close(painting.logvar.float(), told.pixel_logvar.detach(), atol=4e-2, rtol=0)
    assert not torch.equal(painting.painted, painting.reconstruction)
    if model.n_features:
        torch.testing.assert_close(
            crops.features[:, : model.n_features].float(), told.features.clamp(-10, 10), atol=1e-2, rtol=0
        )


def test_crops_of_larger_images_lie_around_a_defect_and_belong_together(make_model, tmp_path):
    paths = [save(tmp_path / f"{index}.png", picture(256, 256, index)) for index in range(3)]
    training = data_loader.GoodImages(paths, 256, "stretch", config.AugmentSettings(), 0.75, 0)
    model = make_model("efficientnet_lite0").eval()
    crops = drawn_crops(model, training, range(2), N_STRANGE, CPU)
    assert (
        crops.images.shape == (2 * N_DEFECTS, 3, 64, 64)
        and crops.taps.shape[2:] == (8, 8)
        and crops.mask[2 * N_STRANGE :].flatten(1).any(1).all()
    )
    for row in range(len(crops.images)):
        clean, damaged, where = training.with_defects(row % 2, N_DEFECTS)
        taps, features = (each[0] for each in model.seen(model.describe(damaged[None], paint=False)))
        pairs = [
            (where, crops.mask),
            (damaged, crops.images),
            (clean, crops.clean),
            (taps, crops.taps),
            (features, crops.features),
        ]
        windows = [(top, left, 8, 8) for top in range(25) for left in range(25)]
        cuts = [
            torch.stack([cut(whole[None], [window], part.shape[-1] // 8)[0] for window in windows])
            for whole, part in pairs
        ]
        same = [
            (each - part[row].float()).abs().flatten(1).amax(1) < 1e-2
            for each, (_, part) in zip(cuts, pairs, strict=True)
        ]
        assert torch.stack(same).all(0).sum() == 1
        if row < 2 * N_STRANGE:
            top, left, height, width = windows[int(torch.stack(same).all(0).nonzero())]
            strange = strange_places(where[None], taps[None])[0, 0, 4::8, 4::8]
            assert strange[top : top + height, left : left + width].any()


def test_strange_is_what_deviates_most_of_what_is_not_drawn():
    taps, mask = torch.rand(2, 3, 20, 20), torch.zeros(2, 1, 160, 160)
    taps[0, :, 3, 4], taps[0, :, 12, 12], taps[1, :, 7, 7] = 9.0, 20.0, 5.0
    mask[0, :, 110:120, 90:100] = 1.0  # which the second of them is near
    strange = strange_places(mask, taps)
    assert strange.shape == mask.shape and strange.sum((1, 2, 3)).tolist() == [4 * 64, 4 * 64]
    assert (
        (strange[0, 0, 24:32, 32:40] == 1).all()
        and (strange[1, 0, 56:64, 56:64] == 1).all()
        and not strange[0, 0, 88:136, 72:120].any()
    )
    assert strange_places(mask, taps[:, :0]) is mask  # without features


def test_a_head_is_shown_where_it_takes_a_good_place_for_a_defect(make_model, tmp_path):
    paths = [save(tmp_path / f"{index}.png", picture(256, 256, index)) for index in range(3)]
    training = data_loader.GoodImages(paths, 256, "stretch", config.AugmentSettings(), 0.75, 0)
    model = make_model("efficientnet_lite0")
    model.add_defect_head()
    model.eval()
    crops = drawn_crops(model, training, range(4, 6), N_DEFECTS, CPU)
    assert len(crops.mask) == 2 * N_DEFECTS
    for row in range(len(crops.images)):
        _, damaged, where = training.with_defects(4 + row % 2, N_DEFECTS)
        with torch.no_grad():
            logits = model.describe(damaged[None], paint=True).defect_logits
        suspected = strange_places(where[None], torch.nn.functional.max_pool2d(logits, 8))
        sure = logits[(suspected > 0) & (where[None] == 0)].max()
        same = [
            (cut(damaged[None], [(top, left, 8, 8)], 8)[0] - crops.images[row].float()).abs().max() < 1e-3
            for top in range(25)
            for left in range(25)
        ]
        top, left = divmod(same.index(True), 25)
        assert cut(suspected, [(top, left, 8, 8)], 8).any() and sure > logits.mean()


def dark_square(training, number):
    """An image (3, 64, 64), the same with a dark square, and where that is, (1, 64, 64)."""
    y, x = np.random.default_rng(number).integers(0, 52, 2)
    mask = torch.zeros(1, 64, 64)
    mask[:, y : y + 12, x : x + 12] = 1.0
    clean = data_loader.to_tensor(training.images[number % 6])[0]
    return clean, clean * (1 - 0.7 * mask), mask


@pytest.mark.parametrize("backbone", ["none", "efficientnet_lite0"])
def test_it_learns_to_paint_and_to_outline_and_nothing_else_changes(make_model, training, monkeypatch, backbone):
    monkeypatch.setattr(training, "with_defects", lambda number, n: dark_square(training, number))
    model = make_model(backbone)
    model.fit_feature_scale(training.plain_batches(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chance = torch.get_rng_state()
    losses = learn_last(model, training, 40, LOSS, SETTINGS.replace(learning_rate=0.02), CPU)
    assert (
        torch.equal(torch.get_rng_state(), chance)
        and losses.keys() == {"pixels", "outlines", "mistakes"}
        and 0 < losses["outlines"] < 0.69
    )
    of_pixels = {name for name, value in before.items() if not torch.equal(model.state_dict()[name], value)}
    assert {name.partition(".")[0] for name in of_pixels} == {
        "up4",
        "up2",
        "detail4",
        "detail2",
        "skip4",
        "skip2",
        "skip1",
        "pixel_head",
        *(["stem2", "stem4"] if model.n_features else []),
    }
    assert {name.partition(".")[0] for name in model.state_dict().keys() - before.keys()} == {"defect_head"}
    assert not any(module.training for module in (model, *model.pixel_branch))
    clean, damaged, masks = (
        torch.stack(each) for each in zip(*(dark_square(training, 1000 + number) for number in range(8)), strict=True)
    )
    told = model.describe(damaged)
    found = (told.defect_logits > 0) == (masks > 0)
    assert found[masks > 0].float().mean() > 0.9 and found[masks == 0].float().mean() > 0.97
    repaired = (told.vae.reconstruction - clean).abs()
    assert (repaired * masks).sum() < 0.7 * ((damaged - clean).abs() * masks).sum()  # not copied
    model.load_state_dict(before, strict=False)
    assert repaired.mean() < 0.7 * (model.describe(damaged).vae.reconstruction - clean).abs().mean()


def test_of_a_steps_crops_the_perceptual_loss_is_taken_of_a_few(make_model, training):
    compared = []

    def perceptual(painted, target):
        compared.append((len(painted), len(target)))
        return (painted - target).abs().mean()

    model = make_model().eval()
    crops = drawn_crops(model, training, range(4), N_STRANGE, CPU)
    assert len(crops.mask) > PIXEL_BATCH > N_PERCEPTUAL
    train_pixels(model, crops, 4, DetailLoss(SETTINGS, perceptual), SETTINGS, CPU)
    assert set(compared) == {(N_PERCEPTUAL, N_PERCEPTUAL)}


def test_the_pixel_branch_learns_where_defects_are_drawn(make_model, training, monkeypatch):
    masks, of_pixels = [], DetailLoss.of_pixels

    def watched(loss, model, clean, images, mask, *rest):
        masks.append(mask)
        return of_pixels(loss, model, clean, images, mask, *rest)

    monkeypatch.setattr(DetailLoss, "of_pixels", watched)
    model = make_model().eval()
    train_pixels(model, drawn_crops(model, training, range(2), 1, CPU), 1, LOSS, SETTINGS, CPU)
    assert masks and all(mask.any() for mask in masks)


def test_a_head_learns_more_slowly_from_as_many_mistakes_on_further_images(make_model, training, monkeypatch):
    numbers, n_strange, steps, real = [], [], {}, drawn_crops

    def watched_crops(model, training, of, n, runtime):
        numbers.append(list(of))
        n_strange.append(n)
        return real(model, training, of, n, runtime)

    def no_steps(part, data, size, n, terms, title, settings, runtime, weights=None):
        steps[title] = len(data), settings.learning_rate, weights
        return 0.0

    monkeypatch.setattr(crop_training, "drawn_crops", watched_crops)
    monkeypatch.setattr(engine, "train_steps", no_steps)
    learn_last(make_model(), training, 4, LOSS, SETTINGS.replace(segmentation=True), CPU)
    assert numbers == [[0, 1, 2, 3], [4, 5]] and n_strange == [N_STRANGE, N_DEFECTS]
    n_first, first_rate, unweighted = steps["outlines"]
    n, rate, weights = steps["mistakes"]
    assert unweighted is None and (n_first, n) == (4 * N_DEFECTS, 6 * N_DEFECTS)
    assert rate == pytest.approx(crop_training.MISTAKEN_LEARNING_RATE * first_rate)
    assert weights[:n_first].sum().item() == pytest.approx(weights[n_first:].sum().item())


def test_the_same_seed_learns_the_same_and_without_a_head_pixels_alone(make_model, training):
    def learned(segmentation):
        torch.manual_seed(5)
        model = make_model("efficientnet_lite0")
        losses = learn_last(model, training, 2, LOSS, SETTINGS.replace(segmentation=segmentation), CPU)
        return losses, model.state_dict()

    (losses, first), (_, again), (alone, plain) = learned(True), learned(True), learned(False)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert alone == {"pixels": losses["pixels"]}
    assert all(torch.equal(value, first[name]) for name, value in plain.items()) and not any(
        name.startswith("defect_head") for name in plain
    )
