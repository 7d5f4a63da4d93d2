"""The classifier's network, loss, calibration and latent space, on tiny drawn plots."""

import copy
import dataclasses
from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoints
import config
import data_loader
import evaluation
import latent_space
import plot_calibration as pc
import vae_classifier as vc
from plot_strokes import column_profile

TINY = {
    "latent_dim": 6,
    "widths": (8, 8, 12),
    "profile_channels": 6,
    "decoder_channels": 8,
    "detail_channels": 2,
    "reconstruction_size": 32,
}
BLUE = (31, 119, 180)
SIDE = 64


def draw(heights, side=SIDE, thickness=1):
    """A plot of heights (in px from the top, one a column) as uint8 side x side x 3."""
    image = np.full((side, side, 3), 255, np.uint8)
    points = np.stack([np.linspace(0, side - 1, len(heights)), heights], 1).round().astype(np.int32)
    for first, second in pairwise(points):
        cv2.line(image, first.tolist(), second.tolist(), BLUE, thickness)
    return image


def plots_of(kind, n, seed=0):
    """Plots of three easy kinds: 0 flat with noise, 1 rising, 2 a jump."""
    rng = np.random.default_rng((seed, kind))
    x = np.linspace(0, 1, SIDE)
    shapes = (lambda: 32 + 0 * x, lambda: 52 - 40 * x, lambda: np.where(x > rng.uniform(0.3, 0.7), 15, 49))
    return np.stack([draw(shapes[kind]() + rng.normal(0, 3, SIDE)) for _ in range(n)])


def three_kinds(n, seed=0):
    images = np.concatenate([plots_of(kind, n, seed) for kind in range(3)])
    return data_loader.to_tensor(images), torch.arange(3).repeat_interleave(n)


def tiny(n_classes=3, **changes):
    torch.manual_seed(0)
    return vc.VAEClassifier(config.ClassifierModelSettings(**{**TINY, **changes}), n_classes)


@pytest.fixture(scope="module")
def calibrated():
    """An untrained model, calibrated on drawn plots."""
    model = tiny()
    training, held = three_kinds(20), three_kinds(10, seed=1)
    model.fit_reconstruction_scale([training[0]])
    encoded = [vc.encode_plots(model, images.split(16), labels.numpy()) for images, labels in (training, held)]
    model.calibration = pc.fit_calibration(encoded[0], {"real": encoded[1]}, 3, 0.1, flips_below=1.0)
    return model


# ------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize(
    ("side", "n_classes", "changes"),
    [(64, 9, {}), (96, 2, {"profile_channels": 0}), (64, 3, {"widths": ()}), (32, 4, {"ink": False})],
)
def test_shapes_and_ranges_for_any_side_and_number_of_classes(side, n_classes, changes):
    output = tiny(n_classes, **changes).eval()(torch.rand(2, 3, side, side))
    assert [tuple(each.shape) for each in output] == [(2, 3, 32, 32), (2, 6), (2, 6), (2, n_classes)]
    assert output.reconstruction.min() >= 0 and output.reconstruction.max() <= 1
    assert output._fields == ("reconstruction", "mu", "logvar", "logits")


def test_plots_of_another_range_are_refused():
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        tiny().eval()(255 * torch.rand(1, 3, SIDE, SIDE))


def test_the_shipped_network_is_small_and_draws_224_px():
    model = vc.VAEClassifier()
    assert 3e5 < sum(each.numel() for each in model.parameters()) < 6e6
    with torch.inference_mode():
        assert model.eval()(torch.rand(1, 3, 64, 64)).reconstruction.shape == (1, 3, 224, 224)
    assert model.class_names == list(config.CLASSES)


def test_the_picture_branch_alone_sees_what_no_column_tells():
    """Two pages of stripes whose rows have the same sum, sum of squares, ends and number: every column profile is the
    same.
    """
    pages = torch.ones(2, 1, 3, SIDE, SIDE)
    pages[0, :, :, [0, 10, 14, 15, 40]], pages[1, :, :, [0, 11, 12, 16, 40]] = 0.0, 0.0
    with torch.inference_mode():
        by_column, by_picture = (
            (mu[0] - mu[1]).abs().max()
            for mu in (
                torch.stack([model.encode(page)[0] for page in pages])
                for model in (tiny(widths=()).eval(), tiny(profile_channels=0).eval())
            )
        )
    assert by_picture > 20 * by_column


def test_details_tell_apart_what_the_latent_vector_does_not():
    """Two plots with the same latent vector: their reconstructions differ by their details alone."""
    model, images = tiny().eval(), three_kinds(1)[0]
    with torch.inference_mode():
        mu = model.encode(images[:1])[0].expand(3, -1)
        together, plain = model.reconstruct(images, mu), model.decode(mu)
        assert (together[0] - together[1]).abs().max() > 1e-4
        torch.testing.assert_close(plain[0], plain[1], atol=1e-6, rtol=0)
        torch.testing.assert_close(model(images).reconstruction, model.reconstruct(images, model.encode(images)[0]))


@pytest.mark.parametrize("size", [32, SIDE])
def test_a_profile_already_computed_changes_nothing(size):
    model, images = tiny(reconstruction_size=size).eval(), three_kinds(1)[0]
    profile = column_profile(images)
    with torch.inference_mode():
        mu, _ = model.encode(images)
        torch.testing.assert_close(model.encode(images, profile)[0], mu)
        torch.testing.assert_close(model.reconstruct(images, mu, profile), model.reconstruct(images, mu))


def test_a_prediction_does_not_depend_on_the_rest_of_the_batch():
    model, images = tiny().eval(), three_kinds(2)[0]
    with torch.inference_mode():
        together, alone = model(images), model(images[:1])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[:1], b, atol=1e-5, rtol=1e-4)


def test_the_latent_is_sampled_in_training_only():
    model, images = tiny(), torch.rand(3, 3, 64, 64)
    for is_random in (False, True):
        first, second = (model.train(is_random)(images).reconstruction for _ in range(2))
        assert torch.equal(first, second) is not is_random


# ---------------------------------------------------------------------------------------------- the loss


def loss_of(**changes):
    return vc.ClassifierLoss(config.ClassifierLossSettings(**changes))


def test_terms_are_named_and_total_is_their_weighted_sum():
    images, labels = three_kinds(2)
    terms = loss_of(reconstruction_weight=2.0, kl_weight=3.0, class_weight=5.0)(tiny().eval(), images, labels)
    assert set(terms) == {"reconstruction", "kl", "classification", "total"}
    torch.testing.assert_close(
        terms["total"], 2 * terms["reconstruction"] + 3 * terms["kl"] + 5 * terms["classification"]
    )


def test_terms_agree_with_torch():
    images, labels = three_kinds(2)
    model = tiny(dropout=0.0).eval()
    a, b = torch.rand(2, 4, 3, 16, 16)
    expected = (evaluation.mse(a, b) / 0.03 + evaluation.mae(a, b) / 0.1) / 3
    torch.testing.assert_close(vc.reconstruction_error(a, b, torch.tensor([0.03, 0.1, torch.inf]), 0.0), expected)
    terms, logits = loss_of().terms(model, images, labels)
    mu, logvar = model.encode(images)
    torch.testing.assert_close(terms["classification"], F.cross_entropy(model.head(mu), labels))
    normals = [
        torch.distributions.Normal(mean, (0.5 * logvar).exp())
        for mean, logvar in (model.encode_detail(images), model.decoder.prior_of(model.decoder.columns(mu)))
    ]
    nats = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    ).sum(1)
    nats = nats + torch.distributions.kl_divergence(*normals).flatten(1).sum(1)
    torch.testing.assert_close(terms["kl"], nats.mean() / 32**2)
    torch.testing.assert_close(logits, model.head(mu))
    model.train()
    with torch.no_grad():
        terms, logits = loss_of(label_smoothing=0.3).terms(model, images, labels)
    torch.testing.assert_close(terms["classification"], F.cross_entropy(logits, labels, label_smoothing=0.3))


def test_ink_in_the_wrong_row_is_the_wronger_the_farther_off():
    from scipy.stats import wasserstein_distance

    ink = torch.rand(2, 1, 12, 12)
    ink[1] *= ink[0].sum(1) / ink[1].sum(1)  # as much in each column
    exact = (
        np.mean(
            [
                wasserstein_distance(range(12), range(12), *ink[:, 0, :, column]) * ink[0, 0, :, column].sum()
                for column in range(12)
            ]
        )
        / 12**2
    )
    assert vc.error_parts(ink[:1], ink[1:])[2].item() == pytest.approx(exact, rel=1e-5)
    lines = [torch.ones(1, 3, 12, 12) for _ in range(3)]
    for image, row in zip(lines, (2, 5, 9), strict=True):
        image[:, :, row] = 0
    more = torch.rand(2, 3, 12, 12)  # not as much ink: no end of the columns is preferred
    torch.testing.assert_close(vc.error_parts(more[:1], more[1:]), vc.error_parts(more[:1].flip(2), more[1:].flip(2)))
    near, far = (vc.error_parts(lines[0], other)[2].item() for other in lines[1:])
    assert far == pytest.approx(7 / 3 * near)


def test_the_mean_plot_has_error_one_at_any_size():
    for side in (32, 64):
        images, model = three_kinds(8)[0], tiny(reconstruction_size=side)
        model.fit_reconstruction_scale(images.split(5))
        target = model.target(images)
        mean = target.mean(0, keepdim=True).expand_as(target)
        assert vc.reconstruction_error(mean, target, model.error_scale, 0.0).mean().item() == pytest.approx(
            1.0, abs=0.03
        )
        assert vc.reconstruction_error(target, target, model.error_scale, 0.5).abs().max() < 1e-4


def test_the_target_keeps_thin_lines():
    image = data_loader.to_tensor(draw(np.full(SIDE, 21.0)))
    assert tiny().target(image).shape == (1, 3, 32, 32)
    torch.testing.assert_close(tiny().target(image).mean(), image.mean())
    assert tiny().target(torch.rand(1, 3, 16, 16)).shape == (1, 3, 32, 32)


def test_at_the_start_no_term_drowns_the_others():
    """With weights of one, the gradients that the terms send into the encoder are within a factor of fifty of each
    other.
    """
    images, labels = three_kinds(8)
    model = tiny(9)
    model.fit_reconstruction_scale([images])
    model.train()
    terms = loss_of(reconstruction_share=1.0)(model, images, labels)
    norms = [
        torch.autograd.grad(terms[name], model.to_latent.weight, retain_graph=True)[0].norm().item()
        for name in ("reconstruction", "kl", "classification")
    ]
    assert max(norms) < 50 * min(norms), norms
    assert 0.1 < terms["reconstruction"] / terms["classification"] < 3


def test_only_a_share_of_a_training_batch_is_drawn(monkeypatch):
    images, labels = three_kinds(4)
    model, drawn = tiny(), []
    draw_strokes = model.decoder.draw
    monkeypatch.setattr(
        model.decoder, "draw", lambda columns, detail: drawn.append(len(detail)) or draw_strokes(columns, detail)
    )
    loss = loss_of(reconstruction_share=0.25)
    loss(model.train(), images, labels)
    loss(model.eval(), images, labels)
    assert drawn == [3, 12]


def test_dropped_details_are_those_expected_of_the_latent_vector(monkeypatch):
    images, labels = three_kinds(4)
    model, drawn = tiny().train(), []
    draw_strokes = model.decoder.draw
    monkeypatch.setattr(
        model.decoder, "draw", lambda columns, detail: drawn.append((columns, detail)) or draw_strokes(columns, detail)
    )
    monkeypatch.setattr(vc, "reparameterise", lambda mu, logvar, training: mu)
    for share in (0.0, 1.0, 0.5):
        loss_of(detail_dropout=share, reconstruction_share=1.0)(model, images, labels)
    found, expected = model.encode_detail(images).mean, model.decoder.prior_of(drawn[1][0]).mean
    torch.testing.assert_close(drawn[0][1], found)
    torch.testing.assert_close(drawn[1][1], expected)
    dropped = [torch.allclose(detail, prior, atol=1e-4) for detail, prior in zip(drawn[2][1], expected, strict=True)]
    assert 0 < sum(dropped) < 12
    loss_of(detail_dropout=1.0)(model.eval(), images, labels)
    torch.testing.assert_close(drawn[3][1], model.encode_detail(images).mean)


def test_mixing_blends_plots_and_labels_alike():
    torch.manual_seed(1)
    images, targets = torch.eye(4).view(4, 1, 2, 2).repeat(1, 3, 1, 1), torch.eye(4)
    blended, labels = vc.mixed(images, targets, 1.0)
    torch.testing.assert_close(blended[:, 0].flatten(1), labels)
    torch.testing.assert_close(labels.sum(1), torch.ones(4))
    assert not torch.equal(labels, targets)


def test_one_batch_can_be_learned_by_heart():
    images, labels = three_kinds(4)
    model = tiny(dropout=0.0, latent_dim=16)
    model.fit_reconstruction_scale([images])
    loss, optimizer = loss_of(kl_weight=0.001, label_smoothing=0.0), torch.optim.Adam(model.parameters(), 5e-3)
    first = loss(model.train(), images, labels)
    for _ in range(40):
        terms = loss(model, images, labels)
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
    assert terms["classification"] < 0.1 * first["classification"]
    assert terms["reconstruction"] < 0.8 * first["reconstruction"]


# --------------------------------------------------------------------------------------- probabilities


def test_the_temperature_is_the_likeliest():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 3, (400, 4)), rng.integers(0, 4, 400)
    logits[np.arange(400), labels] += 2
    log_p = F.log_softmax(torch.from_numpy(logits), 1)
    from scipy.optimize import minimize_scalar

    exact = minimize_scalar(
        lambda t: F.cross_entropy(log_p / t, torch.from_numpy(labels)).item(), bounds=(0.1, 10), method="bounded"
    ).x
    assert pc.fit_temperature(log_p.numpy(), labels) == pytest.approx(exact, rel=0.02)


def two_classes(n_unsure=0, far_apart=0.0):
    """200 plots of two classes, that far apart in the latent space, of which the first ones are unsure and a few of the
    others wrong.
    """
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    sure = np.arange(200) >= n_unsure
    for_first = (
        np.where(sure, 8.0, 0.3) * np.where(labels == 0, 1, -1) * np.where(sure & (rng.random(200) < 0.03), -1, 1)
    )
    views = F.log_softmax(torch.from_numpy(np.stack([for_first, -for_first], 1)), 1).expand(4, 200, 2)
    mu, pictures = rng.normal(size=(200, 2)) + far_apart * labels[:, None], rng.normal(size=(200, 11))
    return pc.Encoded(torch.from_numpy(mu), views, torch.from_numpy(pictures), torch.ones(200), labels)


def calibrated_on(encoded):
    return pc.fit_calibration(encoded, {"real": encoded}, 2, 0.05, flips_below=0.9)


def test_the_temperature_of_one_view_is_fitted_on_that_view():
    encoded = two_classes()
    assert calibrated_on(encoded).temperature == pc.fit_temperature(encoded.views[0].numpy(), encoded.labels) != 1.0


def test_the_temperature_of_flips_is_fitted_on_the_plots_judged_by_flips_where_they_are_enough():
    encoded = two_classes(n_unsure=pc.FEWEST_UNSURE + 10)
    fitted = calibrated_on(encoded)
    unsure = fitted.unsure(fitted.probabilities(encoded.views[:1])).numpy()
    expected = pc.fit_temperature(encoded.views.mean(0).numpy()[unsure], encoded.labels[unsure])
    assert pc.FEWEST_UNSURE <= len(unsure) < 200 and fitted.temperature_flips == expected != fitted.temperature


@pytest.mark.parametrize(("n_views", "temperature"), [(1, 2.0), (4, 4.0)])
def test_one_view_and_the_mean_of_flips_each_have_their_temperature(calibrated, n_views, temperature):
    calibration = dataclasses.replace(calibrated.calibration, temperature=2.0, temperature_flips=4.0)
    logits = torch.tensor([[3.0, 0.0, 0.0]])
    found = calibration.probabilities(F.log_softmax(logits, 1).expand(n_views, 1, 3))
    np.testing.assert_allclose(found, F.softmax(logits / temperature, 1), rtol=1e-5)


def test_probabilities_are_the_calibrated_mean_of_four_flips(calibrated):
    images = three_kinds(2, seed=5)[0]
    said = vc.judge(calibrated, images)
    with torch.inference_mode():
        views = [
            F.log_softmax(calibrated(view).logits, 1)
            for view in (images, images.flip(2), images.flip(3), images.flip(2, 3))
        ]
        alone = F.softmax(views[0].double() / calibrated.calibration.temperature, 1)
    expected = F.softmax(torch.stack(views).mean(0).double() / calibrated.calibration.temperature_flips, 1)
    np.testing.assert_allclose(said.probabilities, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(vc.judge(calibrated, images, flips_below=0.0).probabilities, alone.numpy(), atol=1e-5)
    np.testing.assert_allclose(vc.judge(calibrated, images.flip(3)).probabilities, said.probabilities, atol=1e-5)
    between = alone.amax(1).sort().values[2:4].mean().item()  # three of the six plots are less sure than this
    mixed = vc.judge(calibrated, images, between).probabilities
    unsure = (alone.amax(1) < between).numpy()
    assert unsure.sum() == 3
    np.testing.assert_allclose(mixed, np.where(unsure[:, None], said.probabilities, alone.numpy()), atol=1e-5)
    encoded = vc.encode_plots(calibrated, [images], [0] * 6)
    for level, expected in ((1.0, said.probabilities), (between, mixed)):
        calibration = dataclasses.replace(calibrated.calibration, flips_below=level)
        np.testing.assert_allclose(pc.calibrated_probabilities(encoded, calibration), expected, atol=1e-5)


@pytest.mark.parametrize(("time", "value", "axes"), [(True, False, [(3,)]), (False, True, [(2,)]), (False, False, [])])
def test_only_flips_that_training_allowed_are_averaged(calibrated, monkeypatch, time, value, axes):
    images = three_kinds(2, seed=5)[0]
    monkeypatch.setattr(calibrated, "run_settings", {"flip_time": time, "flip_value": value})
    with torch.inference_mode():
        views = torch.stack([calibrated(view).logits for view in (images, *(images.flip(each) for each in axes))])
    expected = calibrated.calibration.probabilities(F.log_softmax(views, 2))
    said = vc.judge(calibrated, images, flips_below=1.0).probabilities
    np.testing.assert_allclose(said, expected.numpy(), atol=1e-5)
    assert len(vc.encode_plots(calibrated, [images], [0] * 6).views) == 1 + len(axes)


def test_always_means_also_a_plot_that_is_wholly_sure(calibrated):
    sure, unsure = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.4, 0.3, 0.3]])
    both = torch.cat([sure, unsure])
    assert calibrated.calibration.unsure(both, 1.0).tolist() == [0, 1]
    assert calibrated.calibration.unsure(both, 0.5).tolist() == [1]
    assert calibrated.calibration.unsure(both, 0.0).tolist() == []


# ---------------------------------------------------------------------------------------- none of these


def test_mahalanobis_agrees_with_scipy():
    from scipy.spatial.distance import mahalanobis

    rng = np.random.default_rng(0)
    rows, means, precision = (
        rng.normal(size=(5, 3)),
        rng.normal(size=(2, 3)),
        np.linalg.inv(np.cov(rng.normal(size=(20, 3)).T)),
    )
    expected = [min(mahalanobis(row, mean, precision) for mean in means) for row in rows]
    np.testing.assert_allclose(
        pc.mahalanobis(*map(torch.from_numpy, (rows, means, precision))).numpy(), expected, rtol=1e-6
    )


def test_the_latent_distance_is_in_units_of_the_spread_within_classes():
    fitted = calibrated_on(two_classes(far_apart=50.0))
    np.testing.assert_allclose(fitted.class_means, [[0, 0], [50, 50]], atol=0.3)
    np.testing.assert_allclose(fitted.latent_precision, np.eye(2), atol=0.3)


def test_a_shrunk_covariance_does_not_depend_on_the_units_of_its_columns():
    rows, units = np.random.default_rng(0).normal(size=(12, 3)), np.array([1.0, 0.01, 100.0])
    expected = pc.shrunk_covariance(rows) * np.outer(units, units)
    np.testing.assert_allclose(pc.shrunk_covariance(rows * units), expected, rtol=1e-3)


def test_the_novelty_of_a_plot_is_the_largest_of_its_three_distances(calibrated):
    calibration = dataclasses.replace(calibrated.calibration, centre=torch.zeros(3), spread=torch.ones(3))
    distances = torch.exp(torch.tensor([[4.0, 0.0, 0.0], [0.0, 5.0, -9.0], [1.0, 1.0, 6.0]]))
    np.testing.assert_allclose(calibration.novelty(distances), [4.0, 5.0, 6.0], rtol=1e-5)


def strangers():
    rng = np.random.default_rng(0)
    page = np.full((SIDE, SIDE, 3), 255, np.uint8)
    for line in range(10, SIDE, 10):
        cv2.putText(page, "none of these", (0, line), cv2.FONT_HERSHEY_PLAIN, 0.6, (0, 0, 0), 1)
    smooth = cv2.GaussianBlur(rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8), (0, 0), 4)
    return {
        "noise": rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8),
        "blank": np.full((SIDE, SIDE, 3), 255, np.uint8),
        "black": np.zeros((SIDE, SIDE, 3), np.uint8),
        "text": page,
        "photograph": cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX),
    }


@pytest.mark.parametrize("name", strangers())
def test_what_is_no_plot_gets_the_smallest_p_value(calibrated, name):
    said = vc.judge(calibrated, data_loader.to_tensor(strangers()[name]))
    assert said.p_values[0] == pytest.approx(1 / 31)
    assert said.p_values[0] <= calibrated.calibration.alpha


def test_new_plots_of_the_known_kinds_are_rarely_flagged(calibrated):
    p_values = vc.judge(calibrated, three_kinds(40, seed=9)[0]).p_values
    assert (p_values <= 0.1).mean() < 0.2
    assert 0.3 < np.median(p_values) < 0.7
    assert calibrated.calibration.promised


def test_a_plot_needs_to_be_strange_to_every_group(calibrated):
    both = pc.ClassifierCalibration(
        **{**calibrated.calibration.__dict__, "scores": {"real": [0.0] * 9, "fresh": [5.0] * 19}}
    )
    np.testing.assert_allclose(both.p_values(np.array([6.0, 3.0, -1.0])), [1 / 10, 1.0, 1.0])
    assert both.promised and not pc.ClassifierCalibration(**{**both.__dict__, "alpha": 0.05}).promised


def test_scores_of_a_batch_are_those_it_was_calibrated_on(calibrated):
    images, _ = three_kinds(10, seed=1)
    with torch.inference_mode():
        output = calibrated.eval()(images)
        distances = vc.novelty_distances(calibrated, calibrated.calibration, images, output.mu, output.reconstruction)
    np.testing.assert_allclose(
        sorted(calibrated.calibration.novelty(distances)), calibrated.calibration.scores["real"], atol=1e-3
    )


# ------------------------------------------------------------------------------------------ latent space


def test_generated_plots_come_from_the_latent_gaussian_of_their_class(calibrated, monkeypatch):
    drawn = latent_space.generate_class(calibrated, calibrated.class_names[1], 3, seed=4)
    assert drawn.shape == (3, 3, 32, 32) and drawn.min() >= 0 and drawn.max() <= 1
    assert torch.equal(drawn, latent_space.generate_class(calibrated, calibrated.class_names[1], 3, seed=4))
    assert not torch.equal(drawn, latent_space.generate_class(calibrated, calibrated.class_names[1], 3, seed=5))
    monkeypatch.setattr(calibrated, "decode", lambda z: z)
    z = latent_space.generate_class(calibrated, calibrated.class_names[1], 20_000).double()
    covariance = calibrated.calibration.class_covariances[1]
    torch.testing.assert_close(
        z.mean(0),
        calibrated.calibration.class_means[1],
        atol=4 * covariance.diagonal().max().sqrt().item() / 100,
        rtol=0,
    )
    torch.testing.assert_close(torch.cov(z.T), covariance, atol=0.05 * covariance.abs().max().item(), rtol=0.1)


def test_a_class_that_does_not_exist_is_named(calibrated):
    with pytest.raises(config.InputError, match="no class 'seasonal'; expected one of 0, 1, 2"):
        latent_space.generate_class(calibrated, "seasonal", 1)


def test_interpolation_starts_and_ends_at_the_two_plots(calibrated):
    images = three_kinds(1)[0]
    drawn, probabilities = latent_space.interpolate(calibrated, images[0], images[2], 5)
    with torch.inference_mode():
        ends = calibrated(images[[0, 2]]).reconstruction
    torch.testing.assert_close(drawn[[0, -1]], ends, atol=1e-5, rtol=0)
    assert drawn.shape == (5, 3, 32, 32)
    np.testing.assert_allclose(probabilities.sum(1), 1.0)


def test_two_dimensions_keep_groups_apart():
    rng = np.random.default_rng(0)
    mu = np.concatenate([rng.normal(0, 1, (15, 6)), rng.normal(20, 1, (15, 6))])
    for method in ("pca", "tsne"):
        points = latent_space.project_2d(mu, method, seed=2**63 - 1)
        centres = points[:15].mean(0), points[15:].mean(0)
        assert np.linalg.norm(centres[0] - centres[1]) > 2 * points[:15].std(0).max()
    centred = mu - mu.mean(0)
    expected = centred @ np.linalg.svd(centred)[2][:2].T
    np.testing.assert_allclose(np.abs(latent_space.project_2d(mu, "pca")), np.abs(expected), atol=1e-6)
    for method in ("pca", "tsne"):
        with pytest.raises(config.InputError, match="2 different plots shows nothing; expected at least 3"):
            latent_space.project_2d(mu[[0, 1, 1, 1, 1]], method)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_one_number_a_plot_cannot_be_laid_out_in_two_dimensions(method):
    with pytest.raises(
        config.InputError, match=r"^A scatter of 1 latent variable shows nothing; expected a model of at least 2\.$"
    ):
        latent_space.project_2d(np.arange(20.0)[:, None], method)


def test_clusters_are_groups_of_neighbours():
    rng = np.random.default_rng(0)
    mu = np.concatenate([rng.normal(centre, 1, (10, 6)) for centre in (0, 20, -20)])
    found = latent_space.cluster(mu, 3, seed=2**63 - 1).reshape(3, 10)
    assert (found == found[:, :1]).all() and sorted(found[:, 0]) == [0, 1, 2]
    with pytest.raises(config.InputError, match="2 different plots cannot make 3 clusters"):
        latent_space.cluster(mu[[0, 1, 1, 1]], 3)


# ------------------------------------------------------------------------------------------- from a file


def save(network, path, **changes):
    settings = {**config.as_dict(config.TrainClassifierSettings(image_size=64)), **config.as_dict(network.settings)}
    contents = vc.checkpoint_contents(network, network.calibration, settings, ["a", "b", "c"], 7)
    checkpoints.save_checkpoint(path, vc.KIND, {**contents, **changes})
    return path


def test_a_loaded_model_says_the_same(calibrated, tmp_path):
    model, names = vc.load_vae_classifier(save(calibrated, tmp_path / "model.pth"), "auto")
    assert names == model.class_names == ["a", "b", "c"] and not model.training
    assert (model.run_settings["image_size"], model.run_settings["crop_axes"]) == (64, True)
    images = three_kinds(2, seed=3)[0]
    for ours, theirs in zip(vc.judge(model, images), vc.judge(calibrated, images), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_folding_normalisations_changes_nothing_but_the_time(calibrated, tmp_path):
    calibrated = copy.deepcopy(calibrated)
    with torch.no_grad():
        for name, buffer in calibrated.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    path, images = save(calibrated, tmp_path / "model.pth"), three_kinds(2)[0]
    plain, folded = (vc.load_vae_classifier(path, fuse=fuse)[0] for fuse in (False, True))
    assert not any(isinstance(each, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)) for each in folded.modules())
    assert plain.state_dict().keys() == calibrated.state_dict().keys()
    with torch.inference_mode():
        for ours, theirs in zip(folded(images), plain(images), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_files_that_hold_no_classifier_are_refused_in_one_sentence(calibrated, tmp_path):
    def refusal(path):
        with pytest.raises(config.InputError) as caught:
            vc.load_vae_classifier(path)
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
        return str(caught.value)

    checkpoints.save_checkpoint(tmp_path / "detail.pth", "detail_vae", {"settings": {}, "model": {}})
    assert "holds a 'detail_vae'; expected a 'vae_classifier'" in refusal(tmp_path / "detail.pth")
    assert "no checkpoint at" in refusal(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no model")
    assert "not a readable checkpoint" in refusal(tmp_path / "text.pth")
    assert "lacks calibration" in refusal(save(calibrated, tmp_path / "bare.pth", calibration=None))
    assert "what it holds cannot be used ('temperature_flips')" in refusal(
        save(calibrated, tmp_path / "odd.pth", calibration={"temperature": 1.0})
    )
    for key, value, words in (
        ("temperature", float("nan"), "temperature is nan; expected a finite number"),
        ("alpha", "0.05", "alpha is '0.05'; expected a finite number"),
        ("class_means", torch.full((3, 8), torch.inf), "class_means is no tensor of finite numbers"),
        ("centre", torch.zeros(2), "centre has shape (2,); expected (3,)"),
        ("scores", {}, "there are no scores"),
        ("scores", {"real": ["x"]}, "a score is 'x'; expected a finite number"),
    ):
        changed = {**calibrated.calibration.__dict__, key: value}
        assert words in refusal(save(calibrated, tmp_path / "odd.pth", calibration=changed)), key
    assert "do not fit" in refusal(save(calibrated, tmp_path / "weights.pth", model={"head.weight": torch.zeros(1)}))


def test_notebook_names_are_there():
    assert config.DEVICE in ("cpu", "cuda")
    settings = config.TrainClassifierSettings()
    assert (settings.latent_dim, settings.learning_rate, settings.kl_weight) == (
        config.LATENT_DIM,
        config.LEARNING_RATE,
        config.KL_WEIGHT,
    )
    assert (settings.reconstruction_weight, settings.class_weight) == (
        config.RECONSTRUCTION_WEIGHT,
        config.CLASS_WEIGHT,
    )
    with pytest.raises(AttributeError, match="no attribute 'DEVIC'"):
        config.DEVIC  # noqa: B018
