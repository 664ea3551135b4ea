"""Metrics of labels from counts, which add up over batches and hosts."""

from collections.abc import Sequence

import numpy as np

ByLabel = dict[str, dict[str, float]]  # label -> precision, recall, f1, support


def confusion_of(truth_N: np.ndarray, said_N: np.ndarray, labels: int) -> np.ndarray:
    """How often each label (rows) was given each answer (columns): integers (C, C)."""
    return np.bincount(truth_N * labels + said_N, minlength=labels**2).reshape(labels, labels)


def precision_recall_f1(hits: float, said: float, true: float) -> dict[str, float]:
    """Of counts: both right, said, true. What divides by zero is 0, as scikit-learn has it."""
    precision, recall = hits / said if said else 0.0, hits / true if true else 0.0
    f1 = 2 * hits / (said + true) if said + true else 0.0
    return {"precision": float(precision), "recall": float(recall), "f1": float(f1), "support": float(true)}


def labels_report(confusion_CC: np.ndarray, labels: Sequence[str]) -> tuple[dict[str, float], ByLabel]:
    """Accuracy and the mean F1 of the labels that are there, and each label's."""
    hits_C, said_C, true_C = np.diag(confusion_CC), confusion_CC.sum(0), confusion_CC.sum(1)
    by_label = {
        label: precision_recall_f1(*counts)
        for label, *counts in zip(labels, hits_C.tolist(), said_C.tolist(), true_C.tolist(), strict=True)
    }
    there = [by_label[label]["f1"] for label, said, true in zip(labels, said_C, true_C, strict=True) if said + true]
    return {"accuracy": float(hits_C.sum() / confusion_CC.sum()), "f1_macro": float(np.mean(there))}, by_label


def multilabel_report(truth_NC: np.ndarray, said_NC: np.ndarray, labels: Sequence[str]) -> tuple[dict, ByLabel]:
    """Of boolean labels: F1 of all decisions and the mean of the labels', share of rows that are wholly right."""
    hits_C, said_C, true_C = ((truth_NC & said_NC).sum(0), said_NC.sum(0), truth_NC.sum(0))
    by_label = {
        label: precision_recall_f1(*counts)
        for label, *counts in zip(labels, hits_C.tolist(), said_C.tolist(), true_C.tolist(), strict=True)
    }
    micro = precision_recall_f1(hits_C.sum(), said_C.sum(), true_C.sum())["f1"]
    macro = float(np.mean([one["f1"] for one in by_label.values()]))
    exact = float((truth_NC == said_NC).all(1).mean())
    return {"f1_micro": micro, "f1_macro": macro, "accuracy": exact}, by_label


def matthews(confusion_CC: np.ndarray) -> float:
    """Matthews' correlation of several classes (Gorodkin 2004); 0 where one side has one class only."""
    c = confusion_CC.astype(np.float64)
    total, hits, said_C, true_C = c.sum(), np.diag(c).sum(), c.sum(0), c.sum(1)
    spread = np.sqrt((total**2 - (said_C**2).sum()) * (total**2 - (true_C**2).sum()))
    return float((hits * total - (said_C * true_C).sum()) / spread) if spread else 0.0


def pearson(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """The correlation of two lists of numbers; 0 where one does not vary."""
    x_N, y_N = x_N.astype(np.float64) - x_N.mean(), y_N.astype(np.float64) - y_N.mean()
    spread = np.sqrt((x_N**2).sum() * (y_N**2).sum())
    return float((x_N * y_N).sum() / spread) if spread else 0.0
