"""The classifier's latent space: plots drawn from it, ways through it, clusters and scatters of it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config import InputError
from vae_classifier import VAEClassifier


@torch.inference_mode()
def generate_class(model: VAEClassifier, class_name: str, n: int, seed: int = 0) -> Tensor:
    """Plots (n, 3, R, R) in [0, 1] drawn from the Gaussian of a class's latent means.

    Raises:
        InputError: there is no such class.
    """
    if class_name not in model.class_names:
        raise InputError(f"There is no class {class_name!r}; expected one of {', '.join(model.class_names)}.")
    k, calibration = model.class_names.index(class_name), model.calibration
    factor = torch.linalg.cholesky(calibration.class_covariances[k])
    noise = torch.randn(n, len(factor), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z = calibration.class_means[k] + noise @ factor.T
    return model.eval().decode(z.float().to(model.error_scale.device)).cpu()


@torch.inference_mode()
def interpolate(model: VAEClassifier, first: Tensor, second: Tensor, n: int) -> tuple[Tensor, np.ndarray]:
    """Plots (n, 3, R, R) on the straight way between both latents of two plots (3, S, S), and their probabilities (n,
    K).
    """
    ends = torch.stack([first, second]).to(model.error_scale.device)
    shares = torch.linspace(0, 1, n, device=ends.device)
    z, detail = (
        torch.stack([torch.lerp(*means, share) for share in shares])
        for means in (model.eval().encode(ends)[0], model.encode_detail(ends).mean)
    )
    temperature = model.calibration.temperature if model.calibration else 1.0
    return model.decode(z, detail).cpu(), F.softmax(model.head(z).double() / temperature, 1).cpu().numpy()


def n_different(mu: np.ndarray) -> int:
    """How many of latent means (n, D) are not the same."""
    return len(np.unique(mu, axis=0))


def project_2d(mu: np.ndarray, method: str, seed: int = 0) -> np.ndarray:
    """Latent means (n, D) in two dimensions, (n, 2), by "pca" or "tsne" (van der Maaten & Hinton 2008).

    Raises:
        InputError: fewer than 3 different plots, or a single latent variable.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if n_different(mu) < 3:
        raise InputError(f"A scatter of {n_different(mu)} different plots shows nothing; expected at least 3.")
    if mu.shape[1] < 2:
        raise InputError("A scatter of 1 latent variable shows nothing; expected a model of at least 2.")
    if method == "pca":
        return PCA(2, random_state=seed % 2**32).fit_transform(mu)
    return TSNE(2, perplexity=min(30.0, (len(mu) - 1) / 3), init="pca", random_state=seed % 2**32).fit_transform(mu)


def cluster(mu: np.ndarray, n_clusters: int, seed: int = 0) -> np.ndarray:
    """Cluster (n,), from 0 on, of latent means (n, D), by k-means (Lloyd 1982; the best of ten starts).

    Raises:
        InputError: fewer different plots than clusters.
    """
    from sklearn.cluster import KMeans

    if n_different(mu) < n_clusters:
        raise InputError(
            f"{n_different(mu)} different plots cannot make {n_clusters} clusters; expected at least as many."
        )
    return KMeans(n_clusters, n_init=10, random_state=seed % 2**32).fit_predict(mu)


def agreement(labels: list[str], clusters: np.ndarray) -> dict:
    """How far clusters (n,) are the classes in ``labels``, of the plots that have one; nothing where fewer than two
    occur.
    """
    from sklearn.metrics import adjusted_rand_score

    rows = [row for row, label in enumerate(labels) if label]
    known = [labels[row] for row in rows]
    if len(set(known)) < 2:
        return {}
    return {"adjusted_rand_index": adjusted_rand_score(known, clusters[rows]), "n_plots": len(rows)}
