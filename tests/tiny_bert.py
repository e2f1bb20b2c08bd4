"""A BERT of two layers with random weights and a vocabulary of some words, made without a download; and a table of texts."""

import csv
import random

import torch

GOOD, BAD = ["good", "fine", "great", "nice"], ["bad", "poor", "dull", "awful"]
OTHERS = "film plot actor scene the a was is very not really quite".split()


def make(folder):
    """Write it into a folder, as save_pretrained does. Returns the folder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *OTHERS, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(mark, vocabulary[mark]) for mark in ("[CLS]", "[SEP]")])
    # As in files of sentence-transformers: padding and truncation that nobody asked for.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=64, model_input_names=["input_ids", "token_type_ids", "attention_mask"]).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=64)
    BertModel(config).save_pretrained(folder)
    return folder


def rows(count, seed):
    """[(a text of 3 to 15 words, "positive" or "negative" by a word in it), ...]"""
    rng, found = random.Random(seed), []
    for i in range(count):
        label = ("positive", "negative")[i % 2]
        words = [rng.choice(OTHERS) for _ in range(rng.randint(2, 14))]
        words.insert(rng.randrange(len(words)), rng.choice(GOOD if label == "positive" else BAD))
        found.append((" ".join(words), label))
    return found


def write_reviews(path, **per_split):
    """write_reviews(path, train=24, val=8) writes a CSV with the columns text, label, split. Returns its path."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "split"])
        for split, count in per_split.items():
            writer.writerows((*row, split) for row in rows(count, split))
    return path


def sentences(count, seed):
    """[(words, tags in IOB2), ...]: a good word begins a person, a bad one a place; "xu" and "yo" go on with them."""
    rng, found = random.Random(seed), []
    for i in range(count):
        words, tags = [], []
        for _ in range(rng.randint(2, 5)):
            words += [rng.choice(OTHERS) for _ in range(rng.randint(1, 3))]
            tags += ["O"] * (len(words) - len(tags))
            name, kind = (rng.choice(GOOD), "person") if (i + len(words)) % 2 else (rng.choice(BAD), "place")
            longer = rng.randint(0, 1)
            words += [name, *["xu" if kind == "person" else "yo"] * longer]
            tags += [f"B-{kind}", *[f"I-{kind}"] * longer]
        found.append((words, tags))
    return found


def write_tagged(folder, **per_split):
    """write_tagged(folder, train=24, dev=8) writes a CoNLL file for each split. Returns the folder."""
    for split, count in per_split.items():
        blocks = ["\n".join(f"{word}\t{tag}" for word, tag in zip(*sentence, strict=True)) for sentence in sentences(count, split)]
        (folder / f"{split}.conll").write_text("\n\n".join(blocks) + "\n")
    return folder
