"""text.py: texts and their classes, pieces, batches of like length, the networks of transformers."""

import json
import shutil

import pytest
import torch
import transformers
from torch import nn

import data
import features
import freeze
import tables
import text

# ---- texts and their classes


def rows_of(**per_split):
    """rows_of(train="aab", val="b"): a Row for each letter, which is its class."""
    return [text.Row(f"{split} {i} {name}", split, name, f"file, line {i}")
            for split, names in per_split.items() for i, name in enumerate(names)]


def test_tables_of_a_folder(tmp_path):
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl", "readme.md"):
        (tmp_path / name).write_text("")
    found = text.find_tables(tmp_path)
    assert found == {"train": str(tmp_path / "train.jsonl"), "val": str(tmp_path / "dev.jsonl"),
                     "test": str(tmp_path / "test.jsonl")}
    (tmp_path / "validation.csv").write_text("")
    with pytest.raises(text.TextError, match="dev.jsonl and validation.csv: which is meant"):
        text.find_tables(tmp_path)


def test_class_folders_as_the_film_reviews_come(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for name in ("neg", "pos"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / split / name / f"{i}_7.txt").write_text(f"{name} {split} {i}\n")
    (tmp_path / "train" / "urls_neg.txt").write_text("http://")
    (tmp_path / "imdb.vocab").write_text("the")
    (tmp_path / "train" / "unsup").mkdir()
    (tmp_path / "train" / "unsup" / "1_0.txt").write_text("of no class")
    assert text.find_tables(tmp_path) == {}
    notes = []
    found = text.gather(text.read_folders(tmp_path, notes), 0.34, notes)
    assert found.classes == ["neg", "pos"]
    assert {split: len(samples) for split, samples in found.splits.items()} == {"train": 4, "val": 2, "test": 4}
    assert ("pos test 1", 1) in found.splits["test"]
    assert any("unsup: 1 text without a class: not used" in note for note in notes) and any("imdb.vocab" in note for note in notes)


def test_what_is_set_aside_depends_on_the_text_alone():
    rows = rows_of(train="ab" * 20)
    twice = [*rows, *rows]
    found, doubled = text.gather(rows, 0.25), text.gather(list(reversed(twice)), 0.25)
    assert [label for _, label in found.splits["val"]].count(0) == 5  # a quarter of each class
    assert {words for words, _ in doubled.splits["val"]} == {words for words, _ in found.splits["val"]}
    assert not {words for words, _ in doubled.splits["train"]} & {words for words, _ in doubled.splits["val"]}


@pytest.mark.parametrize("rows, words", [
    (rows_of(train="aaa"), "all texts of train are of the class 'a'"),
    (rows_of(train="aab", val="c"), "file, line 0: a row of the split val has the class 'c'"),
    (rows_of(val="ab"), "no rows of the split train"),
    (rows_of(train="aab"), "the only text of the class 'b'"),
    (rows_of(train="abc"), "another class in each of the 3 rows"),
    ([*rows_of(train="aabb"), text.Row(("x", " "), "train", "a", "here")], "here: an empty text"),
])
def test_texts_that_cannot_be_learned(rows, words):
    with pytest.raises(text.TextError, match=words):
        text.gather(rows)


def test_what_is_said_of_texts():
    rows = [*rows_of(train="aabb", val="ab"), text.Row("train 0 a", "val", "b", ""), text.Row("train 3 b", "test", "b", "")]
    said = text.describe(text.gather(rows))
    assert "warning: 1 text of val also in train" in said and "warning: 1 text of test also in train" in said
    assert "1 text with different classes, such as 'train 0 a'" in said
    assert "note: test has no text of a" in said


def test_json_lines(tmp_path):
    file = tmp_path / "pairs.jsonl"
    lines = [{"premise": 'a "b",\n', "hypothesis": "ü", "label": 1, "split": "train"},
             {"split": "test", "premise": "x", "hypothesis": "y", "label": None}]
    file.write_text("\n\n".join(json.dumps(line) for line in lines))
    (first, second), _ = tables.read_text_rows(str(file), ["premise", "hypothesis"], "label")
    assert first == (('a "b",\n', "ü"), "train", "1", f"{file}, line 1")
    assert second == (("x", "y"), "test", None, f"{file}, line 3")


# ---- batches of like length


def epochs_of(lengths, batch_size, processes=1, regroup=True, epochs=3):
    """The batches, lists of places, of some epochs; those of several processes put together."""
    found = []
    for epoch in range(epochs):
        shares = []
        for rank in range(processes):
            order = data.SeededBatches(len(lengths), batch_size, 5, shuffle=True, rank=rank, processes=processes,
                                       arrange=text.ByLength(lengths, 5, 1, regroup))
            order.set_epoch(epoch)
            shares.append([[place for _, place in batch] for batch in order])
        found.append([sum(parts, []) for parts in zip(*shares, strict=True)])
    return found


@pytest.mark.parametrize("count", [1, 2, 7, 64, 65, 1000])
@pytest.mark.parametrize("batch_size, processes", [(1, 1), (4, 1), (32, 1), (2, 3), (8, 2)])
def test_an_epoch_is_a_permutation(count, batch_size, processes):
    lengths = torch.randint(3, 60, (count,), generator=torch.Generator().manual_seed(count)).tolist()
    for regroup in (True, False):
        for batches in epochs_of(lengths, batch_size, processes, regroup):
            assert sorted(place for batch in batches for place in batch) == list(range(count))


def test_texts_of_like_length_are_together_and_meet_others_in_each_epoch():
    lengths = torch.randint(3, 60, (1000,), generator=torch.Generator().manual_seed(0)).tolist()

    def padded(batches):
        return sum(len(batch) * max(lengths[place] for place in batch) for batch in batches) / sum(lengths)

    plain = data.SeededBatches(1000, 16, 5, shuffle=True)
    assert padded([[place for _, place in batch] for batch in plain]) > 1.7
    first, second, third = epochs_of(lengths, 16)
    assert max(map(padded, (first, second, third))) < 1.15
    assert first == epochs_of(lengths, 16)[0]
    groups = [{frozenset(batch) for batch in batches} for batches in (first, second)]
    assert len(groups[0] & groups[1]) <= 2
    # The batches come in no order of length.
    means = torch.tensor([max(lengths[place] for place in batch) for batch in first], dtype=torch.float64)
    assert abs(torch.corrcoef(torch.stack([means, torch.arange(len(means)).double()]))[0, 1]) < 0.3


def test_for_a_frozen_encoder_the_batches_stay_and_their_order_does_not():
    lengths = torch.randint(3, 60, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    first, second, _ = epochs_of(lengths, 16, regroup=False)
    assert first != second and sorted(map(sorted, first)) == sorted(map(sorted, second))


def test_a_step_has_the_same_texts_however_it_is_cut_up():
    """A resumed run may have another batch size, with as much more accumulation."""
    lengths = torch.randint(3, 60, (203,), generator=torch.Generator().manual_seed(0)).tolist()

    def steps(batch_size, accumulate):
        order = data.SeededBatches(203, batch_size, 5, shuffle=True, arrange=text.ByLength(lengths, 5, accumulate))
        batches = [[place for _, place in batch] for batch in order]
        return [sum(batches[i : i + accumulate], []) for i in range(0, len(batches), accumulate)]

    assert steps(16, 1) == steps(8, 2) == steps(4, 4)


# ---- pieces


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    return text.make_tokenizer(text.load_pretrained(str(tiny_bert)))


def test_pieces_are_the_tokenizers_and_its_own_limits_are_off(tokenizer, tiny_bert):
    words = ["a good film", "the plot was not really very bad a film quite good the scene is bad", "nice"]
    found = text.TextList([(one, 0) for one in words], tokenizer, 64)
    x, labels, bad = found.collate([found[i] for i in range(3)])
    # The file asks for 8 pieces, padded and cut off.
    assert found.lengths == [5, 17, 3] and found.cut == 0 and x["input_ids"].shape == (3, 17) and bad == []
    plain = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    by_hand = plain(words, padding=True, truncation=False, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(x[name], by_hand[name]), name


def test_of_a_long_pair_the_longer_half_is_cut(tokenizer):
    pair = ("a good film", "the plot was not really very bad a film quite good")
    found = text.TextList([(pair, 1)], tokenizer, 10)
    ids, types, label = found[0]
    assert found.cut == 1 and found.whole_lengths == [17] and len(ids) == 10 and label == 1
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == [
        "[CLS]", "a", "good", "film", "[SEP]", "the", "plot", "was", "not", "[SEP]"]
    assert types.tolist() == [0] * 5 + [1] * 5


# ---- networks


def config_of(kind, **more):
    shape = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 64, "max_position_embeddings": 66, "num_labels": 3}
    return transformers.AutoConfig.for_model(kind, **shape | more)


KINDS = {"bert": {}, "roberta": {"pad_token_id": 1}, "camembert": {"pad_token_id": 1}, "electra": {"embedding_size": 16},
         "albert": {"embedding_size": 16}, "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
         "deberta-v2": {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"],
                        "type_vocab_size": 0, "position_biased_input": False},
         "modernbert": {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}}


@pytest.mark.parametrize("pool", ["head", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_lead_to_the_same_bits(kind, pool):
    """The head of each kind of network on features, with the same dropout, equals the network on pieces."""
    torch.manual_seed(0)
    config = config_of(kind, **KINDS[kind])
    model = text.make_network(config)
    if pool == "mean":
        model = text.MeanPooled(model)
    head = text.find_head(model)
    assert not head.startswith(model.base_model_prefix + ".")
    model.set_submodule(head, nn.Linear(model.get_submodule(head).in_features, 3))
    mask = torch.ones(5, 11, dtype=torch.long)
    mask[1, 6:] = 0
    ids = torch.randint(4, 100, (5, 11)).masked_fill(mask == 0, config.pad_token_id)
    side = text.HeadSide(model, head)
    model.eval()
    with torch.inference_mode():
        found = side.features({"input_ids": ids, "attention_mask": mask})
    assert found.shape == (5, 32)
    freeze.freeze(model, "backbone", head)
    assert not features.trains_beyond(model, side)
    outputs = []
    for network, x in ((model, {"input_ids": ids, "attention_mask": mask}), (side, {"features": found.clone()})):
        freeze.train_mode(model)
        torch.manual_seed(1)
        outputs.append(network(**x).logits)
    assert torch.equal(*outputs)
    assert len(freeze.layer_groups(model, head)) >= 4  # its blocks one by one


def test_a_batch_of_which_a_process_has_none():
    """Of several processes, the last one may get none of the texts of a small batch; data.batches passes it over."""
    assert text.TextList.collate(None, []) == (None, None, [])


def test_features_are_the_right_ones_also_for_a_head_of_zeros():
    """Whose output tells nothing of what it looks at."""
    model = text.MeanPooled(text.make_network(config_of("modernbert", **KINDS["modernbert"], classifier_pooling="mean")))
    own = text.make_network(config_of("modernbert", **KINDS["modernbert"], classifier_pooling="mean"))
    x = {"input_ids": torch.randint(4, 100, (2, 6)), "attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3])}
    for network in (model, own):
        nn.init.zeros_(network.classifier.weight)
        side = text.HeadSide(network.eval(), "classifier")
        side.features(x)
        assert side.pool is text.mean_of_tokens


def test_a_head_that_looks_at_all_pieces_is_not_cached():
    model = text.make_network(config_of("gpt2", n_embd=32, n_layer=1, n_head=2, pad_token_id=0))
    ids = torch.randint(4, 100, (2, 6))
    with pytest.raises(text.TextError, match="looks at more than one vector of a text: use --pool mean"):
        text.HeadSide(model.eval(), "score").features({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_weights_under_the_names_of_old_files_and_new_layers(tiny_bert):
    pretrained = text.load_pretrained(str(tiny_bert))
    model = text.make_network(text.make_config(pretrained, ["a", "b"]))
    plain = pretrained["state_dict"]
    old = {"bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
           for name, tensor in plain.items()} | {"cls.predictions.bias": torch.zeros(3)}
    said, fresh = text.load_weights(model, pretrained | {"state_dict": old}, "classifier")
    assert fresh == [] and said == f"loaded {len(plain)} tensors; new: classifier; left out: cls.predictions"
    assert all(torch.equal(model.bert.state_dict()[name], tensor) for name, tensor in plain.items())
    without = {name: tensor for name, tensor in plain.items() if not name.startswith("pooler.")}
    _, fresh = text.load_weights(model, pretrained | {"state_dict": without}, "classifier")
    assert fresh == ["bert.pooler.dense"]
    del without["encoder.layer.1.output.dense.weight"]
    with pytest.raises(text.TextError, match="lack 1 tensor of this BertForSequenceClassification, such as bert.encoder"):
        text.load_weights(model, pretrained | {"state_dict": without}, "classifier")
    wrong = plain | {"embeddings.word_embeddings.weight": torch.zeros(3, 32)}
    with pytest.raises(text.TextError, match="is \\(3, 32\\) in the weights"):
        text.load_weights(model, pretrained | {"state_dict": wrong}, "classifier")


@pytest.mark.parametrize("case, words", [
    ("no tokenizer", "holds no tokenizer"),
    ("no config", "holds no config.json"),
    ("a pickle", "as a pickle .pytorch_model.bin., which can run code"),
    ("damaged", "model.safetensors cannot be read"),
    ("code of its own", "knows no network of the kind 'mystery'"),
    ("no head", "a dinov2 has no head for classes"),
    ("a file", "--model takes a folder of transformers"),
    ("no folder", "no such folder"),
    ("a name", "could not be downloaded from the hub"),
])
def test_networks_that_cannot_be_had(tiny_bert, tmp_path, case, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    name = str(folder)
    if case == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif case == "no config":
        (folder / "config.json").unlink()
    elif case == "a pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif case == "damaged":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    elif case == "code of its own":
        code = {"model_type": "mystery", "auto_map": {"AutoModel": "code.Model"}}
        (folder / "config.json").write_text(json.dumps(config | code))
    elif case == "no head":
        (folder / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    name = {"a file": str(folder / "config.json"), "no folder": "./nowhere", "a name": "nobody/nothing"}.get(case, name)
    with pytest.raises(text.TextError, match=words) as error:
        pretrained = text.load_pretrained(name)
        text.make_network(text.make_config(pretrained, ["a", "b"]), name)
    assert "\n" not in str(error.value)


def test_positions(tiny_bert, tokenizer):
    config = config_of("roberta", pad_token_id=1)
    tokenizer.model_max_length = 10**30
    assert text.longest(config, tokenizer) == 64 and text.pick_max_length(None, config, tokenizer) == 64
    with pytest.raises(text.TextError, match="--max-length 65: this roberta has positions for 64 pieces"):
        text.pick_max_length(65, config, tokenizer)
    # That is how many the network takes.
    model = text.make_network(config).eval()
    model(input_ids=torch.full((1, 64), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 65), 5))
