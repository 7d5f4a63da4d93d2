"""Maps, morphology and scores against plain arithmetic."""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np
import pytest
import torch

import checkpoints
import defect_maps
import engine
import vae_model
from config import InputError, LossSettings, MapSettings, TrainSettings, UsageError, as_dict, from_dict
from defect_maps import (
    Calibration,
    Detector,
    MapScale,
    calibrate,
    fuse,
    image_score,
    map_shares,
    p_value,
    refine,
    score_shares,
)
from evaluation import ssim_map

# ----------------------------------------------------------------------------------------- scores, morphology


@pytest.mark.parametrize("top_frac", [0.0, 0.0005, 0.01, 0.3, 1.0])
def test_the_image_score_is_the_mean_of_the_largest_values(top_frac):
    defect_map = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
    n_top = max(1, round(top_frac * 2000))
    assert image_score(defect_map, top_frac) == pytest.approx(
        np.sort(defect_map.ravel())[::-1][:n_top].mean(), rel=1e-5, abs=1e-6
    )


def test_refining_keeps_a_constant_and_adds_nothing_to_zero():
    for value in (0.0, 0.7):
        np.testing.assert_allclose(refine(np.full((40, 64), value, np.float32), 0.02, 0.1), value, rtol=1e-5)
    noise = np.random.default_rng(0).random((48, 48)).astype(np.float32)
    refined = refine(noise, 0.02, 0.1)
    assert refined.dtype == np.float32 and refined.shape == (48, 48)
    assert refined.min() >= noise.min() and refined.max() <= noise.max() + 1e-6


def test_closing_fills_a_hole_and_leaves_the_outline():
    defect_map = np.zeros((64, 64), np.float32)
    defect_map[20:40, 20:40] = 1.0
    whole = defect_map.copy()
    defect_map[30, 30] = 0.0
    np.testing.assert_array_equal(refine(defect_map, 0.0, 3 / 64), whole)
    np.testing.assert_array_equal(refine(defect_map, 0.0, 0.0), defect_map)


def test_closing_never_lowers_a_map():
    noise = np.random.default_rng(1).random((40, 40)).astype(np.float32)
    assert (refine(noise, 0.0, 0.1) >= noise).all()
    assert (refine(noise, 0.0, 0.1) > noise).any()


def test_smoothing_is_a_gaussian_of_that_share_of_the_longer_side():
    from scipy import ndimage

    point = np.zeros((60, 100), np.float32)
    point[30, 50] = 1.0
    np.testing.assert_allclose(refine(point, 0.03, 0.0), ndimage.gaussian_filter(point, 3.0, mode="mirror"), atol=2e-5)
    kept = point.copy()
    refine(point, 0.03, 0.1)
    np.testing.assert_array_equal(point, kept)


def test_shares_add_up_and_fall_back_to_pixels():
    settings = MapSettings(
        map_pixel=1.0, map_ssim=0.0, map_perceptual=0.5, map_feature=2.0, map_likelihood=0.5, map_bank=0.0
    )
    assert map_shares(settings, True) == pytest.approx(
        {"pixel": 0.25, "perceptual": 0.125, "feature": 0.5, "likelihood": 0.125}
    )
    assert map_shares(settings, False) == pytest.approx({"pixel": 2 / 3, "perceptual": 1 / 3})
    only_features = MapSettings(map_pixel=0.0, map_ssim=0.0, map_perceptual=0.0, map_feature=1.0, map_likelihood=1.0)
    with pytest.raises(UsageError, match="No map that needs no backbone has a weight above 0"):
        map_shares(only_features, False)
    nothing = MapSettings(
        map_pixel=0.0, map_ssim=0.0, map_perceptual=0.0, map_feature=0.0, map_likelihood=0.0, map_bank=0.0
    )
    with pytest.raises(UsageError, match="No map has a weight above 0"):
        map_shares(nothing, True)
    scored = settings.replace(score_likelihood=0.0, score_nearest=1.0, score_bank=3.0)
    assert score_shares(scored, True) == {"nearest": 0.25, "bank": 0.75}
    assert score_shares(scored, False) == map_shares(settings, False)
    assert score_shares(settings.replace(score_nearest=0.0, score_bank=0.0), True) == map_shares(settings, True)


# ------------------------------------------------------------------------------------------- maps of a network

NEAREST_SCORE = {"score_deviation": 0.0, "score_likelihood": 0.0, "score_nearest": 1.0, "score_bank": 0.0}
FUSED_SCORE = {"score_deviation": 0.0, "score_likelihood": 0.0, "score_nearest": 0.0, "score_bank": 0.0}
PIXELS = MapSettings(
    map_pixel=1.0,
    map_ssim=1.0,
    map_feature=0.0,
    map_likelihood=0.0,
    map_bank=0.0,
    link_frac=0.0,
    own_level=0.0,
    smoothing_frac=0.02,
    closing_frac=0.05,
    top_frac=0.01,
)
ALL = PIXELS.replace(map_feature=1.0, map_likelihood=1.0, map_perceptual=1.0)


def good_images(n, seed=0, side=64):
    """One smooth scene, a little lighter or darker, with a little grain."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0.3, 0.6, side).view(1, 1, 1, side).expand(n, 3, side, side)
    light = 0.05 * torch.randn(n, 1, 1, 1, generator=generator)
    return (ramp + light + 0.01 * torch.randn(n, 3, side, side, generator=generator)).clamp(0, 1)


def settings_of(maps):
    return TrainSettings(**{**as_dict(maps), "image_size": 64})


def detector_of(model, maps=PIXELS, n_good=12):
    detector = Detector(model, settings_of(maps), None)
    detector.calibration = calibrate(detector, good_images(n_good, seed=5).split(5))
    return detector


def maps_of(detector, images):
    """All refined maps of images by name."""
    names = list(detector.fused | detector.scored)
    return detector.refined_maps(images, detector.describe(images, names), names)


def test_a_detector_refuses_images_of_another_range(make_model):
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        detector_of(make_model("none")).detect(255 * good_images(2, seed=6))


@pytest.mark.parametrize("size", [(80, 64), (64, 100), (16, 16)])
def test_sides_that_the_model_does_not_take_are_refused(make_model, size):
    detector = detector_of(make_model("none"))
    with pytest.raises(ValueError, match=f"images are {size[0]} x {size[1]}; expected multiples of 32"):
        detector.detect(torch.rand(1, 3, *size))
    with pytest.raises(ValueError, match=f"images are {size[0]} x {size[1]}; expected multiples of 32"):
        detector.model(torch.rand(1, 3, *size))
    assert len(detector.detect(torch.rand(1, 3, 64, 96))) == 1


def test_bfloat16_moves_maps_by_little_and_what_is_said_is_float32(make_model):
    maps = ALL.replace(map_perceptual=0.0, map_bank=1.0, map_nearest=1.0)
    full = detector_of(make_model("efficientnet_lite0", segmentation=True), maps)
    half = dataclasses.replace(full, runtime=engine.Runtime(torch.device("cpu"), torch.bfloat16))
    images = good_images(3)
    said = half.describe(images, half.needed)
    assert {
        each.dtype
        for each in (
            *said.vae,
            said.pixel_logvar,
            said.defect_logits,
            said.features,
            said.feature_mu,
            said.feature_logvar,
        )
    } == {torch.float32}
    for name in half.needed:
        exact, found = (each.all_maps(images, [name])[name] for each in (full, half))
        assert 0 < np.abs(found - exact).max() < 0.05 * exact.max(), name


def test_float16_has_not_the_range_for_squared_distances_so_maps_are_made_without(make_model):
    full = detector_of(make_model("efficientnet_lite0"), ALL.replace(map_perceptual=0.0, map_bank=1.0))
    half = dataclasses.replace(full, runtime=engine.Runtime(torch.device("cpu"), torch.float16))
    images = good_images(2)
    for name in full.needed:
        np.testing.assert_array_equal(half.all_maps(images, [name])[name], full.all_maps(images, [name])[name])


class Distance:
    def distance_map(self, x_hat, x):
        return (x_hat - x).abs().amax(1, keepdim=True)


def test_raw_maps_are_what_their_names_say(make_model):
    model, images = make_model("efficientnet_lite0", segmentation=True).eval(), good_images(2)
    for bank in (model.bank, model.prototypes):
        bank.normal_(std=3.0)
    with torch.inference_mode():
        told = model.describe(images)
        maps = defect_maps.raw_maps((*defect_maps.MAPS, "segmentation"), model, images, told, Distance())
    reconstruction = told.vae.reconstruction
    assert tuple(maps) == (*defect_maps.MAPS, "segmentation")
    assert all(
        each.shape == (2, 1, 64, 64) and each.dtype == torch.float32 and each.min() >= 0 for each in maps.values()
    )
    torch.testing.assert_close(maps["pixel"], (reconstruction - images).abs().mean(1, keepdim=True))
    torch.testing.assert_close(maps["ssim"], 1 - ssim_map(reconstruction, images, data_range=1.0))
    torch.testing.assert_close(maps["perceptual"], (reconstruction - images).abs().amax(1, keepdim=True))
    torch.testing.assert_close(maps["segmentation"], torch.sigmoid(told.defect_logits))
    error = told.features - told.feature_mu
    taps = (error**2 / told.feature_logvar.exp()).split([2, 4], 1)  # those of the stand-in
    coarse = {
        "feature": (error**2).mean(1),
        "deviation": sum(tap.mean(1).sqrt() for tap in taps) / 2,
        "bank": defect_maps.nearest_distance(told.features, model.bank),
    }
    for name, expected in coarse.items():
        # bilinear growth keeps the middle of cells about
        cells = torch.nn.functional.adaptive_avg_pool2d(maps[name], 8)
        assert np.corrcoef(cells.flatten(), expected.flatten())[0, 1] > 0.9
    torch.testing.assert_close(defect_maps.feature_error(told), (error**2).mean(1, keepdim=True))
    model.whitening.copy_(torch.randn(6, 6))
    white = torch.einsum("cd,bdhw->bchw", model.whitening, error / torch.exp(told.feature_logvar).sqrt())
    torch.testing.assert_close(defect_maps.decorrelated(told.deviation, model), white)
    # the stand-in's taps have 2 and 4 channels
    balanced = 0.5 * ((white[:, :2] ** 2).mean(1).sqrt() + (white[:, 2:] ** 2).mean(1).sqrt())
    torch.testing.assert_close(defect_maps.feature_likelihood(white, model.tap_channels)[:, 0], balanced)


@pytest.mark.parametrize("thorough", [True, False])
@pytest.mark.parametrize(("trust", "weight"), [(0.0, 0.0), (0.5, 0.0), (1.0, 0.7)])
def test_the_gate_leaves_of_the_map_what_the_head_outlines(make_model, monkeypatch, thorough, trust, weight):
    shaped = PIXELS.replace(
        segmentation_gate=0.9,
        segmentation_trust=trust,
        segmentation_weight=weight,
        outline_window_frac=0.25,
        outline_smoothing_frac=0.0,
        **NEAREST_SCORE,
    )
    detector = detector_of(make_model("efficientnet_lite0", segmentation=True), shaped)
    plain = detector_of(
        make_model("efficientnet_lite0", segmentation=True), PIXELS.replace(segmentation_gate=0.0, **NEAREST_SCORE)
    )
    for each in (detector, plain):
        each.calibration = dataclasses.replace(each.calibration, threshold=-1.0)  # so that all are defective
    left = torch.where(torch.arange(64) < 32, 40.0, -40.0)  # sure of the left half
    monkeypatch.setattr(
        detector.model.defect_head,
        "forward",
        lambda images, painting, taps, features: left.expand(len(images), 1, 64, 64),
    )
    assert detector.shown == ["pixel", "ssim", "segmentation"] and plain.shown == ["pixel", "ssim"]
    beside = 0.1 + 0.9 * defect_maps.OUTLINE_FLOOR / (1 + defect_maps.OUTLINE_FLOOR)
    n_shaped = 0
    images = torch.cat([good_images(1), torch.rand(1, 3, 64, 64)])
    for gated, whole in zip(detector.detect(images, thorough), plain.detect(images, thorough), strict=True):
        # and the sure half is raised
        np.testing.assert_allclose(gated.defect_map[:, :24], whole.defect_map[:, :24] + weight, rtol=1e-3, atol=1e-4)
        seen = whole.defect_map[:, 36:38]
        level = defect_maps.SHAPED_ABOVE
        np.testing.assert_allclose(
            gated.defect_map[:, 36:38],
            np.where(seen > level, level + beside * (seen - level), seen),
            rtol=1e-2,
            atol=1e-4,
        )
        # out of its reach
        away, believed = (
            whole.defect_map[:, 48:],
            (defect_maps.OUTLINE_FLOOR / (1 + defect_maps.OUTLINE_FLOOR)) ** trust,
        )
        np.testing.assert_allclose(
            gated.defect_map[:, 48:],
            np.where(away > level, level + believed * (away - level), away),
            rtol=1e-2,
            atol=1e-4,
        )
        assert gated.score == pytest.approx(whole.score)
        n_shaped += (seen > level).sum()
    assert n_shaped


def test_an_outline_compares_a_place_with_its_surroundings_alone():
    probability = np.zeros((2, 40, 40), np.float32)
    probability[0, 10, 10], probability[0, 10, 12], probability[0, 30, 30] = 0.9, 0.4, 0.4
    found, believed = defect_maps.outline(probability, 9, 0.5)
    assert found.dtype == np.float32 and found.shape == probability.shape
    assert found[0, 10, 10] == found[0, 30, 30] == 1.0  # sure or not, each is the peak of its place
    assert (
        found[0, 10, 12] == pytest.approx(0.42 / 0.92)
        and found[0, 14, 10] == pytest.approx(0.02 / 0.92)
        and found[0, 34, 30] == pytest.approx(0.02 / 0.42)
    )
    assert (found[0, 20] == 1.0).all() and (found[1] == 1.0).all()
    assert (
        believed.shape == probability.shape
        and believed[0, 10, 12] == pytest.approx((0.92 / 1.02) ** 0.5)
        and believed[0, 20, 20] == pytest.approx((0.02 / 1.02) ** 0.5)
    )
    np.testing.assert_array_equal(defect_maps.outline(probability, 9, 0.0)[1], 1.0)
    np.testing.assert_array_equal(defect_maps.outline(probability, 0, 0.0)[0], 1.0)


@pytest.mark.parametrize("shape", [(96, 128), (97, 131)])
def test_a_wide_disc_reaches_as_far_in_blocks_as_in_pixels(shape):
    probability = np.zeros((1, *shape), np.float32)
    probability[0, 40, 60] = 1.0
    low = defect_maps.outline(probability, 45, 0.0)[0][0] < 0.5  # within reach of the one that is sure; itself is not
    rows, columns = np.indices(shape)
    away = np.hypot(rows - 40, columns - 60)
    assert low[(away > 2) & (away < 19)].all() and not low[away > 26].any()
    assert low.shape == shape and not low[40, 60]


def test_faint_dots_in_a_row_stand_above_one_that_lies_alone():
    logs = np.zeros((2, 96, 96), np.float32)
    dot, plain = np.ones((4, 4), np.float32), np.s_[:, 80:84, 80:84]
    for left in range(8, 88, 8):
        logs[0, 40:44, left : left + 4] = 0.2 * dot
    logs[1, 40:44, 40:44] = 0.2 * dot
    logs[plain] = 2.0
    row, lone = defect_maps.linked(logs, 33)
    assert row[40:44, 40:44].min() > 1.2 * lone[40:44, 40:44].max() and lone[40:44, 40:44].max() < 0.15
    assert row[42, 46] > 0.04 > 0.02 > row[20, 46]  # between two dots, and away from them
    np.testing.assert_array_equal([row[80:84, 80:84], lone[80:84, 80:84]], logs[plain])
    assert row[76:80, 80:84].max() <= np.log1p(defect_maps.SHAPED_ABOVE) + 1e-6  # beside what is plain to see
    np.testing.assert_array_equal(defect_maps.linked(logs, 5), logs)  # shorter than two places


def test_linking_leaves_an_even_map_even_up_to_its_border():
    logs = np.full((1, 64, 64), 0.1, np.float32)
    np.testing.assert_allclose(defect_maps.linked(logs, 32), logs, rtol=1e-5)


def test_lengths_of_outlines_and_lines_are_shares_of_a_tile_not_of_the_photo(make_model, monkeypatch):
    seen, outline, linked = [], defect_maps.outline, defect_maps.linked
    monkeypatch.setattr(defect_maps, "outline", lambda p, px, trust: seen.append(px) or outline(p, px, trust))
    monkeypatch.setattr(defect_maps, "linked", lambda logs, px: seen.append(px) or linked(logs, px))
    settings = settings_of(PIXELS.replace(outline_window_frac=0.25, link_frac=0.5)).replace(tile=True)
    detector = Detector(make_model(segmentation=True), settings, None)
    photo = {name: np.zeros((1, 64, 192), np.float32) for name in detector.shown}
    detector.defect_maps(photo, {name: MapScale(0.0, 1.0) for name in photo})
    assert seen == [16, 32]


@pytest.mark.parametrize("step", range(defect_maps.N_DIRECTIONS))
def test_a_line_has_its_length_and_direction_and_averages(step):
    kernel = defect_maps._line(15, np.pi * step / defect_maps.N_DIRECTIONS)
    down, across = np.nonzero(kernel)
    assert kernel.sum() == pytest.approx(1.0) and kernel.shape == (15, 15) and kernel[7, 7] > 0
    assert np.hypot(np.ptp(down), np.ptp(across)) == pytest.approx(14, abs=1.0)
    y, x = down - 7, across - 7
    angle = 0.5 * np.arctan2(2 * (x * y).sum(), (x * x).sum() - (y * y).sum())  # the principal axis
    assert (angle - np.pi * step / defect_maps.N_DIRECTIONS + 0.1) % np.pi == pytest.approx(0.1, abs=0.08)


def test_the_defect_map_is_relative_to_what_stands_out_all_over_the_image_up_to_so_much(make_model):
    maps = PIXELS.replace(map_ssim=0.0, own_level=0.3)
    detector = detector_of(make_model(segmentation=False), maps)
    calm, restless = np.full((8, 8), -0.2, np.float32), np.full((8, 8), 0.5, np.float32)
    calm[2, 2] = restless[2, 2] = 3.0
    found = detector.defect_maps({"pixel": np.stack([calm, restless])}, {"pixel": MapScale(0.0, 1.0)})
    level = math.sqrt(math.log(4) ** 2 / 64)  # of the other 0.43, more than is taken off
    assert found[:, 2, 2] == pytest.approx([4 * math.exp(-level) - 1, 4 * math.exp(-0.3) - 1], rel=1e-5)
    assert found[0, 0, 0] == pytest.approx(1 - 1.2 * math.exp(level), rel=1e-5)
    detector.settings = settings_of(maps).replace(own_level=0.0)
    assert detector.defect_maps({"pixel": restless[None]}, {"pixel": MapScale(0.0, 1.0)})[0, 2, 2] == pytest.approx(3.0)


def test_the_distance_to_the_nearest_prototype_is_zero_at_prototypes_and_euclidean_elsewhere():
    prototypes = torch.randn(40, 6)
    deviation = prototypes[:12].T.reshape(1, 6, 3, 4).clone()
    deviation[0, :, 1, 2] = 0.7
    found = defect_maps.nearest_distance(deviation, prototypes)
    expected = torch.zeros(1, 1, 3, 4)
    expected[0, 0, 1, 2] = ((0.7 - prototypes) ** 2).mean(1).sqrt().min()
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def test_maps_with_no_share_are_not_computed(make_model):
    detector = detector_of(make_model("efficientnet_lite0"), PIXELS.replace(map_ssim=0.0, **NEAREST_SCORE))
    assert (list(detector.fused), list(detector.scored), set(detector.calibration.scales)) == (
        ["pixel"],
        ["nearest"],
        {"pixel", "nearest"},
    )
    without = detector_of(make_model(), PIXELS.replace(map_ssim=0.0, **NEAREST_SCORE))
    assert list(without.scored) == ["pixel"] and set(without.calibration.scales) == {"pixel"}


def test_what_one_map_shouts_counts_less_than_what_two_maps_say():
    smooth = {"pixel": np.array([[[9.0, 3.0, -0.5]]], np.float32), "bank": np.array([[[0.0, 3.0, -0.5]]], np.float32)}
    shouted, said, low = fuse(
        smooth, {"pixel": MapScale(0.0, 1.0), "bank": MapScale(0.0, 1.0)}, {"pixel": 0.5, "bank": 0.5}
    )[0, 0]
    assert said == pytest.approx(3.0) and shouted == pytest.approx(10**0.5 - 1) and low == pytest.approx(-0.5)


def test_above_its_ceiling_the_residual_counts_no_further_beside_maps_of_features(make_model):
    maps = PIXELS.replace(map_ssim=0.0, map_likelihood=1.0, residual_ceiling=0.5)
    detector = detector_of(make_model("efficientnet_lite0"), maps)
    scales = {"pixel": MapScale(0.0, 1.0), "likelihood": MapScale(0.0, 1.0)}
    smooth = {
        "pixel": np.array([[[0.2, 0.5, 80.0]]], np.float32),
        "likelihood": np.array([[[3.0, 3.0, 3.0]]], np.float32),
    }
    np.testing.assert_allclose(
        detector.defect_maps(smooth, scales)[0, 0], [(1.2 * 4) ** 0.5 - 1, 6**0.5 - 1, 6**0.5 - 1], rtol=1e-5
    )
    detector.settings = settings_of(maps).replace(residual_ceiling=0.0)
    assert detector.defect_maps(smooth, scales)[0, 0, 2] == pytest.approx((81 * 4) ** 0.5 - 1, rel=1e-5)
    alone = detector_of(make_model(segmentation=False), PIXELS.replace(map_ssim=0.0, residual_ceiling=0.5))
    assert alone.defect_maps(smooth, scales)[0, 0, 2] == pytest.approx(80.0, rel=1e-5)  # all that there is


def test_the_fused_map_is_the_weighted_geometric_mean_of_one_more_than_the_scaled_maps(make_model):
    detector = detector_of(
        make_model("efficientnet_lite0"), PIXELS.replace(map_pixel=3.0, map_ssim=0.0, map_likelihood=1.0)
    )
    smooth = maps_of(detector, good_images(2, seed=1))
    scales = {"pixel": MapScale(0.0, 0.2), "likelihood": MapScale(0.0, 2.0)}  # all above 0
    expected = (1 + smooth["pixel"] / 0.2) ** 0.75 * (1 + smooth["likelihood"] / 2.0) ** 0.25 - 1
    np.testing.assert_allclose(fuse(smooth, scales, detector.fused), expected, rtol=1e-4, atol=1e-5)


def test_without_morphology_maps_are_as_they_were_computed(make_model):
    detector = detector_of(
        make_model("efficientnet_lite0"),
        ALL.replace(map_perceptual=0.0, map_deviation=1.0, smoothing_frac=0.0, closing_frac=0.0),
    )
    images = good_images(2, seed=1)
    refined = maps_of(detector, images)
    raw = defect_maps.raw_maps(list(refined), detector.model, images, detector.describe(images, refined))
    for name, maps in refined.items():
        np.testing.assert_allclose(maps, raw[name][:, 0].numpy(), rtol=1e-5, atol=1e-6)


def test_the_head_is_smoothed_by_its_own_width_and_not_closed(make_model):
    images, names = good_images(2, seed=1), ["pixel", "segmentation"]
    detector = detector_of(
        make_model("efficientnet_lite0", segmentation=True), PIXELS.replace(outline_smoothing_frac=0.0)
    )
    output = detector.describe(images, names)
    raw = {
        name: maps[:, 0].numpy() for name, maps in defect_maps.raw_maps(names, detector.model, images, output).items()
    }
    found = detector.refined_maps(images, output, names)
    np.testing.assert_allclose(found["segmentation"], raw["segmentation"], rtol=1e-5, atol=1e-6)
    assert np.diff(found["pixel"]).std() < 0.5 * np.diff(raw["pixel"]).std()
    detector.settings = detector.settings.replace(outline_smoothing_frac=0.03)
    smooth = detector.refined_maps(images, output, names)
    np.testing.assert_array_equal(smooth["pixel"], found["pixel"])
    expected = [
        cv2.GaussianBlur(each, (0, 0), 0.03 * 64, borderType=cv2.BORDER_REFLECT_101) for each in raw["segmentation"]
    ]
    np.testing.assert_allclose(smooth["segmentation"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("horizontal", "vertical", "n_views"), [(True, False, 2), (False, True, 2), (True, True, 4), (False, False, 1)]
)
def test_flipped_views_are_averaged_where_training_flips(make_model, horizontal, vertical, n_views):
    plain, images = (
        detector_of(make_model("efficientnet_lite0"), PIXELS.replace(map_likelihood=1.0)),
        torch.rand(2, 3, 64, 64),
    )
    settings = plain.settings.replace(flip_horizontal=horizontal, flip_vertical=vertical, map_flips=True)
    averaged = Detector(plain.model, settings, plain.calibration)
    flips = [
        dims
        for dims, wanted in (((), True), ((3,), horizontal), ((2,), vertical), ((2, 3), horizontal and vertical))
        if wanted
    ]
    assert len(flips) == n_views
    views = [
        {name: np.flip(each, [dim - 1 for dim in dims]) for name, each in maps_of(plain, images.flip(dims)).items()}
        for dims in flips
    ]
    for name, found in maps_of(averaged, images).items():
        np.testing.assert_allclose(found, np.mean([view[name] for view in views], 0), atol=1e-4)
    assert np.ptp([each.score for each in averaged.detect(torch.cat([images[:1].flip(dims) for dims in flips]))]) < 1e-3
    assert averaged.settings.map_flips and not plain.mirrored


def test_calibration_is_plain_arithmetic_on_the_given_images(make_model):
    detector, images = detector_of(make_model()), good_images(12, seed=5)
    found = detector.calibration
    smooth = maps_of(detector, images)
    logs = 0.0
    for name, maps in smooth.items():
        low, high = np.quantile(maps, 0.5), np.quantile(maps, 0.999)
        # 64 px are all border
        assert found.scales[name][:2] == pytest.approx((low, high), rel=1e-4) and not found.scales[name].border
        z = (maps - low) / (high - low)
        logs = logs + 0.5 * np.sign(z) * np.log(1 + np.abs(z))
    fused = np.exp(logs) - 1  # exact where it is above 0, as the largest are
    scores = sorted(np.sort(each.ravel())[::-1][: round(0.01 * 64 * 64)].mean() for each in fused)
    assert found.good_scores == pytest.approx(scores, rel=1e-3)
    assert found.threshold == found.good_scores[-1] and found.alpha == 0.05 and not found.promised  # 12 < 19


def test_one_pixel_in_so_many_of_good_images_lies_above_the_pixel_threshold(make_model):
    detector, images = detector_of(make_model(), PIXELS.replace(pixel_false_positives=0.02)), good_images(12, seed=5)
    above = np.stack([each.defect_map for each in detector.detect(images)]) > detector.calibration.pixel_threshold
    assert above.mean() == pytest.approx(0.02, abs=2e-4)


def test_scales_and_the_pixel_threshold_come_from_the_windows_that_pictures_take(make_model):
    detector, images = detector_of(make_model(), PIXELS.replace(pixel_false_positives=0.02)), good_images(12, seed=5)
    for index, image in enumerate(images):  # grey bars above and below, or at both sides
        (image.mT if index % 2 else image)[:, :20] = (image.mT if index % 2 else image)[:, 44:] = 128 / 255
    inside, whole = slice(20, 44), slice(None)
    windows = [(whole, inside) if index % 2 else (inside, whole) for index in range(12)]
    detector.calibration = calibrate(detector, images.split(5), windows)
    within = np.stack(
        [
            each.defect_map[window] if window[1] == whole else each.defect_map[window].T
            for each, window in zip(detector.detect(images), windows, strict=True)
        ]
    )
    assert (within > detector.calibration.pixel_threshold).mean() == pytest.approx(0.02, abs=2e-4)
    pixel = np.concatenate(
        [each[window].ravel() for each, window in zip(maps_of(detector, images)["pixel"], windows, strict=True)]
    )
    assert detector.calibration.scales["pixel"][:2] == pytest.approx(np.quantile(pixel, (0.5, 0.999)), rel=1e-4)
    assert calibrate(detector, images.split(5), [(slice(0, 64), slice(0, 64))] * 12) == calibrate(
        detector, images.split(5)
    )


@pytest.mark.parametrize("windowed", [False, True])
def test_the_pixel_threshold_is_where_drawn_defects_are_outlined_best(make_model, monkeypatch, windowed):
    detector = detector_of(
        make_model("none", segmentation=False),
        PIXELS.replace(map_ssim=0.0, smoothing_frac=0.0, closing_frac=0.0, link_frac=0.0),
    )
    rng = np.random.default_rng(0)
    good, masks = (
        torch.from_numpy(rng.uniform(0.1, 0.2, (8, 1, 64, 64)).astype(np.float32)),
        np.zeros((8, 64, 64), bool),
    )
    masks[:, 20:24, 20:26] = True
    windows = [(slice(4 + index % 2, 40), slice(None)) for index in range(8)] if windowed else None
    drawn = good + 0.5 * torch.from_numpy(masks[:, None])
    least = drawn.numpy()[:, 0][masks].min()
    masks[:, 40:] = windowed  # what lies in a bar is no matter
    monkeypatch.setattr(Detector, "all_maps", lambda self, images, names: {"pixel": images[:, 0].numpy()})
    rounds = [(drawn[:5], masks[:5]), (drawn[5:], masks[5:])] * 2
    plain, found = (calibrate(detector, good.split(4), windows, each) for each in ((), rounds))
    assert plain.pixel_threshold == pytest.approx(1.0, abs=0.02)  # the top 0.1 % of good pixels
    assert 1.05 < found.pixel_threshold < found.scales["pixel"].read(np.full((1, 64, 64), least)).max() + 1e-4
    assert found == dataclasses.replace(plain, pixel_threshold=found.pixel_threshold)
    # mere strips, on which nothing could be drawn
    assert calibrate(detector, good.split(4), windows, [(good, np.zeros_like(masks))]) == plain
    detector.settings = detector.settings.replace(pixel_false_positives=0.02)
    assert calibrate(detector, good.split(4), windows, rounds) == calibrate(detector, good.split(4), windows)


RINGS = np.minimum.outer(*[np.minimum(np.arange(160), np.arange(160)[::-1])] * 2) // 8  # of 8 px, 0 outermost


@pytest.mark.parametrize(
    ("along", "expected"),
    [
        ((2.0, 1.5, 1.25, 1.1), (2.0, 1.5, 1.25, 1.1)),
        ((1.2, 1.5, 1.0, 1.1), (1.5, 1.5, 1.1, 1.1)),  # what lies further out is no less
        ((0.5, 0.5, 0.5, 0.5), (1.0, 1.0, 1.0, 1.0)),  # a plain background along the border stays plain
    ],
)
def test_a_map_reads_alike_along_the_border_and_further_in(along, expected):
    maps = np.random.default_rng(0).uniform(1, 2, (24, 160, 160)).astype(np.float32)
    maps *= np.array([*along, *[1.0] * 16], np.float32)[RINGS]
    scale = MapScale.of([maps[:10], maps[10:]], None)
    assert scale.border == pytest.approx(expected, rel=0.02)
    level = scale.level(maps)
    if along == expected:
        # factors are interpolated within rings
        assert all(np.quantile(level[:, ring == RINGS], 0.99) == pytest.approx(1.99, rel=0.12) for ring in range(5))
        assert scale.zero == pytest.approx(1.5, rel=0.02)
    assert np.array_equal(level[:, RINGS > 4], maps[:, RINGS > 4]) and np.all(level <= maps)
    np.testing.assert_allclose(scale.read(maps), (level - scale.zero) / (scale.one - scale.zero), rtol=1e-6)


def test_the_border_is_that_of_the_image_within_its_window():
    maps = np.random.default_rng(0).uniform(1, 2, (24, 160, 160)).astype(np.float32)
    maps[:, :8], maps[:, -8:], maps[:, :, :8], maps[:, :, -8:] = 50.0, 50.0, 4.0, 4.0  # bars above and below
    assert MapScale.of([maps], [(slice(8, 152), slice(None))] * 24).border[0] == pytest.approx(2.0, rel=0.03)
    assert MapScale.of([maps], [(slice(40, 120), slice(40, 120))] * 24).border == (1.0, 1.0, 1.0, 1.0)
    # too small an interior
    assert MapScale.of([maps[:, :100, :100]], None).border[0] > 20 and not MapScale.of([maps[:, :92, :92]], None).border


@pytest.mark.parametrize(("border", "interior"), [(1.0, 1.0), (1.0, 0.0)])
def test_a_map_that_is_the_same_everywhere_or_nothing_further_in_reads_as_numbers(border, interior):
    maps = np.full((2, 160, 160), interior, np.float32)
    maps[:, :8] = border
    scale = MapScale.of([maps], None)
    assert np.isfinite(scale.border).all() and np.isfinite(scale.read(maps)).all()


def test_where_good_images_are_stranger_along_their_border_a_defect_further_in_is_found(make_model, monkeypatch):
    """A defect of half the height that every good image has in its corners; nothing but the border tells them apart."""
    detector = detector_of(
        make_model("none", segmentation=False),
        PIXELS.replace(map_ssim=0.0, top_frac=0.0001, smoothing_frac=0.0, closing_frac=0.0),
    )
    rng = np.random.default_rng(0)
    good = rng.uniform(0.1, 0.2, (20, 160, 160)).astype(np.float32) * np.where(RINGS == 0, 4, 1).astype(np.float32)
    defective = good.copy()
    defective[:, 80:84, 80:84] = 0.4
    monkeypatch.setattr(Detector, "all_maps", lambda self, images, names: {"pixel": images[:, 0].numpy()})
    calibration = calibrate(detector, [torch.from_numpy(good[:, None])])
    judged = detector.scores({"pixel": defective}, calibration.scales)
    assert sum(each > calibration.threshold for each in judged) == 20
    assert Calibration.from_dict(calibration.as_dict()) == calibration


def test_the_image_score_comes_from_the_map_that_is_named(make_model):
    maps = PIXELS.replace(map_likelihood=1.0)
    model, images = make_model("efficientnet_lite0"), good_images(3, seed=4)
    model.fit_feature_scale([images])
    model.fit_deviations([model.grid_features(good_images(8, seed=6))], 8)
    model.fit_bank([model.grid_features(good_images(8, seed=6))], 8)
    of_fused = detector_of(model, maps.replace(**FUSED_SCORE))
    of_one = [
        detector_of(model, maps.replace(**{**FUSED_SCORE, f"score_{name}": 2.0}))
        for name in ("deviation", "likelihood", "nearest", "bank")
    ]
    for found in of_fused.detect(images):
        assert found.score == pytest.approx(image_score(found.defect_map, maps.top_frac))
    for name, detector in zip(("deviation", "likelihood", "nearest", "bank"), of_one, strict=True):
        low, high, _ = detector.calibration.scales[name]
        judged = (maps_of(detector, images)[name] - low) / (high - low)
        assert [found.score for found in detector.detect(images)] == pytest.approx(
            [image_score(each, maps.top_frac) for each in judged]
        )
    without = detector_of(make_model("none"), maps)  # no backbone, no likelihood
    assert all(
        found.score == pytest.approx(image_score(found.defect_map, maps.top_frac)) for found in without.detect(images)
    )


def test_calibration_depends_on_the_good_images_alone(make_model):
    detector = detector_of(make_model(), n_good=20)
    first = detector.calibration
    detector.detect(torch.rand(3, 3, 64, 64))
    assert calibrate(detector, good_images(20, seed=5).split(5)) == first and first.promised
    shuffled = calibrate(detector, good_images(20, seed=5)[torch.randperm(20)].split(7))
    assert shuffled.threshold == pytest.approx(first.threshold, rel=1e-4)
    detector.calibration = None
    assert calibrate(detector, good_images(20, seed=6).split(5)).threshold != first.threshold


def test_a_calibration_survives_a_checkpoint(make_model, tmp_path):
    calibration = detector_of(make_model()).calibration
    checkpoints.save_checkpoint(tmp_path / "a.pth", "kind", {"calibration": calibration.as_dict()})
    assert Calibration.from_dict(checkpoints.load_checkpoint(tmp_path / "a.pth", "kind")["calibration"]) == calibration


def test_another_rate_moves_only_the_threshold_and_never_the_wrong_way():
    scores = [float(score) for score in range(1, 51)]
    calibration = Calibration({"pixel": MapScale(0.0, 1.0)}, scores, 0.05, 49.0, True, 1.0)
    alphas = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    moved = [calibration.at(alpha) for alpha in alphas]
    thresholds = [each.threshold for each in moved]
    assert thresholds == sorted(thresholds, reverse=True) and len(set(thresholds)) > 4
    assert [each.alpha for each in moved] == list(alphas)
    assert [each.promised for each in moved] == [False, False, True, True, True, True, True]
    assert all(each.scales == calibration.scales and each.good_scores == scores for each in moved)
    assert calibration.at(0.05) == calibration


@pytest.mark.parametrize("exchangeable", [True, False])
def test_chosen_images_promise_no_rate_whatever_it_is(exchangeable):
    found = Calibration.of({}, range(30), np.arange(9.0), 0.05, 0.0, exchangeable)
    assert found.promised is found.at(0.1).promised is exchangeable


def test_labels_p_values_and_maps_follow_the_calibration(make_model):
    detector = detector_of(make_model(skips=False))
    images = torch.cat([good_images(3, seed=9), torch.rand(2, 3, 64, 64)])
    found = detector.detect(images)
    fused = fuse(maps_of(detector, images), detector.calibration.scales, detector.fused)
    assert len(found) == 5
    for detection, defect_map in zip(found, fused, strict=True):
        np.testing.assert_array_equal(detection.defect_map, defect_map)
        assert detection.defect_map.dtype == np.float32 and detection.reconstruction.shape == (3, 64, 64)
        assert detection.score == image_score(defect_map, 0.01)
        assert detection.p_value == p_value(detection.score, np.array(detector.calibration.good_scores))
        assert detection.label == ("defective" if detection.score > detector.calibration.threshold else "good")
    assert {detection.label for detection in found[3:]} == {"defective"}
    middle = sorted(detection.score for detection in found)[2]
    detector.calibration = Calibration(
        detector.calibration.scales, detector.calibration.good_scores, 0.05, middle, False, 1.0
    )
    assert sorted(detection.label for detection in detector.detect(images)) == ["defective"] * 2 + ["good"] * 3


@pytest.mark.parametrize("from_pixels", [False, True])
def test_a_sparing_detection_says_the_same_and_paints_only_the_defective_unless_pixels_are_scored(
    make_model, monkeypatch, from_pixels
):
    detector = detector_of(
        make_model("efficientnet_lite0"),
        PIXELS.replace(map_likelihood=1.0, **(FUSED_SCORE if from_pixels else NEAREST_SCORE)),
    )
    images = torch.cat([good_images(2, seed=5), torch.rand(1, 3, 64, 64), good_images(1, seed=5)])
    scores = [each.score for each in detector.detect(images)]
    detector.calibration = dataclasses.replace(detector.calibration, threshold=sorted(scores)[-2])
    thorough, n_painted, decode = detector.detect(images), [], detector.model.decode_pixels
    monkeypatch.setattr(
        detector.model, "decode_pixels", lambda trunk, *others: n_painted.append(len(trunk)) or decode(trunk, *others)
    )
    sparing = detector.detect(images, thorough=False)
    assert n_painted == ([4] if from_pixels else [1])
    assert [each.label for each in sparing].count("defective") == 1
    for a, b in zip(thorough, sparing, strict=True):
        assert a.score == pytest.approx(b.score) and (a.p_value, a.label) == (b.p_value, b.label)
        assert a.defect_map is not None and a.reconstruction is not None
        if b.label == "defective":
            np.testing.assert_allclose(a.defect_map, b.defect_map, atol=1e-4)
            np.testing.assert_allclose(a.reconstruction, b.reconstruction, atol=1e-5)
        else:
            assert b.defect_map is None and b.reconstruction is None
    n_painted.clear()
    detector.calibration = dataclasses.replace(detector.calibration, threshold=max(scores) + 1)
    assert {each.label for each in detector.detect(images, thorough=False)} == {"good"} and n_painted == (
        [4] if from_pixels else []
    )


def test_detection_leaves_no_training_mode_behind(make_model):
    model = make_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    detector = detector_of(model)
    first, second = detector.detect(good_images(2)), detector.detect(good_images(2))
    assert [each.score for each in first] == [each.score for each in second]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def trained(model, n_steps=40):
    images = good_images(4, seed=3)
    model.fit_feature_scale([images])
    loss = vae_model.DetailLoss(LossSettings(perceptual_weight=0.0, pixel_crop_px=0, pixel_share=1.0), None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    engine.train_epoch(
        model,
        [images] * n_steps,
        lambda batch: (loss(model, batch, batch, 1.0), 4),
        optimizer,
        schedule,
        engine.Runtime(torch.device("cpu")),
        1.0,
    )
    return model


@pytest.mark.parametrize(("backbone", "skips"), [("none", False), ("efficientnet_lite0", True)])
def test_a_bright_blob_is_found_where_it_is(make_model, backbone, skips):
    maps = MapSettings(smoothing_frac=0.01, closing_frac=0.02, top_frac=0.01, map_feature=1.0)
    detector = detector_of(trained(make_model(backbone, skips=skips)), maps, n_good=19)
    damaged = good_images(2, seed=8)
    damaged[0, :, 16:28, 36:48] = 1.0
    bad, good = detector.detect(damaged)
    assert bad.label == "defective" and bad.p_value == 0.05 and bad.score > good.score
    inside = np.zeros((64, 64), bool)
    inside[12:32, 32:52] = True  # the stride of 8 px blurs the outline
    assert inside[np.unravel_index(bad.defect_map.argmax(), (64, 64))]
    assert bad.defect_map[16:28, 36:48].mean() > 3 * max(bad.defect_map[~inside].mean(), 0.1)


# --------------------------------------------------------------------------------------------------- from a file


def contents_of(detector):
    settings = {**as_dict(detector.settings), **as_dict(detector.model.settings), "resize": "letterbox"}
    settings["data_dir"] = "parts"
    return {"settings": settings, "model": detector.model.state_dict(), "calibration": detector.calibration.as_dict()}


def test_a_detector_comes_back_from_its_file_and_says_the_same(make_model, tmp_path):
    detector = detector_of(make_model("efficientnet_lite0"))
    checkpoints.save_checkpoint(tmp_path / "a.pth", vae_model.KIND, contents_of(detector))
    loaded = defect_maps.load_detector(tmp_path / "a.pth")
    assert (loaded.image_size, loaded.fitting, from_dict(MapSettings, as_dict(loaded.settings))) == (
        64,
        "letterbox",
        PIXELS,
    )
    assert loaded.calibration == detector.calibration
    images = good_images(2, seed=4)
    for a, b in zip(loaded.detect(images), detector.detect(images), strict=True):
        assert (a.p_value, a.label) == (b.p_value, b.label) and a.score == pytest.approx(b.score, abs=0.02)
        # norms are folded; an untrained map has a small scale
        np.testing.assert_allclose(a.defect_map, b.defect_map, atol=0.02)


@pytest.mark.parametrize("missing", ["settings", "model", "calibration"])
def test_a_file_with_a_part_missing_is_refused_in_a_sentence(make_model, tmp_path, missing):
    contents = contents_of(detector_of(make_model()))
    del contents[missing]
    checkpoints.save_checkpoint(tmp_path / "a.pth", vae_model.KIND, contents)
    with pytest.raises(InputError) as caught:
        defect_maps.load_detector(tmp_path / "a.pth")
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("settings", "latent_dim", -3),
        ("settings", "image_size", "wide"),
        ("settings", "top_frac", 7.0),
        ("settings", "resize", None),
        ("calibration", "scales", 3),
        ("calibration", "threshold", None),
        ("calibration", "threshold", float("nan")),
        ("calibration", "pixel_threshold", "high"),
        ("calibration", "good_scores", []),
        ("calibration", "good_scores", "abc"),
        ("calibration", "scales", {"pixel": [0.0, float("inf")]}),
        ("settings", "data_dir", 5),
        ("settings", "resize", "wide"),
    ],
)
def test_contents_that_make_no_sense_are_refused_in_a_sentence(make_model, tmp_path, where, key, value):
    contents = contents_of(detector_of(make_model()))
    if value is None:
        del contents[where][key]
    else:
        contents[where][key] = value
    checkpoints.save_checkpoint(tmp_path / "a.pth", vae_model.KIND, contents)
    with pytest.raises(InputError, match=r"is damaged: .*train again or take another checkpoint") as caught:
        defect_maps.load_detector(tmp_path / "a.pth")
    assert caught.value.exit_code == 1


def test_a_map_that_is_not_a_number_is_never_called_good(make_model):
    detector = detector_of(make_model())
    images = good_images(2)
    images[0, 0, 3, 3] = float("nan")
    try:
        labels = [detection.label for detection in detector.detect(images)]
    except (InputError, ValueError):
        return
    assert labels[0] == "defective"
