import pytest
import torch

import metrics

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 3])
PREDICTIONS = torch.tensor([0, 0, 1, 2, 1, 1, 0, 2, 1, 0])  # class 3 is never predicted


def test_confusion_matrix_by_counting_pairs():
    confusion = metrics.confusion_matrix(PREDICTIONS, LABELS, 4)
    pairs = list(zip(LABELS.tolist(), PREDICTIONS.tolist(), strict=True))
    assert confusion.tolist() == [[pairs.count((t, p)) for p in range(4)] for t in range(4)]
    with pytest.raises(ValueError, match="shape"):
        metrics.confusion_matrix(PREDICTIONS, LABELS[:1], 4)


def test_precision_recall_f1_by_hand():
    # Worked out from the pairs above: hits 2, 2, 1, 0; predicted 4, 4, 2, 0; true 4, 3, 2, 1.
    precision, recall, f1 = metrics.precision_recall_f1(metrics.confusion_matrix(PREDICTIONS, LABELS, 4))
    assert precision.tolist() == pytest.approx([2 / 4, 2 / 4, 1 / 2, 0])
    assert recall.tolist() == pytest.approx([2 / 4, 2 / 3, 1 / 2, 0])
    harmonic = [2 / (1 / p + 1 / r) for p, r in ((2 / 4, 2 / 4), (2 / 4, 2 / 3), (1 / 2, 1 / 2))]
    assert f1.tolist() == pytest.approx([*harmonic, 0])
    found = metrics.scores(metrics.confusion_matrix(PREDICTIONS, LABELS, 4))
    assert found == {"accuracy": 0.5, "macro_f1": pytest.approx(sum(harmonic) / 4)}


def test_report():
    confusion = metrics.confusion_matrix(PREDICTIONS, LABELS, 4)
    text = metrics.report(confusion, ["ant", "bee", "cat", "dog"])
    assert text.splitlines()[2].split() == ["bee", "0.5000", "0.6667", "0.5714", "3"]
    assert text.splitlines()[-4].split() == ["ant", "2", "1", "1", "0"]
    text = metrics.report(confusion, ["ant", "bee", "cat", "dog"], most=3)
    assert "bee -> ant" in text and "1  dog -> ant" in text and "ant -> ant" not in text
