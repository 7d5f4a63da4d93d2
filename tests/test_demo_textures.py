"""The built-in demo of textures: what it holds, that it is always the same files and leaves foreign ones alone."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
from conftest import save, stamps

import config
import demo_textures
import image_files
import image_folders


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return demo_textures.make_demo(tmp_path_factory.mktemp("demo") / "demo_textures")


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_demo_layout_and_masks(demo):
    data = image_folders.MVTecFolder(demo)
    assert (
        len(data.train_good) == 100
        and len(data.validation_good) == 20
        and data.categories == ["good", "paint", "scratch"]
        and not data.warnings
    )
    assert [sum(item.category == name for item in data.test) for name in data.categories] == [20, 12, 12]
    for item in data.test:
        assert image_files.read_image(item.path).shape == (128, 128, 3)
        if item.category != "good":
            assert 0.004 < image_files.read_defects(item.mask_paths, item.path).mean() < 0.06


def test_demo_masks_are_exact_and_crops_come_from_disjoint_places(demo):
    photographs = demo_textures._demo_photographs()
    data = image_folders.MVTecFolder(demo)
    cases = [(path, ()) for path in (*data.train_good[:3], *data.validation_good[::5])] + [
        (item.path, item.mask_paths) for item in data.test[::7]
    ]
    found = {"train": [], "validation": [], "test": []}
    for path, mask_paths in cases:
        crop, which = image_files.read_image(path), int(path.stem) % 3
        outside = (
            (~image_files.read_defects(mask_paths, path)).astype(np.uint8)
            if mask_paths
            else np.ones((128, 128), np.uint8)
        )
        places = []
        for view in (crop, crop[:, ::-1]):
            keep = outside if view is crop else outside[:, ::-1]
            one_channel = np.ascontiguousarray(photographs[which][..., 1]), np.ascontiguousarray(view[..., 1])
            match = cv2.matchTemplate(*one_channel, cv2.TM_SQDIFF, mask=np.ascontiguousarray(keep))
            low, _, (left, top), _ = cv2.minMaxLoc(match)
            places.append((low, left, top, view, keep))
        _, left, top, view, keep = min(places, key=lambda place: place[0])
        there = photographs[which][top : top + 128, left : left + 128]
        changed = np.abs(there.astype(int) - view).max(2) >= 6
        assert np.array_equal(changed, keep == 0), "the mask is exactly what changed"
        found[data.relative(path).split("/")[0]].append((which, left, top))
    for one, other in itertools.combinations(found.values(), 2):
        pairs = [(a, b) for a in one for b in other if a[0] == b[0]]
        assert pairs and all(max(abs(a[1] - b[1]), abs(a[2] - b[2])) >= 128 for a, b in pairs), "no pixel is seen twice"


def test_demo_is_the_same_everywhere_and_written_once(demo, tmp_path):
    assert contents(demo_textures.make_demo(tmp_path / "again")) == contents(demo)
    before = stamps(demo)
    demo_textures.make_demo(demo)
    assert stamps(demo) == before
    (tmp_path / "again" / "demo.json").write_text('{"demo_version": 0}')
    (tmp_path / "again" / "train" / "good" / "000.png").unlink()
    assert contents(demo_textures.make_demo(tmp_path / "again")) == contents(demo), "an older demo is written anew"


def test_an_interrupted_demo_is_written_anew(demo, tmp_path, monkeypatch):
    written = []

    def interrupted(path, pixels):
        written.append(path)
        if len(written) == 5:
            raise KeyboardInterrupt
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")

    with monkeypatch.context() as patch:
        patch.setattr(demo_textures, "write_png", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo_textures.make_demo(tmp_path / "demo")
    assert contents(demo_textures.make_demo(tmp_path / "demo")) == contents(demo)


def test_demo_leaves_foreign_folders_alone(tmp_path):
    save(tmp_path / "mine" / "a.png")
    with pytest.raises(config.InputError, match="not the built-in demo"):
        demo_textures.make_demo(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["a.png"]


def test_demo_without_photographs_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_textures, "find_spec", lambda name: None)
    with pytest.raises(config.InputError, match="install scikit-image"):
        demo_textures.make_demo(tmp_path / "demo")
