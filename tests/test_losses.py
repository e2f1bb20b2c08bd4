import math

import pytest
import torch

import losses
from losses import CrossEntropy, LossError, class_weights, l1_penalty

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.3, 0.2], [-1.0, 1.0, 3.0], [0.1, 0.2, -0.4]])
LABELS = torch.tensor([0, 2, 2, 1])
WEIGHT = [1.0, 5.0, 0.5]


def by_hand(mean, smoothing=0.0):
    """Cross-entropy from its definition, in plain Python floats."""
    total = weights = 0.0
    for row, label in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(v) for v in row))
        nll = [WEIGHT[c] * (log_sum - v) for c, v in enumerate(row)]
        total += (1 - smoothing) * nll[label] + smoothing / 3 * sum(nll)
        weights += WEIGHT[label]
    return total / (weights if mean == "weighted" else len(LABELS))


@pytest.mark.parametrize("mean", ["weighted", "plain"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_by_hand(mean, smoothing):
    loss = CrossEntropy(torch.tensor(WEIGHT), mean=mean, label_smoothing=smoothing)(LOGITS, LABELS)
    assert loss.item() == pytest.approx(by_hand(mean, smoothing), rel=1e-6)


def test_the_two_senses_of_a_class_weight():
    same = torch.zeros(4, dtype=torch.int64)  # a batch of one class, all of weight 10
    plain = CrossEntropy()(LOGITS, same)
    assert CrossEntropy(torch.tensor([10.0, 1, 1]))(LOGITS, same) == pytest.approx(plain.item())
    assert CrossEntropy(torch.tensor([10.0, 1, 1]), mean="plain")(LOGITS, same) == pytest.approx(10 * plain.item())


def test_cross_entropy_is_pytorchs_own_without_options():
    assert torch.equal(CrossEntropy()(LOGITS, LABELS), torch.nn.CrossEntropyLoss()(LOGITS, LABELS))
    with pytest.raises(LossError, match="weighted"):
        CrossEntropy(mean="sum")


def test_gradient():
    logits = LOGITS.double().requires_grad_()
    for mean in ("weighted", "plain"):
        criterion = CrossEntropy(torch.tensor(WEIGHT).double(), mean=mean, label_smoothing=0.1)
        assert torch.autograd.gradcheck(lambda x, c=criterion: c(x, LABELS), logits)


def test_class_weights():
    assert class_weights(None, ["cat", "dog"], [3, 1]) is None
    balanced = class_weights("balanced", ["cat", "dog"], [30, 10])
    assert (balanced * torch.tensor([30, 10])).tolist() == pytest.approx([20, 20])  # each class weighs the same
    assert class_weights("dog=10", ["cat", "dog"], [3, 1]).tolist() == [1, 10]
    assert class_weights("dog=10, cat=0.5", ["cat", "dog"], [3, 1]).tolist() == [0.5, 10]
    assert class_weights("a=b=2", ["a=b", "c"], [3, 1]).tolist() == [2, 1]


@pytest.mark.parametrize("spec, words", [
    ("bird=2", "unknown class 'bird'; the classes are cat, dog"), ("dog", "neither 'balanced' nor"), ("dog=x", "not a number"),
    ("dog=-1", "above zero"), ("dog=nan", "above zero"), ("dog=0", "above zero"), ("", "neither"),
])
def test_class_weights_refused(spec, words):
    with pytest.raises(LossError, match=words):
        class_weights(spec, ["cat", "dog"], [3, 1])


def test_check_finite():
    losses.check_finite(3.0, "loss", "-")
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(LossError, match="the loss is .*, nothing of it was saved; try half the rate: --lr 1"):
            losses.check_finite(bad, "loss", "--lr 1")


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
