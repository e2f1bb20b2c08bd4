"""Freezing: find the head, choose what trains, thaw it later, and give each part its learning rate.

    model = torchvision.models.resnet18(weights="DEFAULT")
    head = find_head(model)                                 # "fc"; "classifier.6" in a VGG
    model.set_submodule(head, nn.Linear(model.get_submodule(head).in_features, 2))
    names = select(model, "backbone", head)                 # of the parameters of everything but the head
    freeze(model, "backbone", head)                         # requires_grad = False on them
    optimizer = torch.optim.AdamW(param_groups(model, head, lr=1e-3, backbone_lr_scale=0.1))
    print(group_table(model, head, optimizer.param_groups))
    train_mode(model)                                       # model.train(), and eval() on each of its frozen_parts
    thaw(model, "layer4", head)                             # some epochs later: train this part too ...
    train_mode(model)                                       # ... and put it into train() mode

Throughout, `head` is the dotted name of the head, or a tuple of names: the head, then auxiliary heads (GoogLeNet,
Inception), which are never frozen either.

A part is frozen when two things hold: its parameters have `requires_grad = False`, *and* it is in `eval()`. The first
alone leaves every BatchNorm updating its running statistics in `train()` mode, so that the "frozen" network drifts.

This file needs torch alone and can be copied into any project.
"""

import fnmatch
import math
import re

from torch import nn


class FreezeError(Exception):
    """A freeze specification that cannot be followed. The message is one line that names the way out."""


def find_head(model):
    """Return the dotted name of the head: the last `nn.Linear`, or in a network without one (SqueezeNet) the last
    `nn.Conv2d`. Use `model.get_submodule(name)` and `model.set_submodule(name, layer)` to reach and replace it.
    """
    for kind in (nn.Linear, nn.Conv2d):
        names = [name for name, module in model.named_modules() if isinstance(module, kind)]
        if names:
            return names[-1]
    raise FreezeError(f"{type(model).__name__} has no Linear and no Conv2d layer that could be its head")


def layer_groups(model, head):
    """Split the parameters into the groups that people freeze and thaw: `conv1, bn1, layer1, ... fc` in a ResNet,
    `features.0, ... features.8, classifier.1` in an EfficientNet.

    Starts from the top-level children and opens the largest group as long as there are fewer than five, or one holds
    more than 90 % of all parameters. Returns {group name: [parameter names]} in the order of the network; the last
    one is the head.
    """
    heads = _as_tuple(head)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    groups = {}

    def children_of(prefix):
        depth = prefix.count(".") + 1 if prefix else 0
        return list(dict.fromkeys(".".join(n.split(".")[: depth + 1]) for n in sizes if _under(n, prefix)))

    # EfficientNet: [features, classifier] -> the head shows: [features, classifier.1]
    #               -> too few groups, so the largest is opened: [features.0, ... features.8, classifier.1]
    names = children_of("")
    while True:
        groups = {name: [n for n in sizes if _under(n, name)] for name in names}
        total = {name: sum(sizes[n] for n in members) for name, members in groups.items()}
        around_head = [n for n in names if n not in heads and any(h.startswith(n + ".") for h in heads)]
        # A single layer (its parameters sit right on it) stays whole, and so does the head.
        divisible = [n for n in names if n not in (*heads, *sizes) and not _is_layer(model.get_submodule(n))]
        # Stacks of blocks, as transformers has them, come first: BERT's embeddings are larger, and one thing.
        stacks = [n for n in divisible if any(isinstance(m, nn.ModuleList) for m in model.get_submodule(n).modules())]
        largest = max(stacks or divisible, key=total.get, default=None)
        if around_head:
            opened = around_head[0]
        elif largest and (len(names) < 5 or total[largest] > 0.9 * sum(total.values())):
            opened = largest
        else:
            break
        at = names.index(opened)
        names[at : at + 1] = children_of(opened)
    groups[heads[0]] = groups.pop(heads[0])
    return groups


def select(model, spec, head, without_head=False):
    """Return the names of the parameters that `spec` stands for, in the order of the network; without_head: but for
    those of the head, which is never frozen.

    spec: comma-separated; each part one of
        none | all | backbone       nothing | everything | everything but the head
        conv | bn                   all convolutions | all BatchNorms
        to:LAYER                    from the input up to and including LAYER
        layer1 or layer4.0.conv1    a module or parameter by its dotted name, with all under it (never `layer10`)
        *.bn1 or features.[0-3]     a glob over dotted names
    Raises FreezeError, with the names there are, for a part that matches no parameter, and where nothing but the head
    is meant and that is left out.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = set()
    for part in (p.strip() for p in spec.split(",")):
        if part == "none":
            continue
        if part == "all":
            matched = names
        elif part == "backbone":
            matched = [n for n in names if not _under(n, head)]
        elif part in ("conv", "bn"):
            kind = nn.modules.conv._ConvNd if part == "conv" else nn.modules.batchnorm._BatchNorm
            layers = [name for name, module in model.named_modules() if isinstance(module, kind)]
            matched = [n for n in names if n.rpartition(".")[0] in layers]
        elif part.startswith("to:") and part != "to:":
            inside = [i for i, n in enumerate(names) if _under(n, part.removeprefix("to:"))]
            matched = names[: inside[-1] + 1] if inside else []
        elif any(c in part for c in "*?["):
            matched = [n for n in names if any(fnmatch.fnmatchcase(p, part) for p in _prefixes(n))]
        else:
            matched = [n for n in names if _under(n, part)] if part else []
        if not matched:
            there_are = ", ".join(layer_groups(model, head))
            raise FreezeError(f"'{part}' matches no layer of this {type(model).__name__} that has parameters; "
                              f"there are: {there_are} (and the dotted names inside them)")
        chosen.update(matched)
    if without_head:
        with_head, chosen = chosen, {n for n in chosen if not _under(n, head)}
        if with_head and not chosen:
            raise FreezeError(f"'{spec}' is the head {_as_tuple(head)[0]}, which always trains: name other layers, or "
                              "none")
    return [n for n in names if n in chosen]


def freeze(model, spec, head):
    """Set `requires_grad = False` on what `spec` (see `select`) stands for, except the head, and `True` on the rest.
    Call `train_mode(model)` before training, and never `model.train()` alone.
    """
    frozen = select(model, spec, head, without_head=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
        if name in frozen:
            parameter.grad = None  # an optimizer skips a parameter without a gradient


def freeze_to(model, n, head=None):
    """Freeze the first `n` layer groups (see `layer_groups`) and train the others; a negative n counts from the end, so
    -1 trains the head alone and -2 one group more (auxiliary heads are not counted). As `freeze_to` of fastai, except
    that the BatchNorms of frozen groups stand still too (through `train_mode`).
    """
    head = head or find_head(model)
    groups = [group for group in layer_groups(model, head) if group not in _as_tuple(head)[1:]]
    if not -len(groups) <= n < len(groups):
        raise FreezeError(f"there are {len(groups)} layer groups ({', '.join(groups)}): n must be from {-len(groups)} "
                          f"to {len(groups) - 1}, not {n}")
    freeze(model, ",".join(groups[:n]) or "none", head)


def unfreeze(model):
    """Train everything: `freeze_to(model, 0)`."""
    model.requires_grad_(True)


def thaw(model, spec, head, groups=()):
    """Set `requires_grad = True` on what `spec` stands for. Returns the number of parameters that were frozen before.
    All parameters are in the optimizer from the start, so nothing else has to be done.

    spec: as in `select`; a part may end in @RATE, as in `layer4@1e-4,layer3@5e-5`: the peak rate of that part from now
    on. groups: the optimizer's `param_groups` (made by the function of that name), which such a rate is written to; the
    head keeps its own rate.
    """
    parameters = dict(model.named_parameters())
    count = 0
    for names, rate, rated in _stages(model, spec, head, groups):
        for group in rated:
            if "initial_lr" in group:  # PyTorch's schedules write that
                raise FreezeError(f"{group['layer']}@{rate:g}: a PyTorch schedule sets the rates of this optimizer, and "
                                  "does not look at peak_lr: leave the rate behind @ out, or set it in the schedule")
            group["peak_lr"] = rate
        thawed = [parameters[n] for n in names if not parameters[n].requires_grad]
        count += sum(p.numel() for p in thawed)
        for parameter in thawed:
            parameter.requires_grad_(True)
    return count


def _stages(model, spec, head, groups):
    """`layer4@1e-4,bn` -> [(names of layer4's parameters, 1e-4, the optimizer's groups that hold them), (names of all
    BatchNorms' parameters, None, [])]
    """
    stages, parameters = [], dict(model.named_parameters())
    for part in spec.split(","):
        layers, at, text = part.partition("@")
        try:
            rate = float(text) if at else None
        except ValueError:
            rate = math.nan
        if rate is not None and not 0 <= rate < math.inf:
            raise FreezeError(f"'{part.strip()}': '{text}' is no learning rate; write NAMES@RATE, as in layer4@1e-4")
        names = select(model, layers, head)
        stages.append((names, rate, [] if rate is None else _groups_of(parameters, names, head, groups)))
    return stages


def _groups_of(parameters, names, head, groups):
    """The optimizer's groups that hold the named parameters, without the head's."""
    chosen = {id(parameters[n]) for n in names if not _under(n, head)}
    if not chosen:
        raise FreezeError("the head learns at --lr: a rate behind @ is for other layers")
    found = [g for g in groups if any(id(p) in chosen for p in g["params"])]
    if not found:
        raise FreezeError("a rate behind @ needs the optimizer's param_groups, to be written there")
    for group in found:
        if not all(id(p) in chosen for p in group["params"]):
            raise FreezeError(f"a rate is set for whole layers, and these names are a part of {group['layer']} only: "
                              f"write {group['layer']}@RATE")
    return found


def backbone_trains(spec, thaws):
    """Will anything but the head ever train? spec, thaws: what --freeze and --unfreeze say."""
    return spec != "backbone" or bool(thaws)


def parse_thaws(specs):
    """`["3:layer4", "5:all"]` -> `{3: "layer4", 5: "all"}`: what thaws at the start of which epoch (the first is 0)."""
    thaws = {}
    for text in specs:
        epoch, colon, names = text.partition(":")
        if not (colon and epoch.strip().isdecimal() and names.strip()):
            raise FreezeError(f"'{text}' is not EPOCH:NAMES, as in 3:layer4, 3:layer4@1e-4 or 5:all")
        thaws[int(epoch)] = ",".join(filter(None, [thaws.get(int(epoch)), names.strip()]))
    return dict(sorted(thaws.items()))


def thaw_specs(thaws):
    """The other way round: `{3: "layer4"}` -> `["3:layer4"]`."""
    return [f"{epoch}:{names}" for epoch, names in thaws.items()]


def plan_thaws(specs, past_specs=(), start_epoch=0):
    """`parse_thaws` for a run that goes on at `start_epoch`: what has thawed before comes from `past_specs` (those of
    the checkpoint) and cannot be changed, except for its rates; what is to come comes from `specs`.
    """
    plan = parse_thaws(specs)
    past = {epoch: names for epoch, names in parse_thaws(past_specs).items() if epoch < start_epoch}
    again = {epoch: names for epoch, names in plan.items() if epoch < start_epoch}
    if again and _without_rates(again) != _without_rates(past):
        thawed = ", ".join(f"{epoch}:{names}" for epoch, names in past.items()) or "nothing"
        raise FreezeError(f"what thawed before epoch {start_epoch} cannot be changed: that was {thawed}")
    return past | plan


def _without_rates(thaws):
    return {epoch: re.sub("@[^,]*", "", names) for epoch, names in thaws.items()}


def describe_plan(model, head, spec, thaw_specs, epochs, *rates):
    """What a run would freeze and thaw, and at which rates: a table, and a line for each thaw. `model` is frozen by it.
    rates: as for `param_groups`. Raises FreezeError.
    """
    freeze(model, spec, head)
    groups, thaws = param_groups(model, head, *rates), plan_thaws(thaw_specs)
    check_thaws(thaws, epochs, model, head, groups)
    lines = [group_table(model, head, groups)]
    for epoch, names in thaws.items():
        lines.append(f"epoch {epoch}: {thaw(model, names, head, groups):,} parameters thaw ({names})")
    return "\n".join(lines)


def check_thaws(thaws, epochs, model, head, groups):
    """Raise FreezeError for what would go wrong hours later: a name that matches nothing, a rate that cannot be set, an
    epoch that never comes since the last one is `epochs` - 1.
    """
    for epoch, spec in thaws.items():
        _stages(model, spec, head, groups)
        if epoch >= epochs:
            raise FreezeError(f"--unfreeze {epoch}:{spec} never happens: the last epoch is {epochs - 1}")


def train_mode(model):
    """`model.train()`, followed by `eval()` on every frozen part, so that its running statistics do not move and its
    dropout and stochastic depth are off. Call it at the start of each epoch and after each thaw; it also works on a
    model wrapped in DataParallel or DistributedDataParallel.

    A module is a frozen part when it has parameters and none of them trains. A layer without parameters follows the
    module around it: the Dropout beside a trained head stays live, the one inside a frozen block does not.
    """
    model.train()
    for part in frozen_parts(model):
        part.eval()
    return model


def frozen_parts(model):
    """The outermost modules in which no parameter trains, in a list: what `train_mode` puts into eval()."""
    trains = [p.requires_grad for p in model.parameters()]
    if trains and not any(trains):
        return [model]
    children = model.children() if trains else ()
    return [part for child in children for part in frozen_parts(child)]


def param_groups(model, head, lr, weight_decay=0.0, backbone_lr_scale=1.0, layer_decay=1.0):
    """Parameter groups for an optimizer: one for each layer group (see `layer_groups`) with weight decay, one without.

    Every parameter is in, frozen or not: an optimizer passes over those without a gradient, and a thaw needs no new
    group. The head's rate is `lr`; that of the layer group before it `lr * backbone_lr_scale`, and of each one further
    towards the input `layer_decay` times that of the one behind it. Each group also carries its `layer`, and its rate
    as `peak_lr`, for a loop that follows a schedule: `group["lr"] = group["peak_lr"] * factor_at(step)`.

    Lower rates for the backbone: Howard and Ruder, "Universal Language Model Fine-tuning", 2018 (discriminative
    fine-tuning); a factor per layer: Clark et al., "ELECTRA", 2020, and Bao et al., "BEiT", 2022. Only the weights of
    convolutions and linear layers decay; biases, norm layers, tokens and position embeddings do not: He et al., "Bag of
    Tricks", 2019.
    """
    parameters, groups = dict(model.named_parameters()), []
    layers, decaying = layer_groups(model, head), {id(weight) for weight in decaying_weights(model)}
    backbone = [layer for layer in reversed(layers) if layer not in _as_tuple(head)]
    for layer, members in layers.items():
        peak_lr = lr * backbone_lr_scale * layer_decay ** backbone.index(layer) if layer in backbone else lr
        decays = [n for n in members if id(parameters[n]) in decaying]
        for names, decay in ((decays, weight_decay), ([n for n in members if n not in decays], 0.0)):
            if names:
                groups.append({"layer": layer, "params": [parameters[n] for n in names], "lr": peak_lr,
                               "peak_lr": peak_lr, "weight_decay": decay})
    return groups


def decaying_weights(model):
    """The weights of convolutions and linear layers, in a list: what weight decay and an L1 penalty are for. No biases,
    no norm layers, no tokens or position embeddings.
    """
    return [p for n, p in model.named_parameters() if n.endswith("weight") and p.ndim > 1]


def group_table(model, head, groups=()):
    """One line per layer group: its parameters, whether it trains, and at which peak rate.

    groups: the optimizer's `param_groups`, made by the function of that name.
    """
    parameters = dict(model.named_parameters())
    rates = {g["layer"]: f"{g['peak_lr']:g}" for g in reversed(groups)}
    rows = []
    for name, members in layer_groups(model, head).items():
        count = sum(parameters[n].numel() for n in members)
        training = sum(parameters[n].numel() for n in members if parameters[n].requires_grad)
        state = "trains" if training == count else "frozen" if training == 0 else f"{training:,} train"
        kind = " (head)" if name == _as_tuple(head)[0] else " (auxiliary head)" if name in _as_tuple(head) else ""
        rows.append((name + kind, f"{count:,}", state, rates.get(name, "") if training else ""))
    total = sum(p.numel() for p in parameters.values())
    training = sum(p.numel() for p in parameters.values() if p.requires_grad)
    rows.append(("total", f"{total:,}", f"{training:,} train", ""))
    rows.insert(0, ("layer", "parameters", "state", "learning rate" if groups else ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = (f"{n:<{widths[0]}}  {c:>{widths[1]}}  {s:<{widths[2]}}  {r}".rstrip() for n, c, s, r in rows)
    return "\n".join(lines)


def _as_tuple(head):
    return (head,) if isinstance(head, str) else tuple(head)


def _under(name, prefixes):
    """Is `name` one of these modules or inside it? (`layer10` is not in `layer1`.)"""
    return any(not p or name == p or name.startswith(p + ".") for p in _as_tuple(prefixes))


def _prefixes(name):
    """`layer4.0.bn1.weight` -> layer4, layer4.0, layer4.0.bn1, layer4.0.bn1.weight"""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _is_layer(module):
    return any(True for _ in module.parameters(recurse=False)) and not any(
        True for child in module.children() for _ in child.parameters()
    )
