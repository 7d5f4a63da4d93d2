"""What both autoencoders are made of: residual blocks, draws from a latent space, layers folded for inference."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

LOGVAR_RANGE = (-8.0, 8.0)
"""Log-variances that are told apart."""
BATCH_NORM_MOMENTUM = 0.05
"""Small, because a step sees few images (Ioffe & Szegedy 2015 leave it open; torch takes 0.1)."""


def conv_norm(n_in: int, n_out: int, kernel: int = 3, stride: int | tuple[int, int] = 1) -> nn.Sequential:
    """Convolution and batch normalisation; the bias is left to the normalisation."""
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(n_out, momentum=BATCH_NORM_MOMENTUM),
    )


class ResidualBlock(nn.Module):
    """x + F(x) with two 3x3 convolutions (He et al. 2016), identity at initialisation."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = conv_norm(channels, channels)
        self.second = conv_norm(channels, channels)
        nn.init.zeros_(self.second[1].weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.second(F.silu(self.first(x))))


class Down(nn.Sequential):
    """Halve the resolution, then one residual block."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(conv_norm(n_in, n_out, 3, 2), nn.SiLU(), ResidualBlock(n_out))


def reparameterise(mu: Tensor, logvar: Tensor, training: bool) -> Tensor:
    """A sample of N(mu, exp(logvar)) in training (Kingma & Welling 2014, section 2.4), the mean otherwise; the shape of
    both.
    """
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu) if training else mu


def kl_divergence(mu: Tensor, logvar: Tensor, prior: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """KL(N(mu, exp(logvar)) || prior) in nats, mean over all latent variables of the batch.

    The prior is N(0, 1), or normal with the mean and log-variance given.

    Kingma & Welling 2014, appendix B, for the standard normal: -1/2 (1 + logvar - mu^2 - exp(logvar)), divided by the
    number of variables, so that one weight serves every latent size and image size.

    >>> round(kl_divergence(torch.ones(1, 4), torch.zeros(1, 4)).item(), 6)
    0.5
    """
    if prior is not None:
        # both shifted and scaled alike, the prior becomes N(0, 1) and the divergence stays
        mu, logvar = (mu - prior[0]) * torch.exp(-0.5 * prior[1]), logvar - prior[1]
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).mean()


@torch.no_grad()
def fold_layers(model: nn.Module) -> nn.Module:
    """The model with every normalisation and every ``PixelUnshuffle`` folded into the convolution beside it: the same
    outputs sooner, no more training.
    """
    for module in model.eval().modules():
        if isinstance(module, nn.Sequential):
            for at, (first, second) in enumerate(pairwise(module)):
                if isinstance(first, nn.PixelUnshuffle):
                    module[at], second[0] = nn.Identity(), _strided(second[0], first.downscale_factor)
                if isinstance(first, (nn.Conv1d, nn.Conv2d)) and isinstance(second, (nn.BatchNorm1d, nn.BatchNorm2d)):
                    module[at], module[at + 1] = fuse_conv_bn_eval(first, second), nn.Identity()
    return model


def _strided(conv: nn.Conv2d, factor: int) -> nn.Conv2d:
    """What a convolution without bias does after ``PixelUnshuffle(factor)``, as one with a stride."""
    kernel = F.pixel_shuffle(conv.weight, factor)
    folded = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2:], factor, factor * conv.padding[0], bias=False)
    folded.weight = nn.Parameter(kernel)
    return folded.eval()
