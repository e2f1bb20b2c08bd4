"""Networks by name: build one, load its weights, replace its head, know its preprocessing and its best precision.

    pretrained = load_pretrained("DEFAULT", "resnet18")              # or the name of weights, none, a file
    model = build("resnet18", **build_options("resnet18", 224, pretrained))
    model.fc = nn.Linear(512, 2)                                     # or mlp_head(model.fc, outputs=2)
    print(load_weights(model, pretrained["state_dict"], head="fc"))

Networks of timm have names that begin with `timm:`. This file needs torch and torchvision, and for those timm, and can be
copied into any project.
"""

import contextlib
import copy
import ctypes
import difflib
import os
import re
import shlex
import sys
import unicodedata
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from urllib.error import URLError

import torch
import torch.distributed as dist
import torchvision
from torch import nn

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# The weight of each auxiliary head's loss beside that of the head: Szegedy et al., "Going Deeper with Convolutions",
# 2014, and "Rethinking the Inception Architecture", 2016, as PyTorch's tutorial has it.
AUXILIARY_WEIGHT = {"googlenet": 0.3, "inception_v3": 0.4}


class ModelError(Exception):
    """A network or weights that cannot be had. The message is one line that names the way out."""


def model_names():
    """The names of torchvision's classification models."""
    return torchvision.models.list_models(module=torchvision.models)


def check_name(name):
    """Raise ModelError, naming close matches, unless `name` is a classification model of torchvision or, with `timm:`
    before it, of timm. `timm:NAME.TAG` also says which of timm's weights.
    """
    prefix, known, there_are = "", model_names(), f"there are: {', '.join(model_names())}, and timm:NAME"
    if name.startswith("timm:"):
        prefix, timm, there_are = "timm:", _timm(), "timm.list_models() lists them"
        known = [*timm.list_models(), *timm.list_models(pretrained=True)]
    own = name.removeprefix(prefix)
    if own not in known:
        close = difflib.get_close_matches(own.lower().replace("-", "_"), known, n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(prefix + n for n in close)}?" if close else there_are
        raise ModelError(f"unknown model '{name}': {hint}")


# ---- pretrained weights


def load_pretrained(weights, name):
    """Find pretrained weights for the network `name` and the preprocessing they were trained with.

    weights: `none`; DEFAULT or another torchvision weights name (downloaded once by torch.hub into its cache); or a
    local file of torch.save or safetensors: a bare `state_dict`, or whatever holds a single one in nested dicts. Of
    several, FILE::KEY chooses: KEY is what leads there, with dots between. For `timm:NAME.TAG`, DEFAULT stands for the
    weights TAG, without it for timm's choice.
    Returns a dict: state_dict (None for `none`), outputs (list of names, None if unknown), source (words), image_size
    and resize_size (pixels, for evaluation), mean, std, interpolation, imagenet_input (see `build_options`).
    Raises ModelError; a network is never left at random weights because a download failed.
    """
    check_name(name)
    pretrained = {"state_dict": None, "outputs": None, "source": "none: random weights", "image_size": 224,
                  "resize_size": 256, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bilinear",
                  "imagenet_input": False}
    if is_timm := name.startswith("timm:"):
        enum, pretrained = [], pretrained | _timm_preset(name)
    else:
        enum = torchvision.models.get_model_weights(name)
    if weights.lower() == "none":
        return pretrained if is_timm else pretrained | _preset(enum.DEFAULT)
    file, _, key = (weights, "", "") if os.path.exists(weights) else weights.partition("::")
    endings = (".pt", ".pth", ".safetensors", ".ckpt", ".bin")
    is_file = key or os.path.exists(file) or file.endswith(endings) or os.sep in file
    if is_timm and not is_file:
        return pretrained | {"state_dict": _timm_weights(name, weights), "source": f"{name}, pretrained"}
    if not is_file:
        owner, _, chosen = weights.rpartition(".")
        if chosen not in enum.__members__ or owner not in ("", enum.__name__):
            raise ModelError(f"{name} has no weights '{weights}': there are {', '.join(enum.__members__)}, "
                             "none, or the path of a local .pt or .pth file")
        entry = enum[chosen]
        try:
            state_dict = entry.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except (URLError, OSError, RuntimeError) as error:
            raise ModelError(f"could not download {entry} ({_first_line(error)}): fetch {entry.url} elsewhere and give "
                             "the file as --weights FILE, or train from random weights with --weights none") from error
        return pretrained | _preset(entry) | {"state_dict": state_dict, "source": str(entry), "imagenet_input": True}

    holder = read_file(file)
    # A file that torchvision published is known by its name, so its own preprocessing applies.
    for entry in enum:
        if Path(entry.url).name == Path(file).name:
            pretrained |= _preset(entry) | {"imagenet_input": True}
    scripts = ("train_classifier", "train_continual", "train_multilabel", "train_regressor")
    if isinstance(holder, dict) and holder.get("script") in ("train_text_classifier", "train_token_classifier"):
        raise ModelError(f"{file} takes texts, {holder['script']}.py wrote it: --weights takes those of a network "
                         "for pictures")
    if isinstance(holder, dict) and holder.get("script") in scripts:  # one of our checkpoints
        pretrained |= holder["preprocessing"] | {"outputs": output_names(holder)}
        pretrained["imagenet_input"] = holder["build"]["options"].get("transform_input", False)
        if holder["build"]["name"].partition(".")[0] != name.partition(".")[0]:  # timm: the same one with other weights
            raise ModelError(f"{weights} holds a {holder['build']['name']}, not a {name}: "
                             f"give --model {holder['build']['name']}")
        if not key:  # its own weights, whatever an edited script has saved beside them
            return pretrained | {"state_dict": holder["model"], "source": file}
    state_dict, source = choose_weights(holder, file, key)
    return pretrained | {"state_dict": state_dict, "source": source}


# ---- files of weights

_FETCH = "open the address in a browser and fetch the file itself"
_OTHER = "take weights that were saved with PyTorch, a .pth, .pt or .safetensors file"
_UNPACK = "unpack it, and give the file of weights that it holds"
_PICTURE = "a picture: --weights takes the file of a network's weights"
# Regular expressions for a file's first bytes, and what it then is, with the way out.
SIGNATURES = (
    (rb"$", "empty: fetch or copy it again"),
    (rb"\0{512}", "empty at its beginning, a download that was not finished: fetch it again"),
    (rb"(?i:\s*<(!doctype|html|head|body))", f"a web page, such as a login or a warning before a download: {_FETCH}"),
    (rb"\s*<\?xml", f"an XML page, such as a server's message of an error: {_FETCH}"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the file that it stands for: fetch that with `git lfs pull`"),
    (rb"GGUF", f"a GGUF file, a language model of llama.cpp: {_OTHER}"),
    (rb".{4}TFL3", f"a model of TensorFlow Lite: {_OTHER}"),
    (rb".{4}ET\d\d", f"a program of ExecuTorch: {_OTHER}"),
    (rb"\x89HDF", f"an HDF5 file, as Keras and TensorFlow write it: {_OTHER}"),
    (rb"\x08[\x01-\x0f][\x12\x1a\x22\x28\x32\x3a\x42]", f"a model of ONNX, or of TensorFlow or Core ML: {_OTHER}"),
    (rb"\x93NUMPY", f"an array of NumPy: {_OTHER}"),
    (rb"\x1f\x8b", f"a gzip archive: {_UNPACK}"),
    (rb"BZh\d|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd|\x04\x22\x4d\x18", f"a compressed archive: {_UNPACK}"),
    (rb"sys_info\0", f"in the format that PyTorch wrote before 2017, which can run code: {_OTHER}"),
    (rb".{257}ustar", f"a tar archive: {_UNPACK}"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|II\*\0|MM\0\*|RIFF.{4}WEBP", _PICTURE),
    (rb"%PDF", f"a PDF document: {_OTHER}"),
    (rb"\x80[\x02-\x05]", "a Python pickle that torch.save did not write, nothing in it was executed: in the program "
                          "that made it, save the network's state_dict with torch.save"),
)


# What rewrites a file that can run code, typed by someone who trusts it. It keeps the tensors and the keys that lead to
# them, of networks their state_dict; of another object, such as fastai's Learner, what its attributes hold.
# Without $, ", ` and !, every shell leaves it as it is.
_CONVERT = ("import sys, torch; kinds = dict, list, tuple, torch.Tensor, torch.nn.Module; "
            "f = lambda x: x if isinstance(x, torch.Tensor) else "
            "f(x.state_dict()) if isinstance(x, torch.nn.Module) else "
            "{k: f(v) for k, v in x.items() if isinstance(v, kinds)} if isinstance(x, dict) else "
            "f(dict(enumerate(x))) if isinstance(x, (list, tuple)) else f(vars(x)); "
            "torch.save(f(torch.load(sys.argv[1], map_location='cpu', weights_only=False)), open('weights.pt', 'xb'))")
_CONVERT_SCRIPT = ("import sys, torch; "
                   "torch.save(torch.jit.load(sys.argv[1], map_location='cpu').state_dict(), open('weights.pt', 'xb'))")


def _converted_by(code, path):
    return f'where you trust it, type python -c "{code}" {shlex.quote(str(path))}, and give --weights weights.pt'


def kind_of(path):
    """What a file is, by its first bytes: `torch` (torch.save wrote it), `safetensors`, or in words what else, with the
    way out. Nothing in it is executed. Raises ModelError if it cannot be opened.
    """
    try:
        if os.path.isdir(path):
            return _kind_of_folder(path)
        with open(path, "rb") as file:
            start = file.read(1024)
    except OSError as error:
        if "://" in str(path):
            raise ModelError(f"{path} is an address: fetch the file, and give that") from error
        raise ModelError(f"no such file: {path}" if isinstance(error, FileNotFoundError)
                         else f"{path} cannot be read: {error.strerror}") from error
    if start.startswith(b"PK\3\4"):
        return _kind_of_zip(path)
    if re.match(rb"(?s)\x80[\x02-\x05](\x95.{8})?\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", start):  # before PyTorch 1.6
        return "torch"
    if start[8:10] == b'{"':  # behind the length of this header
        return "safetensors"
    for signature, words in SIGNATURES:
        if re.match(rb"(?s)(?:\xef\xbb\xbf)?" + signature, start):
            return words
    if re.search(r"\.index$|\.meta$|\.data-\d+-of-\d+$", str(path)):
        return f"a part of a TensorFlow checkpoint: {_OTHER}"
    text = start.decode("utf-8", errors="ignore")
    if len(text.encode()) > len(start) - 4 and all(c.isprintable() or c.isspace() for c in text):
        return f"text, which begins with {text.strip()[:40]!r}: --weights takes a .pth, .pt or .safetensors file"
    return "not a file that torch.save or safetensors wrote, or is damaged: fetch it again, or give another"


def _kind_of_folder(path):
    names = sorted(os.listdir(path))
    if "data.pkl" in names:  # what some browsers do with every zip archive
        return (f"the unpacked folder of a PyTorch file: pack it again with python -m zipfile -c weights.pth "
                f"{shlex.quote(str(path))}, and give --weights weights.pth")
    first = ("best.pt", "model.safetensors", "pytorch_model.bin")
    files = sorted((n for n in names if n.endswith((".pt", ".pth", ".safetensors", ".ckpt", ".bin"))),
                   key=lambda n: first.index(n) if n in first else len(first))
    found = f", such as {Path(path, files[0])}" if files else f"; here are {_some(names) or 'none'}"
    return f"a folder: give the file of weights in it{found}"


def _kind_of_zip(path):
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return "a file whose end is missing, as when a download breaks off: fetch it again"
    files = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in files:
        return f"a program of TorchScript: {_converted_by(_CONVERT_SCRIPT, path)}"
    if "archive_format" in files:
        return "a program that torch.export wrote: give the checkpoint that it was made from, such as best.pt"
    if "data.pkl" in files:
        return "torch"
    if "model.weights.h5" in files:
        return f"a model of Keras: {_OTHER}"
    if all(name.endswith(".npy") for name in files):
        return f"an archive of NumPy arrays: {_OTHER}"
    return f"a zip archive with {_some(names)}: {_UNPACK}"


def read_file(path):
    """Read what torch.save wrote, with `weights_only=True`, or a file of safetensors: tensors and plain values, never
    code. Raises ModelError, which says what the file is instead.
    """
    kind = kind_of(path)
    if kind == "safetensors":
        return _read_safetensors(path)
    if kind != "torch":
        raise ModelError(f"{path} is {kind}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the errors below say what is wrong
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        if "weights_only" not in str(error):
            raise ModelError(f"{path} is damaged, or its end is missing: fetch it again") from error
        names = re.search(r"GLOBAL ([\w.]+)", str(error))
        objects = f" ({names[1]})" if names else ", or is damaged,"
        raise ModelError(f"{path} holds Python objects besides tensors{objects} and was refused, nothing in it was "
                         f"executed: {_converted_by(_CONVERT, path)}") from error


def _read_safetensors(path):
    try:
        from safetensors.torch import load_file

        return load_file(path)
    except ImportError as error:
        raise ModelError(f"reading {path} needs the package safetensors: pip install safetensors") from error
    except Exception as error:  # the package has an exception of its own
        raise ModelError(f"{path} is damaged, or its end is missing: fetch it again ({_first_line(error)})") from error


def find_weights(holder, where="", depth=0):
    """All that may be the weights of a network within nested dicts and lists: {the keys that lead there, with dots
    between: a dict}. For a bare state_dict that is {"": holder}.

    What counts is a dict with a matrix or kernel under a name with a dot, such as `layer1.0.conv1.weight`. The state of
    an optimizer is passed over.
    """
    if depth > 5 or not isinstance(holder, (dict, list, tuple)) or "param_groups" in holder:
        return {}
    inner = list(holder.items() if isinstance(holder, dict) else enumerate(holder))
    named = any(isinstance(k, str) and "." in k and isinstance(v, torch.Tensor) and v.dim() > 1 for k, v in inner)
    found = {where: holder} if named else {}
    for key, value in inner:
        found |= find_weights(value, f"{where}.{key}" if where else str(key), depth + 1)
    return found


def choose_weights(holder, file, key=""):
    """The one state_dict in `holder`, what `read_file` made of `file`, or the one that `key` leads to: keys with dots
    between, and perhaps what its names begin with (`state_dict.module.encoder_q`). Returns it and words for where it
    was found. Raises ModelError.
    """
    found = find_weights(holder)
    if not found and isinstance(holder, dict):  # of a network without layers in layers
        bare = all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in holder.items())
        found = {"": holder} if holder and bare else {}
    if not found:
        keys = _some([str(k) for k in holder]) if isinstance(holder, dict) else f"a {type(holder).__name__}"
        raise ModelError(f"{file} holds no weights, no dict of tensors under any key; it holds {keys or 'nothing'}")
    there_are = ", ".join(f"{path or 'bare weights'} ({len(held)} tensors)" for path, held in found.items())
    chosen = [(path, "") for path in found]
    if key:
        under = [(path, f"{rest}.") for path, held in found.items() for rest in {key, key.removeprefix(f"{path}.")}
                 if any(str(name).startswith(f"{rest}.") for name in held)]
        # Names within a dict may begin like its own key, and load_weights lists such beginnings.
        chosen = ([(path, start) for path, start in under if path == key]
                  or [(path, "") for path in found if path == key]
                  or [(path, "") for path in found if path.startswith(f"{key}.")] or under)
    if not chosen:
        names = list(next(iter(found.values())))
        raise ModelError(f"{file} holds no weights under '{key}': there are {there_are}, with names such as "
                         f"{names[0]} and {names[-1]}")
    if len(chosen) > 1:
        raise ModelError(f"{file} holds several sets of weights, {there_are}: choose one, --weights "
                         f"{shlex.quote(f'{file}::{chosen[0][0]}')}")
    path, start = chosen[0]
    state_dict = _renamed(found[path], lambda name: name[len(start):] if name.startswith(start) else None)
    odd = [k for k, v in state_dict.items() if not _is_plain_tensor(v)]
    if odd:
        raise ModelError(f"{file} holds no weights of a usable kind: sparse, quantized, complex or without values are "
                         f"{_some(odd)}")
    others = [str(k) for k, v in found[path].items() if not (isinstance(k, str) and isinstance(v, torch.Tensor))]
    source = f"{file}::{key or path}" if key or path else file
    return state_dict, f"{source} without {_some(others)}" if others else source


def _renamed(state_dict, new_name):
    """The tensors of a state_dict under other names, without those for which new_name returns None; likewise its
    metadata, the versions of its layers.
    """
    renamed = OrderedDict((new_name(name), value.detach()) for name, value in state_dict.items()
                          if isinstance(name, str) and isinstance(value, torch.Tensor) and new_name(name) is not None)
    if hasattr(state_dict, "_metadata"):
        layers = [(new_name(f"{layer}." if layer else ""), version) for layer, version in state_dict._metadata.items()]
        renamed._metadata = OrderedDict((layer.rstrip("."), version) for layer, version in layers if layer is not None)
    return renamed


def _is_plain_tensor(value):
    return (value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
            and not value.is_complex())


def _preset(entry):
    """The preprocessing that a torchvision weights entry was evaluated with."""
    preset = entry.transforms()
    return {"image_size": preset.crop_size[0], "resize_size": preset.resize_size[0], "mean": list(preset.mean),
            "std": list(preset.std), "interpolation": preset.interpolation.value}


def preprocessing_for(pretrained, image_size=None, resize=None, white=None, flip=None):
    """image_size, resize_size, mean, std and interpolation of `pretrained` (see `load_pretrained`), for another
    `image_size` with the same ratio between the two sizes. Also resize, white and flip (see `data.train_transform` and
    `data.decode`): those given, else those of `pretrained` (our own checkpoints have them), else "crop", None, True.
    """
    found = {k: pretrained[k] for k in ("image_size", "resize_size", "mean", "std", "interpolation")}
    if image_size:
        resize_size = round(image_size * found["resize_size"] / found["image_size"])
        found |= {"image_size": image_size, "resize_size": resize_size}
    found["resize"] = resize or pretrained.get("resize", "crop")
    found["white"] = white or pretrained.get("white")
    found["flip"] = pretrained.get("flip", True) if flip is None else flip
    return found


# ---- timm


def _timm():
    """The package timm, which only networks named `timm:` need. Raises ModelError where it is not installed."""
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise ModelError(f"networks named timm:NAME need the package timm ({error}): pip install timm") from error
    return timm


def _timm_preset(name):
    """The preprocessing of the weights of `timm:NAME`, as timm itself evaluates them."""
    timm = _timm()
    config = timm.get_pretrained_cfg(name.removeprefix("timm:")).to_dict()
    found = timm.data.resolve_model_data_config(None, pretrained_cfg=config)
    channels, height, width = found["input_size"]
    if channels != 3 or height != width:
        raise ModelError(f"{name} takes {width} x {height} pixels in {channels} channels, not RGB squares: choose "
                         "another")
    interpolation = found["interpolation"] if found["interpolation"] in ("bilinear", "nearest") else "bicubic"
    return {"image_size": height, "resize_size": int(height / found["crop_pct"]), "mean": list(found["mean"]),
            "std": list(found["std"]), "interpolation": interpolation}


def _timm_weights(name, weights):
    """The state_dict of timm's weights for `timm:NAME.TAG`, downloaded once into the cache of huggingface_hub."""
    timm, name = _timm(), name.removeprefix("timm:")
    config = timm.get_pretrained_cfg(name)
    there_are = [f"--model timm:{n}" for n in timm.list_models(name.partition(".")[0] + ".*", pretrained=True)]
    if weights != "DEFAULT" or not there_are:
        raise ModelError(f"timm:{name} has no weights '{weights}': there are DEFAULT, none, or the path of a local file; "
                         f"timm's own are chosen by name: {_some(there_are) or 'it has none'}")
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # the network raises many kinds; a random network must not take the place of this one
        hub = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{config.hf_hub_filename or 'model.safetensors'}"
        url = hub if config.hf_hub_id else config.url
        raise ModelError(f"could not load timm's weights of {name} ({_first_line(error)}): fetch {url} elsewhere and "
                         "give the file as --weights FILE, or train from random weights with --weights none") from error


def _build_timm(name, **options):
    model = _timm().create_model(name.removeprefix("timm:"), pretrained=False, **({"num_classes": 1000} | options))
    found = model.get_classifier() if hasattr(model, "get_classifier") else None
    layers = nn.ModuleList(found if isinstance(found, (tuple, list)) else [found]).modules()
    outputs = [m.out_features if isinstance(m, nn.Linear) else getattr(m, "out_channels", 0) for m in layers]
    ends = outputs.count(options.get("num_classes", 1000))  # two and more in networks made for distillation
    if ends != 1 or getattr(model, "aux_head", None) is not None:
        raise ModelError(f"{name} has {'several heads' if ends else 'no head'}: choose a network with a single one")
    return model


# ---- building and loading


def build_options(name, image_size, pretrained=None, auxiliary=False):
    """What must be known besides its name and class count to build the network again; a dict of plain values, kept in
    the checkpoint. Not in any state_dict: the size a ViT or MaxViT is built for, and of GoogLeNet and Inception the
    `transform_input` (their ImageNet weights expect the input scaled to (-1, 1)) and whether there are auxiliary heads.

    auxiliary: build those heads, which help the layers before them to train; no other network has any.
    """
    if name.startswith("timm:"):
        fixed = _timm().get_pretrained_cfg(name.removeprefix("timm:")).fixed_input_size
        return {"img_size": image_size} if fixed else {}
    if name.startswith("vit_"):
        return {"image_size": image_size}
    if name == "maxvit_t":
        return {"input_size": [image_size, image_size]}
    if name in ("googlenet", "inception_v3"):
        auxiliary = auxiliary and (name == "googlenet" or image_size >= 299)  # Inception's cannot take smaller ones
        return {"aux_logits": auxiliary, "transform_input": bool(pretrained and pretrained["imagenet_input"])}
    return {}


def build(name, **options):
    """Build a classification network of torchvision (or `timm:NAME`, of timm) with random weights.

    options: `num_classes` (default: ImageNet's 1000) and what `build_options` returns. Raises ModelError.
    """
    check_name(name)
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # Inception announces another initialization
            if name.startswith("timm:"):
                return _build_timm(name, **options)
            model = torchvision.models.get_model(name, weights=None, **options)
    except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = (str(error) or "the size does not fit").partition("\n")[0]
        raise ModelError(f"{name} cannot be built with {options}: {reason}; is it the --image-size? try 224") from error
    if name.startswith("squeezenet"):
        model.classifier[2] = nn.Identity()  # a ReLU behind the head: no score below zero, and a fresh head can die
    return model


def auxiliary_heads(model):
    """The names of the auxiliary heads that `model` has: (), ("AuxLogits",) or ("aux1", "aux2"). In training mode such
    a network returns a named tuple: the outputs of the head first, then those of the auxiliary heads.
    """
    return tuple(name for name in ("AuxLogits", "aux1", "aux2") if getattr(model, name, None) is not None)


def mlp_head(old_head, outputs, hidden=256, dropout=0.5):
    """A head with one hidden layer, in place of `old_head` (a Linear, or SqueezeNet's Conv2d): Linear to `hidden`
    units, ReLU, Dropout, Linear to `outputs`.
    """
    if isinstance(old_head, nn.Conv2d):
        first, last = nn.Conv2d(old_head.in_channels, hidden, 1), nn.Conv2d(hidden, outputs, 1)
    else:
        first, last = nn.Linear(old_head.in_features, hidden), nn.Linear(hidden, outputs)
    return nn.Sequential(first, nn.ReLU(), nn.Dropout(dropout), last)


def grow_outputs(model, layer, count):
    """Give the layer of this name (a Linear or a 1x1 Conv2d) `count` more outputs, at random weights, behind those that
    it has, which stay as they are.
    """
    old = model.get_submodule(layer)
    if isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, old.out_channels + count, kernel_size=1)
    else:
        new = nn.Linear(old.in_features, old.out_features + count, bias=old.bias is not None)
    with torch.no_grad():
        for mine, its in zip(new.parameters(), old.parameters(), strict=True):
            mine[: len(its)] = its
    model.set_submodule(layer, new)


def set_dropout(model, head, p):
    """Set the dropout on the head's side to `p`: that in the top-level block that holds the head, and the network's own
    right before it (GoogLeNet, Inception, ViTs of timm). Raises ModelError where there is none.
    """
    block = head.partition(".")[0]
    children = [name for name, _ in model.named_children()]
    side = children[max(0, children.index(block) - 1) : children.index(block) + 1]
    found = [module for name, module in model.named_modules()
             if isinstance(module, nn.Dropout) and (name.partition(".")[0] == block or name in side)]
    if not found:
        raise ModelError(f"{type(model).__name__} has no dropout before its head: --dropout needs --head mlp here")
    for module in found:
        module.p = p


def output_names(saved):
    """What the outputs of the network of one of our checkpoints stand for: classes or labels, whose names are compared
    in Unicode's composed form (NFC), or numbers.
    """
    names = next(saved[kind] for kind in ("classes", "labels", "outputs") if kind in saved)
    return [unicodedata.normalize("NFC", name) for name in names]


def rebuild(saved):
    """The network of one of our checkpoints (`saved`, as read by torch.load) with its weights. Raises ModelError."""
    outputs = len(output_names(saved))
    model = build(saved["build"]["name"], num_classes=outputs, **saved["build"]["options"])
    if saved["hidden"]:
        model.set_submodule(saved["head"], mlp_head(model.get_submodule(saved["head"]), outputs, saved["hidden"]))
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise ModelError(f"the weights of the checkpoint do not fit its network, {saved['build']['name']}: a head of "
                         "your own belongs into mlp_head in model.py (docs/editing.md)") from error
    return model


def load_weights(model, state_dict, head, same_outputs=True):
    """Copy `state_dict` (any float type) into `model`, whose head is the layer named `head`.

    What wrappers put before or into the names is taken off (`module.`, `_orig_mod.`), and so is what stands before the
    names of all of the network's tensors (`model.`, `backbone.`). A head of another shape is left out, and any head
    with `same_outputs=False`; so is what does not fit of auxiliary heads, what stands beside the network, and counters.
    Returns words that say what became of the names, the head and the rest. Any other mismatch raises ModelError with
    the keys, and so does a weight that is not finite.
    """
    own = model.state_dict()
    keys = [k for k in own if k.startswith(f"{head}.")]
    body = {k: v.shape for k, v in own.items() if k not in keys and not k.startswith(_AUXILIARY)
            and not k.endswith("num_batches_tracked")}
    state_dict, said_of_names, beside = _match_names(model, state_dict, body)
    # A state_dict carries the versions of its layers; one that was copied into a plain dict has lost them.
    metadata = {"": {"version": model._version}} | getattr(state_dict, "_metadata", {})
    if isinstance(model, torchvision.models.VisionTransformer):
        state_dict = _fit_position_embedding(model, state_dict)
    state_dict = _fit_to_timm(model, state_dict, head)
    beside += [k for k, v in state_dict.items() if k not in own and _is_beside(k, v, own)]
    given = OrderedDict((k, v) for k, v in state_dict.items() if k not in beside)

    state_dict = given.copy()
    in_file = {k: state_dict.pop(k) for k in list(state_dict) if k.startswith(f"{head}.")}
    keep, said = _fit_head(head, in_file, {k: own[k] for k in keys}, same_outputs)
    state_dict |= in_file if keep else {k: own[k] for k in keys}
    fits = {k for k, v in state_dict.items() if k in own and v.shape == own[k].shape}
    if not same_outputs:
        fits -= {k for k in fits if k.startswith(("aux1.fc2.", "aux2.fc2.", "AuxLogits.fc."))}
    state_dict = OrderedDict((k, v) for k, v in state_dict.items() if k in fits or not k.startswith(_AUXILIARY))
    # Old files lack the counts of batches, which nothing here reads.
    state_dict |= {k: own[k] for k in own if k.startswith(_AUXILIARY) and k not in fits
                   or k.endswith("num_batches_tracked") and k not in state_dict}

    wrong = [f"{k} {tuple(v.shape)} instead of {tuple(own[k].shape)}" for k, v in state_dict.items()
             if k in own and v.shape != own[k].shape]
    whole = [k for k, v in state_dict.items() if k in own and own[k].is_floating_point() > v.is_floating_point()]
    if whole:
        raise ModelError(f"the weights are no floating-point numbers: {_some(whole)}")
    infinite = [k for k, v in state_dict.items() if v.is_floating_point() and not v.float().isfinite().all()]
    if infinite:
        raise ModelError(f"the weights hold values that are not finite: {_some(infinite)}")
    missing = unexpected = []
    if not wrong:
        state_dict._metadata = metadata
        missing, unexpected = model.load_state_dict(state_dict, strict=False)
    problems = [f"{what}: {_some(found)}" for what, found in
                (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)) if found]
    if problems:
        made_with = _network_of(given)
        way_out = (f"they have as many parameters as a {made_with}: give --model {made_with}"
                   if made_with not in ("", _network_of(own)) else "is --model the network they were made with?")
        raise ModelError(f"the weights do not fit this {type(model).__name__}: {len(fits & body.keys())} of its "
                         f"{len(body)} tensors before the head are there; {'; '.join(problems)}; {way_out}")
    return "; ".join([*said_of_names, said, *([f"left out: {_some(beside)}"] if beside else [])])


_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
# What wrappers put into the names of a network's tensors: DataParallel and AveragedModel, torch.compile, FSDP.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def _match_names(model, state_dict, body):
    """Take off the names of a state_dict what the network's names do not have. body: {name: shape} of its tensors
    before the head. Returns the state_dict, words about it (a list) and the names of what stands beside the network.
    """
    if isinstance(model, torchvision.models.DenseNet):  # published when module names could hold dots
        old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
        state_dict = _renamed(state_dict, lambda name: old.sub(r"\1\2", name))
    wrappers = _WRAPPERS - {part for name in body for part in name.split(".")}
    in_file = list(state_dict)
    taken_off = sorted({part for name in in_file for part in name.split(".") if part in wrappers})

    def unwrapped(name):
        return ".".join(part for part in name.split(".") if part not in wrappers)

    if len({unwrapped(name) for name in in_file}) < len(in_file):
        taken_off = []  # some tensor is there with and without
    if taken_off:
        state_dict = _renamed(state_dict, unwrapped)

    # How many of the network's tensors stand behind each beginning? `net.0.conv1.weight` has "", net, net.0 ...
    behind, written = Counter({"": 0}), {}
    for (name, value), with_wrappers in zip(state_dict.items(), in_file, strict=True):
        parts = name.split(".")
        for i in range(len(parts)):
            start, rest = ".".join(parts[:i]), ".".join(parts[i:])
            if body.get(rest) == value.shape:
                behind[start] += 1
                written.setdefault(start, with_wrappers.removesuffix(f".{rest}"))
    most = max(behind.values())
    best = [start for start, count in behind.items() if count == most]
    if "" in best or 10 * most < len(body):
        return state_dict, [f"taken off the names: {', '.join(taken_off)}"] if taken_off else [], []
    if len(best) > 1 and 2 * most > len(body):
        there_are = [written[start] for start in best]
        raise ModelError(f"the weights hold several networks that fit, {_some(there_are)}: choose one, --weights "
                         f"FILE::{there_are[0]}")
    start = f"{best[0]}."
    beside = [name for name in state_dict if not name.startswith(start)]
    state_dict = _renamed(state_dict, lambda name: name[len(start):] if name.startswith(start) else None)
    return state_dict, [f"taken off the names: {', '.join([*taken_off, best[0]])}"], beside


# How the names of heads begin that other programs put behind a network.
_HEADS = ("fc", "head", "classifier", "linear", "last_linear", "logits", "output", "proj", "pred", "proto", "queue")


def _is_beside(name, value, own):
    """Whether a tensor, none of `own`, is a count (`n_averaged`, thop's `total_ops`) or of a head of another name."""
    block, _, within = name.partition(".")
    count = not within and value.dim() == 0 or name.endswith(("total_ops", "total_params"))
    return count or block.startswith(_HEADS) and block not in {key.partition(".")[0] for key in own}


def _fit_head(head, in_file, own, same_outputs):
    """Whether the head's tensors in a file are to be loaded, and words about it. own: those of the network."""
    last = list(own)[-1]
    if not in_file:
        return False, f"head {head} is not in the file, it starts at random weights"
    if not same_outputs:
        return False, f"head {head} left out, it was trained for other outputs"
    if in_file.keys() != own.keys():
        return False, f"head {head} left out: the file's consists of {', '.join(in_file)}"
    if in_file[last].shape != own[last].shape:
        outputs = (in_file[last].shape + (1,))[0]
        return False, f"head {head} left out: the file's has {outputs} outputs, this task {len(own[last])}"
    if any(in_file[k].shape != own[k].shape for k in own):
        return False, f"head {head} left out: the file's is of another size"
    return True, f"head {head} kept, it fits"


def _network_of(state_dict):
    """The name of the network of torchvision that has as many parameters as a state_dict, whatever the number of
    outputs; "" if there is none.
    """
    tensors = [v for k, v in state_dict.items() if v.is_floating_point() and not k.endswith(("_mean", "_var"))]
    outputs, inputs = next((v.shape[:2] for v in reversed(tensors) if v.dim() > 1), (0, 0))
    backbone = sum(v.numel() for v in tensors) - outputs * (inputs + 1)
    return next((name for name in model_names() for entry in torchvision.models.get_model_weights(name)
                 if entry.meta["num_params"] - 1000 * (inputs + 1) == backbone), "")


def _fit_position_embedding(model, state_dict):
    """Interpolate a ViT's position embedding to the image size that `model` was built for."""
    key = "encoder.pos_embedding"
    if key in state_dict and state_dict[key].shape != model.encoder.pos_embedding.shape:
        state_dict[key] = state_dict[key].float()
        try:
            return torchvision.models.vision_transformer.interpolate_embeddings(
                model.image_size, model.patch_size, state_dict)
        except ValueError as error:
            raise ModelError(f"the position embedding of the weights does not fit: {error}") from error
    return state_dict


def _fit_to_timm(model, state_dict, head):
    """Have timm rename what older files call otherwise, and interpolate position embeddings to the size of `model`.
    Nothing happens where all fits, nor for a network that is not of timm.
    """
    own = {k: v.shape for k, v in model.state_dict().items() if not k.startswith(f"{head}.")}
    fit = getattr(sys.modules.get(type(model).__module__), "checkpoint_filter_fn", None)  # as timm's modules call it
    if fit and own != {k: v.shape for k, v in state_dict.items() if not k.startswith(f"{head}.")}:
        with contextlib.suppress(Exception):  # weights of another network, of which load_weights tells more
            return OrderedDict(fit({k: v.float() if v.is_floating_point() else v for k, v in state_dict.items()}, model))
    return state_dict


def _first_line(error):
    return (str(error) or type(error).__name__).partition("\n")[0]


def _some(names):
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@torch.no_grad()
def check_image_size(model, size, batch_size=1):
    """Send black images of size x size pixels through `model`, in the mode it is in; raise ModelError if it cannot take
    them. (In training mode, BatchNorm refuses a batch that has a single value per channel.)
    """
    count = min(batch_size, 2)
    try:
        # Training mode moves running statistics: those of a copy.
        (copy.deepcopy(model) if model.training else model)(torch.zeros(count, 3, size, size))
    except (AssertionError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        alone = model.training and count == 1
        way_out = "--batch-size 2 or more" if alone else "another --image-size, such as 224"
        raise ModelError(f"{type(model).__name__} cannot take {'a single image' if alone else 'images'} of "
                         f"{size} x {size} pixels ({reason}): give {way_out}") from error


# ---- device and precision


def pick_device(name="auto", deterministic=False, sync_bn=False):
    """The torch.device that `name` stands for; `auto` is cuda, mps or cpu, in that order. Of several processes on a
    machine (torchrun), each takes a GPU of its own, or all take the CPU; sync_bn: whether nn.SyncBatchNorm is to be used,
    which there is on GPUs alone. Raises ModelError.

    deterministic: let every operation give the same bits on every run, or raise RuntimeError where it cannot; on a CPU
    that is so anyway. For the whole process; to be called before anything else runs on a GPU. On a CPU, memory that is
    freed stays with the process: see `keep_freed_memory`.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(bool(deterministic))
    available = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if dist.is_initialized():
        name = _own_device(name, sync_bn)
    try:
        device = torch.device(available if name == "auto" else name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # torch raises many kinds for devices that it does not have, and for GPUs that are full
        another = available if name not in ("auto", available) else "cpu"
        raise ModelError(f"--device {name} cannot be used here ({_first_line(error)}): "
                         f"try --device {another}") from error
    if device.type == "cpu":
        keep_freed_memory()
    return device


def _own_device(name, sync_bn):
    """The name of the device of one of several processes. Raises ModelError."""
    if name not in ("auto", "cuda", "cpu"):
        raise ModelError(f"--device {name}: several processes take a GPU each, or the CPU: give auto, cuda or cpu")
    if name == "cpu" or name == "auto" and not torch.cuda.is_available():
        if sync_bn:
            raise ModelError("--sync-bn needs GPUs: PyTorch has no BatchNorm over several processes on a CPU")
        return "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise ModelError(f"there are {torch.cuda.device_count()} GPUs here: lower torchrun's --nproc_per_node to that, "
                         "or give --device cpu")
    torch.cuda.set_device(local_rank)
    return f"cuda:{local_rank}"


def keep_freed_memory():
    """Have the C library keep what is freed for the next step. glibc gives every large tensor back to the system, which
    then fills each page of the next one with zeros: some tenth of a training step on a CPU. Does nothing elsewhere.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc: macOS, Windows, musl
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def pick_precision(amp, model, device, gpus=1, thaws=False):
    """What --amp stands for. amp: auto, off, bf16 or fp16; gpus: how many DataParallel uses; thaws: whether what is frozen
    now will train later. Returns (`bf16`, `fp16` or `off`; the reason in words; the dtype for autocast, or None). Raises
    ModelError.
    """
    precision, reason = auto_precision(model, device, thaws) if amp == "auto" else (amp, "as given")
    if gpus > 1 and precision == "bf16":  # in the threads of DataParallel, autocast falls back to fp16
        if amp == "bf16":
            raise ModelError("--amp bf16 does not reach DataParallel's threads: use --amp fp16, or --device cuda:0")
        precision, reason = "fp16", "DataParallel's threads know no other"
    return precision, reason, {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[precision]


def auto_precision(model, device, thaws=False):
    """Choose the precision for `--amp auto`, by what was measured (benchmarks/README.md). Returns (`bf16`, `fp16` or `off`,
    the reason in words).
    """
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return "bf16", "this GPU has bf16 units"
        return "fp16", "this GPU has no bf16 units"
    if device.type != "cpu":
        return "off", f"autocast is not used on {device.type}"
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    else:  # before torch 2.11
        has_bf16 = torch.cpu._is_avx512_bf16_supported()
    if not has_bf16:
        return "off", "this CPU has no bf16 instructions"
    # Backwards, depthwise convolutions are slower in bf16. They outweigh the rest from a fiftieth of the weights on (2.3 %
    # in MobileNetV3-large, which loses by it; 1.5 % in EfficientNetV2-S, 1.2 % in ConvNeXt-tiny, which gain).
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    depthwise = [m for m in layers if isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels]
    trains = thaws or any(m.weight.requires_grad for m in depthwise)
    if trains and 50 * sum(m.weight.numel() for m in depthwise) > sum(m.weight.numel() for m in layers[:-1]):
        return "off", "depthwise convolutions train slower in bf16 on a CPU"
    return "bf16", "this CPU has bf16 instructions"
