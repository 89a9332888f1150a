"""Metrics of predicted labels, by scikit-learn and scipy; all but the loss times 100."""

import torch
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss


def classified(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return cross-entropy, accuracy, macro F1 and Matthews' correlation.

    Args:
        logits: (E, C), of E examples for C classes.
        labels: int64 (E,).
    """
    predicted, true = logits.argmax(-1).numpy(), labels.numpy()
    return {
        "loss": float(cross_entropy(logits.double(), labels)),
        "accuracy": 100 * float(accuracy_score(true, predicted)),
        "macro_f1": 100 * float(f1_score(true, predicted, average="macro")),
        "matthews": 100 * float(matthews_corrcoef(true, predicted)),
    }


def predicted_numbers(values: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the mean squared error, and Spearman's rank correlation (0 where all predictions are the same).

    Args:
        values: (E,), what was predicted.
        labels: float (E,).
    """
    constant = bool((values == values[0]).all() | (labels == labels[0]).all())
    return {
        "loss": float(mse_loss(values.double(), labels.double())),
        "spearman": 0.0 if constant else 100 * float(spearmanr(values.numpy(), labels.numpy()).statistic),
    }


def measured(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the metrics that fit the labels."""
    return predicted_numbers(logits[:, 0], labels) if torch.is_floating_point(labels) else classified(logits, labels)
