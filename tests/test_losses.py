import math

import pytest
import torch
import torch.nn.functional as F
import torchvision

import losses
from losses import CostMatrix, CrossEntropy, Focal, LossError, SoftF1, class_weights, cost_matrix, l1_penalty

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.3, 0.2], [-1.0, 1.0, 3.0], [0.1, 0.2, -0.4]])
LABELS = torch.tensor([0, 2, 2, 1])
WEIGHT = [1.0, 5.0, 0.5]
COSTS = [[0.0, 10.0, 1.0], [2.0, 0.0, 1.0], [1.0, 3.0, 0.0]]
ONE_HOT = F.one_hot(LABELS, 3).float()
SHARES = 0.7 * ONE_HOT + 0.3 * ONE_HOT.flip(0)  # a batch mixed with itself, as MixUp does
CRITERIA = {
    **{f"cross-entropy {mean}": CrossEntropy(torch.tensor(WEIGHT), mean, 0.1) for mean in ("weighted", "plain")},
    **{f"focal {mean}": Focal(0.5, torch.tensor(WEIGHT), mean, 0.1) for mean in ("weighted", "plain")},
    "soft F1": SoftF1(),
    "costs": CostMatrix(torch.tensor(COSTS)),
}
every_criterion = pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA.keys())
every_criterion_with_shares = pytest.mark.parametrize(
    "criterion", [c for name, c in CRITERIA.items() if name != "soft F1"], ids=[n for n in CRITERIA if n != "soft F1"])
both_means = pytest.mark.parametrize("mean", ["weighted", "plain"])


def softmax(row):
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def by_hand(mean, smoothing=0.0, gamma=0.0, target=ONE_HOT):
    """Cross-entropy, and focal loss, from their definition, in plain Python floats."""
    total = weights = 0.0
    for row, shares in zip(LOGITS.tolist(), target.tolist(), strict=True):
        nll = [WEIGHT[c] * (1 - p) ** gamma * -math.log(p) for c, p in enumerate(softmax(row))]
        total += (1 - smoothing) * sum(t * v for t, v in zip(shares, nll, strict=True)) + smoothing / 3 * sum(nll)
        weights += sum(t * w for t, w in zip(shares, WEIGHT, strict=True))
    return total / (weights if mean == "weighted" else len(LABELS))


@both_means
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("target, shares", [(LABELS, ONE_HOT), (SHARES, SHARES)], ids=["labels", "shares"])
def test_cross_entropy_and_focal_by_hand(mean, smoothing, target, shares):
    loss = CrossEntropy(torch.tensor(WEIGHT), mean=mean, label_smoothing=smoothing)(LOGITS, target)
    assert loss.item() == pytest.approx(by_hand(mean, smoothing, target=shares), rel=1e-6)
    for gamma in (0.5, 2):
        loss = Focal(gamma, torch.tensor(WEIGHT), mean, smoothing)(LOGITS, target)
        assert loss.item() == pytest.approx(by_hand(mean, smoothing, gamma, shares), rel=1e-6)


def test_the_two_senses_of_a_class_weight():
    same = torch.zeros(4, dtype=torch.int64)  # a batch of one class, all of weight 10
    plain = CrossEntropy()(LOGITS, same)
    assert CrossEntropy(torch.tensor([10.0, 1, 1]))(LOGITS, same) == pytest.approx(plain.item())
    assert CrossEntropy(torch.tensor([10.0, 1, 1]), mean="plain")(LOGITS, same) == pytest.approx(10 * plain.item())


def test_cross_entropy_is_pytorchs_own():
    weight = torch.tensor(WEIGHT)
    assert torch.equal(CrossEntropy()(LOGITS, LABELS), torch.nn.CrossEntropyLoss()(LOGITS, LABELS))
    theirs = torch.nn.CrossEntropyLoss(weight, label_smoothing=0.1)
    assert torch.equal(CrossEntropy(weight, label_smoothing=0.1)(LOGITS, LABELS), theirs(LOGITS, LABELS))
    # With shares, theirs divides by the number of samples: our other mean.
    assert CrossEntropy(weight, "plain", 0.1)(LOGITS, SHARES).item() == pytest.approx(theirs(LOGITS, SHARES).item())


@both_means
@pytest.mark.parametrize("target", [LABELS, SHARES], ids=["labels", "shares"])
@pytest.mark.parametrize("weight", [None, torch.tensor(WEIGHT)], ids=["no weight", "weight"])
def test_focal_of_gamma_0_is_cross_entropy(mean, target, weight):
    focal, plain = Focal(0, weight, mean, 0.1), CrossEntropy(weight, mean, 0.1)
    assert focal(LOGITS.double(), target).item() == pytest.approx(plain(LOGITS.double(), target).item(), rel=1e-12)


@pytest.mark.parametrize("alpha", [-1, 0.25])
def test_focal_of_two_classes_is_torchvisions(alpha):
    from torchvision.ops import sigmoid_focal_loss

    z, labels = torch.tensor([2.0, -1.5, 0.1, -4.0]), torch.tensor([1, 1, 0, 0])
    weight = None if alpha < 0 else torch.tensor([1 - alpha, alpha])
    loss = Focal(2, weight, mean="plain")(torch.stack([torch.zeros(4), z], 1), labels)
    expected = sigmoid_focal_loss(z, labels.float(), alpha=alpha, gamma=2, reduction="mean")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("row, expected", [
    ([0.0, 0.0], [-math.log(2), -math.log(2)]),
    ([30.0, 0.0], [-30 - math.log1p(math.exp(-30)), -math.log1p(math.exp(-30))]),  # p rounds to 1
    ([-1e4, 0.0, 1e4, 0.0], [0, 0, -1e4 + math.log(2), 0]),
    ([1.0, 2.0, 3.0], [math.log(1 - p) for p in softmax([1, 2, 3])]),
])
def test_log_one_minus(row, expected):
    found = losses._log_one_minus(torch.tensor([row, row[::-1]]))  # two rows, each with its own most probable class
    assert found[0].tolist() == pytest.approx(expected, rel=1e-6, abs=0)
    assert found[1].tolist() == pytest.approx(expected[::-1], rel=1e-6, abs=0)


def test_soft_f1_of_decisions_is_one_minus_macro_f1():
    """Counted by hand. The class 3 is predicted twice and never occurs."""
    labels, predictions = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 3, 3])
    logits = torch.full((6, 4), -1e4).scatter(1, predictions[:, None], 1e4)
    f1 = [2 * 2 / (2 + 3), 2 * 1 / (2 + 2), 0]  # twice the hits / (predicted + true)
    assert SoftF1()(logits, labels).item() == pytest.approx(1 - sum(f1) / 3, rel=1e-6)


def test_soft_f1_by_hand():
    p = [softmax(row) for row in LOGITS.tolist()]
    f1 = [2 * sum(row[c] for row, label in zip(p, LABELS.tolist(), strict=True) if label == c)
          / (sum(row[c] for row in p) + LABELS.tolist().count(c)) for c in range(3)]
    assert SoftF1()(LOGITS, LABELS).item() == pytest.approx(1 - sum(f1) / 3, rel=1e-6)


def test_cost_matrix_by_hand():
    loss = CostMatrix(torch.tensor(COSTS))
    each = [[sum(cost * -math.log(1 - p) for cost, p in zip(costs, softmax(row), strict=True)) for costs in COSTS]
            for row in LOGITS.tolist()]  # [sample][class it could be]
    expected = sum(row[label] for row, label in zip(each, LABELS.tolist(), strict=True)) / 4
    assert loss(LOGITS, LABELS).item() == pytest.approx(expected, rel=1e-6)
    mixed = sum(t * v for r, row in zip(SHARES.tolist(), each, strict=True) for t, v in zip(r, row, strict=True)) / 4
    assert loss(LOGITS, SHARES).item() == pytest.approx(mixed, rel=1e-6)


def test_cost_matrix_of_two_classes_is_weighted_cross_entropy():
    logits, labels = LOGITS[:, :2], torch.tensor([0, 1, 1, 0])
    expected = CrossEntropy(torch.tensor([10.0, 3.0]), mean="plain")(logits, labels)
    loss = CostMatrix(torch.tensor([[0.0, 10.0], [3.0, 0.0]]))(logits, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def minimise(criterion, shares):
    """The softmax (C,) at which the criterion is least for samples of these class shares."""
    logits = torch.zeros(1, len(shares), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-10,
                                  tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = criterion(logits, torch.tensor([shares], dtype=torch.float64))
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(1)[0].tolist()


def test_the_cheapest_decision_is_the_most_probable_class_of_the_optimum():
    shares, costs = [0.5, 0.3, 0.2], [[0.0, 1.0, 1.0], [4.0, 0.0, 2.0], [3.0, 2.0, 0.0]]
    risk = [sum(q * row[j] for q, row in zip(shares, costs, strict=True)) for j in range(3)]
    assert risk == pytest.approx([1.8, 0.9, 1.1])  # class 0 is the most probable, class 1 the cheapest decision
    p = minimise(CostMatrix(torch.tensor(costs)), shares)
    assert p.index(max(p)) == 1
    # R_j / (1 - p_j) is the same for all j: their sum over 1 - p_j, which add up to 2.
    assert [r / (1 - v) for r, v in zip(risk, p, strict=True)] == pytest.approx([sum(risk) / 2] * 3, rel=1e-6)
    # Where all mistakes cost the same, the optimum is the shares.
    assert minimise(CostMatrix(1 - torch.eye(3)), shares) == pytest.approx(shares, rel=1e-6)


def test_the_slow_start_with_many_classes():
    for criterion, expected in ((CostMatrix(1 - torch.eye(100)), -0.01), (CrossEntropy(), -0.99)):
        logits = torch.zeros(1, 100, requires_grad=True)
        criterion(logits, torch.tensor([7])).backward()
        assert logits.grad[0, 7].item() == pytest.approx(expected, rel=1e-6)


# ---- all of them


@every_criterion_with_shares
def test_one_hot_shares_are_labels(criterion):
    assert criterion(LOGITS, ONE_HOT).item() == pytest.approx(criterion(LOGITS, LABELS).item(), rel=1e-6)
    assert criterion(LOGITS, SHARES).item() != pytest.approx(criterion(LOGITS, LABELS).item(), rel=1e-2)


@pytest.mark.parametrize("name", ["cross-entropy plain", "focal plain", "costs"])
def test_the_loss_of_mixed_labels_is_the_mix_of_losses(name):
    criterion = CRITERIA[name]
    expected = 0.7 * criterion(LOGITS, LABELS) + 0.3 * criterion(LOGITS, LABELS.flip(0))
    assert criterion(LOGITS, SHARES).item() == pytest.approx(expected.item(), rel=1e-6)


@every_criterion
def test_gradient(criterion):
    logits = LOGITS.double().requires_grad_()
    for target in (LABELS,) if isinstance(criterion, SoftF1) else (LABELS, SHARES):
        assert criterion(logits, target).dtype == torch.float64
        assert torch.autograd.gradcheck(lambda x, t=target: criterion(x, t), logits)


@every_criterion
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_16_bits_are_computed_in_float32(criterion, dtype):
    logits = (10 * LOGITS).to(dtype)
    for target in (LABELS,) if isinstance(criterion, SoftF1) else (LABELS, SHARES, SHARES.to(dtype)):
        loss = criterion(logits, target)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, criterion(logits.float(), target))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(criterion(logits, target), loss)


@every_criterion
@pytest.mark.parametrize("row", [[100.0, -100, 0], [1e4, 1e4, -1e4], [-1e4, 0, 1e4]])
def test_extreme_logits_have_finite_losses_and_gradients(criterion, row):
    for labels in ([0, 1, 2], [0, 0, 0]):
        logits = torch.tensor([row] * 3, requires_grad=True)
        loss = criterion(logits, torch.tensor(labels))
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()


def joined(criterion):
    """The loss of one step of two batches, of three images and of one, joined by their share of the images."""
    return (3 / 4 * criterion(LOGITS[:3], LABELS[:3]) + 1 / 4 * criterion(LOGITS[3:], LABELS[3:])).item()


@pytest.mark.parametrize("name", ["cross-entropy plain", "focal plain", "costs"])
def test_plain_means_add_up(name):
    assert joined(CRITERIA[name]) == pytest.approx(CRITERIA[name](LOGITS, LABELS).item(), rel=1e-6)


@pytest.mark.parametrize("make", [CrossEntropy, Focal])
def test_each_batch_divides_a_weighted_mean_by_its_own_sum_of_weights(make):
    criterion = make(weight=torch.tensor(WEIGHT))
    each = [make(weight=torch.tensor(WEIGHT), mean="plain")(x[None], y[None]).item()
            for x, y in zip(LOGITS, LABELS, strict=True)]  # weights 1, 0.5, 0.5 and 5
    assert criterion(LOGITS, LABELS).item() == pytest.approx(sum(each) / 7, rel=1e-6)
    assert joined(criterion) == pytest.approx(3 / 4 * sum(each[:3]) / 2 + 1 / 4 * each[3] / 5, rel=1e-6)
    assert joined(criterion) != pytest.approx(sum(each) / 7, rel=0.01)


def test_soft_f1_is_that_of_each_batch_alone_over_its_own_classes():
    p = [softmax(row) for row in LOGITS.tolist()]
    f1 = [2 * p[0][0] / (sum(row[0] for row in p[:3]) + 1),
          2 * (p[1][2] + p[2][2]) / (sum(row[2] for row in p[:3]) + 2)]
    expected = 3 / 4 * (1 - sum(f1) / 2) + 1 / 4 * (1 - 2 * p[3][1] / (p[3][1] + 1))
    assert joined(SoftF1()) == pytest.approx(expected, rel=1e-6)
    assert joined(SoftF1()) != pytest.approx(SoftF1()(LOGITS, LABELS).item(), rel=0.01)


@every_criterion
@pytest.mark.parametrize("logits, target", [
    (LOGITS, LABELS[:, None]), (LOGITS, LABELS[:1]), (LOGITS, LABELS.int()), (LOGITS[:, :, None], LABELS),
    (LOGITS[0], LABELS[:3]),
])
def test_targets_that_do_not_fit_are_refused(criterion, logits, target):
    with pytest.raises(LossError, match=r"do not fit .*: give logits \(N, C\) and int64 labels \(N,\) or class shares"):
        criterion(logits, target)


@every_criterion_with_shares
@pytest.mark.parametrize("shares", [SHARES[:, :1], SHARES[:1], SHARES[:, :2], SHARES[:, 0]])
def test_shares_that_do_not_fit_are_refused(criterion, shares):
    with pytest.raises(LossError, match=r"do not fit"):
        criterion(LOGITS, shares)


@every_criterion_with_shares
def test_another_number_of_classes_is_refused(criterion):
    with pytest.raises(LossError, match="logits of 2 classes need a weight or a row of costs for each, not 3"):
        criterion(LOGITS[:, :2], LABELS.clamp(max=1))


@pytest.mark.parametrize("make, words", [
    (lambda: CrossEntropy(mean="sum"), "must be 'weighted' or 'plain', not 'sum'"),
    (lambda: Focal(mean="sum"), "must be 'weighted' or 'plain', not 'sum'"),
    (lambda: CrossEntropy(label_smoothing=1.5), "from 0 to 1, not 1.5"),
    (lambda: Focal(label_smoothing=-0.1), "from 0 to 1, not -0.1"),
    (lambda: Focal(gamma=-1), "gamma must be 0 .* not -1"), (lambda: Focal(gamma=math.nan), "gamma .* not nan"),
    (lambda: SoftF1()(LOGITS, SHARES), "soft F1 needs labels, not class shares: switch MixUp and CutMix off"),
    (lambda: CostMatrix(torch.zeros(2, 3)), r"a table \(C, C\), not \(2, 3\)"),
    (lambda: CostMatrix(torch.zeros(4)), r"a table \(C, C\), not \(4,\)"),
    (lambda: CostMatrix(torch.ones(2, 2)), "zero on the diagonal"),
    (lambda: CostMatrix(torch.eye(2) - 1), "none below zero"),
    (lambda: CostMatrix(torch.tensor([[0, math.inf], [1, 0]])), "finite"),
])
def test_settings_refused(make, words):
    with pytest.raises(LossError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


# ---- what is typed


def test_class_weights():
    assert class_weights(None, ["cat", "dog"], [3, 1]) is None
    balanced = class_weights("balanced", ["cat", "dog"], [30, 10])
    assert (balanced * torch.tensor([30, 10])).tolist() == pytest.approx([20, 20])  # each class weighs the same
    assert class_weights("dog=10", ["cat", "dog"], [3, 1]).tolist() == [1, 10]
    assert class_weights("dog=10, cat=0.5", ["cat", "dog"], [3, 1]).tolist() == [0.5, 10]
    assert class_weights("a=b=2", ["a=b", "c"], [3, 1]).tolist() == [2, 1]
    for typed, known in (("caf\u00e9=2", "cafe\u0301"), ("cafe\u0301=2", "caf\u00e9")):  # NFC and NFD
        assert class_weights(typed, [known, "tea"], [3, 1]).tolist() == [2, 1]


@pytest.mark.parametrize("spec, words", [
    ("bird=2", "unknown class 'bird'; the classes are cat, dog$"), ("dog", "neither 'balanced' nor"),
    ("dog=x", "not a number"), ("dog=-1", "above zero"), ("dog=nan", "above zero"), ("dog=0", "above zero"),
    ("dog=1,dog=2", "class weights name 'dog' twice"),
    ("", "neither"), ("dog=1e31", "the weight of class 'dog' is 1e31; it must be above zero, and finite"),
])
def test_class_weights_refused(spec, words):
    with pytest.raises(LossError, match=words):
        class_weights(spec, ["cat", "dog"], [3, 1])


def test_cost_matrix_from_words():
    costs = cost_matrix("dog:cat=10, cat:dog=2.5", ["cat", "dog", "horse"])
    assert costs.dtype == torch.float32
    assert costs.tolist() == [[0, 2.5, 1], [10, 0, 1], [1, 1, 0]]  # rows: truth
    assert cost_matrix("a=b:c=2", ["a=b", "c"]).tolist() == [[0, 2], [1, 0]]
    assert cost_matrix("cafe\u0301:tea=2", ["caf\u00e9", "tea"]).tolist() == [[0, 2], [1, 0]]
    # A dog (the second row) that is called a cat.
    loss = CostMatrix(costs)(torch.tensor([[1e2, 0, 0]]), torch.tensor([1]))
    assert loss.item() == pytest.approx(10 * (100 - math.log(2)), rel=1e-6)


@pytest.mark.parametrize("spec, words", [
    ("dog:cat", "--costs 'dog:cat' is not like cat:horse=10,horse:cat=2$"), ("dog=10", "is not like"),
    ("", "is not like"), ("dog=cat:10", "is not like"), ("dog:cat=1,", "is not like"),
    ("dog:cat=10,dog:cat=2", "costs name 'dog:cat' twice: it is TRUTH:PREDICTION"),
    ("dog:bird=2", "costs name an unknown class 'bird'; the classes are cat, dog, horse$"),
    ("bird:dog=2", "unknown class 'bird'"),
    ("dog:dog=2", "costs name 'dog:dog', which is no mistake and costs nothing: leave it out"),
    ("dog:cat=x", "the cost of 'dog:cat' is 'x', which is not a number"),
    *[(f"dog:cat={v}", f"the cost of 'dog:cat' is {v}; it must be above zero, and finite")
      for v in ("0", "-1", "nan", "inf", "1e31", "1e-31")],
])
def test_cost_matrix_refused(spec, words):
    with pytest.raises(LossError, match=words):
        cost_matrix(spec, ["cat", "dog", "horse"])


def test_separators_in_the_name_of_a_class():
    for classes, words in ((["a,b", "c"], "a comma"), (["a:b", "c"], "a comma or a colon")):
        with pytest.raises(LossError, match=rf"\(rename a class with {words}( or a colon)?\)$"):
            cost_matrix(f"{classes[0]}:c=2", classes)
    with pytest.raises(LossError, match=r"\(rename a class with a comma\)$"):
        class_weights("a,b=2", ["a,b", "c"], [1, 1])
    assert class_weights("a:b=2", ["a:b", "c"], [1, 1]).tolist() == [2, 1]


def test_l1_penalty_leaves_out_tokens_and_position_embeddings():
    from torchvision.models import vision_transformer

    vit = vision_transformer.VisionTransformer(16, 8, 1, 2, 8, 16, num_classes=2)
    expected = sum(p.abs().sum().item() for n, p in vit.named_parameters()
                   if n.endswith(("conv_proj.weight", "in_proj_weight", "out_proj.weight", "mlp.0.weight", "mlp.3.weight",
                                  "head.weight")))
    assert l1_penalty(vit).item() == pytest.approx(expected, rel=1e-5)


def test_l1_penalty_takes_trainable_weights_only():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Flatten(), torch.nn.Linear(2, 2))
    expected = sum(abs(v) for layer in (model[0], model[3]) for v in layer.weight.flatten().tolist())
    assert l1_penalty(model).item() == pytest.approx(expected, rel=1e-6)
    model[0].weight.requires_grad_(False)
    penalty = losses.l1_penalty(model)
    assert penalty.item() == pytest.approx(sum(abs(v) for v in model[3].weight.flatten().tolist()), rel=1e-6)
    penalty.backward()
    assert torch.equal(model[3].weight.grad, model[3].weight.sign())
    assert model[0].weight.grad is None and model[3].bias.grad is None
    assert losses.l1_penalty(model.half()).dtype == torch.float32


# ---- against forgetting


def small_network():
    """A convolution, a BatchNorm that has seen some data, a head of three outputs."""
    torch.manual_seed(3)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.ReLU(), torch.nn.Flatten(),
                                  torch.nn.Dropout(0.5), torch.nn.Linear(8, 3))
    network(torch.randn(5, 1, 4, 4))
    return network


def test_the_pull_of_l2_sp_and_of_ewc():
    network = small_network()
    anchor = losses.anchor_of(network, ["5"])
    assert set(anchor) == {"0.weight", "0.bias", "1.weight", "1.bias"}  # the head is 5
    everything = losses.anchor_of(network)
    fisher = {name: torch.rand_like(value) for name, value in everything.items()}
    with torch.no_grad():
        for p in network.parameters():
            p += torch.randn_like(p)
    network[1].weight.requires_grad_(False)
    parameters = dict(network.named_parameters())
    for penalty, expected in (
        (losses.l2_sp_penalty(network, anchor), {n: parameters[n] - a for n, a in anchor.items()}),
        (losses.ewc_penalty(network, everything, fisher), {n: fisher[n] * (parameters[n] - a) for n, a in everything.items()}),
    ):
        network.zero_grad()
        penalty.backward()
        value = 0.0
        for name, p in parameters.items():
            if name in expected and p.requires_grad:
                torch.testing.assert_close(p.grad, expected[name].detach())
                value += (expected[name] * (p - everything[name])).sum().item() / 2
            else:
                assert p.grad is None
        assert penalty.item() == pytest.approx(value, rel=1e-5)
    network.requires_grad_(False)
    losses.l2_sp_penalty(network, anchor).backward()  # nothing to pull, as before a thaw
    assert losses.ewc_penalty(network.half(), everything, fisher).dtype == torch.float32


def test_the_fisher_information_of_a_logistic_regression():
    """true: p (1 - p) x^2, whatever the labels; empirical: (1[c = y] - p)^2 x^2; the third output belongs to no old task."""
    torch.manual_seed(0)
    layer, x, y = torch.nn.Linear(4, 3), torch.randn(7, 4), torch.randint(2, (7,))
    p = layer(x)[:, :2].softmax(1).detach()
    for kind, share in (("true", p * (1 - p)), ("empirical", (F.one_hot(y, 2) - p).square())):
        found = losses.fisher_diagonal(layer, [(x[:3], y[:3]), (x[3:], y[3:])], kind, classes=2)
        torch.testing.assert_close(found["weight"][:2], (share[:, :, None] * x[:, None].square()).mean(0))
        torch.testing.assert_close(found["bias"][:2], share.mean(0))
        assert not found["weight"][2].any() and not found["bias"][2].any()
    with pytest.raises(LossError, match="must be true or empirical, not 'x'"):
        losses.fisher_diagonal(layer, [], "x")
    with pytest.raises(LossError, match="of no pictures"):
        losses.fisher_diagonal(layer, [])


def test_the_fisher_information_of_many_classes_is_drawn_from_the_prediction():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(2, 12), torch.randn(1, 2)
    p, state = layer(x).softmax(1)[0].detach(), torch.get_rng_state()
    found = losses.fisher_diagonal(layer, [(x.expand(3000, 2), torch.zeros(3000, dtype=torch.int64))], seed=1)["bias"]
    torch.testing.assert_close(found, p * (1 - p), rtol=0.2, atol=0.01)
    assert torch.equal(state, torch.get_rng_state())  # so a run goes on as it would without


def test_the_fisher_information_is_that_of_each_picture_with_batchnorms_at_rest():
    network, x, y = small_network().train(), torch.randn(6, 1, 4, 4), torch.randint(3, (6,))
    network[0].bias.requires_grad_(False)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    found = losses.fisher_diagonal(network, [(x, y)], "empirical")
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    parameters = {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}

    def loss(parameters, x, y):
        return F.cross_entropy(torch.func.functional_call(network, parameters, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    assert found.keys() == parameters.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, each[name].square().mean(0))


# ---- regression

OUTPUTS = torch.tensor([[0.5, -2.0], [1.5, 0.25], [-3.0, 4.0]])
TARGETS = torch.tensor([[1.0, 1.0], [-1.5, 0.0], [-3.5, 4.0]])
SAMPLE_WEIGHTS = torch.tensor([0.5, 2.0, 0.5])


def regression_by_hand(per_value, weights):
    """The mean over samples of weight times the mean over targets, in plain Python floats."""
    rows = [[per_value(t - o) for o, t in zip(outputs, targets, strict=True)]
            for outputs, targets in zip(OUTPUTS.tolist(), TARGETS.tolist(), strict=True)]
    weights = [1.0] * 3 if weights is None else weights.tolist()
    return sum(w * sum(row) / len(row) for w, row in zip(weights, rows, strict=True)) / 3


@pytest.mark.parametrize("weights", [None, SAMPLE_WEIGHTS])
@pytest.mark.parametrize("kind, delta, per_value", [
    ("mse", 1.0, lambda e: e * e), ("l1", 1.0, abs), ("huber", 0.75, lambda e: e * e / 2 if abs(e) < 0.75 else 0.75 * (abs(e) - 0.375)),
])
def test_regression_losses_by_hand(kind, delta, per_value, weights):
    loss = losses.Regression(kind, delta)(OUTPUTS, TARGETS, weights)
    assert loss.item() == pytest.approx(regression_by_hand(per_value, weights), rel=1e-6)


@pytest.mark.parametrize("weights", [None, SAMPLE_WEIGHTS])
def test_quantile_loss_by_hand(weights):
    """At q = 0.5 half the absolute error; at 0.9 an output that is too low costs nine times one that is too high."""
    for q in (0.1, 0.5, 0.9):
        loss = losses.Quantile([q])(OUTPUTS[..., None], TARGETS, weights).item()
        assert loss == pytest.approx(regression_by_hand(lambda e, q=q: q * e if e > 0 else (q - 1) * e, weights), rel=1e-6)
    half = losses.Regression("l1")(OUTPUTS, TARGETS, weights).item() / 2
    assert losses.Quantile([0.5])(OUTPUTS[..., None], TARGETS, weights).item() == pytest.approx(half, rel=1e-6)
    both = losses.Quantile([0.1, 0.9])(torch.stack([OUTPUTS, OUTPUTS + 1], -1), TARGETS, weights).item()
    one = losses.Quantile([0.1])(OUTPUTS[..., None], TARGETS, weights) + losses.Quantile([0.9])(OUTPUTS[..., None] + 1, TARGETS, weights)
    assert both == pytest.approx(one.item() / 2, rel=1e-6)


def test_the_quantile_loss_settles_at_the_quantile():
    targets = torch.arange(101.0)[:, None]
    criterion = losses.Quantile([0.25])
    costs = [criterion(torch.full((101, 1, 1), float(v)), targets).item() for v in range(101)]
    assert costs.index(min(costs)) == 25


def test_regression_losses_add_up_over_batches_and_take_16_bits():
    for criterion, outputs in ((losses.Regression("huber"), OUTPUTS), (losses.Quantile([0.5]), OUTPUTS[..., None])):
        whole = criterion(outputs, TARGETS, SAMPLE_WEIGHTS)
        parts = 2 / 3 * criterion(outputs[:2], TARGETS[:2], SAMPLE_WEIGHTS[:2]) + criterion(outputs[2:], TARGETS[2:], SAMPLE_WEIGHTS[2:]) / 3
        assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
        for dtype in (torch.float16, torch.bfloat16):
            low = criterion(outputs.to(dtype), TARGETS, SAMPLE_WEIGHTS)
            assert low.dtype == torch.float32 and torch.equal(low, criterion(outputs.to(dtype).float(), TARGETS, SAMPLE_WEIGHTS))
        far = (outputs.double() + 0.01).requires_grad_()  # not where the absolute error has its kink
        assert torch.autograd.gradcheck(lambda o, c=criterion: c(o, TARGETS.double(), SAMPLE_WEIGHTS.double()), far)


@pytest.mark.parametrize("outputs, targets, weights", [
    ((3, 1), (3,), None), ((3,), (3,), None), ((3, 2), (3, 1), None), ((3, 2), (3, 2), (3, 1)), ((3, 2), (3, 2), (2,)),
])
def test_shapes_that_would_broadcast_are_refused(outputs, targets, weights):
    shapes = torch.zeros(outputs), torch.zeros(targets), None if weights is None else torch.zeros(weights)
    with pytest.raises(LossError, match="must"):
        losses.Regression("mse")(*shapes)
    with pytest.raises(LossError, match="must"):
        losses.Quantile([0.5])(shapes[0][..., None] if len(outputs) > 1 else shapes[0], *shapes[1:])
    with pytest.raises(LossError, match="mse, l1 or huber, not 'mae'"):
        losses.Regression("mae")


# ---- several labels per picture

CELLS = torch.tensor([[0.5, -1.0], [2.0, 0.1], [-0.3, 3.0]])
ONES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
KNOWN = torch.tensor([[1.2, 0.0], [1.2, 1.2], [1.2, 1.2]])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("pos_weight", [None, torch.tensor([3.0, 0.5])])
def test_binary_focal_by_hand(gamma, pos_weight):
    total = 0.0
    for n in range(3):
        for label in range(2):
            p = 1 / (1 + math.exp(-CELLS[n, label]))
            p, weight = (p, 1 if pos_weight is None else pos_weight[label].item()) if ONES[n, label] else (1 - p, 1)
            total += KNOWN[n, label].item() * weight * -math.log(p) * (1 - p) ** gamma
    criterion = losses.BinaryFocal(gamma, pos_weight)
    assert criterion(CELLS, ONES, KNOWN).item() == pytest.approx(total / 6, rel=1e-5)
    if gamma == 0:
        pytorchs = torch.nn.BCEWithLogitsLoss(weight=KNOWN, pos_weight=pos_weight)(CELLS, ONES)
        assert criterion(CELLS, ONES, KNOWN).item() == pytest.approx(pytorchs.item(), rel=1e-6)
    # the batches of a step add up
    parts = 2 / 3 * criterion(CELLS[:2], ONES[:2], KNOWN[:2]) + criterion(CELLS[2:], ONES[2:], KNOWN[2:]) / 3
    assert parts.item() == pytest.approx(total / 6, rel=1e-5)
    far = CELLS.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: criterion.double()(x, ONES.double(), KNOWN.double()), far)


def test_binary_focal_is_torchvisions():
    own = losses.BinaryFocal(2.0, torch.tensor([0.25 / 0.75] * 2))(CELLS, ONES)
    theirs = torchvision.ops.sigmoid_focal_loss(CELLS, ONES, alpha=0.25, gamma=2.0, reduction="mean")
    assert 0.75 * own.item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("value", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_binary_focal_is_finite_everywhere_and_masked_cells_have_no_gradient(value):
    for gamma in (0.0, 0.3, 2.0):
        logits = torch.full((3, 2), value, requires_grad=True)
        loss = losses.BinaryFocal(gamma)(logits, ONES, KNOWN)
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all() and logits.grad[0, 1] == 0
        assert loss.item() == losses.BinaryFocal(gamma)(logits, 1 - (1 - ONES) * (KNOWN > 0), KNOWN).item()


def test_binary_focal_refuses_what_does_not_fit():
    for logits, targets, weights in ((CELLS, ONES[:, :1], KNOWN), (CELLS, ONES, KNOWN[:, :1]), (CELLS[0], ONES[0], None)):
        with pytest.raises(LossError, match=r"must all be \(N, L\)"):
            losses.BinaryFocal()(logits, targets, weights)
    with pytest.raises(LossError, match="gamma must be 0"):
        losses.BinaryFocal(-1)
    low = losses.BinaryFocal()(CELLS.bfloat16(), ONES, KNOWN)
    assert low.dtype == torch.float32


def test_pos_weights():
    values = torch.tensor([[1, 0], [1, 1], [0, 0], [math.nan, 0]])
    assert losses.pos_weights(None, ["a", "b"], values) is None
    assert losses.pos_weights("balanced", ["a", "b"], values).tolist() == [0.5, 3]
    assert losses.pos_weights("b=4", ["a", "b"], values).tolist() == [1, 4]
    for spec, words in (("a=1,a=2", "pos weights name 'a' twice"), ("a=0", "the weight of label 'a' is 0; it must be above"),
                        ("c,d=1", "neither 'balanced' nor like c,d=10,b=1 .rename a label with a comma"),
                        ("x=1", "pos weights name an unknown label 'x'; the labels are c,d, b")):
        with pytest.raises(LossError, match=words):
            losses.pos_weights(spec, ["a" if "a=" in spec else "c,d", "b"], values)
