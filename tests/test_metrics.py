import math

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
    balanced = (2 / 4 + 2 / 3 + 1 / 2 + 0) / 4
    assert found == pytest.approx({"accuracy": 0.5, "balanced_accuracy": balanced, "macro_f1": sum(harmonic) / 4})


SCORES = torch.tensor([[.9, .2, .5], [.8, .2, .1], [.8, .7, .3], [.6, .1, .2], [.6, .4, .4], [.5, .2, .1], [.3, .9, .6], [.3, .3, .3]])
TRUTH = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]]).double()


def test_scores_of_labels_are_scikit_learns():
    """scikit-learn 1.9.1, with these scores p and truths t, many of them equal, and y = p >= [0.6, 0.25, 0.55]:

        average_precision_score(t[:, :2], p[:, :2], average=None)         # of the third label there is no picture
        average_precision_score(t[:, :2], p[:, :2], average="macro")
        precision_recall_fscore_support(t, y, zero_division=0)            # and with average="micro"
        f1_score(t, y, average="macro", zero_division=0)
        average_precision_score(t[[0, 2, 3, 4, 5, 7], 0], p[[0, 2, 3, 4, 5, 7], 0])
    """
    each = [metrics.average_precision(p, t) for p, t in zip(SCORES.T, TRUTH.T, strict=True)]
    assert each[:2] == pytest.approx([0.6916666666666667, 0.7857142857142857]) and math.isnan(each[2])
    cuts = [0.6, 0.25, 0.55]
    scores = SCORES.double().round(decimals=1)
    found = metrics.label_scores(scores, TRUTH, cuts)
    assert found == pytest.approx({"map": 0.7386904761904762, "macro_f1": 0.38888888888888884, "micro_f1": 0.5555555555555556})
    words = [line.split() for line in metrics.label_report(["a", "b", "c"], scores, TRUTH, cuts).splitlines()]
    assert words[1] == ["a", "4", "0.500", "0.6917", "0.6000", "0.6000", "0.7500", "0.6667", "0.6000"]
    assert words[3] == ["c", "0", "0.000", "-", "0.5500", "0.0000", "0.0000", "0.0000", "0.0000"]
    assert words[4][:5] == ["macro", "mean", "8", "0.500", "0.7387"] and words[5][:8] == [
        "micro", "8", "-", "-", "-", "0.5000", "0.6250", "0.5556"]
    assert "the mean AP is over the 2 of 3 labels" in " ".join(words[6])
    truth = TRUTH.clone()
    truth[[1, 6], 0] = math.nan  # not known: as if the pictures were not there
    assert metrics.average_precision(SCORES[:, 0], truth[:, 0]) == pytest.approx(0.9166666666666665)
    assert metrics.label_counts(scores, truth, cuts)[1].tolist() == [4, 4, 1]
    with pytest.raises(ValueError, match="must both be"):
        metrics.average_precision(SCORES[:, :1], TRUTH[:, 0])


def test_the_best_threshold():
    """By trying many: no other has a higher F1; it lies in the middle of a gap."""
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 5, 30) * 5:
        p = torch.rand(count, generator=generator).mul(8).round() / 8
        truth = torch.randint(2, (count,), generator=generator).double()
        truth[0] = 1

        def f1(cut, p=p, truth=truth):
            given = p >= cut
            return 2 * (given * truth).sum().item() / (given.sum() + truth.sum()).item()

        best = metrics.best_threshold(p, truth)
        assert f1(best) == max(f1(cut) for cut in torch.linspace(0, 1, 101).tolist())
        levels = [0.0, *sorted(set(p.tolist()))]
        assert any(best == pytest.approx((a + b) / 2) for a, b in zip(levels, levels[1:], strict=False))
    p = torch.tensor([0.9, 0.8, 0.7, 0.2, 0.1])
    assert metrics.best_threshold(p, torch.tensor([1, 1, 1, 0, 0])) == pytest.approx(0.45)
    assert metrics.best_threshold(p, torch.tensor([1, 0, 1, 1, 0])) == pytest.approx(0.15)
    assert metrics.best_threshold(p, torch.tensor([0, 0, 0, 0, 0])) == metrics.best_threshold(p[:0], p[:0]) == 0.5
    # F1 is 2/3 for the highest alone and for four: the cut that is nearer to 0.5, and of two as near the higher
    assert metrics.best_threshold(torch.tensor([0.75, 0.5, 0.25, 0.125]), torch.tensor([1, 0, 0, 1])) == 0.625
    assert metrics.best_threshold(torch.tensor([0.75, 0.5, 0.5, 0.5, 0.25]), torch.tensor([1, 1, 0, 0, 0])) == 0.625
    assert metrics.best_threshold(torch.tensor([0.875, 0.5, 0.5, 0.5, 0.25]), torch.tensor([1, 1, 0, 0, 0])) == 0.375


def test_rows_of_labels():
    rows = metrics.label_rows(["x", "y"], ["a", "b"], torch.tensor([[0.5, 0.2], [0.1, 0.1]]), [0.5, 0.1],
                              torch.tensor([[1.0, math.nan], [0.0, 1.0]]))
    assert [list(row.values())[:2] for row in rows] == [["x", "a b"], ["y", "b"]]
    assert list(rows[0]) == ["file", "labels", "p_a", "p_b", "true_a", "true_b"]
    assert [[row["true_a"], row["true_b"]] for row in rows] == [[1, ""], [0, 1]]
    for labels, mark in ((["a b", "c"], ","), (["a b", "c,d"], ";"), (["a", "c;d"], " "), ([" ,;|"], "\n")):
        assert metrics.separator_for(labels) == mark


def test_who_wins_a_tie():
    def epochs(*pairs):
        return [{"val_accuracy": accuracy, "val_loss": loss} for accuracy, loss in pairs]

    assert metrics.wins_tie(epochs((0.9, 2.0), (0.8, 1.0), (0.9, 1.9)), 0, "val_accuracy")
    assert not metrics.wins_tie(epochs((0.9, 2.0), (0.9, 2.0)), 0, "val_accuracy")
    assert not metrics.wins_tie(epochs((0.9, 2.0), (0.8, 1.0)), 0, "val_accuracy")
    assert not metrics.wins_tie(epochs((0.9, 2.0), (0.9, 1.0), (0.9, 1.5)), 1, "val_accuracy")
    assert not metrics.wins_tie(epochs((math.nan, 2.0), (math.nan, 1.0)), 0, "val_accuracy")
    assert not metrics.wins_tie(epochs((0.9, 1.0), (0.9, 1.0)), 0, "val_loss")


def test_prediction_rows_by_hand():
    probabilities, names = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.0, 0.5]]), ["ant", "bee", "cat"]
    assert metrics.prediction_rows(["a", "b"], probabilities, names) == [
        {"file": "a", "prediction": "bee", "probability": 0.5}, {"file": "b", "prediction": "ant", "probability": 0.5}]
    assert metrics.prediction_rows(["a"], probabilities[:1], names, torch.tensor([2]), top_k=9) == [
        {"file": "a", "truth": "cat", "prediction": "bee", "probability": 0.5, "prediction_2": "ant", "probability_2": 0.25,
         "prediction_3": "cat", "probability_3": 0.25}]
    assert metrics.prediction_rows([], probabilities[:0], names) == []
    assert metrics.prediction_rows(["a", "b"], probabilities, names, torch.tensor([-1, 0]), 1, all_probabilities=True) == [
        {"file": "a", "truth": "", "prediction": "bee", "probability": 0.5, "p_ant": 0.25, "p_bee": 0.5, "p_cat": 0.25},
        {"file": "b", "truth": "ant", "prediction": "ant", "probability": 0.5, "p_ant": 0.5, "p_bee": 0.0, "p_cat": 0.5}]


def test_classes_that_do_not_occur_have_no_part_in_a_mean():
    """As if they were not among the classes: computed anew without them. One that is only predicted does occur."""
    labels, predictions = torch.tensor([0, 0, 2, 2, 2, 2]), torch.tensor([0, 2, 2, 2, 2, 2])
    confusion, less = metrics.confusion_matrix(predictions, labels, 4), metrics.confusion_matrix(predictions // 2, labels // 2, 2)
    assert metrics.scores(confusion) == metrics.scores(less)
    text, short = (metrics.report(found, names).splitlines() for found, names in ((confusion, "abcd"), (less, "ac")))
    assert text[2].split() == ["b", "-", "-", "-", "0"] and text[4].split() == ["d", "-", "-", "-", "0"]
    assert (text[1], text[3], text[5]) == tuple(short[1:4])
    assert text[6] == "note: the mean is over the 2 of 4 classes that occur here" and "note" not in "".join(short)
    found = metrics.scores(metrics.confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 0]), 3))
    assert found == pytest.approx({"accuracy": 0.5, "balanced_accuracy": 0.5, "macro_f1": 1 / 3})
    nothing = torch.zeros(2, 2, dtype=torch.int64)
    assert "nan" not in f"{metrics.scores(nothing)} {metrics.report(nothing, 'ab')}"


# Computed once with scikit-learn 1.9.1, which the tests do without:
#   precision_recall_fscore_support(labels, predictions, labels=range(4), average=None, zero_division=0)
#   precision_recall_fscore_support(..., average="macro"), accuracy_score(labels, predictions)
#   balanced_accuracy_score(labels, predictions)
# By hand, the first example (LABELS, PREDICTIONS): recall of class 1 is 2/3, F1 of class 1 is 2 * 2 / (4 + 3) = 4/7,
# macro F1 is (1/2 + 4/7 + 1/2 + 0) / 4 = 11/28. The second: precision of class 0 is 4/5 and its F1 2 * 4 / (5 + 6) =
# 8/11; class 3 does not occur in the truth, so that balanced accuracy is (4/6 + 2/3 + 0/1) / 3 = 4/9, not / 4.
SKLEARN = [
    dict(
        labels=LABELS.tolist(), predictions=PREDICTIONS.tolist(),
        precision=[0.5, 0.5, 0.5, 0.0], recall=[0.5, 0.6666666666666666, 0.5, 0.0],
        f1=[0.5, 0.5714285714285714, 0.5, 0.0], macro=[0.375, 0.41666666666666663, 0.39285714285714285],
        accuracy=0.5, balanced_accuracy=0.41666666666666663,
    ),
    dict(
        labels=[0, 0, 0, 0, 0, 0, 1, 1, 1, 2], predictions=[0, 0, 0, 0, 1, 3, 1, 1, 3, 0],  # 2 is never predicted
        precision=[0.8, 0.6666666666666666, 0.0, 0.0], recall=[0.6666666666666666, 0.6666666666666666, 0.0, 0.0],
        f1=[0.7272727272727273, 0.6666666666666666, 0.0, 0.0],
        macro=[0.3666666666666667, 0.3333333333333333, 0.3484848484848485],
        accuracy=0.6, balanced_accuracy=0.4444444444444444,
    ),
]


@pytest.mark.parametrize("known", SKLEARN)
def test_against_scikit_learn(known):
    labels, predictions = torch.tensor(known["labels"]), torch.tensor(known["predictions"])
    confusion = metrics.confusion_matrix(predictions, labels, 4)
    found = metrics.precision_recall_f1(confusion)
    for values, name, macro in zip(found, ("precision", "recall", "f1"), known["macro"], strict=True):
        assert values.tolist() == pytest.approx(known[name], abs=1e-12)
        assert values.mean().item() == pytest.approx(macro, abs=1e-12)
    assert metrics.scores(confusion) == pytest.approx(
        {"accuracy": known["accuracy"], "balanced_accuracy": known["balanced_accuracy"], "macro_f1": known["macro"][2]},
        abs=1e-12,
    )
    line = next(line for line in metrics.report(confusion, list("abcd")).splitlines() if line.startswith("macro mean"))
    assert line.split()[2:] == [*(f"{value:.4f}" for value in known["macro"]), "10"]


def test_a_class_that_does_not_occur_lowers_no_mean():
    """The same samples among four classes and among six, two of which occur neither in the truth nor in the predictions."""
    four, six = (metrics.confusion_matrix(PREDICTIONS, LABELS, count) for count in (4, 6))
    assert metrics.scores(six) == metrics.scores(four)
    mean, same = (next(line for line in metrics.report(c, list("abcdef")[: len(c)]).splitlines() if line.startswith("macro"))
                  for c in (four, six))
    assert mean == same


def test_top_k_accuracy_against_scikit_learn():
    # top_k_accuracy_score(LABELS, outputs, k=k, labels=range(4)) of scikit-learn 1.9.1. By hand: the true class has
    # rank 1 1 2 3 1 1 2 1 3 2 in the rows, so 5/10 are within the first, 8/10 within the first two, all within three.
    outputs = torch.tensor([[5.0, 2, 1, 0], [4, 1, 3, 0], [2, 6, 1, 0], [1, 0, 7, 2], [1, 5, 0, 2],
                            [0, 4, 2, 3], [6, 3, 1, 2], [1, 2, 8, 0], [0, 3, 1, 2], [4, 0, 1, 3]])
    assert outputs.argmax(1).tolist() == PREDICTIONS.tolist()
    assert [metrics.top_k_accuracy(outputs, LABELS, k) for k in (1, 2, 3, 4)] == [0.5, 0.8, 1.0, 1.0]
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"1..4, the number of classes, not {k}"):
            metrics.top_k_accuracy(outputs, LABELS, k)
    with pytest.raises(ValueError, match="length"):
        metrics.top_k_accuracy(outputs, LABELS[:1], 2)


def test_mean_cost_by_adding_up_samples():
    confusion = metrics.confusion_matrix(PREDICTIONS, LABELS, 4)
    costs = torch.tensor([[0, 1, 1, 1], [2, 0, 1, 1], [5, 4, 0, 1], [9, 2, 2, 0]]).float() / 2
    # the wrong pairs (truth, prediction): (0, 1), (0, 2), (1, 0), (2, 1), (3, 0)
    assert metrics.mean_cost(confusion, costs) == pytest.approx((1 + 1 + 2 + 4 + 9) / 2 / 10)
    assert metrics.mean_cost(confusion, 1 - torch.eye(4)) == pytest.approx(1 - metrics.scores(confusion)["accuracy"])
    assert metrics.mean_cost(confusion, torch.eye(4)) == pytest.approx(0.5)  # a right answer may cost something too
    with pytest.raises(ValueError, match="shape"):
        metrics.mean_cost(confusion, costs[0])


def test_no_samples_at_all():
    none = torch.zeros(4, 4, dtype=torch.int64)
    assert metrics.scores(none) == {"accuracy": 0, "balanced_accuracy": 0, "macro_f1": 0}
    assert metrics.mean_cost(none, torch.ones(4, 4)) == metrics.top_k_accuracy(torch.ones(0, 4), LABELS[:0], 2) == 0


def test_report():
    confusion = metrics.confusion_matrix(PREDICTIONS, LABELS, 4)
    text = metrics.report(confusion, ["ant", "bee", "cat", "dog"])
    assert text.splitlines()[2].split() == ["bee", "0.5000", "0.6667", "0.5714", "3"]
    assert text.splitlines()[-4].split() == ["ant", "2", "1", "1", "0"]
    text = metrics.report(confusion, ["ant", "bee", "cat", "dog"], most=3)
    assert "bee -> ant" in text and "1  dog -> ant" in text and "ant -> ant" not in text


# ---- regression


def test_regression_scores_by_hand():
    """Errors 1, -2, 3, 0 on targets 2, 4, -5, 0: the mean of the targets is 0.25, their squared distances from it
    3.0625 + 14.0625 + 27.5625 + 0.0625 = 44.75; shares of the three targets that are not zero: 1/2, 2/4, 3/5."""
    found = metrics.regression_scores(torch.tensor([3.0, 2.0, -2.0, 0.0]), torch.tensor([2.0, 4.0, -5.0, 0.0]))
    assert found == pytest.approx({"mae": 6 / 4, "rmse": (14 / 4) ** 0.5, "r2": 1 - 14 / 44.75, "medape": 0.5})
    same = metrics.regression_scores(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
    assert math.isnan(same["r2"]) and math.isnan(same["medape"]) and same["mae"] == 1.5
    with pytest.raises(ValueError, match=r"must both be \(N,\)"):
        metrics.regression_scores(torch.zeros(3, 1), torch.zeros(3))


def test_columns_and_report_of_several_targets():
    targets = torch.tensor([[1.0, 10.0], [2.0, 30.0], [6.0, 20.0]])
    quantiles = torch.stack([targets - 1, targets, targets + 1], -1)
    quantiles[0, 0] += 5  # the first target lies below its range
    columns = metrics.score_columns(["x", "y"], targets.mean(0).expand_as(targets), targets, quantiles)
    assert list(columns) == [f"{m}_{t}" for t in "xy" for m in ("mae", "rmse", "r2", "medape", "inside")] + ["r2"]
    assert (columns["r2_x"], columns["r2_y"], columns["r2"]) == (0, 0, 0)  # the mean of the targets themselves
    assert columns["inside_x"] == pytest.approx(2 / 3) and columns["inside_y"] == 1
    assert list(metrics.score_columns(["x"], targets[:, :1], targets[:, :1])) == ["mae", "rmse", "r2", "medape"]
    text = metrics.regression_report(["x", "y"], targets, {"model": targets, "mean": targets.mean(0)}, quantiles)
    rows = [line.split() for line in text.splitlines()]
    assert rows[1] == ["model", "0", "0", "1.000", "0.0%"] and rows[2][:4] == ["mean", "2", "2.16025", "0.000"]
    assert "66.7% of x inside the range" in text and "100.0% of y inside" in text
