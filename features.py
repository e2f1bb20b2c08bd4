"""Cached features: what a frozen backbone makes of pictures, computed once and kept in files.

    side = head_side(model, head)                   # the head, as a module that takes the backbone's outputs
    x = head_input(model, side, pictures)           # those outputs; side(x) is model(pictures), bit for bit
    cache = Cache("runs/a", 2, model, head, train_loader, val_loader, ...)
    for epoch in range(10):
        network, train_batches, val_batches = cache.route(model, epoch)

As long as the backbone stands still, a picture in one and the same view needs to go through it once only: every epoch
after that trains the head on what is in the files. When the backbone thaws, they are dropped.

This file needs torch alone and can be copied into any project.
"""

import contextlib
import functools
import hashlib
import itertools
import math
import os
import re
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn


class FeaturesError(Exception):
    """Features that cannot be computed or kept. The message is one line that names the way out."""


# ---- the two halves of a network


def head_side(model, head):
    """What follows the backbone, as one module that shares the model's layers: the top-level block that holds the head,
    with the dropout that GoogLeNet, Inception and ViTs of timm have right before it. For a frozen backbone, `side(
    head_input(model, side, x))` is `model(x)`, bit for bit, for all of torchvision's classification networks.

    head: the dotted name of the head, or a tuple of names: the head, then auxiliary heads.
    """
    children = dict(model.named_children())
    head = head if isinstance(head, str) else head[0]
    names, block = list(children), head.partition(".")[0]
    before = names[max(0, names.index(block) - 1) : names.index(block)]
    drop = [children[name] for name in before if isinstance(children[name], nn.Dropout)]
    first = next(layer for layer in children[block].modules() if not any(True for _ in layer.children()))
    flat = [nn.Flatten(1)] if drop and isinstance(first, nn.Linear) else []  # Inception does so between the two
    return nn.Sequential(*drop, *flat, children[block], nn.Flatten(1))


def head_input(model, side, x):
    """What the backbone makes of a batch x: the input of `side`, a `head_side` of the model. Raises FeaturesError for a
    network that runs the parts of that side without the whole.
    """
    caught = []
    handle = side[0].register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    try:
        model(x)
    finally:
        handle.remove()
    if not caught:  # MetaFormers of timm
        raise FeaturesError(f"this {type(model).__name__} runs the parts of its head one by one, so its features cannot "
                            "be cached: leave --cache-features out")
    return caught[0]


def trains_beyond(model, side):
    """The name of a parameter that trains and is not in `side`, else ''."""
    inside = {id(p) for p in side.parameters()}
    return next((n for n, p in model.named_parameters() if p.requires_grad and id(p) not in inside), "")


def refuse_a_backbone_that_trains(model, head, side=None):
    """Raise FeaturesError if anything but the head's side trains: features would not stay the same. side: as in Cache."""
    name = trains_beyond(model, head_side(model, head) if side is None else side)
    if name:
        raise FeaturesError(f"--cache-features needs a frozen backbone, such as --freeze backbone: {name} trains")


# ---- the cache of a run


class Cache:
    """The features of a training and a validation split, in files of a run folder.

    views: augmented views of each training picture: epoch e trains on view e % views, which is what epoch e % views
        would have seen without a cache. 0: nothing is cached.
    head: as in `head_side`. train_loader, val_loader: DataLoaders over a data.ImageList in the order of a
        data.SeededBatches.
    read: read(loader, at_least) yields the batches (x, numbers of the pictures) of a DataLoader, one process at its own
        pace, and raises what is to be raised on the way. prepare: makes the backbone's input of x. autocast: a context.
    bar: wraps the batches of a computation, as tqdm does: bar(batches, words, their number).
    depends_on: all else that features depend on, such as the machine and the precision: if it changes, they are computed
        again.
    side: what follows the backbone, if not a `head_side`: a module with a method that makes its input of the backbone's,
        features(x).

    Of several processes all have to make one and call `route`; each computes a share. Raises FeaturesError.
    """

    def __init__(self, folder, views, model, head, train_loader, val_loader, read, prepare, autocast, bar, depends_on,
                 side=None):
        self.folder, self.views, self.model = Path(folder), views, model
        self.train_loader, self.val_loader = train_loader, val_loader
        self.read, self.prepare, self.autocast, self.bar = read, prepare, autocast, bar
        if views:
            self.side = head_side(model, head) if side is None else side
            self.features = getattr(side, "features", functools.partial(head_input, model, self.side))
            pictures = train_loader.dataset, val_loader.dataset
            head = head if isinstance(head, str) else head[0]
            self.key = features_key(model.state_dict(), head, *pictures, prepare, *depends_on)

    def route(self, whole, epoch):
        """(network, training batches, validation batches) of an epoch: `whole` and the two DataLoaders; or, as long as
        the backbone is frozen and views are wanted, its head and features, in the same batches and order.
        """
        if not self.views:
            return whole, self.train_loader, self.val_loader
        if trains_beyond(self.model, self.side):
            if _rank() == 0 and drop_features(self.folder):
                print("the backbone trains: the cached features are dropped")
            return whole, self.train_loader, self.val_loader
        train_batches = self._batches("train", self.train_loader, epoch % self.views)
        return self.side, train_batches, self._batches("val", self.val_loader, 0)

    def _batches(self, split, loader, view):
        """Batches of a split, as `loader` orders them, from a file that is computed if it is not there."""
        file, order = self.folder / f"features_{split}_{view}.bin", loader.batch_sampler
        cached = read_features(file, self.key)
        if any(_all_gather(cached is None)):
            once = _read_once(loader, view)
            batches = self.bar(self.read(once, 2 if order.shuffle else 0), f"features of {split}", len(once))
            cached = share_features(file, self.key, self._compute(batches))
        return FeatureBatches(cached, loader.dataset.labels(), order, getattr(loader.dataset, "parts", None))

    @torch.inference_mode()
    def _compute(self, batches):
        self.model.eval()
        for x, numbers in batches:
            with self.autocast:
                features = self.features(self.prepare(x))
            yield features, numbers


def _read_once(loader, view):
    """A DataLoader over the same pictures, with their numbers as labels, in the order and augmentation of epoch `view`."""
    return torch.utils.data.DataLoader(
        loader.dataset.numbered(), batch_sampler=loader.batch_sampler.once(view), num_workers=loader.num_workers,
        collate_fn=loader.collate_fn, worker_init_fn=loader.worker_init_fn, generator=torch.Generator())


class FeatureBatches:
    """Like a DataLoader over the batches of `order`: (features (N, ...), labels (N,), []) from what `read_features` has
    found. labels: those of all pictures. Pictures that could not be read are left out. parts: where features and labels
    are not of a sample, but of its parts, such as the words of a sentence: parts(index), their numbers.
    """

    def __init__(self, saved, labels, order, parts=None):
        self.saved, self.labels, self.batch_sampler, self.parts = saved, labels, order, parts

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        numbers = self.saved["numbers"]
        place = torch.full((len(self.labels),), -1)
        place[numbers] = torch.arange(len(numbers))
        for keys in self.batch_sampler:
            if keys:  # of a small batch, a process may have none
                chosen = torch.tensor([index for _, index in keys])
                if self.parts:
                    chosen = torch.cat([self.parts(index) for index in chosen.tolist()])
                chosen = chosen[place[chosen] >= 0]
                features = self.saved["features"][place[chosen]].contiguous(memory_format=_layout(self.saved))
                yield features, self.labels[chosen], []


# ---- when features are the same


def features_key(weights, head, *depends_on):
    """A short text that is the same as long as features are: a hash of the weights (a state_dict) outside the top-level
    block of `head`, and of all else. Of a data set of pictures (with `samples`, [(path, label), ...]) that is its
    transform, seed, size and white, and the name, size and time of each file. Of a function it is its code, its
    defaults, what it closes over and what it names (of a module the whole file): an edited transform makes other
    features.
    """
    found = hashlib.sha256()
    for name, tensor in weights.items():
        if name.partition(".")[0] != head.partition(".")[0]:
            found.update(name.encode())
            found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for thing in depends_on:
        if hasattr(thing, "samples"):
            stats = [(Path(path), os.stat(path)) for path, _ in thing.samples if os.path.exists(path)]
            files = [(os.fsencode(path.name), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
            thing = thing.transform, thing.seed, thing.size, getattr(thing, "white", None), files
        for word in _words(thing, set()):
            found.update(word.encode() + b"\0")
    return found.hexdigest()


LIBRARIES = ("builtins", "torch", "torchvision", "timm", "PIL", "numpy", *sys.stdlib_module_names)  # nobody edits these


def _words(thing, seen):
    """Texts that say what a thing is, the same in every process: see `features_key`. seen: ids, against going round."""
    if isinstance(thing, (list, tuple)):
        for part in thing:
            yield from _words(part, seen)
    elif isinstance(thing, dict):
        for name, part in thing.items():
            yield repr(name)
            yield from _words(part, seen)
    elif isinstance(thing, (set, frozenset)):
        yield from sorted(map(repr, thing))  # their own order differs from process to process
    elif isinstance(thing, torch.Tensor) or hasattr(thing, "tobytes"):  # an array: a repr leaves most of it out
        values = thing.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() if torch.is_tensor(thing) else thing
        yield f"{thing.dtype} {tuple(thing.shape)} {hashlib.sha256(values.tobytes()).hexdigest()}"
    elif isinstance(thing, functools.partial):
        yield from _words([thing.func, thing.args, thing.keywords], seen)
    elif isinstance(thing, types.ModuleType):
        yield "" if _in_library(thing.__name__) else _source(getattr(thing, "__file__", None))
    elif not hasattr(thing, "__dict__"):  # a number, a string
        yield f"{type(thing).__qualname__} {_without_address(thing)}"
    elif id(thing) not in seen:
        seen.add(id(thing))
        if isinstance(thing, types.MethodType):
            yield from _words([thing.__self__, thing.__func__], seen)
        elif isinstance(thing, types.FunctionType):
            yield from _of_function(thing, seen)
        elif isinstance(thing, type):
            yield from _of_class(thing, seen)
        else:  # a transform, say: its class, and what it holds
            if type(thing).__repr__ is not object.__repr__:  # which gives an address
                yield _without_address(thing)
            yield from _of_class(type(thing), seen)
            yield from _words(vars(thing), seen)


def _of_function(function, seen):
    """Its code, its defaults, what it closes over, and what it names."""
    if _in_library(function.__module__):
        yield f"{function.__module__}.{function.__qualname__}"
        return
    code, names = function.__code__, set()
    yield from _of_code(code, names)
    closed_over = [cell.cell_contents for cell in function.__closure__ or ()]
    named = [(name, function.__globals__[name]) for name in sorted(names) if name in function.__globals__]
    yield from _words([function.__defaults__, function.__kwdefaults__, closed_over, named], seen)


def _of_code(code, names):
    """What compiled code does. names: takes the names that it looks up."""
    yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames}"
    names.update(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _of_code(constant, names)
        else:
            yield from _words(constant, set())


def _of_class(kind, seen):
    if _in_library(kind.__module__):
        yield f"{kind.__module__}.{kind.__qualname__}"
    else:
        for ancestor in kind.__mro__:
            if not _in_library(ancestor.__module__):
                own = {name: part for name, part in vars(ancestor).items() if not name.startswith("__") or callable(part)}
                for name, part in own.items():
                    yield name
                    yield from _words(getattr(part, "__func__", getattr(part, "fget", part)), seen)


def _without_address(thing):
    """Its repr; an address in it is of this process alone."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(thing), flags=re.IGNORECASE)


def _in_library(module):
    return (module or "").partition(".")[0] in LIBRARIES


def _source(file):
    """A hash of a file of code: of a module, of which it is not known what a function uses."""
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except (OSError, TypeError):  # a notebook's
        return ""


# ---- the files


def share_features(file, key, batches):
    """`write_features` by several processes, each with batches of its own, which the first joins in one file for all."""
    rank = _rank()
    if not dist.is_initialized():
        return write_features(file, key, batches)
    batches, part = iter(batches), Path(file).with_suffix(f".{rank}.bin")
    if first := next(batches, None):  # of a small split there may be none for this process
        write_features(part, key, itertools.chain([first], batches))
    parts = [path for path in _all_gather(str(part) if first else None) if path]
    found = [read_features(path, key) for path in parts]
    if rank == 0 and None not in found:
        write_features(file, key, (
            (saved["features"][i : i + 256].contiguous(memory_format=_layout(saved)), saved["numbers"][i : i + 256])
            for saved in found for i in range(0, len(saved["numbers"]), 256)))
    _all_gather(None)  # waits until that is done
    part.unlink(missing_ok=True)
    if (cached := read_features(file, key)) is None:
        raise FeaturesError(f"{file} cannot be seen by all processes: --cache-features needs an --output on a disk that "
                            "all machines share")
    return cached


def write_features(file, key, batches):
    """Write the features of a split, from batches of (features (N, ...), numbers of the pictures (N,)), to a file that
    is there when it is complete, and may be larger than memory. Returns what `read_features` does. Raises FeaturesError.
    """
    numbers, raw, temporary = [], f"{file}.raw.{os.getpid()}.tmp", f"{file}.{os.getpid()}.tmp"

    @contextlib.contextmanager
    def writing():
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            raise FeaturesError(f"could not write {file} ({error}): make room, or leave out --cache-features") from error

    try:
        with writing():
            stream = open(raw, "wb")
        with stream:
            for x, which in batches:
                channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
                with writing():
                    stream.write(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
                numbers += which.tolist()
            with writing():
                stream.flush()
        if not numbers:
            raise FeaturesError("no picture of this split can be read: has the disk gone away? python data.py --check DIR "
                                "lists what cannot be read")
        shape = len(numbers), *x.shape[1:]
        with writing():
            features = torch.from_file(raw, size=math.prod(shape), dtype=x.dtype).view(shape)
            state = {"key": key, "numbers": torch.tensor(numbers), "features": features, "channels_last": channels_last}
            torch.save(state, temporary)
            os.replace(temporary, file)
    finally:
        for path in (raw, temporary):
            Path(path).unlink(missing_ok=True)
    return read_features(file, key)


def read_features(file, key):
    """What `write_features` has written under this key, to be read as it is needed; None if that is not there."""
    try:
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # not there, or damaged: they can be computed again
        return None
    return saved if isinstance(saved, dict) and saved.get("key") == key else None


def drop_features(folder):
    """Remove the files of features from a folder. Returns how many there were."""
    return sum(not path.unlink() for path in Path(folder).glob("features_*.bin"))


def _layout(saved):
    return torch.channels_last if saved["channels_last"] else torch.contiguous_format


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


def _all_gather(value):
    """The values of all processes, in a list."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
