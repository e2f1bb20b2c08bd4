"""What holds for the repository as a whole: helpers that can be copied alone, the ten sections, a README and pages under
docs/ that are true, and whose links lead somewhere."""

import ast
import importlib.util
import inspect
import io
import multiprocessing.spawn
import os
import re
import shlex
import subprocess
import sys
import textwrap
import warnings
from collections import Counter

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import default_collate

import all_models
import arguments
import data
import demo
import options
import predict
import predict_text
import report
import train_classifier
import train_continual
import train_multilabel
import train_regressor
import train_text_classifier
import train_token_classifier
from conftest import ROOT, draw
from pages import PAGES, README, TEXT, snippet

SCRIPTS = ["train_classifier.py", "train_multilabel.py", "train_regressor.py", "train_continual.py",
           "train_text_classifier.py", "train_token_classifier.py"]
TEXT_FILES = ["train_text_classifier.py", "train_token_classifier.py", "predict_text.py", "text.py"]
TORCH_ONLY = ["freeze.py", "losses.py", "metrics.py", "checkpoint.py", "features.py", "distributed.py", "words.py"]
HELPERS = [*TORCH_ONLY, "export.py", "arguments.py", "ending.py", "tables.py", "model.py", "data.py", "report.py", "text.py"]


def imports(name):
    found = set()
    tree = ast.parse((ROOT / name).read_text())
    # What only the person at the terminal needs is imported inside a main().
    tree.body = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name == "main")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", HELPERS)
def test_a_helper_can_be_copied_alone(name):
    third_party = {"torch"} if name in TORCH_ONLY else {"torch", "torchvision", "PIL", "numpy", "matplotlib"}
    third_party |= {"model.py": {"timm", "safetensors"}, "export.py": {"onnxruntime"},
                    "text.py": {"transformers", "safetensors", "huggingface_hub"}}.get(name, set())  # where asked for
    assert imports(name) - set(sys.stdlib_module_names) <= third_party


def test_transformers_is_of_the_text_scripts_alone():
    """Who works with pictures does not need it: no other file imports it, text.py or words.py, and text.py only within
    functions."""
    for file in ROOT.glob("*.py"):
        of_text = {"transformers", "tokenizers", "safetensors", "huggingface_hub", "text", "words"}
        imported = {name for node in ast.parse(file.read_text()).body for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else
            [node.module] if isinstance(node, ast.ImportFrom) else [])}
        if file.name not in TEXT_FILES:
            assert not imported & of_text, file.name
        if file.name == "text.py":
            assert not imported & (of_text - {"text"})


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_ten_sections_stand_in_order(name):
    found = re.findall(r"^ *# ---- (\d+) ([A-Za-z, ]+?) -+$", (ROOT / name).read_text(), re.M)
    titles = ["arguments", "device and processes", "data", "model and head", "freezing", "loss",
              "optimizer, schedule, scaler", "what is saved, and resume", "several gpus", "the loop"]
    assert [(number, title.lower()) for number, title in found] == [(str(i + 1), t) for i, t in enumerate(titles)]


@pytest.mark.parametrize("name", [*SCRIPTS, "predict.py", "predict_text.py"])
def test_the_threads_of_torch_do_not_spin(name):
    """What OpenMP is to read stands before anything that imports torch; a user's own choice stays."""
    said = 'os.environ.setdefault("OMP_WAIT_POLICY", "passive")'
    lines = (ROOT / name).read_text().splitlines()
    others = {path.stem for path in ROOT.glob("*.py")} | {"torch", "torchvision"}
    assert lines.index(said) < min(i for i, line in enumerate(lines) if line.startswith(("import ", "from "))
                                   and line.split()[1] in others)


def test_files_are_only_read_with_weights_only():
    for file in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):  # not what is printed, for a user to type
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), file


# ---- the README and the pages under docs/


def commands():
    """Every command that starts a script of this repository in a code block of the pages, one line each."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.S | re.M):
        for line in block.splitlines() if not language else []:
            for part in line.removeprefix("$ ").split("&&"):
                if part.split()[:1] == ["torchrun"]:
                    part = re.sub(r"^.*?(?=train_\w+\.py)", "python ", part.strip())
                if part.split()[:1] == ["python"]:
                    yield part.partition(" # ")[0].partition("  # ")[0].strip()


def test_every_command_of_the_pages_is_understood(pictures):
    seen = 0
    for command in commands():
        words = shlex.split(command)[1:]
        parsers = {"train_classifier.py": train_classifier.build_parser, "predict.py": predict.build_parser,
                   "train_regressor.py": train_regressor.build_parser, "demo.py": demo.build_parser,
                   "train_continual.py": train_continual.build_parser,
                   "train_multilabel.py": train_multilabel.build_parser,
                   "train_text_classifier.py": train_text_classifier.build_parser, "predict_text.py": predict_text.build_parser,
                   "train_token_classifier.py": train_token_classifier.build_parser}
        if words[0] in parsers:
            parsers[words[0]]().parse_args(words[1:])
            seen += 1
        if words[0].startswith("train_") and "--resume" not in words:
            script = __import__(words[0].removesuffix(".py"))
            args, _ = script.read_arguments([*words[1:], "--output", "x"] if "--output" not in words else words[1:])
            # Are there such layers? (timm is not among the requirements, and networks for texts would be downloaded.)
            of_pictures = words[0] not in TEXT_FILES
            if "list_layers" in args and args.freeze != "none" and of_pictures and not args.model.startswith("timm:"):
                with all_models.QuickInit(fill=False):
                    script.main([*words[1:], "--data", str(pictures), "--list-layers"])
        else:
            assert words[0] in ("-m", "demo.py") or (ROOT / words[0]).exists(), command
    assert seen >= 8


def test_sorting_kaggles_flat_folder(tmp_path, monkeypatch):
    for kind in ("cat", "dog"):
        for i in (0, 1, 10):
            draw(tmp_path / f"train/{kind}.{i}.jpg", kind, i)
    monkeypatch.chdir(tmp_path)
    exec(snippet("sort_flat_folder"), {})
    images = data.find_images(tmp_path / "cats_and_dogs", val_split=0.34)
    assert images.classes == ["cat", "dog"]
    for split, count in (("train", 4), ("val", 2)):
        assert len(images.splits[split]) == count
        assert all(images.classes[y] == os.path.basename(p).split(".")[0] for p, y in images.splits[split])
    assert len(list((tmp_path / "train").iterdir())) == 6  # copied


def edited_script(name, line, place, script="train_classifier.py"):
    """The script with a snippet of the pages put before (place 0) or behind (1) the line that starts so, as a module."""
    lines = (ROOT / script).read_text().splitlines()
    places = [i for i, found in enumerate(lines) if found.strip().startswith(line)]
    assert len(places) == 1
    indent = len(lines[places[0]]) - len(lines[places[0]].lstrip())
    lines[places[0] + place : places[0] + place] = textwrap.indent(snippet(name), " " * indent).splitlines()
    spec = importlib.util.spec_from_loader(name, None)
    module = importlib.util.module_from_spec(spec)
    exec(compile("\n".join(lines), name, "exec"), vars(module))
    return module


def test_your_own_loss_in_one_line(train, weights, monkeypatch):
    seen = []
    real = torch.nn.MultiMarginLoss.forward
    monkeypatch.setattr(torch.nn.MultiMarginLoss, "forward", lambda *a: (seen.append((*a, real(*a))), seen[-1][-1])[1])
    script = edited_script("own_loss", "losses.refuse_unused(", 0)
    monkeypatch.setattr(train_classifier, "main", script.main)
    run = train("--freeze", "backbone", weights=weights, batch_size=20)
    criterion, logits, labels, loss = seen[0]
    right = logits.gather(1, labels[:, None])
    by_hand = (0.5 - right + logits).clamp(min=0).scatter(1, labels[:, None], 0).sum(1) / 2
    assert torch.load(run / "last.pt", weights_only=True)["history"][0]["train_loss"] == pytest.approx(by_hand.mean().item())
    assert len(seen) == 2  # the training batch, and the validation split


def test_your_own_transform(train, monkeypatch):
    script = edited_script("own_transform", "augment = data.augmentation(", 1)
    monkeypatch.setattr(train_classifier, "main", script.main)
    seen, real = [], data.ImageList.__init__
    monkeypatch.setattr(data.ImageList, "__init__", lambda self, samples, transform, *a, **k: (
        seen.append(transform), real(self, samples, transform, *a, **k))[1])
    run = train()
    again = train()
    assert [type(t).__name__ for t in seen[0].transforms] == ["RandomResizedCrop", "RandomVerticalFlip", "ColorJitter"]
    a, b = (torch.load(r / "last.pt", weights_only=True)["model"] for r in (run, again))
    assert all(torch.equal(a[k], b[k]) for k in a)  # seeded, like the transforms that it replaces


def test_a_program_of_your_own_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """The snippet of docs/runs.md, ended by an error in its eighth step."""
    monkeypatch.chdir(tmp_path)
    exec(snippet("own_program"), {})
    os.rename("my_run", "whole")
    steps, step = [], torch.optim.AdamW.step

    def dying(optimizer):
        steps.append(step(optimizer))
        if len(steps) == 8:
            raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch.optim.AdamW, "step", dying)
        exec(snippet("own_program"), {})
    exec(snippet("own_program"), {})
    assert "resumed from my_run/last.pt at epoch 0, step 7" in capsys.readouterr().out
    a, b = (torch.load(f"{run}/last.pt", weights_only=True) for run in ("whole", "my_run"))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"]) and a["step"] == b["step"] == 20


def test_a_loop_of_your_own_freezes_both_ways():
    names = {}
    exec(snippet("own_loop"), names)
    model, plain = names["model"], torchvision.models.resnet18()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["fc.weight", "fc.bias"]
    start = {k: v for k, v in plain.state_dict().items() if "running" in k or "num_batches" in k}
    assert start and all(torch.equal(model.state_dict()[k], v) for k, v in start.items())


def provoke(message):
    """What PyTorch says when one does what the table of its errors says beside this message."""
    resnet, x, labels = torchvision.models.resnet18(num_classes=3), torch.randn(2, 3, 64, 64), torch.tensor([0, 1])

    def pickled():
        torch.save(nn.Linear(1, 1), buffer := io.BytesIO())
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)

    def all_frozen():
        nn.functional.cross_entropy(resnet.requires_grad_(False)(x), labels).backward()

    def wrong_head():
        resnet.fc = nn.Linear(2048, 2)
        resnet(x)

    def held_graphs():
        total, layer = 0, nn.Linear(1, 1)
        for _ in range(2):
            total = total + layer(torch.ones(1, 1)).square().sum()
            total.backward()

    def unscaled_twice():
        scaler, layer = torch.amp.GradScaler("cpu"), nn.Linear(1, 1)
        optimizer = torch.optim.SGD(layer.parameters())
        scaler.scale(layer(torch.ones(1, 1)).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.unscale_(optimizer)

    def broadcast():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            nn.functional.mse_loss(torch.randn(4, 1), torch.randn(4))

    def no_main():  # spawning such a script would take ten seconds
        raise RuntimeError(inspect.getsource(multiprocessing.spawn))

    def of_another_size():
        torchvision.models.VisionTransformer(224, 32, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8)(x)

    ways = {
        "object has no attribute 'val'": lambda: resnet.val(),
        "object has no attribute 'fc'": lambda: torchvision.models.mobilenet_v2().fc,
        "mat1 and mat2 shapes cannot be multiplied": wrong_head,
        "size mismatch for fc.weight": lambda: torchvision.models.resnet18(num_classes=2).load_state_dict(resnet.state_dict()),
        "Missing key(s) in state_dict": lambda: resnet.load_state_dict(nn.DataParallel(resnet).state_dict()),
        "Weights only load failed": pickled,
        "element 0 of tensors does not require grad": all_frozen,
        "optimizer got an empty parameter list": lambda: torch.optim.SGD(p for p in resnet.parameters() if not p.requires_grad),
        "Expected more than 1 value per channel when training": lambda: resnet.train()(x[:1, :, :32, :32]),
        "is out of bounds": lambda: nn.functional.cross_entropy(torch.randn(2, 1), labels),
        "to have 3 channels, but got": lambda: resnet(torch.randn(2, 4, 64, 64)),
        "stack expects each tensor to be equal size": lambda: default_collate([torch.zeros(3, 4, 4), torch.zeros(3, 5, 4)]),
        "expected scalar type Byte but found Float": lambda: resnet(x.to(torch.uint8)),
        "must be Tensor, not GoogLeNetOutputs": lambda: nn.functional.cross_entropy(
            torchvision.models.googlenet(init_weights=False).train()(x), labels),
        "Wrong image height!": of_another_size,
        "Using a target size": broadcast,
        "Trying to backward through the graph a second time": held_graphs,
        "unscale_() has already been called on this optimizer": unscaled_twice,
        "An attempt has been made to start a new process before": no_main,
    }
    way = ways[message]  # a message that is not there is no answer: a KeyError would repeat it
    with pytest.raises(Exception) as caught:
        way()
    return str(caught.value)


def test_pytorch_says_what_the_table_of_its_errors_says():
    table = PAGES["docs/troubleshooting.md"].partition("## What PyTorch says")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    assert len(messages) == 19
    with all_models.QuickInit(fill=True):
        for message in messages:
            assert message in " ".join(provoke(message).split()), message


def test_options_that_the_text_names_exist():
    scripts = (train_classifier, train_multilabel, train_regressor, train_continual, predict, demo, train_text_classifier,
               predict_text, train_token_classifier)
    known = {o for s in scripts for a in s.build_parser()._actions for o in a.option_strings}
    known |= {"--check", "--shm-size", "--logdir", "--no-deps"}  # of data.py, docker, tensorboard, pip
    known |= {"--nproc", "--nnodes", "--node", "--rdzv", "--max-restarts"}  # torchrun's, to their first underscore
    known |= set(re.findall(r"^#SBATCH (--[a-z-]+)", TEXT, re.M))
    of_benchmarks = set(re.findall(r"--[a-z][a-z0-9-]+", " ".join(re.findall(r"python benchmarks/[^`\n]*", TEXT))))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", TEXT)) - of_benchmarks <= known
    text = re.sub(r"\b(SLURM|OMP)_[A-Z_]+", "", TEXT)
    assert not re.search(r"[A-Z]+_[A-Z]+|RESULTS|TODO", text)  # nothing left to be filled in


def test_the_tables_of_all_options_are_true():
    assert PAGES["docs/options.md"] == options.page(), "write it anew: python tests/options.py"


def test_the_table_of_defaults_is_true():
    parser = train_classifier.build_parser()
    rows = re.findall(r"^\| (`--[^|]*) \| ([^|]*) \|", PAGES["docs/training.md"].partition("## Defaults")[2].partition("\n## ")[0], re.M)
    checked = set()
    for names, text in rows:
        for option, value in zip(re.findall(r"--[a-z0-9-]+", names), text.split(","), strict=False):
            default = next(a.default for a in parser._actions if option in a.option_strings)
            if option == "--lr":
                default = arguments.DEFAULT_LR["adamw"]
            if default is not None and option != "--workers":
                assert value.strip().strip("`").split()[0] == str(default).removesuffix(".0"), option
                checked.add(option)
    assert {"--epochs", "--lr", "--batch-size", "--optimizer", "--freeze", "--patience", "--monitor"} <= checked


def test_the_first_command_of_the_readme_and_predict_as_commands(tmp_path):
    """What a newcomer types, in a folder of its own, with one epoch."""
    first = next(line for line in README.splitlines() if line.startswith("python3 -m venv"))
    assert first.endswith(" && python demo.py")  # which tests/test_demo.py runs; here is what it does with --draw

    def run(command, **environment):
        words = shlex.split(command)
        assert words[0] == "python"
        untouched = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        return subprocess.run([sys.executable, str(ROOT / words[1]), *words[2:]], cwd=tmp_path, text=True,
                              capture_output=True, timeout=200, env=untouched | environment)

    drawn = run("python demo.py --draw ./cats_and_dogs")
    assert drawn.returncode == 0
    train = drawn.stdout.partition("; next: ")[2]
    assert len(list((tmp_path / "cats_and_dogs").rglob("*.jpg"))) == 300
    trained = run(f"{train.strip()} --epochs 1 --output runs/first")
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr == ""  # no bar and no warnings where the output is no terminal
    assert [line for line in trained.stdout.splitlines() if line.startswith("epoch ")][0].startswith("epoch   0  train_loss")
    found = run("python predict.py --checkpoint runs/first/best.pt cats_and_dogs/test/cat/cat.1.jpg --csv x.csv")
    assert found.returncode == 0 and found.stderr == ""
    assert found.stdout.splitlines()[1].split()[0] == "cats_and_dogs/test/cat/cat.1.jpg"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cats_and_dogs", "runs", "x.csv"]
    missing = run("python train_classifier.py --data nowhere", OMP_DISPLAY_ENV="true")
    *openmp, error = missing.stderr.splitlines()
    assert (missing.returncode, error) == (2, "error: no such folder: nowhere: see how it is spelled; if the pictures have "
                                              "moved, say where they are now: --data NEWPLACE (old ones: --old-data NEWPLACE)")
    if sys.platform == "linux":  # OpenMP says what it has read
        assert "  OMP_WAIT_POLICY = 'PASSIVE'" in openmp


# ---- links


LINKING = PAGES | {f"benchmarks/{page.name}": page.read_text() for page in sorted((ROOT / "benchmarks").glob("*.md"))}


def prose(text):
    """Without code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)


def anchors(text):
    """Those that GitHub gives the headings of a page."""
    found, seen = [], Counter()
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", prose(text), re.M):
        heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # a link: its text
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def test_anchors_are_made_as_github_makes_them():
    page = "# A `--b c`, and *d*\n## DataParallel: plain `python` uses all GPUs\n## Which loss?\n## Which loss?\n" \
           "### snake_case - [a link](x.md)\n```\n# a comment\n```\n## \"Frozen\" means two\n"
    assert anchors(page) == ["a---b-c-and-d", "dataparallel-plain-python-uses-all-gpus", "which-loss", "which-loss-1",
                             "snake_case---a-link", "frozen-means-two"]


def links(text):
    """The targets of all links and pictures, but for those into the web."""
    found = re.findall(r"!?\[(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*\]\(([^)\s]+)\)", prose(text))
    return [target for target in found if not re.match(r"https?://", target)]


@pytest.mark.parametrize("name", LINKING)
def test_every_link_leads_somewhere(name):
    for link in links(LINKING[name]):
        file, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / file).resolve() if file else ROOT / name
        assert target.exists(), f"{name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{name}: {link}"


def test_the_pages_are_short_listed_and_begin_with_their_question():
    assert README.count("\n") <= 230
    index = README.partition("\n## All pages\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^- \[[^\]]+\]\(([^)]+)\): .+$", index, re.M)
    assert sorted(set(listed) - {"benchmarks/README.md"}) == sorted(set(PAGES) - {"README.md"})
    assert len(listed) == len(set(listed)) == len(index.split("\n- ")) - 1  # one line each
    for name, text in PAGES.items():
        if name != "README.md":
            assert re.match(r"# .+\n\n\*[A-Z][^*]*\?\*\n\n", text), f"{name} does not begin with the question it answers"


@pytest.mark.parametrize("script", [train_classifier, train_multilabel, train_regressor, train_continual, predict, demo,
                                    report, data, train_text_classifier, predict_text, train_token_classifier])
def test_help_names_a_page(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    page = re.findall(r"^More: (\S+)$", capsys.readouterr().out, re.M)
    assert len(page) == 1 and page[0] in PAGES
