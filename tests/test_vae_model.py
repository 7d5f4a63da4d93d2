"""DetailVAE: closed forms, shapes, gradients, what passes through a skip, and the way through a file."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributions

import checkpoints
import coresets
import engine
import layers
import vae_model
from config import InputError, LossSettings, as_dict
from vae_model import (
    LATENT_TERMS,
    DefectHead,
    DetailLoss,
    FeatureCache,
    Painting,
    corrupt_features,
    crop_windows,
    cut,
    gaussian_nll,
    kl_divergence,
)

ROOT = Path(__file__).parent.parent
BACKBONES = ("none", "efficientnet_lite0")
each_backbone = pytest.mark.parametrize("backbone", BACKBONES)
LOSS = LossSettings(perceptual_weight=0.0, pixel_crop_px=32)


def smooth_images(n, height=64, width=64, seed=0):
    """Images with structure: a few colour waves in each."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)


def shake(model, amount=0.1, seed=1):
    """Move every parameter off its initial value, so that no zero at the start hides a path."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator)
    return model


# --------------------------------------------------------------------------------------------- closed forms


def test_kl_divergence_is_that_of_torch_distributions():
    torch.manual_seed(0)
    mu, logvar = torch.randn(3, 5, 2, 2), torch.randn(3, 5, 2, 2)
    expected = distributions.kl_divergence(
        distributions.Normal(mu, torch.exp(0.5 * logvar)), distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(kl_divergence(mu, logvar), expected.mean())
    assert kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3)).item() == 0.0


def test_gaussian_nll_is_that_of_torch_distributions_up_to_the_constant():
    torch.manual_seed(0)
    x, mean, logvar = torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 6)
    expected = -distributions.Normal(mean, torch.exp(0.5 * logvar)).log_prob(x).mean() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(gaussian_nll((x - mean) ** 2, logvar), expected)


def test_places_of_no_weight_do_not_count_in_the_likelihood():
    squared, logvar = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    weight = torch.zeros(2, 1, 4, 4)
    assert gaussian_nll(squared, logvar, weight).item() == 0.0
    weight[:, :, :2] = 1.0
    torch.testing.assert_close(gaussian_nll(squared, logvar, weight), gaussian_nll(squared[:, :, :2], logvar[:, :, :2]))


def test_the_sound_places_are_those_that_see_nothing_of_a_drawn_defect():
    mask, pasted = torch.zeros(1, 1, 96, 96), torch.zeros(1, 1, 12, 12)
    mask[0, 0, 44, 52], pasted[0, 0, 9, 0] = 1.0, 1.0
    sound = vae_model.sound_places(mask, pasted)[0, 0]
    touched = torch.zeros(12, 12, dtype=torch.bool)
    touched[3:8, 4:9] = touched[7:12, :3] = True
    assert torch.equal(sound == 0, touched)


def test_drawn_defects_do_not_teach_the_predicted_variance(make_model):
    model, images = shake(make_model("efficientnet_lite0")).train(), smooth_images(2, 96, 96)
    mask = torch.zeros(2, 1, 96, 96)
    mask[:, :, 40:48, 40:48] = 1.0
    damaged, clean = torch.where(mask > 0, 1 - images, images), model.grid_features(images)
    far_off = clean + 100.0 * (1 - vae_model.sound_places(mask, torch.zeros_like(clean[:, :1])))

    def likelihood(aim, defect_mask):
        torch.manual_seed(0)
        return DetailLoss(LOSS.replace(feature_paste=0.0), None)(model, images, damaged, 1.0, defect_mask, aim)[
            "feature_nll"
        ].item()

    assert likelihood(far_off, mask) == pytest.approx(likelihood(clean, mask), rel=1e-5)
    assert likelihood(far_off, torch.zeros_like(mask)) > likelihood(clean, torch.zeros_like(mask)) + 1.0


@pytest.mark.parametrize(("backbone", "taught"), [("efficientnet_lite0", False), ("none", True)])
def test_pixels_teach_the_latents_only_where_there_are_no_features(make_model, backbone, taught):
    model, images = shake(make_model(backbone)).train(), smooth_images(2)
    DetailLoss(LOSS, None)(model, images, images, 1.0)["painted"].backward()
    gradient = model.from_detail.weight.grad
    assert (gradient is not None and bool(gradient.any())) == taught
    assert model.up4.reduce[0].weight.grad.any()


def test_without_the_head_nothing_is_outlined(make_model):
    model, images = make_model("efficientnet_lite0"), smooth_images(2)
    assert model.describe(images).defect_logits is None
    assert not [name for name in model.state_dict() if name.startswith("defect_head")]


def test_the_head_sees_the_features_of_each_image_for_itself(make_model):
    model, images = shake(make_model("efficientnet_lite0", segmentation=True)).eval(), smooth_images(2)
    together = model.describe(images)
    for row in range(2):
        torch.testing.assert_close(
            model.describe(images[row : row + 1]).defect_logits,
            together.defect_logits[row : row + 1],
            atol=1e-4,
            rtol=1e-4,
        )
    taps, features = model.seen(together)
    painting = model.decode_pixels(together.trunk, images, vae_model.feature_surprise(taps, model.tap_channels))
    for half in (slice(None, model.n_features), slice(model.n_features, None)):  # features, then their deviations
        other = features.clone()
        other[:, half] += 1.0
        assert not torch.allclose(model.defect_head(images, painting, taps, other), together.defect_logits, atol=1e-3)


def test_the_head_sees_all_that_it_is_given():
    torch.manual_seed(0)
    head = DefectHead((2, 4), 4).eval()
    given = {
        "images": torch.rand(1, 3, 32, 32),
        "reconstruction": torch.rand(1, 3, 32, 32),
        "painted": torch.rand(1, 3, 32, 32),
        "logvar": torch.rand(1, 1, 32, 32),
        "taps": 0.5 + torch.rand(1, 2, 4, 4),
        "features": torch.rand(1, 12, 4, 4),
    }

    def said(images, reconstruction, painted, logvar, taps, features):
        with torch.inference_mode():
            return head(images, Painting(reconstruction, painted, logvar), taps, features)

    for name, value in given.items():
        assert not torch.allclose(said(**{**given, name: value + 1.0}), said(**given)), name


def test_the_sample_has_the_mean_and_spread_it_was_given():
    mu, logvar = torch.tensor([-1.0, 0.5, 3.0]), torch.tensor([0.0, -2.0, 1.0])
    draws = layers.reparameterise(mu.expand(40_000, 3), logvar.expand(40_000, 3), training=True)
    torch.testing.assert_close(draws.mean(0), mu, atol=0.03, rtol=0)
    torch.testing.assert_close(draws.std(0), torch.exp(0.5 * logvar), atol=0, rtol=0.02)
    assert torch.equal(layers.reparameterise(mu, logvar, training=False), mu)


# ------------------------------------------------------------------------------------ shapes, chance, gradients


@each_backbone
@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 96), (128, 256), (1024, 1024)])
def test_shapes_and_ranges(make_model, backbone, height, width):
    model = make_model(backbone).eval()
    n = 1 if height == 1024 else 2
    with torch.inference_mode():
        told = model.describe(smooth_images(n, height, width))
    out = told.vae
    assert out.reconstruction.shape == (n, 3, height, width)
    assert out.mu.shape == out.logvar.shape == (n, 4)
    assert out.detail_mu.shape == out.detail_logvar.shape == (n, 2, height // 32, width // 32)
    assert told.pixel_logvar.shape == (n, 1, height, width)
    assert out.reconstruction.min() >= 0 and out.reconstruction.max() <= 1
    assert all(torch.isfinite(each).all() for each in (*out, told.pixel_logvar))
    grid = (n, 6, height // 8, width // 8)
    if backbone == "none":
        assert told.features is told.feature_mu is told.feature_logvar is None
    else:
        assert told.features.shape == told.feature_mu.shape == told.feature_logvar.shape == grid


def test_forward_is_the_vae_part_of_describe(make_model):
    model, images = make_model().eval(), smooth_images(2)
    names = ("reconstruction", "mu", "logvar", "detail_mu", "detail_logvar")
    out, told = model(images), model.describe(images).vae
    assert out._fields == names and all(torch.equal(a, b) for a, b in zip(out, told, strict=True))


@each_backbone
def test_evaluation_is_deterministic_and_training_samples(make_model, backbone):
    model, images = shake(make_model(backbone, skip_noise=0.0)), smooth_images(2)
    model.train()
    first, second = model(images).reconstruction, model(images).reconstruction
    assert (first - second).abs().max() > 1e-4
    model.eval()
    assert torch.equal(model(images).reconstruction, model(images).reconstruction)


def test_one_image_is_judged_alike_alone_and_in_a_batch(make_model):
    model, images = shake(make_model("efficientnet_lite0")).eval(), smooth_images(3)
    together, alone = model.describe(images), model.describe(images[1:2])
    torch.testing.assert_close(together.vae.reconstruction[1:2], alone.vae.reconstruction, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.feature_mu[1:2], alone.feature_mu, atol=1e-4, rtol=1e-4)


@each_backbone
def test_every_parameter_learns(make_model, backbone):
    model, images = shake(make_model(backbone)).train(), smooth_images(3)
    DetailLoss(LOSS, None)(model, images, images, 1.0, torch.zeros(3, 1, 64, 64))["total"].backward()
    idle = [name for name, each in model.named_parameters() if each.grad is None or not each.grad.abs().sum() > 0]
    assert idle == []


@each_backbone
def test_a_batch_can_be_learned_by_heart(make_model, backbone):
    """30 steps cut the squared error of pixels (and of features) of four small images to a fifth or less."""
    model, images = make_model(backbone, latent_dim=16), smooth_images(4, 32, 32)
    model.fit_feature_scale([images])
    settings = LossSettings(
        perceptual_weight=0.0, pixel_crop_px=0, pixel_share=1.0, feature_noise=0.0, feature_paste=0.0
    )
    loss, optimizer = DetailLoss(settings, None), torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    runtime = engine.Runtime(torch.device("cpu"))

    def terms(batch):
        return loss(model, batch, batch, 0.0), len(batch)

    first = engine.train_epoch(model, [images], terms, optimizer, schedule, runtime, 1.0)
    engine.train_epoch(model, [images] * 30, terms, optimizer, schedule, runtime, 1.0)
    last = engine.train_epoch(model, [images], terms, optimizer, schedule, runtime, 1.0)
    assert last["mse"] < 0.2 * first["mse"]
    if backbone != "none":
        assert last["feature"] < 0.2 * first["feature"]
        assert last["feature_nll"] < first["feature_nll"]


def test_whitened_deviations_of_the_images_they_were_fitted_on_are_uncorrelated_and_of_size_one(
    make_model, monkeypatch
):
    monkeypatch.setattr(vae_model, "SHRINKAGE", 1e-6)
    model = shake(make_model("efficientnet_lite0")).eval()
    model.fit_feature_scale([smooth_images(8)])
    batches = [model.grid_features(each) for each in smooth_images(24).split(8)]
    model.fit_deviations(batches, 24)
    features = torch.cat(batches)
    mu, _, detail_mu, _ = model.encode(None, features)
    plain = (
        vae_model.deviations(features, *model.decode_features(model.decode_trunk(mu, detail_mu)))
        .movedim(1, -1)
        .flatten(0, -2)
    )
    white = plain @ model.whitening.T
    moments = white.T @ white / len(white)
    for block in (slice(0, 2), slice(2, 6)):  # the stand-in's taps
        torch.testing.assert_close(moments[block, block], torch.eye(block.stop - block.start), atol=0.02, rtol=0)
    assert (model.whitening[2:, :2] == 0).all() and (model.whitening[:2, 2:] == 0).all()
    to_nearest = torch.cdist(model.prototypes, white).amin(1)
    assert to_nearest.max() < 1e-2  # prototypes are deviations that were seen


def test_the_bank_holds_features_of_all_training_images(make_model):
    model = make_model("efficientnet_lite0").eval()
    images = [smooth_images(6), 1 - smooth_images(2)]
    model.fit_feature_scale(images)
    batches = [model.grid_features(each) for each in images]
    model.fit_bank(batches, 8)
    for features in batches:  # the stand-in's few places fit whole: each is in the bank, and nothing else
        assert torch.cdist(coresets.rows_of(features).flatten(0, 1), model.bank).amin(1).max() < 2e-3
    assert (
        torch.cdist(model.bank, torch.cat([coresets.rows_of(each).flatten(0, 1) for each in batches])).amin(1).max()
        < 2e-3
    )


RARE = [(image, 7 * image, 60 - 7 * image) for image in range(8)]


def features_with_rare_places(model):
    """(8, C, 64, 64), so 32,768 places, of which those of RARE are like no other."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(8, model.n_features, 64, 64, generator=generator)
    for image, row, column in RARE:
        features[image, :, row, column] = 4 * torch.randn(model.n_features, generator=generator)
    return features


def test_rare_places_are_in_the_bank_however_many_there_are(make_model):
    model = make_model("efficientnet_lite0").eval()
    features = features_with_rare_places(model)
    model.fit_bank(features.split(3), 8)
    for image, row, column in RARE:
        assert (model.bank == features[image, :, row, column]).all(1).any()


def test_the_bank_lies_amid_what_it_stands_for(make_model):
    model = make_model("efficientnet_lite0").eval()
    features = features_with_rare_places(model)
    model.fit_bank(features.split(3), 8)
    places = coresets.rows_of(features).flatten(0, 1)
    chosen = places[coresets.farthest_points(places, len(model.bank), torch.Generator().manual_seed(0))]
    distance = {name: torch.cdist(places, rows).amin(1).mean() for name, rows in (("bank", model.bank), ("", chosen))}
    assert distance["bank"] < 0.95 * distance[""]


def test_rare_deviations_are_kept_however_many_places_there_are(make_model):
    model = shake(make_model("efficientnet_lite0")).eval()
    features = features_with_rare_places(model)
    model.fit_deviations(features.split(3), 8)
    deviation = model.describe(None, features, paint=False).deviation
    for image, row, column in RARE:
        rare = model.whitening @ deviation[image, :, row, column]
        assert (model.prototypes - rare).norm(dim=1).min() < 1e-3 * rare.norm()


def test_a_model_with_folded_norms_says_the_same_with_fewer_layers(make_model):
    model, images = shake(make_model("efficientnet_lite0")).eval(), smooth_images(2)
    before = model.describe(images)
    n_norms = sum(isinstance(each, torch.nn.BatchNorm2d) for each in model.modules())
    after = layers.fold_layers(model).describe(images)
    assert sum(isinstance(each, torch.nn.BatchNorm2d) for each in model.modules()) < 0.2 * n_norms
    assert not any(isinstance(each, torch.nn.PixelUnshuffle) for each in model.modules())
    torch.testing.assert_close(after.defect_logits, before.defect_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.vae.reconstruction, before.vae.reconstruction, atol=1e-5, rtol=0)
    torch.testing.assert_close(after.feature_mu, before.feature_mu, atol=1e-4, rtol=1e-4)


def test_images_of_another_range_are_refused_without_a_backbone_too(make_model):
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        make_model("none").eval()(255 * smooth_images(1))


def test_maps_side_by_side_have_the_type_that_convolutions_work_in_and_channels_last():
    first = torch.rand(2, 16, 4, 6).bfloat16().to(memory_format=torch.channels_last)
    wide = torch.rand(2, 1, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = [vae_model.side_by_side(first, wide), vae_model.side_by_side(wide, first).roll(-1, 1)]
    for found in narrow:
        assert found.dtype == torch.bfloat16 and found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found, torch.cat([first, wide.bfloat16()], 1))
    assert vae_model.side_by_side(wide, wide).dtype == torch.float32


def test_the_surprise_is_the_logarithm_of_one_and_the_mean_squared_deviation():
    torch.manual_seed(0)
    features, predicted, logvar = torch.randn(3, 2, 5, 4, 6)
    taps = vae_model.tap_deviations(features, predicted, logvar, (1, 4), features)
    expected = torch.log(1 + ((features - predicted) ** 2 / torch.exp(logvar)).mean(1, keepdim=True))
    torch.testing.assert_close(vae_model.feature_surprise(taps, (1, 4)), expected)
    assert torch.equal(vae_model.feature_surprise(features[:, :0], ()), torch.zeros(2, 1, 4, 6))


def test_deviations_that_are_no_numbers_are_not_learned_from(make_model):
    model = make_model("efficientnet_lite0").eval()
    batches = [model.grid_features(smooth_images(8))]
    torch.nn.init.constant_(model.feature_head[-1].bias, float("inf"))
    with pytest.raises(engine.DivergedError, match=r"predictions became infinite; training stops \(try a lower"):
        model.fit_deviations(batches, 8)


def test_without_a_backbone_there_are_no_deviations_to_learn(make_model):
    model = make_model("none")
    model.fit_deviations([], 0)
    assert model.whitening.shape == (0, 0)


def test_the_decoder_is_told_where_each_place_lies(make_model):
    model, seen = make_model().eval(), []
    model.from_detail.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    detail = torch.rand(1, model.settings.detail_channels, 2, 3)
    model.decode_trunk(torch.zeros(1, model.settings.latent_dim), detail)
    torch.testing.assert_close(seen[0], torch.cat([detail, vae_model._coordinates(detail)], 1))


# ------------------------------------------------------------------------------------------- skips and crops


def decoder_inputs(model, images, surprise=0.0):
    """A trunk that does not depend on the images, and an even surprise."""
    torch.manual_seed(3)
    height, width = images.shape[-2] // 8, images.shape[-1] // 8
    return torch.randn(len(images), model.widths[3], height, width), torch.full(
        (len(images), 1, height, width), surprise
    )


def test_pixels_can_pass_through_a_skip_and_without_skips_cannot(make_model):
    for skips in (True, False):
        model, images = make_model(skips=skips).eval(), smooth_images(2).requires_grad_()
        trunk, surprise = decoder_inputs(model, images)
        reconstruction = model.decode_pixels(trunk, images, surprise).reconstruction
        gradient = torch.autograd.grad(reconstruction.sum(), images, allow_unused=True)[0]
        assert (gradient is not None and gradient.abs().sum() > 0) if skips else gradient is None


def test_surprise_shuts_every_skip_whatever_its_gate_has_learned(make_model):
    model, images = make_model().eval(), smooth_images(1)
    for gate in (model.skip2.gate[-1], model.skip4.gate[-1], model.skip1.gate[-2]):
        torch.nn.init.constant_(gate.bias, 10.0)  # wide open, as far as learning goes
    copied = {}
    for level in (0.0, 10.0):
        trunk, surprise = decoder_inputs(model, images, level)
        pair = [model.decode_pixels(trunk, each, surprise)[0] for each in (images, 1 - images)]
        copied[level] = (pair[0] - pair[1]).abs().max().item()
    assert copied[0.0] > 1e-3 and copied[10.0] < 1e-3 * copied[0.0]


def test_a_skips_learned_gate_sees_the_surprise():
    skip = vae_model.GatedSkip(4, noise=0.0).eval()
    for layer in (skip.gate[0], skip.gate[2]):
        torch.nn.init.zeros_(layer.weight)
    skip.gate[0].weight.data[:, -1] = 1.0  # the last channel of the gate's input is the surprise
    torch.nn.init.constant_(skip.gate[2].weight, -10.0)
    decoded, features = torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8)
    # the ceiling is high for both
    low, high = (skip(decoded, features, torch.full((1, 1, 2, 2), level)).abs().max() for level in (0.0, 0.5))
    assert high < 0.01 * low


def test_the_image_skip_passes_the_image_where_open_and_the_painted_where_shut():
    skip = vae_model.ImageSkip(4).eval()
    half, painted, images = torch.randn(1, 4, 8, 8), torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    torch.nn.init.constant_(skip.gate[-2].bias, 30.0)
    surprise = torch.zeros(1, 1, 2, 2)
    surprise[..., 1] = 10.0  # the right half
    out = skip(half, half, half, painted, images, surprise)
    assert out[..., :3].min() > 0.99 and out[..., 12:].max() < 0.01


def test_skip_noise_is_drawn_in_training_only(make_model):
    skip = vae_model.GatedSkip(4, noise=1.0)
    decoded, features, surprise = torch.zeros(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.zeros(2, 1, 2, 2)
    assert not torch.equal(skip(decoded, features, surprise), skip(decoded, features, surprise))
    skip.eval()
    assert torch.equal(skip(decoded, features, surprise), skip(decoded, features, surprise))


def test_decoding_a_crop_is_cropping_the_decoded(make_model):
    """Away from the crop's border, where convolutions see the padding: 40 px are enough."""
    model, images = shake(make_model("efficientnet_lite0")).eval(), smooth_images(2, 192, 256)
    trunk, surprise = torch.randn(2, model.widths[3], 24, 32), torch.rand(2, 1, 24, 32)
    whole = model.decode_pixels(trunk, images, surprise)
    small, large = (..., slice(3, 19), slice(5, 21)), (..., slice(24, 152), slice(40, 168))
    part = model.decode_pixels(trunk[small], images[large], surprise[small])
    inner = (..., slice(40, -40), slice(40, -40))
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[large][inner], b[inner], atol=1e-5, rtol=0)
        assert not torch.allclose(a[large], b, atol=1e-3)  # the border does differ, so the test can see


def mask_of(n, height, width, *places):
    """Masks (n, 1, height, width) with one defective pixel (image, y, x) for each place."""
    mask = torch.zeros(n, 1, height, width)
    for image, y, x in places:
        mask[image, 0, y, x] = 1.0
    return mask


@pytest.mark.parametrize(
    ("side", "share", "n", "height", "width"), [(32, 0.5, 4, 64, 128), (24, 1.0, 3, 96, 64), (8, 0.01, 5, 64, 64)]
)
def test_windows_are_squares_inside_the_image_and_reach_every_place(side, share, n, height, width):
    starts = set()
    for seed in range(150):
        torch.manual_seed(seed)
        windows = crop_windows(torch.zeros(n, 1, height, width), side, share)
        assert len(windows) == max(1, round(share * n))
        for top, left, h, w in windows:
            assert h == w == side // 8 and 0 <= top <= height // 8 - h and 0 <= left <= width // 8 - w
            starts.add((top, left))
    assert {top for top, _ in starts} == set(range((height - side) // 8 + 1))
    assert {left for _, left in starts} == set(range((width - side) // 8 + 1))


def test_a_window_holds_the_drawn_defect_of_its_own_image():
    corners = [(0, 0, 0), (1, 63, 127), (2, 0, 127), (3, 33, 50)]
    mask, tops = mask_of(5, 64, 128, *corners), set()
    for seed in range(60):
        torch.manual_seed(seed)
        windows = crop_windows(mask, 32, 1.0)
        assert [int(each.sum()) for each in cut(mask, windows, 8)] == [1, 1, 1, 1, 0]
        tops.add(windows[3][0])
    assert tops == {1, 2, 3, 4}  # around the defect at random, not always in its middle


def test_the_large_cut_is_the_small_one_at_eight_times_the_size():
    images = torch.arange(3 * 64 * 128, dtype=torch.float32).view(3, 1, 64, 128)
    windows = [(0, 3, 4, 4), (4, 12, 4, 4)]
    large, small = cut(images, windows, 8), cut(images[:, :, ::8, ::8], windows, 1)
    assert large.shape == (2, 1, 32, 32) and torch.equal(large[:, :, ::8, ::8], small)
    assert torch.equal(large[1], images[1, :, 32:64, 96:128])


@pytest.mark.parametrize("side", [0, 64, 100])
def test_a_window_as_large_as_the_image_is_the_whole(side):
    images = torch.rand(4, 3, 64, 96)
    windows = crop_windows(mask_of(4, 64, 96, (0, 1, 1)), side, 0.5)
    assert torch.equal(cut(images, windows, 8), images[:2])


def test_the_pixel_branch_trains_on_crops_of_all_it_compares(make_model, monkeypatch):
    model, images = make_model("efficientnet_lite0").train(), smooth_images(4, 64, 96)
    seen = []

    def watched(trunk, crops, surprise):
        seen.append((trunk, crops, surprise))
        return vae_model.Painting(crops, crops, torch.zeros_like(crops[:, :1]))  # a perfect copy of the damaged crop

    monkeypatch.setattr(model, "decode_pixels", watched)
    damaged, mask = images.clone(), mask_of(4, 64, 96, (0, 40, 50), (1, 8, 8))
    damaged[:2] = torch.where(mask[:2] > 0, 1 - images[:2], images[:2])
    loss = DetailLoss(LOSS.replace(pixel_share=0.5, repair_weight=0.0), None)
    terms = loss(model, images, damaged, 1.0, mask)
    heavier = DetailLoss(LOSS.replace(pixel_share=0.5, repair_weight=4.0), None)(model, images, damaged, 1.0, mask)
    assert all(heavier[name] > terms[name] for name in ("mse", "l1", "painted"))  # the copied defect counts for more
    trunk, crops, surprise = seen[0]
    assert crops.shape == (2, 3, 32, 32) and trunk.shape[2:] == surprise.shape[2:] == (4, 4)
    expected = sum((images[i] - damaged[i]).square().sum() for i in range(2)) / (2 * 3 * 32 * 32)  # the target is clean
    assert terms["mse"].item() == pytest.approx(expected.item(), rel=1e-4)
    model.eval()
    loss(model, images, damaged, 1.0, mask)
    assert torch.equal(seen[-1][1], damaged)


def test_without_features_the_pixel_branch_trains_on_every_image(make_model, monkeypatch):
    model, images = make_model("none").train(), smooth_images(4, 64, 96)
    seen = []
    monkeypatch.setattr(
        model,
        "decode_pixels",
        lambda trunk, crops, surprise: (
            seen.append(crops) or vae_model.Painting(crops, crops, torch.zeros_like(crops[:, :1]))
        ),
    )
    DetailLoss(LOSS.replace(pixel_share=0.25), None)(model, images, images, 1.0, mask_of(4, 64, 96, (0, 40, 50)))
    assert len(seen[0]) == 4


# -------------------------------------------------------------------------------------------------- features


def test_features_are_standardised_over_all_images_of_ragged_batches(make_model):
    model, images = make_model("efficientnet_lite0"), smooth_images(7)
    raw = model.backbone.grid(images)
    assert raw.mean() > 1.0
    model.fit_feature_scale(images.split(3))
    features = model.grid_features(images)
    torch.testing.assert_close(features.mean((0, 2, 3)), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std((0, 2, 3), unbiased=False), torch.ones(6), atol=1e-3, rtol=0)
    torch.testing.assert_close(features * model.feature_std + model.feature_mean, raw)


def test_a_channel_that_never_moves_stays_finite_in_half_precision(make_model, tiny_backbone):
    tiny_backbone.kernel[0] = 0.0  # constant on every image
    model, images = make_model("efficientnet_lite0"), smooth_images(2)
    model.fit_feature_scale([images])
    assert torch.isfinite(model.grid_features(images).half()).all()


def test_a_channel_that_rested_in_training_does_not_overflow_when_it_wakes(make_model, tiny_backbone, monkeypatch):
    model, images, grid = make_model("efficientnet_lite0"), smooth_images(2), tiny_backbone.grid
    monkeypatch.setattr(
        tiny_backbone, "grid", lambda images: grid(images) * torch.tensor([0.0, 1, 1, 1, 1, 1]).view(1, 6, 1, 1)
    )
    model.fit_feature_scale([images])
    monkeypatch.setattr(tiny_backbone, "grid", grid)
    assert torch.isfinite(FeatureCache(model)([0, 1], images)).all()


def test_the_backbone_is_neither_saved_nor_trained(make_model, tiny_backbone):
    model = make_model("efficientnet_lite0")
    frozen = tiny_backbone.kernel.data_ptr()
    assert frozen not in {each.data_ptr() for each in (*model.state_dict().values(), *model.parameters())}
    assert not [name for name in model.state_dict() if "backbone" in name]
    assert {"feature_mean", "feature_std"} <= model.state_dict().keys()
    assert not model.grid_features(smooth_images(1).requires_grad_()).requires_grad


def test_corrupted_features_keep_shape_and_change_by_the_noise():
    torch.manual_seed(0)
    features = torch.randn(4, 5, 12, 16)
    kept = features.clone()
    assert torch.equal(corrupt_features(features, 0.0, 0.0)[0], features)
    noisy, pasted = corrupt_features(features, 0.3, 0.0)
    assert not pasted.any()
    assert noisy.shape == features.shape and (noisy - features).std().item() == pytest.approx(0.3, rel=0.05)
    assert torch.equal(features, kept)


def test_pasted_features_are_a_rectangle_from_some_image_of_the_batch():
    torch.manual_seed(0)
    features = torch.arange(3 * 8 * 12, dtype=torch.float32).view(3, 1, 8, 12).repeat(1, 2, 1, 1)
    n_changed = 0
    for _ in range(40):
        seen, pasted = corrupt_features(features, 0.0, 1.0)
        for image, original, where in zip(seen, features, pasted[:, 0], strict=True):
            changed = (image != original).any(0)
            assert where[changed].all() and torch.equal(image[:, where == 0], original[:, where == 0]) and where.any()
            rows, columns = torch.nonzero(changed.any(1)).flatten(), torch.nonzero(changed.any(0)).flatten()
            if not len(rows):
                continue  # pasted onto itself
            n_changed += 1
            patch = image[0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert patch.shape[0] <= 2 and patch.shape[1] <= 3 and torch.equal(image[0], image[1])
            source, offset = divmod(int(patch[0, 0]), 96)
            y, x = divmod(offset, 12)
            assert torch.equal(patch, features[source, 0, y : y + patch.shape[0], x : x + patch.shape[1]])
    assert n_changed > 60
    torch.manual_seed(0)
    share = np.mean(
        [(corrupt_features(features, 0.0, 0.25)[0] != features).flatten(1).any(1).float().mean() for _ in range(200)]
    )
    assert 0.15 < share < 0.3


def test_cached_features_are_the_direct_ones_and_computed_once(make_model, tiny_backbone):
    model, images = make_model("efficientnet_lite0"), smooth_images(4)
    model.fit_feature_scale([images])
    direct = model.grid_features(images)
    cache = FeatureCache(model)
    tiny_backbone.n_calls = 0
    first = cache([10, ~10, 3, 0], images)
    assert tiny_backbone.n_calls == 4
    again = cache([0, 3], torch.zeros(2, 3, 64, 64))  # what is kept wins over what is shown
    assert tiny_backbone.n_calls == 4
    assert first.dtype == torch.float32 and torch.equal(again, first[[3, 2]])
    torch.testing.assert_close(first, direct, atol=2e-3, rtol=2e-3)
    assert torch.equal(first, direct.half().float()) or (first - direct).abs().max() < 4e-3


def test_a_full_cache_computes_without_keeping_and_says_the_same(make_model, tiny_backbone):
    model, images = make_model("efficientnet_lite0"), smooth_images(3)
    size = 6 * 8 * 8 * 2  # channels x height x width x bytes of half precision
    cache = FeatureCache(model, capacity_bytes=2 * size + 1)
    tiny_backbone.n_calls = 0
    first = cache([0, 1, 2], images)
    assert sorted(cache.kept) == [0, 1] and cache.n_bytes == 2 * size
    assert torch.equal(cache([0, 1, 2], images), first) and tiny_backbone.n_calls == 4
    assert FeatureCache(make_model("none"))([0], images[:1]) is None


# ------------------------------------------------------------------------------------------------------ loss


class Distance(torch.nn.Module):
    def forward(self, x_hat, x):
        return (x_hat - x).abs().max()


WEIGHTS = {
    "mse_weight": "mse",
    "l1_weight": "l1",
    "painted_weight": "painted",
    "perceptual_weight": "perceptual",
    "kl_weight": "kl",
    "detail_kl_weight": "kl_detail",
    "feature_weight": "feature",
    "likelihood_weight": "feature_nll",
    "pixel_likelihood_weight": "pixel_nll",
}


@pytest.mark.parametrize(("setting", "term"), WEIGHTS.items())
def test_each_weight_moves_the_total_by_its_own_term(make_model, setting, term):
    model, images = shake(make_model("efficientnet_lite0")).eval(), smooth_images(2)
    base = LossSettings()
    mask = mask_of(2, 64, 64, (0, 9, 9))
    plain = DetailLoss(base, Distance())(model, images, images, 0.5, mask)
    heavier = DetailLoss(base.replace(**{setting: getattr(base, setting) + 2.0}), Distance())(
        model, images, images, 0.5, mask
    )
    scale = 0.5 if "kl" in term else 1.0
    assert (heavier["total"] - plain["total"]).item() == pytest.approx(2.0 * scale * plain[term].item(), rel=1e-3)
    assert plain[term].item() != 0.0
    lasting = [
        DetailLoss(settings, None).of_latents(plain).item()
        for settings in (base, base.replace(**{setting: getattr(base, setting) + 2.0}))
    ]
    assert lasting[1] - lasting[0] == pytest.approx(2.0 * plain[term].item() if term in LATENT_TERMS else 0.0, rel=1e-3)


def test_the_loss_of_features_alone_is_the_latents_part_of_the_whole(make_model):
    model, images, loss = make_model("efficientnet_lite0").eval(), smooth_images(2), DetailLoss(LOSS, None)
    terms, alone = loss(model, images, images, 1.0), loss.of_features(model, model.grid_features(images))
    assert alone.keys() == {*LATENT_TERMS, "total"}
    assert all(torch.equal(alone[name], terms[name]) for name in LATENT_TERMS)
    assert alone["total"].item() == pytest.approx(loss.of_latents(terms).item(), rel=1e-6)
    alone["total"].backward()
    assert all(parameter.grad is None for parameter in model.pixel_branch.parameters())


def test_the_terms_are_those_of_the_clean_image_not_of_the_damaged_one(make_model):
    model, images = shake(make_model("efficientnet_lite0")).eval(), smooth_images(2)
    damaged = images.clone()
    damaged[:, :, 20:30, 20:30] = 1.0
    terms, told = DetailLoss(LOSS, None)(model, images, damaged, 1.0), model.describe(damaged)
    out, clean = told.vae, model.grid_features(images)
    assert terms["mse"].item() == pytest.approx(((out.reconstruction - images) ** 2).mean().item(), rel=1e-5)
    assert terms["l1"].item() == pytest.approx((out.reconstruction - images).abs().mean().item(), rel=1e-5)
    assert terms["feature"].item() == pytest.approx(((clean - told.feature_mu) ** 2).mean().item(), rel=1e-5)
    assert terms["kl"].item() == pytest.approx(kl_divergence(out.mu, out.logvar).item(), rel=1e-5)
    taps = vae_model.tap_deviations(told.features, told.feature_mu, told.feature_logvar, model.tap_channels, told.trunk)
    surprise = vae_model.feature_surprise(taps, model.tap_channels)
    off = model.decode_pixels(model.decode_trunk(out.mu, out.detail_mu), damaged, surprise).painted - images
    assert terms["painted"].item() == pytest.approx((off**2).mean().item() + off.abs().mean().item(), rel=1e-5)
    squared = (off**2).mean(1, keepdim=True)
    assert terms["pixel_nll"].item() == pytest.approx(gaussian_nll(squared, told.pixel_logvar).item(), rel=1e-5)


def test_features_given_are_used_and_not_computed_again(make_model, tiny_backbone):
    model, images = make_model("efficientnet_lite0").eval(), smooth_images(2)
    damaged = images.flip(3)
    loss, clean, actual = DetailLoss(LOSS, None), model.grid_features(images), model.grid_features(damaged)
    expected = loss(model, images, damaged, 1.0)
    tiny_backbone.n_calls = 0
    given = loss(model, images, damaged, 1.0, clean=clean, actual=actual)
    assert tiny_backbone.n_calls == 0
    assert {name: term.item() for name, term in given.items()} == pytest.approx(
        {name: term.item() for name, term in expected.items()}
    )


def test_the_variance_learns_from_the_error_but_not_the_error_from_the_variance(make_model):
    model, images = shake(make_model("efficientnet_lite0")).eval(), smooth_images(2)
    terms = DetailLoss(LOSS, None)(model, images, images, 1.0)
    head = model.feature_head[2].weight
    gradient = torch.autograd.grad(terms["feature_nll"], head)[0]
    assert gradient[:6].abs().sum() == 0 and gradient[6:].abs().sum() > 0  # the first half predicts means


def painted_terms(drawn, target, weight, logvar):
    """The terms of what was painted and of its reconstruction, here the same."""
    return DetailLoss(LOSS, None)._painted_terms(Painting(drawn, drawn, logvar), target, weight, None)


def test_a_drawn_defect_weighs_in_squared_and_absolute_errors_as_its_weight_says():
    torch.manual_seed(0)
    drawn, target, logvar = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8), torch.zeros(2, 1, 8, 8)
    weight = 1 + 4 * (torch.rand(2, 1, 8, 8) > 0.8).float()
    terms, share = painted_terms(drawn, target, weight, logvar), weight / weight.mean()
    torch.testing.assert_close(terms["mse"], (share * (drawn - target) ** 2).mean())
    torch.testing.assert_close(terms["l1"], (share * (drawn - target).abs()).mean())


def test_the_pixels_variance_learns_from_their_error_but_not_the_error_from_the_variance():
    drawn, logvar = torch.rand(2, 3, 8, 8, requires_grad=True), torch.zeros(2, 1, 8, 8, requires_grad=True)
    painted_terms(drawn, torch.rand(2, 3, 8, 8), torch.ones(2, 1, 8, 8), logvar)["pixel_nll"].backward()
    assert drawn.grad is None and logvar.grad.abs().sum() > 0


def test_in_bfloat16_features_come_from_the_cache_and_every_term_is_near_that_of_float32(make_model):
    model, images, mask = (
        shake(make_model("efficientnet_lite0")).eval(),
        smooth_images(2),
        mask_of(2, 64, 64, (0, 9, 9)),
    )
    cache, loss = FeatureCache(model), DetailLoss(LossSettings(), Distance())
    full = loss(model, images, images, 1.0, mask, cache([0, 1], images))
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(model, images, images, 1.0, mask, cache([0, 1], images))
    assert half.keys() == full.keys() and all(term.dtype == torch.float32 for term in half.values())
    for name, term in half.items():
        assert term.item() == pytest.approx(full[name].item(), rel=0.05, abs=1e-3), name
    assert half["feature"].item() != full["feature"].item()
    half["total"].backward()
    assert all(each.grad is None or each.grad.isfinite().all() for each in model.parameters())
    assert model.to_detail.weight.grad.abs().sum() > 0


def test_without_backbone_there_are_no_feature_terms(make_model):
    terms = DetailLoss(LOSS, None)(make_model().train(), smooth_images(2), smooth_images(2), 1.0)
    assert terms.keys() == {"mse", "l1", "painted", "pixel_nll", "kl", "kl_detail", "total"}


# ------------------------------------------------------------------------------------------------ from a file


def save(network, path, **changes):
    contents = {"settings": as_dict(network.settings), "model": network.state_dict(), **changes}
    checkpoints.save_checkpoint(path, vae_model.KIND, contents)
    return path


LOAD = """
import sys
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
from vae_model import load_detail_vae
images = torch.from_numpy(np.load(sys.argv[3]))
model = load_detail_vae(sys.argv[2])
assert not model.training
with torch.inference_mode():
    np.savez(sys.argv[4], *model(images))
"""


def test_a_saved_model_says_the_same_in_a_new_process(make_model, tmp_path):
    model, images = shake(make_model(detail_channels=3, skips=True)), smooth_images(2)
    model.train()(images)  # running statistics are part of the model
    path = save(model.eval(), tmp_path / "model.pth")
    np.save(tmp_path / "images.npy", images.numpy())
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(ROOT), str(path), str(tmp_path / "images.npy"), str(tmp_path / "out.npz")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        expected = model(images)
    with np.load(tmp_path / "out.npz") as got:
        for number, tensor in enumerate(expected):
            np.testing.assert_allclose(got[f"arr_{number}"], tensor.numpy(), rtol=0, atol=1e-6)


def test_a_model_with_features_comes_back_with_their_scale(make_model, tmp_path):
    model, images = make_model("efficientnet_lite0", segmentation=True), smooth_images(2)
    model.fit_feature_scale([images])
    path = save(model.eval(), tmp_path / "model.pth")
    loaded = vae_model.load_detail_vae(path)
    for a, b in zip(loaded.describe(images)[1:], model.describe(images)[1:], strict=True):
        assert torch.equal(a, b)


def test_a_file_that_does_not_hold_the_model_is_refused(make_model, tmp_path):
    model = make_model()
    checkpoints.save_checkpoint(tmp_path / "other.pth", "classifier", {})
    with pytest.raises(InputError, match="holds a 'classifier'; expected a 'detail_vae'"):
        vae_model.load_detail_vae(tmp_path / "other.pth")
    wider = {**as_dict(model.settings), "base_channels": 8}
    with pytest.raises(InputError, match="do not fit its own architecture"):
        vae_model.load_detail_vae(save(model, tmp_path / "wider.pth", settings=wider))


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": None},
        {"model": None},
        {"settings": {"latent_dim": 0}},
    ],
    ids=["no settings", "no weights", "odd settings"],
)
def test_a_file_with_parts_missing_is_refused_in_a_sentence(make_model, tmp_path, changes):
    with pytest.raises(InputError) as caught:
        vae_model.load_detail_vae(save(make_model(), tmp_path / "part.pth", **changes))
    assert str(caught.value).endswith(".")


def test_a_model_is_loaded_onto_the_device_of_that_name(make_model, tmp_path, monkeypatch):
    path = save(make_model(), tmp_path / "a.pth")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert vae_model.load_detail_vae(path, "auto").from_global.weight.device.type == "cpu"
    with pytest.raises(InputError, match="CUDA was asked for but this machine has no usable CUDA device"):
        vae_model.load_detail_vae(path, "cuda")


@pytest.mark.parametrize("backbone", ["none", "efficientnet_lite0"])
def test_a_batch_without_images_is_refused_in_a_sentence(make_model, backbone):
    with pytest.raises(ValueError, match=r"no images in a tensor of shape \(0, 3, 64, 64\); expected one or more"):
        make_model(backbone).eval()(torch.zeros(0, 3, 64, 64))
