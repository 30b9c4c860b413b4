"""Fitting the probes: sparse logistic regression on the aligned model's last-token states, one per block."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qrealign.errors import DataError
from qrealign.probes.probe import BlockFit, SafetyProbe
from qrealign.probes.separability import fisher_ratio

if TYPE_CHECKING:
    import numpy as np

INVERSE_PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0)
MIN_PER_CLASS = 10
_VALIDATION_SHARE = _TEST_SHARE = 0.2
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_MIN_SPREAD = 1e-6
_TOLERANCE = 1e-3
_MAX_ITERATIONS = 2000
_WIDE_NUMBERS = 500_000  # in one block's features: above it a fit takes longer than a process takes to start


def fit_probes(
    states: Tensor, labels: Tensor | Sequence[int | None], *, seed: int, progress: str | None = None
) -> tuple[SafetyProbe, list[float]]:
    """Fit one L1 logistic regression per block and measure it on prompts that it has not seen.

    Features are standardised per block and the standardisation is folded back, so the probe applies to the raw block
    output. 60 % of the prompts fit, 20 % choose C (the strongest penalty within one standard error of the best log
    loss), then both fit the final probe; the last 20 % give the accuracy. The split is stratified and the same for
    every block.

    Args:
        states: `[L, N, H]` float32, block outputs at the last prompt token.
        labels: N values, 1 = malicious, 0 = benign.
        seed: of the split and of the solver.
        progress: label of a progress bar, or None for silence.

    Returns:
        The probe, with a `BlockFit` per block, and the held-out accuracies in [0, 1].

    Raises:
        DataError: a label is missing, a class is absent or smaller than `MIN_PER_CLASS`, or the states are not finite.

    Source: the probes of arXiv 2601.08089; standardising is ours: L1 otherwise picks the loudest channels.
    """
    target = _checked_labels(labels, states.shape[1])
    if not bool(torch.isfinite(states).all()):
        raise DataError(
            "the model's block outputs are not finite, so no probe can be fitted: check the aligned model's weights "
            "and dtype"
        )
    splits = _split(target, seed)
    blocks: Any = range(states.shape[0])
    if progress is not None:
        from tqdm import tqdm

        blocks = tqdm(blocks, desc=progress, unit="block", leave=False)
    from joblib import Parallel, delayed

    # One block's fit is one thread's work: seconds at the width of a 7B, so there the blocks share the cores.
    jobs = min(_cores(), len(states)) if states[0].numel() >= _WIDE_NUMBERS else 1
    fitted = Parallel(n_jobs=jobs)(
        delayed(_fit_block)(states[block].double().numpy(), target, splits, seed) for block in blocks
    )
    weight = torch.stack([torch.from_numpy(w) for w, _, _ in fitted]).float()
    bias = torch.tensor([b for _, b, _ in fitted], dtype=torch.float32)
    malicious = states[:, torch.from_numpy(target == 1)].float()
    logits = torch.einsum("lnh,lh->ln", malicious, weight) + bias[:, None]
    temperature = logits.abs().median(dim=1).values.clamp(min=_MIN_SPREAD)
    probe = SafetyProbe(weight=weight, bias=bias, temperature=temperature, fits=[fit for _, _, fit in fitted])
    return probe, probe.accuracies


def _cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _checked_labels(labels: Tensor | Sequence[int | None], count: int) -> np.ndarray:
    """Return the labels as an integer array, or say what is wrong with them."""
    import numpy as np

    values = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    if len(values) != count:
        raise DataError(f"{len(values)} labels for {count} prompts: give one label per prompt")
    if missing := sum(value is None for value in values):
        raise DataError(
            f"{missing} of {count} prompts have no label: the probe needs each marked benign (0) or malicious (1)"
        )
    if strange := sorted({str(value) for value in values if value not in (0, 1)}):
        raise DataError(f"labels must be 0 (benign) or 1 (malicious), found {', '.join(strange[:4])}")
    target = np.array([int(value) for value in values if value is not None])
    counts = {name: int((target == value).sum()) for name, value in (("benign", 0), ("malicious", 1))}
    for name, number in counts.items():
        if number == 0:
            raise DataError(f"all {count} prompts are of one class: the probe needs {name} prompts too")
        if number < MIN_PER_CLASS:
            raise DataError(
                f"only {number} {name} prompts: the probe needs at least {MIN_PER_CLASS} per class to be fitted, "
                f"tuned and tested"
            )
    return target


def _split(target: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the indices of the fitting, validation and test prompts, each with the classes in proportion."""
    import numpy as np
    from sklearn.model_selection import train_test_split

    everything = np.arange(len(target))
    rest, test = train_test_split(everything, test_size=_TEST_SHARE, stratify=target, random_state=seed)
    fit, validation = train_test_split(
        rest, test_size=_VALIDATION_SHARE / (1 - _TEST_SHARE), stratify=target[rest], random_state=seed
    )
    return fit, validation, test


def _fit_block(
    features: np.ndarray, target: np.ndarray, splits: tuple[np.ndarray, ...], seed: int
) -> tuple[np.ndarray, float, BlockFit]:
    """Fit one block; returns its weight `[H]` and bias on the raw features, and how good they are."""
    import numpy as np

    fit, validation, test = splits
    penalty = _choose_penalty(features, target, fit, validation, seed)
    known = np.concatenate([fit, validation])
    weight, bias = _regress(features[known], target[known], penalty, seed)
    logits = features[test] @ weight + bias
    margins = {
        name: [round(float(value), 4) for value in np.quantile(logits[target[test] == label], _QUANTILES)]
        for name, label in (("benign", 0), ("malicious", 1))
    }
    ratio = fisher_ratio(torch.from_numpy(features), torch.from_numpy(target))
    accuracy = float(((logits > 0) == (target[test] == 1)).mean())
    return (
        weight,
        bias,
        BlockFit(
            accuracy=accuracy,
            fisher_ratio=ratio,
            inverse_penalty=penalty,
            nonzero=int((weight != 0).sum()),
            margins=margins,
        ),
    )


def _choose_penalty(
    features: np.ndarray, target: np.ndarray, fit: np.ndarray, validation: np.ndarray, seed: int
) -> float:
    """Return the smallest C whose validation log loss is within one standard error of the best."""
    import numpy as np

    losses = []
    for penalty in INVERSE_PENALTIES:
        weight, bias = _regress(features[fit], target[fit], penalty, seed)
        logits = features[validation] @ weight + bias
        losses.append(np.logaddexp(0.0, np.where(target[validation] == 1, -logits, logits)))
    means = [loss.mean() for loss in losses]
    best = int(np.argmin(means))
    allowed = means[best] + losses[best].std() / np.sqrt(len(validation))
    return next(penalty for penalty, mean in zip(INVERSE_PENALTIES, means, strict=True) if mean <= allowed)


def _regress(features: np.ndarray, target: np.ndarray, inverse_penalty: float, seed: int) -> tuple[np.ndarray, float]:
    """Standardise, regress, fold back: returns weight `[H]` and bias that apply to `features` as they are."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    mean, spread = features.mean(axis=0), features.std(axis=0)
    # A channel that never moves carries nothing; dividing by its rounding noise would make it the loudest of all.
    alive = spread > _MIN_SPREAD * np.maximum(1.0, np.abs(mean))
    scaled = np.where(alive, (features - mean) / np.where(alive, spread, 1.0), 0.0)
    # liblinear: 30 times faster than saga on 800 x 4096 standardised features, and it converges.
    model = LogisticRegression(
        C=inverse_penalty,
        solver="liblinear",
        class_weight="balanced",
        tol=_TOLERANCE,
        max_iter=_MAX_ITERATIONS,
        random_state=seed,
        **_l1_argument(LogisticRegression),
    )
    model.fit(scaled, target)
    weight = np.where(alive, model.coef_[0] / np.where(alive, spread, 1.0), 0.0)
    return weight, float(model.intercept_[0] - weight @ mean)


def _l1_argument(estimator: type) -> dict[str, Any]:
    """Return how this scikit-learn asks for L1: `l1_ratio` since 1.8, where `penalty` warns; `penalty` before."""
    default = (
        inspect.signature(estimator).parameters["penalty"].default
        if "penalty" in inspect.signature(estimator).parameters
        else "deprecated"
    )
    return {"l1_ratio": 1.0} if default == "deprecated" else {"penalty": "l1"}
