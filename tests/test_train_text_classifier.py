"""train_text_classifier.py as a user runs it, on a tiny BERT with random weights."""

import torch

from conftest import changed, read


def test_cached_features_change_nothing(classify_text):
    plain, cached = (classify_text(freeze="backbone", pool=pool, epochs=2, cache_features=views)
                     for pool in ("mean",) for views in (0, 1))
    a, b = read(plain / "last.pt"), read(cached / "last.pt")
    assert not changed(a["model"], b["model"]) and a["history"][1]["val_loss"] == b["history"][1]["val_loss"]
    assert torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])
