"""Shared by the tests: a tiny stand-in for the frozen backbone, images good and broken and data sets on disk."""

from __future__ import annotations

import inspect
import json
import os
import re
import struct
import sys
import zlib
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process of tests a core; its own processes likewise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import config
import data_loader
import detail_training
import files
import plots
import trimming
import vae_model


@pytest.fixture(scope="session", autouse=True)
def few_pictured_and_shown():
    """One image of each kind in a training's pictures: drawing four takes a third of a tiny training; and a few steps
    for the model that images are compared by.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(detail_training, "N_PICTURED", 1)
        patched.setattr(trimming, "N_SHOWN", 8)
        yield


FIGURES = (
    "reconstruction_grid",
    "defect_panel",
    "metrics_heatmap",
    "training_curves",
    "confusion_heatmap",
    "class_probability_panel",
    "latent_scatter",
)
"""What the stages ask for figures, and save."""


def draw_nothing(patched):
    """Let figures be asked for, with arguments that fit, and saved, but neither be made nor drawn, which takes two
    thirds of a tiny training.
    """
    for name in FIGURES:
        signature = inspect.signature(getattr(plots, name))
        patched.setattr(plots, name, signature.bind)
    patched.setattr(plots, "save", lambda figure, path, **how: files.write_whole(path, b"a figure"))


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Nothing is drawn but in tests so marked, and in fixtures of a whole module or session."""
    if "drawn" not in request.keywords:
        draw_nothing(monkeypatch)


class TinyBackbone(nn.Module):
    """Six fixed channels at stride 8, each of its own mean and spread; counts its calls."""

    tap_channels = (2, 4)
    channels = 6

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.register_buffer("kernel", torch.randn(self.channels, 3, 3, 3, generator=generator))
        self.n_calls = 0

    def grid(self, images):
        self.n_calls += 1
        responses = F.avg_pool2d(F.conv2d(images, self.kernel, padding=1).abs(), 8)
        return responses * torch.arange(1.0, 1.0 + self.channels).view(1, -1, 1, 1) + 5.0


def take_tiny_backbone(monkeypatch):
    """From now on ``DetailVAE`` takes the stand-in that is returned for its backbone."""
    backbone = TinyBackbone()
    monkeypatch.setattr(vae_model, "load_backbone", lambda *args: backbone)
    return backbone


@pytest.fixture
def tiny_backbone(monkeypatch):
    """The stand-in that ``DetailVAE`` takes for its backbone while this fixture lives."""
    return take_tiny_backbone(monkeypatch)


@pytest.fixture
def make_model(tiny_backbone):
    """``make_model("none")`` or ``make_model("efficientnet_lite0", skips=False)``: a narrow DetailVAE, seed 0."""

    def make(backbone="none", **changes):
        torch.manual_seed(0)
        narrow = {
            "latent_dim": 4,
            "detail_channels": 2,
            "base_channels": 4,
            "backbone": backbone,
            "segmentation": False,
        }
        return vae_model.DetailVAE(config.ModelSettings(**{**narrow, **changes}))

    return make


@pytest.fixture
def run_readme_code(tmp_path, monkeypatch):
    """``run_readme_code("load_detector")`` runs README's Python block that has this word, in a folder of its own, and
    returns its names.
    """

    def run(word):
        (code,) = (
            block
            for block in re.findall(
                r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8"), re.S
            )
            if word in block
        )
        monkeypatch.chdir(tmp_path)
        names = {}
        exec(code, names)
        return names

    return run


@pytest.fixture
def run_notebook(tmp_path, monkeypatch):
    """``run_notebook("detail_vae")`` runs the cells of that notebook in tmp_path/notebooks, and returns its names."""

    def run(name):
        path = Path(__file__).parent.parent / "notebooks" / f"{name}.ipynb"
        cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        assert cells and not any(cell["outputs"] for cell in cells), "expected a notebook without outputs"
        (tmp_path / "notebooks").mkdir()
        monkeypatch.chdir(tmp_path / "notebooks")
        monkeypatch.setattr(sys, "path", sys.path.copy())
        names = {}
        for cell in cells:
            exec("".join(cell["source"]), names)
        return names

    return run


def picture(height=48, width=64, seed=0):
    """Smooth, every corner another colour: JPEG keeps it and a turn shows."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = 20 * np.sin(6 * x + 5 * y + seed)
    return np.clip(np.stack([40 + 170 * x + waves, 40 + 170 * y, 200 - 90 * x - 60 * y], 2), 0, 255).astype(np.uint8)


def save(path, pixels=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture() if pixels is None else pixels).save(path, **options)
    return path


def damaged_files(folder):
    """name -> words of the reason."""
    good = save(folder / "source.png").read_bytes()
    jpeg = save(folder / "source.jpg", picture(200, 200)).read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    files = {
        "text.png": (b"this is no picture", "not an image"),
        "truncated.png": (good[: len(good) // 2], "damaged"),
        "flipped.png": (bytes(flipped), "damaged"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "damaged"),
        "zero.png": (b"", "0 bytes"),
        "bomb.png": (bomb(60000, 60000), "expected 89 megapixels at most"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    for name, shape in (("dot.png", (1, 1)), ("ribbon.png", (10, 20000)), ("thin.png", (7, 64))):
        save(folder / name, np.zeros((*shape, 3), np.uint8))
        files[name] = (b"", "expected sides of 8 px or more")
    (folder / "source.png").unlink()
    (folder / "source.jpg").unlink()
    return {name: reason for name, (_, reason) in files.items()}


def bomb(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def make_set(root, n_good=6, n_test=2, masks=True, defect="scratch"):
    for i in range(n_good):
        save(root / "train" / "good" / f"{i:03d}.png", picture(seed=i))
    for i in range(n_test):
        save(root / "test" / "good" / f"{i:03d}.png", picture(seed=20 + i))
        save(root / "test" / defect / f"{i:03d}.png", picture(seed=40 + i))
        if masks:
            save_mask(root / "ground_truth" / defect / f"{i:03d}_mask.png")
    return root


def save_mask(path, shape=(48, 64)):
    mask = np.zeros(shape, np.uint8)
    mask[shape[0] // 4 : shape[0] // 2, shape[1] // 4 : shape[1] // 2] = 255
    return save(path, mask)


def prepare(source, out, **changes):
    return data_loader.preprocess(
        config.PreprocessSettings(source=(str(source),), out=str(out), image_size=64, **changes)
    )


def stamps(out):
    return {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in out.rglob("*.png")}
