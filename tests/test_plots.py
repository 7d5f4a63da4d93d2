"""The pictures: what is drawn is what was given, and nothing global is left behind."""

import os
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgba
from PIL import Image
from scipy import ndimage

import plots
from config import InputError

SIDE = 64
pytestmark = pytest.mark.drawn


@pytest.fixture
def scene():
    rng = np.random.default_rng(0)
    image = rng.random((3, SIDE, SIDE)).astype(np.float32)
    defect_map = rng.random((SIDE, SIDE)).astype(np.float32)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[20:23, 40:43] = True
    defect_map[mask] = 5.0
    return image, image[::-1].copy(), defect_map, mask


@pytest.fixture(autouse=True)
def nothing_global_changes():
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []


def shown(axis):
    return np.asarray(axis.images[0].get_array())


def titles(figure):
    return [axis.get_title() for axis in figure.axes if axis.get_title()]


def colours(axis):
    return {line.get_color() for line in axis.lines}


# ------------------------------------------------------------------------------ defects


def test_grid_draws_each_row_on_one_scale(scene):
    image, reconstruction, defect_map, _ = scene
    figure = plots.reconstruction_grid(
        [image, reconstruction], [reconstruction, image], [defect_map, defect_map / 2], ["a", "b"], 4.0
    )
    first, second, third = figure.axes[:3]
    np.testing.assert_allclose(shown(first), np.moveaxis(image, 0, 2))
    np.testing.assert_allclose(shown(second), np.moveaxis(reconstruction, 0, 2))
    np.testing.assert_allclose(shown(third), defect_map)
    np.testing.assert_allclose(shown(figure.axes[5]), defect_map / 2)
    assert {axis.images[0].get_clim() for axis in (third, figure.axes[5])} == {(0.0, 4.0)}
    assert [axis.get_ylabel() for axis in figure.axes[0:6:3]] == ["a", "b"]
    with pytest.raises(ValueError, match="one entry an image"):
        plots.reconstruction_grid([image], [], [defect_map], ["a"], 1.0)


def test_panel_shows_all_parts_and_leaves_out_an_absent_truth(scene):
    image, reconstruction, defect_map, mask = scene
    truth = np.roll(mask, 5, axis=0)
    figure = plots.defect_panel(image, reconstruction, defect_map, mask, truth, "scratch 003", 4.0, threshold=2.0)
    names = titles(figure)
    assert names == [
        "Original",
        "Close-up, 4\u00d7",
        "Reconstruction",
        "Defect map",
        "Predicted defect",
        "Ground truth",
    ]
    by_name = dict(zip(names, figure.axes, strict=False))
    np.testing.assert_allclose(shown(by_name["Reconstruction"]), np.moveaxis(reconstruction, 0, 2))
    np.testing.assert_array_equal(shown(by_name["Predicted defect"]), mask)
    np.testing.assert_array_equal(shown(by_name["Ground truth"]), truth)
    np.testing.assert_allclose(shown(by_name["Close-up, 4\u00d7"]), np.moveaxis(image, 0, 2)[13:29, 33:49])
    assert {plots.PREDICTED_COLOUR, plots.TRUTH_COLOUR} <= colours(by_name["Original"])
    assert figure._suptitle.get_text() == "scratch 003"
    bar = figure.axes[-1]
    assert any(np.allclose(line.get_ydata(), 2.0) for line in bar.lines)
    assert "Ground truth" not in titles(plots.defect_panel(image, reconstruction, defect_map, mask, None, "", 4.0))


def test_panel_of_a_good_image_has_no_outline_and_a_large_region_no_close_up(scene):
    image, reconstruction, defect_map, mask = scene
    good = plots.defect_panel(image, reconstruction, defect_map, np.zeros_like(mask), None, "good", 4.0)
    assert titles(good) == ["Original", "Reconstruction", "Defect map", "Predicted defect"]
    assert not good.axes[0].lines and good.axes[3].get_xlabel() == "nothing"
    called = plots.defect_panel(
        image,
        reconstruction,
        defect_map,
        np.zeros_like(mask),
        None,
        "called defective all the same",
        4.0,
        defective=True,
    )
    row, column = np.unravel_index(np.argmax(defect_map), defect_map.shape)
    window = shown(dict(zip(titles(called), called.axes, strict=False))["Close-up, 4\u00d7"])
    np.testing.assert_allclose(window, np.moveaxis(image, 0, 2)[row - 8 : row + 8, column - 8 : column + 8])
    large = np.zeros_like(mask)
    large[5:60, 5:60] = True
    assert len(titles(plots.defect_panel(image, reconstruction, defect_map, large, None, "", 4.0))) == 4


def test_a_title_that_the_font_has_no_letters_for_is_drawn_without_a_warning(scene, tmp_path):
    image, reconstruction, defect_map, mask = scene
    figure = plots.defect_panel(image, reconstruction, defect_map, mask, None, "部品 001.png: defective", 4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.save(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_outline_stands_off_a_tiny_region_and_surrounds_it():
    mask = np.zeros((100, 100), bool)
    mask[50, 30] = mask[0, 99] = True
    rings = plots._region_rings(mask)
    assert len(rings) == 2
    for ring in rings:
        columns, rows = ring[:, 0, 0], ring[:, 0, 1]
        assert not mask[rows, columns].any() or (rows.min() == 0 and columns.max() == 99)
        assert min(rows.min(), columns.min()) >= 0 and max(rows.max(), columns.max()) <= 99
    inner = next(ring for ring in rings if ring[:, 0, 1].max() > 10)[:, 0]
    assert inner.min(0).tolist() == [28, 48] and inner.max(0).tolist() == [32, 52]


def test_outlines_run_at_one_distance_from_a_region_of_any_shape():
    rng = np.random.default_rng(0)
    mask = np.zeros((500, 400), bool)
    for row, column in rng.integers(40, 340, (5, 2)):
        mask[row : row + 30, column : column + 9] = True
    away = ndimage.distance_transform_edt(~mask)
    rings = np.concatenate([ring[:, 0] for ring in plots._region_rings(mask)])
    margin = plots.OUTLINE_MARGIN_FRAC * 500
    assert np.abs(away[rings[:, 1], rings[:, 0]] - margin).max() < 1.5


@pytest.mark.parametrize("size", [(64, 64), (301, 150), (20, 50)])
def test_overlay_leaves_pixels_far_below_the_threshold_untouched(size):
    photo = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    before = photo.copy()
    defect_map, mask = np.full((40, 40), 0.2, np.float32), np.zeros((40, 40), bool)
    defect_map[18:22, 18:22] = 3.0
    mask[18:22, 18:22] = True
    overlay = plots.overlay_image(photo, defect_map, mask, 1.0)
    assert overlay.shape == photo.shape and overlay.dtype == np.uint8
    changed = (overlay != photo).any(2)
    rows, columns = np.nonzero(changed)
    centre_row, centre_column = size[0] // 2, size[1] // 2
    assert changed[centre_row, centre_column]
    assert (
        np.abs(rows - centre_row).max() < 0.25 * size[0] + 5
        and np.abs(columns - centre_column).max() < 0.25 * size[1] + 5
    )
    assert (overlay == plots._rgb(plots.PREDICTED_COLOUR)).all(2).any()
    np.testing.assert_array_equal(photo, before)


def test_overlay_warms_the_photo_near_the_threshold_only():
    photo = np.full((50, 50, 3), 100, np.uint8)
    defect_map = np.tile(np.linspace(0, 2, 50, dtype=np.float32), (50, 1))
    mask = np.zeros((50, 50), bool)
    mask[25, 49] = True
    changed = (plots.overlay_image(photo, defect_map, mask, 1.0) != photo).any(2)
    assert not changed[:, defect_map[0] <= 0.7].any() and changed[:, defect_map[0] > 0.75].all()
    with pytest.raises(ValueError, match="H x W x 3 uint8"):
        plots.overlay_image(photo / 255.0, defect_map, defect_map, 1.0)


@pytest.mark.parametrize(
    ("size", "peak"), [((200, 300), (120, 80)), ((200, 300), (0, 299)), ((300, 12), (150, 6)), ((8, 8), (7, 0))]
)
def test_overlay_without_a_region_has_brackets_around_the_largest_value_alone(size, peak):
    photo, defect_map = np.full((*size, 3), 100, np.uint8), np.zeros(size, np.float32)
    defect_map[peak] = 0.5
    overlay = plots.overlay_image(photo, defect_map, np.zeros(size, bool), 1.0)
    rows, columns = np.nonzero((overlay == plots._rgb(plots.PREDICTED_COLOUR)).all(2))
    assert len(rows) and rows.min() <= peak[0] <= rows.max() and columns.min() <= peak[1] <= columns.max()
    assert max(np.ptp(rows), np.ptp(columns)) <= 0.1 * max(size) + 5
    if min(size) > 100:
        assert (
            overlay[max(0, peak[0] - 3) : peak[0] + 4, max(0, peak[1] - 3) : peak[1] + 4] == 100
        ).all() or 0 in peak, "what they surround stays to be seen"


# ------------------------------------------------------------------------------ training, tables


def test_training_curves_draw_the_history_and_mark_the_best_epoch():
    history = [
        {"epoch": e, "lr": 0.1, "train/total": 100.0 / e**2, "val/total": abs(e - 7) + 1.0, "train/kl": 1.0 + e}
        for e in range(1, 11)
    ]
    figure = plots.training_curves(history)
    assert titles(figure) == ["total", "kl"]
    total, kl = figure.axes
    np.testing.assert_allclose(total.lines[0].get_xydata(), [(row["epoch"], row["train/total"]) for row in history])
    np.testing.assert_allclose(total.lines[1].get_ydata(), [row["val/total"] for row in history])
    assert total.get_yscale() == "log" and kl.get_yscale() == "linear"
    rising = plots.training_curves([{"train/macro_f1": 0.001}, {"train/macro_f1": 0.9}])
    assert rising.axes[0].get_yscale() == "linear"
    assert list(total.lines[2].get_xdata()) == [7, 7] and list(kl.lines[-1].get_xdata()) == [7, 7]
    assert list(plots.training_curves(history, best_epoch=3).axes[0].lines[-1].get_xdata()) == [3, 3]
    with pytest.raises(ValueError, match="train/pixel"):
        plots.training_curves([{"epoch": 1}])


def test_training_curves_show_the_fresh_series_that_chose_the_epoch_too():
    figure = plots.training_curves(
        [{"train/macro_f1": 0.2, "val/macro_f1": 0.3, "fresh/macro_f1": 0.1 * k} for k in range(1, 4)], best_epoch=3
    )
    assert [line.get_label() for line in figure.axes[0].lines] == [
        "Training",
        "Validation",
        "Validation, fresh series",
        "Best epoch (3)",
    ]
    assert list(figure.axes[0].lines[2].get_ydata()) == pytest.approx([0.1, 0.2, 0.3])


def test_training_curves_bear_gaps_and_one_epoch(tmp_path):
    figure = plots.training_curves([{"train/total": 1.0}, {"train/total": 0.5, "val/total": float("nan")}])
    assert len(figure.axes[0].lines) == 2  # no best epoch to mark
    plots.save(figure, tmp_path / "curves.png")
    plots.save(plots.training_curves([{"train/total": 0.0, "val/total": 0.0}]), tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000


def test_metrics_heatmap_leaves_absent_cells_blank():
    figure = plots.metrics_heatmap(
        {"all": {"auroc": 0.5, "aupro": 0.25}, "deep_scratch": {"auroc": 1.0, "aupro": None}}
    )
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.texts] == ["0.500", "0.250", "1.000"]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["all", "deep scratch"]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["auroc", "aupro"]
    cells = axis.collections[0]
    assert cells.get_clim() == (0.0, 1.0) and np.ma.getmaskarray(cells.get_array()).ravel().tolist() == [False] * 3 + [
        True
    ]


def test_confusion_heatmap_annotates_counts_and_colours_shares():
    axis = plots.confusion_heatmap(np.array([[3, 1], [0, 0]]), ["a_b", "c"]).axes[0]
    np.testing.assert_allclose(np.ravel(axis.collections[0].get_array()), [0.75, 0.25, 0.0, 0.0])
    assert [text.get_text() for text in axis.texts if text.get_text()] == ["3", "1"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("Predicted class", "True class")
    assert [text.get_text() for text in axis.get_xticklabels()] == ["a b", "c"]


@pytest.mark.drawn
def test_names_that_are_no_text_label_tables_too(tmp_path):
    name = os.fsdecode(b"sp\xfe")
    plots.save(plots.metrics_heatmap({name: {"auroc": 0.5}}), tmp_path / "metrics.png")
    plots.save(plots.confusion_heatmap(np.eye(2), [name, "a"]), tmp_path / "confusion.png")
    grey = np.full((8, 8, 3), 128, np.uint8)
    plots.save(plots.class_probability_panel(grey, grey, {name: 0.9, "a": 0.1}, "x.png"), tmp_path / "classes.png")
    plots.save(plots.latent_scatter(np.eye(2), [name, "a"]), tmp_path / "scatter.png")
    assert len(list(tmp_path.iterdir())) == 4


def test_class_panel_marks_the_winner(scene):
    image, reconstruction, *_ = scene
    figure = plots.class_probability_panel(image, reconstruction, {"low": 0.1, "mean_shift": 0.7, "mid": 0.2}, "x.png")
    bars = figure.axes[2].patches
    assert [bar.get_width() for bar in bars] == [0.7, 0.2, 0.1]
    assert [bar.get_facecolor() == to_rgba(plots.VALIDATION_COLOUR) for bar in bars] == [True, False, False]
    assert [text.get_text() for text in figure.axes[2].get_yticklabels()] == ["mean shift", "mid", "low"]
    assert figure.axes[2].texts[0].get_text() == "70.0 %"
    np.testing.assert_allclose(shown(figure.axes[0]), np.moveaxis(image, 0, 2))


def test_latent_scatter_groups_points_by_label():
    points = np.arange(12.0).reshape(6, 2)
    axis = plots.latent_scatter(points, ["b", "a", "b", "a", "c", "b"]).axes[0]
    assert [group.get_label() for group in axis.collections] == ["a", "b", "c"]
    np.testing.assert_array_equal(axis.collections[1].get_offsets(), points[[0, 2, 5]])
    assert len({tuple(group.get_facecolor()[0]) for group in axis.collections}) == 3
    with pytest.raises(ValueError, match="expected \\(2, 2\\)"):
        plots.latent_scatter(points, ["a", "b"])


# ------------------------------------------------------------------------------ series, files


def test_series_figure_is_the_home_style_whatever_the_users_settings(tmp_path):
    values = np.sin(np.arange(100.0))
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "black", "font.size": 30}):
        figure = plots.series_figure(values)
        plots.save(figure, tmp_path / "dark.png", dpi=100, tight=True)
    axis = figure.axes[0]
    line = axis.lines[0]
    np.testing.assert_array_equal(line.get_ydata(), values)
    assert (line.get_linewidth(), line.get_color()) == (1.5, "#1f77b4")
    assert tuple(figure.get_size_inches()) == (8, 6) and figure.dpi == 100
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_title()) == ("Time", "Value", "")
    assert axis.xaxis.label.get_size() == axis.yaxis.label.get_size() == 12
    assert {name: spine.get_visible() for name, spine in axis.spines.items()} == {
        "left": True,
        "bottom": True,
        "top": False,
        "right": False,
    }
    assert axis.xaxis.get_gridlines()[0].get_alpha() == 0.3
    plots.save(plots.series_figure(values), tmp_path / "plain.png", dpi=100, tight=True)
    plain, dark = (np.asarray(Image.open(tmp_path / name)) for name in ("plain.png", "dark.png"))
    assert abs(plain.shape[0] - 589) <= 2 and abs(plain.shape[1] - 790) <= 2  # the size of the home plots
    np.testing.assert_array_equal(plain, dark)
    np.testing.assert_array_equal(plots.pixels(plots.series_figure(values), tight=True), plain[..., :3])


def test_the_users_settings_come_back_when_the_last_of_two_threads_leaves():
    with matplotlib.rc_context({"font.size": 30}):
        plots.home_style.__enter__()  # one thread enters,
        plots.home_style.__enter__()  # a second one,
        plots.home_style.__exit__(None, None, None)  # and the first is done
        assert matplotlib.rcParams["font.size"] == 10
        plots.home_style.__exit__(None, None, None)
        assert matplotlib.rcParams["font.size"] == 30


def test_a_chosen_backend_stays_chosen():
    before = matplotlib.rcParams._get("backend")
    matplotlib.rcParams._set("backend", "svg")
    try:
        plots.pixels(plots.series_figure([0.0, 1.0]))
        assert matplotlib.rcParams._get("backend") == "svg"
    finally:
        matplotlib.rcParams._set("backend", before)


def test_save_is_whole_or_absent(tmp_path, scene, monkeypatch):
    figure = plots.latent_scatter(np.zeros((1, 2)), ["a"])
    target = tmp_path / "new" / "picture.png"
    plots.save(figure, target, dpi=50)
    assert Image.open(target).size == (425, 300)
    assert [path.name for path in target.parent.iterdir()] == ["picture.png"]
    before = target.read_bytes()

    def breaks(target, **_):
        target.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", breaks)
    with pytest.raises(OSError, match="disk full"):
        plots.save(figure, target)
    assert target.read_bytes() == before and [path.name for path in target.parent.iterdir()] == ["picture.png"]


@pytest.mark.parametrize("name", ["result", "result.xyz", "folder.png", "."])
def test_a_file_that_is_no_picture_is_refused_in_one_sentence(tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=r"^\S+ is no file name of a picture; expected one that ends in \.png, .*\.$"):
        plots.save(plots.latent_scatter(np.zeros((1, 2)), ["a"]), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_photos_of_either_layout_are_the_same_and_others_are_refused(scene):
    image = scene[0][:, :40]
    np.testing.assert_array_equal(plots._photo(image), plots._photo(np.moveaxis(image, 0, 2)))
    assert plots._photo(image * 3).max() == 1.0
    with pytest.raises(ValueError, match="expected 3 x H x W"):
        plots._photo(image[0])


@pytest.mark.parametrize("map_max", [-3.0, 0.0])
def test_a_map_that_is_nowhere_above_its_threshold_is_drawn_too(map_max):
    image, low = np.full((3, 32, 32), 0.5, np.float32), np.linspace(-2, -1, 1024, dtype=np.float32).reshape(32, 32)
    for figure in (
        plots.reconstruction_grid([image] * 2, [image] * 2, [low] * 2, ["low"] * 2, map_max),
        plots.defect_panel(image, image, low, low > map_max / 3, None, "low", map_max, map_max / 3),
    ):
        assert plots.pixels(figure).any()
        scales = {(drawn.norm.vmin, drawn.norm.vmax) for axis in figure.axes[2:3] for drawn in axis.images}
        assert scales == {(0.0, 1.0)}


def test_pictures_are_laid_out_in_rows():
    sheet = plots.picture_sheet([np.zeros((3, 3, 8, 8)), np.ones((3, 3, 8, 8))], gap_px=2)
    assert sheet.shape == (24, 36, 3) and sheet.dtype == np.uint8
    assert (
        sheet[5, 5].tolist() == [0, 0, 0]
        and sheet[17, 5].tolist() == [255, 255, 255]
        and sheet[0, 0].tolist() == [153, 153, 153]
    )
