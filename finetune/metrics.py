"""Metrics of labels from counts, which add up over batches and hosts."""

import string
from collections import Counter
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


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The spans (kind, first word, one past the last) of BIO tags, by the rule of CoNLL's own script.

    A span goes on with I-X behind B-X or I-X; an I-X that follows anything else begins one.
    """
    found, begin, kind = set(), 0, None
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind is not None and (mark != "I" or name != kind):
            found.add((kind, begin, place))
            kind = None
        if mark in ("B", "I") and kind is None:
            begin, kind = place, name
    return found


def spans_report(truths: Sequence[Sequence[str]], saids: Sequence[Sequence[str]]) -> tuple[dict[str, float], ByLabel]:
    """Precision, recall and F1 of all spans together, and of each kind's (Tjong Kim Sang and Buchholz 2000)."""
    counts: dict[str, np.ndarray] = {}  # kind -> both right, said, true
    for truth, said in zip(truths, saids, strict=True):
        true_spans, said_spans = spans(truth), spans(said)
        for place, some in enumerate((true_spans & said_spans, said_spans, true_spans)):
            for kind, *_ in some:
                counts.setdefault(kind, np.zeros(3, np.int64))[place] += 1
    by_label = {kind: precision_recall_f1(*counts[kind].tolist()) for kind in sorted(counts)}
    whole = precision_recall_f1(*sum(counts.values(), np.zeros(3, np.int64)).tolist())
    return {name: whole[name] for name in ("f1", "precision", "recall")}, by_label


def normalised(text: str) -> list[str]:
    """The words of an answer without case, punctuation and articles, as SQuAD's script has them."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in text.split() if word not in ("a", "an", "the")]


def exact_match(said: str, truth: str) -> float:
    """1 where two answers are the same but for what `normalised` takes away."""
    return float(normalised(said) == normalised(truth))


def words_f1(said: str, truth: str) -> float:
    """F1 of the words of two answers; of empty ones 1 where both are."""
    said_words, true_words = Counter(normalised(said)), Counter(normalised(truth))
    if not said_words or not true_words:
        return float(said_words == true_words)
    return precision_recall_f1((said_words & true_words).total(), said_words.total(), true_words.total())["f1"]


def rouge(said: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """The mean F1 of shared words, pairs of words and longest common subsequences (Lin 2004; package rouge-score)."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ValueError("ROUGE needs the package rouge-score: make setup EXTRAS=evaluation") from None
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(right, text) for text, right in zip(said, truth, strict=True)]
    return {kind: float(np.mean([score[kind].fmeasure for score in scores])) for kind in kinds}


def bleu(said: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """BLEU of all texts together, 0 to 100 (Papineni et al. 2002; package sacrebleu, its usual tokenisation)."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise ValueError("BLEU needs the package sacrebleu: make setup EXTRAS=evaluation") from None
    return {"bleu": float(BLEU().corpus_score(list(said), [list(truth)]).score)}


def chrf(said: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """chrF of all texts together, 0 to 100: shared pieces of 1 to 6 characters (Popović 2015; package sacrebleu)."""
    try:
        from sacrebleu.metrics import CHRF
    except ImportError:
        raise ValueError("chrF needs the package sacrebleu: make setup EXTRAS=evaluation") from None
    return {"chrf": float(CHRF().corpus_score(list(said), [list(truth)]).score)}
