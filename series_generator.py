"""Labelled series of the nine kinds, from the PyPI package ``betise``: made by seed, with all their parameters.

Two styles. ``present`` draws what betise's ``generate_dataframe`` draws with its default parameters, and picks what is
left open (base series, length, one or several events, where, direction, shape). ``home`` rebuilds from betise's base
processes what earlier releases drew, which the home plots show: noise added to every base series, shorter overlays,
mean shifts in absolute units, trend shifts of steep slope, contextual anomalies on an added sine, lengths from 50 to
10,000.
"""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import config

KINDS = config.CLASSES
STYLES = ("present", "home")
LENGTHS = ((50, 100), (300, 500), (1000, 2000))
LONG_LENGTHS = ((50, 100), (300, 500), (1000, 10_000))
STATIONARY = ("ar", "ma", "arma", "white_noise")
STOCHASTIC = ("random_walk", "random_walk_drift", "ari", "ima", "arima")
VOLATILITY = ("arch", "garch", "egarch", "aparch")
TRENDS = ("linear", "quadratic", "cubic", "exponential", "damped")
SHAPES = ("rectangular", "gaussian", "triangular", "ramp", "decay")
PLACES = {"beginning": (0.1, 0.3), "middle": (0.4, 0.6), "end": (0.7, 0.9)}
CHANGES = ("direction_change", "magnitude_change", "direction_and_magnitude_change")
PERIODS = (5, 7, 12, 24, 30, 52, 90, 180)
MAX_ATTEMPTS = 50


class LabelledSeries(NamedTuple):
    kind: str  # one of KINDS
    values: np.ndarray  # float64 (n,), finite, not constant
    parameters: dict  # plain values: what was drawn, enough to tell how the series came to be


def require_betise() -> str:
    """The version of betise that is installed.

    Raises:
        InputError: it is not, with the command that installs it.
    """
    try:
        import betise
    except ImportError:
        raise config.InputError(
            "Generating series needs the package betise; install it with: pip install 'betise>=0.6,<0.7'"
        ) from None
    return betise.__version__


def generate_series(kind: str, style: str, seed: int | tuple[int, ...]) -> LabelledSeries:
    """One series of a kind; the same arguments give the same series whatever was generated before.

    Raises:
        InputError: betise is missing, or an unknown kind or style.
    """
    if kind not in KINDS or style not in STYLES:
        raise config.InputError(
            f"There is no series of kind {kind!r} in style {style!r}; expected one of {', '.join(KINDS)} and "
            f"{' or '.join(STYLES)}."
        )
    require_betise()
    rng = np.random.default_rng(seed)
    make = _present_series if style == "present" else _home_series
    reason = ""
    with _betise_chance(rng):
        for _ in range(MAX_ATTEMPTS):
            try:
                values, parameters = make(kind, rng)
            except (ValueError, AttributeError, IndexError) as error:
                # betise cannot place an event in so short a series
                reason = str(error)
                continue
            if np.isfinite(values).all() and np.ptp(values) > 0:
                return LabelledSeries(kind, values, {"style": style, "length": len(values), **parameters})
    raise config.InputError(
        f"betise made no usable series of kind {kind} in {MAX_ATTEMPTS} attempts; the last reason was: {reason}."
    )


@contextlib.contextmanager
def _betise_chance(rng: np.random.Generator):
    """betise draws from the global generators and prints: both are lent to it and put back."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    seed = int(rng.integers(2**32))
    np.random.seed(seed)
    random.seed(seed)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def _pick(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]


def _length(rng: np.random.Generator, ranges) -> int:
    low, high = _pick(rng, ranges)
    return int(rng.integers(low, high + 1))


# --------------------------------------------------------------------- present style: betise as it is today


def _present_series(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    base, features = _present_plan(kind, rng)
    length = _length(
        rng, LONG_LENGTHS if kind in ("stochastic_trend", "volatility") and rng.random() < 0.3 else LENGTHS
    )
    return _betise_series(base, features, length), {"base": base, "features": features}


def _betise_series(base: str, features: dict[str, dict], length: int) -> np.ndarray:
    """The numbers of ``betise.generate_dataframe`` without its table of metadata, which takes 0.1 s a series."""
    from betise import TimeSeriesGenerator, load_config
    from betise.dataset_generation import apply_feature, generate_base_series

    parameters = load_config()["params"]
    generator = TimeSeriesGenerator(length=length)
    table, info = generate_base_series(generator, base, parameters)
    state = {"seasonal_info": info if base.endswith("seasonality") else None}
    for name, options in features.items():
        table, info = apply_feature(generator, table, name, {"enabled": True, **options}, parameters, state)
        if info is None:
            raise ValueError(f"no place for {name} in {length} points")
    return table["data"].to_numpy(dtype=np.float64)


def _present_plan(kind: str, rng: np.random.Generator) -> tuple[str, dict[str, dict]]:
    """(base series, feature -> options) of betise's dataset configuration."""
    if kind == "stochastic_trend":
        return _pick(rng, STOCHASTIC), {}
    if kind == "volatility":
        return _pick(rng, VOLATILITY), {}
    base = _pick(rng, STATIONARY)
    direction = _pick(rng, ("up", "down"))
    if kind == "deterministic_trend":
        options = {"direction": direction}
        trend = _pick(rng, TRENDS)
        return base, {
            f"{trend}_trend": {**options, "location": _pick(rng, ("left", "center", "right"))}
            if trend in ("quadratic", "cubic")
            else options
        }
    options = {
        "mode": _pick(rng, ("single", "multiple")),
        "location": _pick(rng, tuple(PLACES)),
        "direction": direction,
    }
    several = int(rng.integers(2, 5))
    if kind in ("mean_shift", "variance_shift", "trend_shift"):
        options["num_breaks"] = several
    if kind == "trend_shift":
        options["change_type"] = (
            _pick(rng, (*CHANGES, "mixed")) if options["mode"] == "multiple" else _pick(rng, CHANGES)
        )
        return base, {"linear_trend": {"direction": direction}, kind: options}
    if kind == "point_anomaly":
        options["is_spike"] = bool(rng.random() < 0.5)
    if kind == "collective_anomaly":
        options |= {"num_anomalies": several, "anomaly_shapes": [_pick(rng, SHAPES)]}
    if kind == "contextual_anomaly":
        options["num_anomalies"] = several
        base = _pick(rng, ("single_seasonality", "multiple_seasonality"))
    return base, {kind: options}


# ------------------------------------------------------------------------- home style: the home plots' look


def _home_series(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    if kind == "volatility":
        return _home_volatility(rng)
    if kind == "stochastic_trend":
        return _home_stochastic(rng)
    n = _length(rng, LENGTHS)
    name = _pick(rng, STATIONARY)
    base = _home_base(name, n, rng)
    values, parameters = HOME_OVERLAYS[kind](base, rng)
    return values, {"base": name, **parameters}


def _generator(n: int):
    from betise import TimeSeriesGenerator

    return TimeSeriesGenerator(length=n)


def _normalised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std()


def _home_base(name: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """A stationary process of unit innovations with noise on top, normalised unless it is white noise."""
    noise = rng.normal(0, rng.uniform(0.1, 1.5), n)
    if name == "white_noise":
        return rng.normal(0, 1, n) + noise
    process, _ = getattr(_generator(n), f"generate_{name}_series")(n, noise_std=1.0)
    return _normalised(np.asarray(process, dtype=np.float64) + noise)


def _places(
    n: int, rng: np.random.Generator, several: int, safe_zone: tuple[float, float] = (0.1, 0.9)
) -> tuple[list[int], str]:
    """Indices of one event in a named part, or of several at least a tenth of the length apart."""
    if several == 1:
        place = _pick(rng, tuple(PLACES))
        low, high = PLACES[place]
        return [int(rng.integers(int(low * n), int(high * n)))], place
    free, chosen = np.arange(int(safe_zone[0] * n), int(safe_zone[1] * n)), []
    while len(chosen) < several and len(free):
        chosen.append(int(rng.choice(free)))
        free = free[np.abs(free - chosen[-1]) >= 0.1 * n]
    return sorted(chosen), "several"


def _home_point(base: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    table = _as_table(base)
    if rng.random() < 0.25:
        table, info = _generator(len(base)).generate_point_anomalies(table, is_loc=False)
    else:
        table, info = _generator(len(base)).generate_point_anomaly(
            table, location=_pick(rng, tuple(PLACES)), is_spike=True, is_loc=False
        )
    return _normalised(table["data"].to_numpy()), {"at": [int(i) for i in info["anomaly_indices"]]}


def _as_table(values: np.ndarray):
    import pandas

    return pandas.DataFrame({"time": np.arange(len(values)), "data": values})


def _home_collective(base: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    n, values = len(base), base.copy()
    starts, place = _places(n, rng, int(rng.integers(2, 5)) if rng.random() < 0.25 else 1, (0.1, 0.85))
    events = []
    for start in starts:
        longest = min(int(0.09 * n), n - start - int(0.05 * n))
        duration = int(rng.integers(int(0.05 * n), max(longest, int(0.05 * n) + 1)))
        shift = float(_pick(rng, (-1, 1)) * rng.uniform(0.8, 1.5) * values.std())
        values[start : start + duration] += shift
        events.append({"start": start, "duration": duration, "shift": shift})
    return _normalised(values), {"place": place, "events": events}


def _home_contextual(base: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """A sine over the whole series, turned upside down for half a period around some of its peaks or valleys."""
    n = len(base)
    period = _pick(rng, [p for p in PERIODS if max(5, n // 20) <= p <= n // 6])
    season = base.std() * rng.uniform(1.5, 3.0) * np.sin(2 * np.pi * np.arange(n) / period)
    turns = np.flatnonzero(np.diff(np.sign(np.diff(season))) != 0) + 1
    several = _pick(rng, (1, 1, 1, int(rng.integers(2, 5))))
    place = _pick(rng, tuple(PLACES)) if several == 1 else "several"
    low, high = PLACES.get(place, (0.1, 0.85))
    turns = turns[(turns >= int(low * n)) & (turns < int(high * n))]
    centres = sorted(int(i) for i in rng.permutation(turns)[:several])
    if not centres:
        raise ValueError("no turn of the season where the anomaly should be")
    values, width = base + season, min(max(period // 2, 10), int(0.2 * n))
    for centre in centres:
        inside = slice(max(0, centre - width // 2), min(n, max(0, centre - width // 2) + width))
        values[inside] -= 2 * season[inside]
    return values, {"period": period, "place": place, "at": centres, "width": width}


def _home_trend(base: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    trend, sign, n = _pick(rng, ("linear", *TRENDS)), float(_pick(rng, (-1, 1))), len(base)
    t, steps = np.linspace(-1, 1, n), np.arange(n)
    if trend == "linear":
        values = base + sign * rng.uniform(0.05, 0.5) / (n / 100) * steps + rng.normal(0, rng.uniform(0.1, 1.5), n)
    elif trend == "quadratic":
        values = base + sign * rng.uniform(2.0, 5.0) * (t - _pick(rng, (-0.5, 0, 0, 0.5))) ** 2
    elif trend == "cubic":
        values = base + 10 * (t**3 + _pick(rng, (-1.5, 0, 0, 0, 1.5)) * t**2 - t)
    else:  # exponential, and damped, which fell like one
        sign = -1.0 if trend == "damped" else sign
        size, noise = (1, rng.uniform(0.1, 0.5)) if sign > 0 else (5, rng.uniform(0.01, 0.05))
        values = size * rng.uniform(1.0, 2.0) * np.exp(sign * rng.uniform(1.5, 3.0) * (t + 1)) + rng.normal(
            0, 3 * noise, n
        )
    return _normalised(values), {"trend": trend, "sign": sign}


def _smooth_and_rest(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hodrick-Prescott trend of smoothness 11,000, and what it leaves."""
    from scipy.linalg import solveh_banded

    n, smoothness = len(values), 11_000.0
    bands = np.zeros((3, n))
    for weight_i, i in ((1.0, 0), (-2.0, 1), (1.0, 2)):  # I + smoothness * D'D, D the second difference
        bands[2, i : n - 2 + i] += smoothness * weight_i**2
        for weight_j, j in ((1.0, 0), (-2.0, 1), (1.0, 2)):
            if j > i:
                bands[2 - (j - i), j : n - 2 + j] += smoothness * weight_i * weight_j
    bands[2] += 1.0
    smooth = solveh_banded(bands, values)
    return smooth, values - smooth


def _break_count(n: int, rng: np.random.Generator) -> int:
    return int(rng.integers(2, 5)) if n > 100 and rng.random() < 0.2 else 1


def _home_mean_shift(base: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    at, place = _places(len(base), rng, _break_count(len(base), rng))
    shifts = [float(_pick(rng, (-1, 1)) * rng.uniform(0.3, 1.5)) for _ in at]
    values = base + rng.normal(0, rng.uniform(0.01, 0.05), len(base))
    for index, shift in zip(at, shifts, strict=True):
        values[index:] += shift
    return _normalised(values), {"at": at, "place": place, "shifts": shifts}


def _home_variance_shift(base: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    smooth, rest = _smooth_and_rest(base)
    at, place = _places(len(base), rng, _break_count(len(base), rng))
    factors = [float(rng.uniform(1.5, 3.0) ** _pick(rng, (-1, 1))) for _ in at]
    for index, factor in zip(at, factors, strict=True):
        rest[index:] *= factor
    return _normalised(smooth + rest), {"at": at, "place": place, "factors": factors}


def _home_trend_shift(base: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    n = len(base)
    _, rest = _smooth_and_rest(base)
    at, place = _places(n, rng, _break_count(n, rng))
    slope = float(_pick(rng, (-1, 1)) * rng.uniform(0.1, 0.9))
    slopes, changes = [slope], []
    for _ in at:
        change = _pick(rng, CHANGES)
        slope *= (-1 if "direction" in change else 1) * (rng.uniform(1.5, 4.5) if "magnitude" in change else 1)
        slopes.append(float(slope))
        changes.append(change)
    runs = np.diff([0, *at, n])
    trend = np.concatenate([[0.0], np.cumsum(np.repeat(slopes, runs))[:-1]])
    values = trend + rest + rng.normal(0, rng.uniform(5, 15), n)
    return _normalised(values), {"at": at, "place": place, "slopes": slopes, "changes": changes}


HOME_OVERLAYS: dict[str, Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, dict]]] = {
    "collective_anomaly": _home_collective,
    "contextual_anomaly": _home_contextual,
    "deterministic_trend": _home_trend,
    "mean_shift": _home_mean_shift,
    "point_anomaly": _home_point,
    "trend_shift": _home_trend_shift,
    "variance_shift": _home_variance_shift,
}


def _home_stochastic(rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    name, n = _pick(rng, STOCHASTIC), _length(rng, LONG_LENGTHS)
    if name.startswith("random_walk"):
        drift = float(rng.uniform(0.01, 0.1)) if name.endswith("drift") else 0.0
        return _normalised(drift * np.arange(n) + np.cumsum(rng.normal(0, 1, n))), {"base": name, "drift": drift}
    order = int(rng.integers(1, 3))
    values, _ = getattr(_generator(n), f"generate_{name}_series")(n, d=order, noise_std=1.0)
    values = np.asarray(values, dtype=np.float64) + rng.normal(0, rng.uniform(0.1, 1.5), n)
    return _normalised(values), {"base": name, "differences": order}


def _home_volatility(rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    name, n = _pick(rng, VOLATILITY), _length(rng, LONG_LENGTHS)
    ranges = {}
    if name == "egarch":  # weaker clusters than today's
        ranges = {
            "omega_range": (0.1, 0.1),
            "alpha_range": (0.1, 0.3),
            "beta_range": (0.6, 0.9),
            "gamma_range": (0.0, 0.0),
        }
    if name == "aparch":
        ranges = {"alpha_range": (0.1, 0.3), "beta_range": (0.5, 0.8)}
    values, info = getattr(_generator(n), f"generate_{name}_series")(n, **ranges)
    drawn = {key: float(value) for key, value in info.items() if isinstance(value, float)}
    return _normalised(np.asarray(values, dtype=np.float64)), {"base": name, **drawn}
