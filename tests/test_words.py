"""words.py: files of words and tags, entities, windows of pieces, scores."""

import json
import random

import pytest
import torch
import transformers

import text
import words

# ---- tags and entities

# One sentence in all schemes: two persons side by side, a place of one word, a person of three words at the end.
TAGS = {
    "IOB2": "B-per B-per I-per O B-loc O B-per I-per I-per",
    "IOB1": "I-per B-per I-per O I-loc O I-per I-per I-per",
    "BIOES": "S-per B-per E-per O S-loc O B-per I-per E-per",
    "BILOU": "U-per B-per L-per O U-loc O B-per I-per L-per",
    "IO": "I-per I-per I-per O I-loc O I-per I-per I-per",
}
FOUND = [(0, 1, "per"), (1, 3, "per"), (4, 5, "loc"), (6, 9, "per")]


@pytest.mark.parametrize("scheme", TAGS)
def test_schemes_are_recognized_and_name_the_same_entities(scheme):
    tags = TAGS[scheme].split()
    expected = FOUND if scheme != "IO" else [(0, 3, "per"), *FOUND[2:]]
    assert words.recognize([tags]) == scheme and words.breaks(tags, scheme) == []
    assert words.entities(tags) == expected and words.encode(9, expected, scheme) == tags


@pytest.mark.parametrize("scheme, tags, wrong", [
    ("IOB2", "O I-per B-per I-loc I-loc", [1, 3]),
    ("IOB1", "B-per I-per O I-per B-per B-loc", [0, 5]),
    ("BIOES", "E-per B-per O S-per I-per E-per B-loc", [0, 2, 4, 6]),
    ("BILOU", "B-per L-loc U-per L-per", [1, 3]),
    ("IO", "I-per I-loc O I-loc", []),
])
def test_what_a_scheme_does_not_allow_is_counted(scheme, tags, wrong):
    assert words.breaks(tags.split(), scheme) == wrong


def test_the_scheme_of_most_beginnings_counts():
    valid, other = "B-per I-per O B-per".split(), "O I-per O B-loc".split()
    assert words.recognize([valid, other]) == "IOB2"  # one I begins an entity, three B do
    assert words.recognize(["I-per B-per O I-loc".split(), "B-per O I-per".split()]) == "IOB1"
    assert words.recognize([["O", "O"]]) == "IOB2"


# True and predicted tags, sentences parted by |, which break their schemes here and there; and what seqeval 1.2.2 says of
# them, in its default mode, that of conlleval (of BILOU, which that does not know, in the strict one; there nothing is
# broken): precision, recall and F1 of all entities, their means over the types, and the F1 of each type.
SCORED = {
    "IOB2": ("B-per I-per O B-loc O | B-per B-per O I-org I-org | O B-loc I-loc O B-misc",
             "B-per I-per O I-loc O | B-per I-per O B-org B-org | I-loc I-loc B-loc O I-per",
             (0.25, 0.285714, 0.266667), (0.166667, 0.208333, 0.183333), {"loc": 0.4, "misc": 0, "org": 0, "per": 0.333333}),
    "IOB1": ("I-per B-per I-per O I-loc | B-org O I-org I-loc B-loc",
             "I-per I-per I-per O B-loc | I-org O B-org I-loc I-loc",
             (0.6, 0.428571, 0.5), (0.5, 0.444444, 0.466667), {"loc": 0.4, "org": 1, "per": 0}),
    "IO": ("I-per I-per O I-loc | I-org I-loc O O", "I-per O O I-loc | I-loc I-loc O I-misc",
           (0.25, 0.25, 0.25), (0.125, 0.125, 0.125), {"loc": 0.5, "misc": 0, "org": 0, "per": 0}),
    "BIOES": ("S-per B-per E-per O S-loc | B-org I-org E-org O B-loc | S-per O O",
              "B-per I-per E-per O S-loc | B-org E-org I-org O S-loc | E-per E-per S-misc",
              (0.375, 0.5, 0.428571), (0.333333, 0.333333, 0.333333), {"loc": 1, "misc": 0, "org": 0, "per": 0.333333}),
    "BILOU": ("U-per B-per L-per O U-loc | B-org I-org L-org O", "U-per U-per O O U-loc | B-org L-org U-org O",
              (0.4, 0.5, 0.444444), (0.5, 0.5, 0.5), {"loc": 1, "org": 0, "per": 0.5}),
}


@pytest.mark.parametrize("scheme", SCORED)
def test_scores_are_the_numbers_of_seqeval_and_conlleval(scheme):
    true, given, micro, macro, per_type = SCORED[scheme]
    sentences = [words.Sentence(tags.split(), tags.split(), []) for tags in true.split("|")]
    counts = words.count(sentences, [tags.split() for tags in given.split("|")])
    found = words.scores(counts)
    names = "precision", "recall", "f1"
    assert [found[name] for name in names] == pytest.approx(micro, abs=1e-6)
    assert [found[f"macro_{name}"] for name in names] == pytest.approx(macro, abs=1e-6)
    for name, f1 in per_type.items():
        assert words.scores({name: counts[name]})["f1"] == pytest.approx(f1, abs=1e-6)
    assert counts.keys() == per_type.keys()


# ---- files


def write(path, content):
    path.write_bytes(content.encode())
    return path


def test_conll_files(tmp_path):
    """With what the file of CoNLL 2003 has, a mark of its beginning, other columns; and comments, lone tabs, CRLF."""
    file = write(tmp_path / "x.txt", "\ufeff-DOCSTART- -X- -X- O\n\n# id 5 domain=en\nEU NNP B-NP I-ORG\r\nrejects VBZ B-VP O\n"
                                     " \t \n# # # O\n-DOCSTART- -X- O O\nRome NN B-NP I-LOC")
    found = words.read(file)
    assert [(s.words, s.tags, s.lines) for s in found.sentences] == [
        (["EU", "rejects"], ["B-ORG", "O"], [4, 5]), (["#"], ["O"], [7]), (["Rome"], ["B-LOC"], [9])]
    assert found.scheme == "IO" and found.notes == [f"{file}: tags are IO"]
    tabs = write(tmp_path / "y.conll", "# a comment\n#rome\tB-loc\n#\tO\n\t\n# another\n\u200e\tO\n")
    assert [s.words for s in words.read(tabs).sentences] == [["#rome", "#"], ["\u200e"]]


def test_json_lines_and_words_without_tags(tmp_path):
    file = write(tmp_path / "x.jsonl", '{"tokens": ["New York", "is"], "tags": ["S-loc", "O"]}\n\n')
    found = words.read(file)
    assert found.sentences == [words.Sentence(["New York", "is"], ["B-loc", "O"], [1, 1])] and found.scheme == "BIOES"
    for name, content in (("y.jsonl", '{"tokens": ["a"]}'), ("y.conll", "a\n")):
        assert words.read(write(tmp_path / name, content), tags_optional=True).sentences == [words.Sentence(["a"], None, [1])]


@pytest.mark.parametrize("content, said", [
    ("Rome\tB-loc\nis\n", "line 2: 'is' has no tag"),
    ("Rome\tB-\n", "line 1: the tag 'B-' has no type"),
    ("a\tO\nRome\tB\n", "line 2: the tag 'B' has no type"),
    ("Rome\tLOC\n", "line 1: the tag 'LOC' is neither O nor like B-person"),
    ("Rome\tB-loc\nis O\n", "line 2: tabs and blanks mixed: there is a blank, and tabs part"),
    ("Rome B-loc\nis\tO\n", "line 2: tabs and blanks mixed: there is a tab, and blanks part"),
    ("New York\tB-loc\n", "line 1: tabs and blanks mixed"),
    ("a O\nNew York B-loc\n", "line 2: 3 columns, and 2 in the first line"),
    ("a\tO\n\tO\n", "line 2: an empty word"),
    ("a\tS-x\n\nb\tB-x\nc\tL-x\n", "line 4: mixed schemes: L-x is of BILOU, and a tag in line 1 of BIOES"),
    ("", "holds no words"),
    ("\n \t\n# nothing\n", "holds no words"),
    ("a\tO\0\n", "NUL bytes"),
])
def test_broken_files_are_one_line(tmp_path, content, said):
    with pytest.raises(words.WordError) as caught:
        words.read(write(tmp_path / "x.conll", content))
    assert said in str(caught.value) and "\n" not in str(caught.value) and "x.conll" in str(caught.value)


@pytest.mark.parametrize("content, said", [
    ("{", "line 1: no JSON"), ("[]", "line 1: no words"), ('{"tokens": []}', "line 1: no words"),
    ('\n{"tokens": ["a"]}', "line 2: 1 word and 0 tags"), ('{"tokens": ["a"], "tags": [3]}', "the tag 3 is no text"),
    ('{"tokens": ["\\ud83d"], "tags": ["O"]}', "half of a character"), ('{"tokens": [" "], "tags": ["O"]}', "empty word"),
])
def test_broken_json_lines_are_one_line(tmp_path, content, said):
    with pytest.raises(words.WordError, match=said):
        words.read(write(tmp_path / "x.jsonl", content))


def test_files_of_a_folder(tmp_path):
    for name in ("train.bio", "dev.txt", "test.jsonl", ".train.swp", "readme.md"):
        (tmp_path / name).touch()
    assert {split: path.rsplit("/")[-1] for split, path in words.find_files(tmp_path).items()} == {
        "train": "train.bio", "val": "dev.txt", "test": "test.jsonl"}
    (tmp_path / "val.conll").touch()
    with pytest.raises(words.WordError, match=r"dev.txt and val.conll: which is meant\?"):
        words.find_files(tmp_path)
    with pytest.raises(words.WordError, match="no such file or folder: nowhere"):
        words.find_files("nowhere")


def test_other_schemes_in_other_splits_and_what_is_said_of_them(tmp_path):
    write(tmp_path / "train.txt", "a O\nRome I-loc\nin I-loc\n\nEve I-per\nAda B-per\n")
    write(tmp_path / "dev.txt", "Rome S-loc\nRome B-loc\n")
    found = words.gather(tmp_path)
    assert found.classes == ["O", "B-loc", "I-loc", "B-per", "I-per"]
    assert [s.tags for s in found.splits["train"]] == [["O", "B-loc", "I-loc"], ["B-per", "B-per"]]
    said = words.describe(found)
    assert "train.txt: tags are IOB1" in said and "dev.txt: tags are BIOES" in said
    assert "dev.txt: 1 tag against BIOES, such as B-loc behind S-loc in line 2" in said
    rows = [line.split() for line in said.splitlines()[:6]]
    assert rows == [["train", "val"], ["sentences", "2", "1"], ["words", "5", "2"], ["entities", "3", "2"],
                    ["loc", "1", "2"], ["per", "2", "0"]]
    write(tmp_path / "test.txt", "x O\n\ny B-org\n")
    with pytest.raises(words.WordError, match=r"test.txt, line 3: an entity of the type 'org', which train has none of"):
        words.gather(tmp_path)
    write(tmp_path / "test.txt", "x O\n")
    write(tmp_path / "train.txt", "x O\n")
    with pytest.raises(words.WordError, match="has no entity"):
        words.gather(tmp_path)


def test_what_is_set_aside_depends_on_the_words_and_leaves_train_each_type(tmp_path):
    blocks = [f"w{i} O\nx{i} B-{'rare' if i == 7 else 'loc'}" for i in range(20)]
    chosen = []
    for order in (blocks, blocks[::-1] + blocks):
        found = words.gather(write(tmp_path / "x.conll", "\n\n".join(order)), val_split=0.5)
        chosen.append({tuple(s.words) for s in found.splits["val"]})
        assert not chosen[-1] & {tuple(s.words) for s in found.splits["train"]}
    assert chosen[0] == chosen[1] and len(chosen[0]) == 10 and ("w7", "x7") not in chosen[0]


def test_a_column_more(tmp_path):
    content = "# id 1\nRome\tB-loc  \nis\tO\r\n\r\n\nRome\tB-loc"
    found = words.read(write(tmp_path / "x.conll", content))
    assert words.with_column(content, found.sentences, [["X", "Y"], ["Z"]]) == (
        "# id 1\nRome\tB-loc\tX\nis\tO\tY\r\n\r\n\nRome\tB-loc\tZ")


# ---- pieces

ODD = ["\u200e", "good", "xyz", "\U0001f600", "\u202bnice\u202c", "\ufe0f", "\u200e\u200f"]


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    return text.make_tokenizer(text.load_pretrained(tiny_bert), of_words=True)


def sentence(*of, tag="O"):
    return words.Sentence(list(of), [tag] * len(of), list(range(len(of))))


def test_words_with_no_one_and_many_pieces(tokenizer):
    """An emoji is one piece, unknown; marks of direction and variants are none, within a word they go."""
    found = words.WordList([sentence(*ODD), sentence("\u200e")], ["O"], tokenizer, 64)
    assert found.no_pieces == ["\u200e", "\ufe0f", "\u200e\u200f", "\u200e"] and len(found) == 1 and found.lengths == [8]
    x, y, bad = found.numbered().collate([found.numbered()[0]])
    assert tokenizer.convert_ids_to_tokens(x["input_ids"][0]) == [
        "[CLS]", "good", "x", "##y", "##z", "[UNK]", "nice", "[SEP]"]
    assert y.tolist() == [1, 2, 3, 4] == found.parts(0).tolist() and bad == [] and len(found.labels()) == 8
    assert x["first"].nonzero()[:, 1].tolist() == [1, 2, 5, 6]
    assert words.describe_pieces(found, "val", 64) == [
        r"note: val: 4 words without a piece ('\u200e', '\ufe0f', '\u200e\u200f'): predicted as O"]
    with pytest.raises(words.WordError, match="no word of these sentences has a piece"):
        words.WordList([sentence("\u200e")], ["O"], tokenizer, 64)


@pytest.mark.parametrize("max_length", [8, 13, 64])
def test_every_word_of_a_thousand_is_read_where_it_has_the_most_context(tokenizer, max_length):
    rng = random.Random(max_length)
    long = [rng.choice(["good", "xyz", "\u200e", "abcdefgh"]) for _ in range(1000)]
    long[500] = "letters" * 30  # of more pieces than all windows here have
    found = words.WordList([sentence("bad"), sentence(*long)], ["O"], tokenizer, max_length).numbered()
    x, y, _ = found.collate([found[i] for i in range(len(found))])
    with_piece = [number for number, word in enumerate(["bad", *long]) if word != "\u200e"]
    assert sorted(y.tolist()) == with_piece and max(found.lengths) == max_length and found.long == 1
    assert x["input_ids"].shape == (len(found), max_length) and x["attention_mask"].sum(1).tolist() == found.lengths
    # By hand: the pieces of the whole sentence, and how far each word is from the ends of the window that reads it.
    pieces = [tokenizer.tokenize(word) for word in long]
    starts = [sum(map(len, pieces[:i])) for i in range(len(long))]
    length = sum(map(len, pieces))
    for row in range(1, len(found)):
        tokens = tokenizer.convert_ids_to_tokens(x["input_ids"][row])
        for column, number in zip(x["first"][row].nonzero()[:, 0].tolist(), found.parts(row).tolist(), strict=True):
            assert tokens[column] == pieces[number - 1][0]
            before, behind = column - 1, int(x["attention_mask"][row].sum()) - 3 - column + 1
            at_begin, at_end = starts[number - 1] == before, length - 1 - starts[number - 1] == behind
            # Windows overlap by half, less the word at which one begins.
            least = (max_length - 2) // 4 - 8
            assert (before >= least or at_begin) and (behind >= least or at_end), (row, column)


def test_context_by_hand(tokenizer):
    """Ten words of one piece, windows of four: each begins two words behind the one before."""
    found = words.WordList([sentence(*["good"] * 10)], ["O"], tokenizer, 6)
    assert [(*found.windows[i].tolist(), found.parts(i).tolist()) for i in range(len(found))] == [
        (0, 4, [0, 1, 2]), (2, 6, [3, 4]), (4, 8, [5, 6]), (6, 10, [7, 8, 9])]


def test_a_batch_padded_on_the_left(tokenizer):
    found = words.WordList([sentence("good"), sentence("bad", "xy", "fine")], ["O"], tokenizer, 64).numbered()
    found.pad_left = True
    x, y, _ = found.collate([found[0], found[1]])
    assert y.tolist() == [0, 1, 2, 3] and x["input_ids"][0, :3].tolist() == [0, 0, 0]
    assert [row.nonzero()[:, 0].tolist() for row in x["first"]] == [[4], [1, 2, 4]]


def test_bytes_have_a_blank_before_each_word(tmp_path):
    """The tokenizers of RoBERTa, and others of its kind, take a word within a sentence for another than at its beginning."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(["a good film"] * 3, trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    tokenizer = text.make_tokenizer(text.load_pretrained(tmp_path, "none"), of_words=True)
    found = words.WordList([sentence("good", "film")], ["O"], tokenizer, 8)
    x, _, _ = found.collate([found[0]])
    assert [token[0] for token in tokenizer.convert_ids_to_tokens(x["input_ids"][0][x["first"][0]])] == ["Ġ", "Ġ"]
    assert words.words_of("good  film.", tokenizer) == [(0, 4), (6, 11)]


def test_words_of_a_text(tokenizer):
    content = "a good\u200e film, don't! \u200e"
    assert [content[start:end].strip("\u200e") for start, end in words.words_of(content, tokenizer)] == [
        "a", "good", "film", ",", "don", "'", "t", "!"]


# ---- networks

KINDS = {"bert": {}, "roberta": {"pad_token_id": 1}, "electra": {"embedding_size": 16},
         "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
         "modernbert": {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}}


@pytest.mark.parametrize("kind", KINDS)
def test_words_get_what_their_first_pieces_get(kind):
    """The logits of transformers' network, and the same bits from features, with dropout."""
    torch.manual_seed(0)
    shape = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 64, "max_position_embeddings": 66, "num_labels": 3}
    network = text.make_network(transformers.AutoConfig.for_model(kind, **shape | KINDS[kind]), of_words=True).eval()
    model = words.WordClassifier(network)
    assert model.state_dict().keys() == network.state_dict().keys()
    assert text.find_head(model) == "classifier"
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[1, 5:] = 0
    x = {"input_ids": torch.randint(4, 100, (4, 9)), "attention_mask": mask}
    first = mask.bool() & (torch.rand(4, 9) < 0.5)
    with torch.no_grad():
        torch.testing.assert_close(model(first=first, **x).logits, network(**x).logits[first])
        side = words.HeadSide(model)
        found = side.features(x | {"first": first})
        outputs = []
        for run in (lambda: model(first=first, **x), lambda: side(features=found)):
            model.train()
            model.base_model.eval()
            torch.manual_seed(1)
            outputs.append(run().logits)
    assert torch.equal(*outputs) and found.shape == (int(first.sum()), 32)


# ---- scores


def test_rows_of_entities():
    true = [sentence("in", "New", "York", "Eve")._replace(tags=["O", "B-loc", "I-loc", "B-per"]), sentence("a")]
    given = [["O", "B-loc", "I-loc", "B-loc"], ["B-per"]]
    rows = words.prediction_rows(true, given, torch.tensor([0.9, 0.8, 0.6, 0.5, 0.4]))
    assert [list(row.values()) for row in rows] == [
        ["in New York Eve", 3, 11, "New York", "loc", "loc", "0.700000"],
        ["in New York Eve", 12, 15, "Eve", "per", "loc", "0.500000"],
        ["a", 0, 1, "a", "", "per", "0.400000"]]
    assert words.word_accuracy(true, given) == (3 / 5, 2 / 5)
    assert words.scores({}) == dict.fromkeys(words.scores({}), 0.0)
