"""Reading a plot's strokes off a picture, and drawing them."""

import numpy as np
import pytest
import torch

import data_loader
import plot_strokes as ps
from vae_model import kl_divergence

SIDE = 64


def stroke_plot(tops, bottoms):
    """A white square with a blue stroke in each column, from row tops[i] down to row bottoms[i], as float32 (1, 3,
    SIDE, SIDE).
    """
    image = np.full((SIDE, SIDE, 3), 255, np.uint8)
    for column, (top, bottom) in enumerate(zip(tops, bottoms, strict=True)):
        image[top : bottom + 1, column] = (31, 119, 180)
    return data_loader.to_tensor(image)


@pytest.fixture
def wavy():
    middle = (32 + 20 * np.sin(np.linspace(0, 6, SIDE))).round().astype(int)
    return stroke_plot(middle - 3, middle + 5)


# ------------------------------------------------------------------------------------- reading strokes


def test_ink_is_the_distance_from_white():
    pixels = torch.tensor([[1.0, 1, 1], [0, 0, 0], [31 / 255, 119 / 255, 180 / 255]]).T.view(1, 3, 1, 3)
    torch.testing.assert_close(ps.ink_of(pixels).flatten(), torch.tensor([0.0, 1.0, 224 / 255]))


# ------------------------------------------------------------------------------------- reading strokes


def test_the_profile_follows_the_trace():
    tops = (30 + 20 * np.sin(np.linspace(0, 6, SIDE))).round().astype(int)
    bottoms = tops + np.arange(SIDE) % 5
    profile = ps.column_profile(stroke_plot(tops, bottoms))[0].numpy()

    def height_of(row):
        return 1 - 2 * row / (SIDE - 1)

    np.testing.assert_allclose(
        profile[[0, 2, 3]], [height_of((tops + bottoms) / 2), height_of(tops), height_of(bottoms)], atol=1e-5
    )
    np.testing.assert_allclose(
        profile[1],
        [np.std(height_of(np.arange(top, bottom + 1))) for top, bottom in zip(tops, bottoms, strict=True)],
        atol=1e-3,
    )
    assert (profile[5] == 1).all()


def test_grid_lines_and_blank_columns_are_no_trace():
    image = stroke_plot([20] * SIDE, [20] * SIDE)
    image[:, :, 40] = 231 / 255  # a grid line
    image[..., 50:] = 1
    profile = ps.column_profile(image)[0]
    torch.testing.assert_close(profile[0, :50], torch.full((50,), 1 - 2 * 20 / 63))
    assert profile[:, 50:].abs().max() == 0


def test_flipping_a_plot_flips_its_profile(wavy):
    profile, upside_down, backwards = (ps.column_profile(each) for each in (wavy, wavy.flip(2), wavy.flip(3)))
    torch.testing.assert_close(backwards, profile.flip(2))
    torch.testing.assert_close(upside_down[:, [0, 2, 3]], -profile[:, [0, 3, 2]], atol=1e-5, rtol=0)
    torch.testing.assert_close(upside_down[:, 1], profile[:, 1], atol=1e-3, rtol=0)


# ------------------------------------------------------------------------------------- drawing strokes


def decoder():
    torch.manual_seed(0)
    return ps.PlotDecoder(latent_dim=4, channels=8, detail_channels=2, side=SIDE)


def test_strokes_are_drawn_where_they_are_said_to_be(monkeypatch):
    """Middle, half extent and darkness of each column, put in by hand, are what its profile then says."""
    drawing, rows = decoder(), torch.linspace(20, 44, SIDE)
    asked = torch.stack(
        [
            rows / SIDE - 0.5,
            torch.full((SIDE,), 0.7),
            torch.full((SIDE,), 3.0),
            torch.full((SIDE,), 3.0),
            torch.full((SIDE,), 9.0),
        ]
    )
    monkeypatch.setattr(drawing.stroke, "forward", lambda x: asked[None])
    drawing.set_colours(stroke_plot([5] * SIDE, [9] * SIDE))
    with torch.inference_mode():
        plot = drawing.draw(torch.zeros(1, 8, SIDE), torch.zeros(1, 2, SIDE))
    assert plot.shape == (1, 3, SIDE, SIDE)
    mean, _, top, bottom, *_ = ps.column_profile(plot)[0]
    torch.testing.assert_close(mean, 1 - 2 * (rows - 0.5) / (SIDE - 1), atol=0.5 * 2 / SIDE, rtol=0)
    extent = 2 * torch.nn.functional.softplus(torch.tensor(0.7)).item() * SIDE / 16
    assert ((top - bottom).mean() * (SIDE - 1) / 2 + 1).item() == pytest.approx(extent, abs=0.6)


def test_the_decoder_begins_with_the_colours_of_the_plots(wavy):
    drawing = decoder()
    drawing.set_colours(wavy)
    ground, line = torch.sigmoid(drawing.colours).chunk(2)
    torch.testing.assert_close(ground, torch.full((3,), 0.995))
    torch.testing.assert_close(line, torch.tensor([31, 119, 180]) / 255, atol=0.01, rtol=0)


def test_the_divergence_of_two_gaussians_agrees_with_torch():
    torch.manual_seed(0)
    (a, b), (c, d) = torch.randn(2, 2, 5, 3)

    def normal(mean, logvar):
        return torch.distributions.Normal(mean, (0.5 * logvar).exp())

    exact = torch.distributions.kl_divergence(normal(a, b), normal(c, d))
    found = [
        kl_divergence(*(each.flatten()[i] for each in (a, b)), tuple(each.flatten()[i] for each in (c, d)))
        for i in range(a.numel())
    ]
    torch.testing.assert_close(torch.stack(found).view_as(exact), exact)


def test_a_thin_line_is_learned_as_a_line():
    """Decoder and details alone bring the ink to a line one pixel thick, from anywhere, and keep it from fading."""
    middle = (32 + 20 * np.sin(np.linspace(0, 6, SIDE))).round().astype(int)
    thin, z = stroke_plot(middle, middle), torch.zeros(1, 4)
    drawing, details = decoder(), ps.DetailEncoder(8, 2)
    drawing.set_colours(thin)
    optimizer = torch.optim.Adam([*drawing.parameters(), *details.parameters()], 0.01)
    for _ in range(400):
        drawn = drawing.draw(drawing.columns(z), details(ps.column_profile(thin)).mean)
        loss = (drawn - thin).abs().mean() + 3 * (drawn - thin).mean(1).cumsum(1).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (course, *_), (true, *_) = (ps.column_profile(plot)[0] for plot in (drawn.detach(), thin))
    assert (course - true).abs().mean() < 2.5 * 2 / SIDE
    assert ps.ink_of(drawn).sum().item() == pytest.approx(ps.ink_of(thin).sum().item(), rel=0.3)
