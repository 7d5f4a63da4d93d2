"""Drawn defects: reproducible, visible where the mask says, of the size asked for, cheap."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest

import drawn_defects
from drawn_defects import APART_PX, SMALLEST_PX, VISIBLE_LEVELS, draw_defect, draw_defects


def textured(height=128, width=128, seed=0):
    rng = np.random.default_rng(seed)
    ramp = np.linspace(60, 180, width)[None, :, None] + np.zeros((height, 1, 3))
    return np.clip(ramp + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)


def change(before, after):
    return np.abs(before.astype(int) - after.astype(int)).max(axis=2)


def test_equal_generators_draw_equal_defects_and_others_do_not():
    image = textured()
    first = draw_defect(image, np.random.default_rng(3), [textured(seed=1)])
    again = draw_defect(image, np.random.default_rng(3), [textured(seed=1)])
    other = draw_defect(image, np.random.default_rng(4), [textured(seed=1)])
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("shape", [(128, 128), (64, 200), (16, 16)])
def test_mask_is_exactly_where_the_image_changed_visibly(shape):
    image = textured(*shape)
    kept = image.copy()
    for seed in range(150):
        damaged, mask = draw_defect(image, np.random.default_rng(seed))
        assert damaged.dtype == np.uint8 and damaged.shape == image.shape and mask.dtype == bool
        assert np.array_equal(mask, change(image, damaged) >= VISIBLE_LEVELS)
        assert mask.any()
    assert np.array_equal(image, kept), "the input must stay untouched"


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_defect_shows_even_on_a_flat_image(level):
    image = np.full((64, 64, 3), level, np.uint8)
    for seed in range(150):
        damaged, mask = draw_defect(image, np.random.default_rng(seed))
        assert mask.any() and change(image, damaged).max() >= drawn_defects.PEAK_LEVELS


def test_what_cannot_be_seen_is_drawn_again():
    white = np.full((64, 64, 3), 255, np.uint8)
    areas = [draw_defect(white, np.random.default_rng(seed), area_frac=(0.03, 0.05))[1].sum() for seed in range(150)]
    assert np.mean(np.array(areas) <= 4) < 0.02, "the 2 x 2 spot is the last resort"


def test_area_is_log_uniform_in_the_range_asked_for():
    image = textured(256, 256)
    area = np.array([draw_defect(image, np.random.default_rng(seed))[1].mean() for seed in range(400)])
    low, high = 0.0002, 0.02
    assert np.mean((area > low / 3) & (area < 2 * high)) > 0.97
    median = np.sqrt(low * high)
    assert 0.6 * median < np.median(area) < 1.8 * median
    assert np.mean(area < 0.001) > 0.2 and np.mean(area > 0.006) > 0.15
    large = [draw_defect(image, np.random.default_rng(seed), area_frac=(0.1, 0.2))[1].mean() for seed in range(60)]
    assert np.median(large) > 0.06


def test_defects_lie_anywhere():
    image = textured()
    total = sum(draw_defect(image, np.random.default_rng(seed))[1].astype(int) for seed in range(300))
    blocks = total.reshape(4, 32, 4, 32).sum((1, 3))
    assert (blocks > 0).all()


def test_contrast_is_mostly_low_to_medium_with_some_strong():
    image = textured()
    peaks = []
    for seed in range(300):
        damaged, mask = draw_defect(image, np.random.default_rng(seed))
        peaks.append(np.median(change(image, damaged)[mask]))
    assert np.mean(np.array(peaks) < 40) > 0.5 and np.mean(np.array(peaks) > 60) > 0.01


def test_now_and_then_a_defect_is_of_two_or_three_parts(monkeypatch):
    drawn, counts = [], []
    monkeypatch.setattr(drawn_defects, "_draw_visible", lambda image, area_px, rng, donors: drawn.append(area_px))
    for seed in range(200):
        drawn.clear()
        mask = draw_defect(np.full((64, 64, 3), 128, np.uint8), np.random.default_rng(seed))[1]
        counts.append(len(drawn))
        assert mask.any(), "where nothing could be drawn a spot is"
    assert set(counts) == {1, 2, 3} and 140 < counts.count(1) < 180


def test_each_kind_is_drawn_as_often_as_it_should(monkeypatch):
    drawn = np.zeros(6, int)

    def kind(number):
        def draw(image, *rest):
            drawn[number] += 1
            return drawn_defects._Patch(0, 0, np.full((2, 2, 3), 255, np.float32))

        return draw

    monkeypatch.setattr(drawn_defects, "_KINDS", tuple(map(kind, range(6))))
    rng = np.random.default_rng(0)
    for _ in range(2000):
        drawn_defects._draw_visible(np.zeros((16, 16, 3), np.uint8), 16.0, rng, ())
    np.testing.assert_allclose(drawn / 2000, [0.30, 0.20, 0.14, 0.12, 0.14, 0.10], atol=0.04)


@pytest.mark.parametrize(("level", "expected"), [(0, 0.5), (255, -0.5)])
def test_defects_are_mostly_bright_on_dark_places_and_dark_on_bright_ones(level, expected):
    pixels, rng = np.full((2, 2, 3), level), np.random.default_rng(0)
    assert np.mean([drawn_defects._sign(pixels, rng) for _ in range(1000)]) == pytest.approx(expected, abs=0.1)


def test_patches_come_from_the_donors():
    grey, magenta = np.full((64, 64, 3), 128, np.uint8), np.zeros((64, 64, 3), np.uint8)
    magenta[..., [0, 2]] = 250

    def n_magenta(donors):
        found = 0
        for seed in range(200):
            damaged = draw_defect(grey, np.random.default_rng(seed), donors)[0].astype(int)
            found += ((damaged[..., 0] > 200) & (damaged[..., 1] < 60) & (damaged[..., 2] > 200)).any()
        return found

    assert n_magenta([magenta]) >= n_magenta(()) + 4


@pytest.mark.parametrize("kind", drawn_defects._KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("area_px", [12, 60, 300])
def test_every_kind_changes_about_the_area_asked_for(kind, area_px):
    image = textured(128, 128)
    ratios = []
    for seed in range(40):
        patch = kind(image, area_px, 60.0, np.random.default_rng(seed), [image])
        height, width = patch.pixels.shape[:2]
        there = image[patch.top : patch.top + height, patch.left : patch.left + width]
        assert there.shape == patch.pixels.shape and np.isfinite(patch.pixels).all()
        ratios.append((change(there, np.clip(np.rint(patch.pixels), 0, 255)) >= VISIBLE_LEVELS).sum() / area_px)
    assert 0.4 < np.median(ratios) < 2.6


def test_wrong_input_is_refused():
    rng = np.random.default_rng(0)
    for wrong in (np.zeros((64, 64, 3), np.float32), np.zeros((64, 64), np.uint8), np.zeros((8, 64, 3), np.uint8)):
        with pytest.raises(ValueError, match="expected uint8 H x W x 3"):
            draw_defect(wrong, rng)
    with pytest.raises(ValueError, match="area_frac"):
        draw_defect(textured(), rng, area_frac=(0.1, 0.01))


def test_a_defect_costs_milliseconds():
    image, spent = textured(256, 256), []
    for seed in range(60):
        start = time.process_time()
        draw_defect(image, np.random.default_rng(seed), [image])
        spent.append(time.process_time() - start)
    assert np.median(spent) < 0.012, "about 2 ms on an idle core; far more means work on the whole image"


def test_small_images_get_no_smaller_defects_than_can_be_seen():
    image, rng = np.full((64, 64, 3), 128, np.uint8), np.random.default_rng(5)
    areas = [draw_defect(image, rng, area_frac=(1e-6, 1e-6))[1].sum() for _ in range(100)]
    assert np.median(areas) > 0.5 * SMALLEST_PX


def test_several_defects_lie_apart_and_each_is_in_the_mask():
    image, rng, counts = textured(), np.random.default_rng(0), []
    for _ in range(40):
        before = rng.bit_generator.state
        damaged, mask = draw_defects(image, rng, (), 4)
        assert np.array_equal(mask, change(image, damaged) >= VISIBLE_LEVELS)
        rng.bit_generator.state = before
        first = draw_defect(image, rng)[1]
        ring = cv2.dilate(first.astype(np.uint8), np.ones((2 * APART_PX + 1,) * 2)) - first
        assert mask[first].all() and not mask[ring > 0].any()
        counts.append(int(mask.sum() > first.sum()))
        draw_defects(image, rng, (), 3)
    assert sum(counts) > 30
    untouched, empty = draw_defects(image, rng, (), 0)
    assert np.array_equal(untouched, image) and not empty.any()
