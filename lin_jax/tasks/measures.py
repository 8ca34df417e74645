"""What classes and numbers are measured by, as GLUE does it, by scikit-learn and SciPy."""

import math

import numpy as np


def class_measures(labels: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, float]:
    """Return accuracy, F1 (of the second of two classes, else the mean over classes) and Matthews' correlation.

    Args:
        labels: numbers of classes.
        predicted: likewise.
        classes: how many there are.
    """
    from sklearn import metrics

    average, which = ("binary", None) if classes == 2 else ("macro", list(range(classes)))
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "f1": float(metrics.f1_score(labels, predicted, average=average, labels=which, zero_division=0.0)),
        "matthews": float(metrics.matthews_corrcoef(labels, predicted)),
    }


def number_measures(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation, and their mean; 0 where all numbers are the same."""
    from scipy import stats

    if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predicted) == 0:
        return {"pearson": 0.0, "spearman": 0.0, "correlation": 0.0}
    pearson, spearman = (float(of(labels, predicted)[0]) for of in (stats.pearsonr, stats.spearmanr))
    found = {"pearson": pearson, "spearman": spearman, "correlation": (pearson + spearman) / 2}
    return {name: 0.0 if math.isnan(value) else value for name, value in found.items()}
