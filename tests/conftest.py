"""Shared by the tests of the network and its maps: a tiny stand-in for the frozen backbone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vae_model
from config import ModelSettings


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


@pytest.fixture
def tiny_backbone(monkeypatch):
    """The stand-in that ``DetailVAE`` takes for its backbone while this fixture lives."""
    backbone = TinyBackbone()
    monkeypatch.setattr(vae_model, "load_backbone", lambda *args: backbone)
    return backbone


@pytest.fixture
def make_model(tiny_backbone):
    """``make_model("none")`` or ``make_model("efficientnet_lite0", skips=False)``: a narrow DetailVAE, seed 0."""

    def make(backbone="none", **changes):
        torch.manual_seed(0)
        narrow = {"latent_dim": 4, "detail_channels": 2, "base_channels": 4, "backbone": backbone, "segmentation": False}
        return vae_model.DetailVAE(ModelSettings(**{**narrow, **changes}))

    return make
