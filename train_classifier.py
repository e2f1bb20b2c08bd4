"""Fine-tune a torchvision network to tell classes of pictures apart: the full loop, top to bottom, in plain PyTorch.

    python train_classifier.py --data ./cats_and_dogs --freeze backbone            # train the new head alone
    python train_classifier.py --data ./cats_and_dogs                              # train everything
    python train_classifier.py --data ./cats_and_dogs --freeze backbone --unfreeze 1:layer4 --unfreeze 3:all
    python train_classifier.py --model efficientnet_b0 --list-layers               # the names to freeze and thaw
    python train_classifier.py --resume runs/train_classifier/.../last.pt          # go on after an interruption

--data holds train/ and val/ (and test/), or is one folder to be split; in them one folder of pictures per class. What
comes out lies in --output: best.pt and last.pt, history.csv (one row per epoch), args.json, the predictions.

Errors are one line, exit status 2: folders without classes or with different ones, a picture that cannot be read,
weights that do not fit or cannot be had, a layer name that matches nothing, a run that diverged.
"""

import argparse
import copy
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import checkpoint
import data
import freeze
import losses
import metrics
from model import (ModelError, auto_precision, build, build_options, check_image_size, load_pretrained, load_weights,
                   preprocessing_for)

# ---- 1 arguments -----------------------------------------------------------------------------------------------------

DEFAULT_LR = {"sgd": 1e-2, "adam": 3e-3, "adamw": 3e-3, "rmsprop": 1e-3, "adagrad": 1e-2}
# A resumed run may change these and nothing else: the rest decides what has been learned so far.
MAY_CHANGE = {"data", "epochs", "lr", "backbone_lr_scale", "weight_decay", "patience", "unfreeze", "workers", "device",
              "output", "resume", "log_every", "batch_size", "accumulate"}


def number(kind, low, high=10**9):
    """An argparse type: an int or float from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # true for nan as well
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be from {low:g} to {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number at all
    return parse


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")

    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="DIR", help="train/ and val/ (and test/), or one folder of class folders to be split")
    add("--val-split", type=number(float, 0.01, 0.99), default=0.2, metavar="SHARE",
        help="share of each class that is set aside where there is no val/ (default %(default)s)")
    add("--image-size", type=number(int, 1), metavar="N",
        help="pixels (default: the evaluation size of the weights; 224 for a bare local file)")
    add("--augment", choices=["none", "standard"], default="standard", help="standard: random crop and flip (default)")
    add("-b", "--batch-size", type=number(int, 1), default=32, metavar="N",
        help="pictures per batch (default %(default)s)")
    add("-j", "--workers", type=number(int, 0), default=min(4, os.cpu_count() or 1), metavar="N",
        help="processes that decode pictures; does not change the result (default here %(default)s)")

    add = parser.add_argument_group("network").add_argument
    add("--model", default="resnet18", metavar="NAME",
        help="any torchvision classification model (default %(default)s)")
    add("--weights", default="DEFAULT", metavar="W",
        help="DEFAULT | a torchvision weights name | none | a local .pt or .pth file (default %(default)s)")

    add = parser.add_argument_group("freezing").add_argument
    add("--freeze", default="none", metavar="SPEC",
        help="none | backbone | conv | bn | to:LAYER | names or patterns, comma-separated, such as conv1,layer1 or "
             "'*.bn1'; the new head always trains (default %(default)s)")
    add("--unfreeze", action="append", default=[], metavar="EPOCH:NAMES",
        help="what thaws at the start of that epoch, the first being 0: 3:layer4, 5:all; repeatable")
    add("--list-layers", action="store_true", help="print the layers, what is frozen, the rates; do not train")

    add = parser.add_argument_group("loss").add_argument
    add("--label-smoothing", type=number(float, 0, 1), default=0.0, metavar="E", help="(default %(default)s)")
    add("--class-weights", metavar="W", help="balanced | CLASS=W,... such as dog=10,cat=1: a missed dog costs 10")
    add("--class-weight-mean", choices=["weighted", "plain"], default="weighted",
        help="divide a batch's weighted loss by its sum of weights, as nn.CrossEntropyLoss does (default), or by its "
             "number of pictures, so that a weight of 10 makes a gradient ten times as large")
    add("--l1", type=number(float, 0), default=0.0, metavar="L",
        help="L1 penalty on the trainable weights; try 1e-6 to 1e-5 (default: off)")

    add = parser.add_argument_group("optimizer").add_argument
    add("--optimizer", choices=list(DEFAULT_LR), default="adamw", help="(default %(default)s)")
    add("--lr", type=number(float, 0), metavar="LR",
        help=f"learning rate of the head (default: {', '.join(f'{k} {v:g}' for k, v in DEFAULT_LR.items())})")
    add("--backbone-lr-scale", type=number(float, 0), metavar="S",
        help="the backbone's rate is LR * S (default 0.1; 1 with --weights none)")
    add("--momentum", type=number(float, 0, 1), metavar="M", help="sgd (default 0.9) and rmsprop (default 0)")
    add("--wd", "--weight-decay", dest="weight_decay", type=number(float, 0), metavar="D",
        help="on weights, not on biases and norm layers; decoupled in adamw (default 0.01), L2 regularisation in the "
             "others (default 0.0001)")
    add("--schedule", choices=["cosine", "step", "constant", "plateau"], default="cosine", help="(default %(default)s)")
    add("--warmup-epochs", type=number(float, 0), default=0.5, metavar="N", help="linear (default %(default)s)")
    add("--step-epochs", type=number(int, 1), default=3, metavar="N",
        help="step: epochs between cuts of the rate (default %(default)s)")
    add("--plateau-epochs", type=number(int, 1), default=2, metavar="N",
        help="plateau: epochs without a better --monitor before a cut (default %(default)s)")
    add("--gamma", type=number(float, 0, 1), default=0.1, metavar="G",
        help="step, plateau: factor of a cut (default %(default)s)")
    add("--accumulate", type=number(int, 1), default=1, metavar="N",
        help="batches per optimizer step (default %(default)s)")
    add("--clip-grad", type=number(float, 0), default=0.0, metavar="NORM", help="longest gradient (default: any)")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1), default=15, metavar="N", help="(default %(default)s)")
    add("--monitor", choices=["val_loss", "val_accuracy", "val_macro_f1"], default="val_accuracy",
        help="what chooses best.pt and stops early (default %(default)s)")
    add("--patience", type=number(int, 0), default=0, metavar="N",
        help="stop after N epochs without a better --monitor (default 0: never)")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="precision (default %(default)s)")
    add("--device", default="auto", metavar="D", help="auto (cuda, mps, cpu in that order) or a name such as cuda:0")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N", help="(default %(default)s)")

    add = parser.add_argument_group("saving").add_argument
    add("--output", metavar="DIR", help="the run folder (default runs/train_classifier/<time>)")
    add("--resume", nargs="?", const="", metavar="FILE",
        help="go on from FILE; without FILE from --output's last.pt if there is one, else start afresh; options not "
             "typed come from the checkpoint")
    add("--log-every", type=number(int, 1), default=10, metavar="N",
        help="optimizer steps between looks at the loss (default %(default)s)")
    return parser


def read_arguments(argv):
    """Return the options, and the checkpoint of a run that is resumed (else None)."""
    parser = build_parser()
    args, typed, saved = parser.parse_args(argv), checkpoint.typed_options(parser, argv), None
    if args.resume is not None:
        if not (args.resume or args.output):
            parser.error("--resume without a file needs --output, the folder of the run to go on with")
        file = Path(args.resume or Path(args.output, "last.pt"))
        if args.resume or file.exists():
            saved = checkpoint.load(file, script="train_classifier")
            options = checkpoint.resume_options(typed, saved["options"], MAY_CHANGE)
            args = argparse.Namespace(**vars(args) | options)
            args.resume, args.output = str(file), typed.get("output", str(file.parent))
    if not args.data and not args.list_layers:
        parser.error("--data is needed: a folder with one folder of pictures per class")
    for option, applies, where in (
        ("momentum", args.optimizer in ("sgd", "rmsprop"), "--optimizer sgd and rmsprop"),
        ("class_weight_mean", args.class_weights, "--class-weights"),
        ("step_epochs", args.schedule == "step", "--schedule step"),
        ("plateau_epochs", args.schedule == "plateau", "--schedule plateau"),
        ("gamma", args.schedule in ("step", "plateau"), "--schedule step and plateau"),
        ("unfreeze", args.freeze != "none", "something frozen by --freeze"),
    ):
        if option in typed and not applies:
            parser.error(f"--{option.replace('_', '-')} only has a meaning with {where}")
    for option, default in (
        ("lr", DEFAULT_LR[args.optimizer]),
        ("weight_decay", 1e-2 if args.optimizer == "adamw" else 1e-4),
        ("momentum", 0.9 if args.optimizer == "sgd" else 0.0),
        ("backbone_lr_scale", 1.0 if args.weights.lower() == "none" else 0.1),
    ):
        if getattr(args, option) is None:
            setattr(args, option, default)
    # Two runs may start in the same second: the process number keeps them apart.
    args.output = args.output or time.strftime(f"runs/train_classifier/%Y-%m-%d_%H-%M-%S_{os.getpid()}")
    elsewhere = saved is None or Path(args.output).resolve() != file.resolve().parent
    if elsewhere and os.path.isdir(args.output) and any(Path(args.output).glob("*.pt")):
        parser.error(f"{args.output} already holds a run: go on with it by --resume {args.output}/last.pt, or give "
                     "another --output")
    return args, saved


def train(args, saved):
    # ---- 2 device and processes --------------------------------------------------------------------------------------
    available = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(available if args.device == "auto" else args.device)
        torch.zeros(1, device=device).item()
    except Exception as error:  # torch raises many kinds for devices that it does not have
        raise ModelError(f"--device {args.device} cannot be used here: try --device {available}") from error
    gpus = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1
    torch.manual_seed(args.seed)  # for the new head's weights and for dropout

    # ---- 3 data ------------------------------------------------------------------------------------------------------
    images = data.find_images(args.data, args.val_split)
    classes, fingerprint = images.classes, data.fingerprint(images)
    if saved and saved["data"] != fingerprint:
        raise data.DataError(f"{args.data} holds other pictures ({fingerprint}) than the run was started with "
                             f"({saved['data']}): start a new run from its weights, --weights {args.resume}")
    print(data.describe(images))

    # ---- 4 model and head --------------------------------------------------------------------------------------------
    if saved:
        preprocessing, options_to_build = saved["preprocessing"], saved["build"]["options"]
    else:
        pretrained = load_pretrained(args.weights, args.model)
        preprocessing = preprocessing_for(pretrained, args.image_size)
        options_to_build = build_options(args.model, preprocessing["image_size"], pretrained)
    model = build(args.model, **options_to_build)

    head = freeze.find_head(model)  # "fc" in a ResNet, "classifier.6" in a VGG, "heads.head" in a ViT
    old_head = model.get_submodule(head)
    if isinstance(old_head, nn.Conv2d):  # SqueezeNet classifies with a 1x1 convolution
        new_head = nn.Conv2d(old_head.in_channels, len(classes), kernel_size=1)
    else:
        new_head = nn.Linear(old_head.in_features, len(classes), bias=old_head.bias is not None)
    model.set_submodule(head, new_head)
    check_image_size(model.eval(), preprocessing["image_size"])
    if saved:
        model.load_state_dict(saved["model"])
    elif pretrained["state_dict"]:
        same_classes = pretrained["classes"] in (None, classes)  # one of our checkpoints knows its classes
        said = load_weights(model, pretrained["state_dict"], head, same_classes)
        print(f"weights: {pretrained['source']}; {said}")
    model.to(device, memory_format=torch.channels_last)

    # ---- 5 freezing --------------------------------------------------------------------------------------------------
    freeze.freeze(model, args.freeze, head)  # requires_grad = False; train_mode() in section 10 does the other half
    start_epoch, past = (saved["epoch"], saved["options"]["unfreeze"]) if saved else (0, [])
    thaws = freeze.plan_thaws(args.unfreeze, past, start_epoch)
    for epoch, names in thaws.items():
        freeze.select(model, names, head)  # a misspelt name is an error now, not hours later
        if epoch >= max(args.epochs, start_epoch):
            raise freeze.FreezeError(f"--unfreeze {epoch}:{names} never happens: the last epoch is {args.epochs - 1}")
        if epoch < start_epoch:
            freeze.thaw(model, names, head)
    if args.batch_size == 1:  # can its BatchNorms train on a single picture?
        check_image_size(freeze.train_mode(copy.deepcopy(model)).cpu(), preprocessing["image_size"])
    if args.weights.lower() == "none" and args.freeze != "none":
        print("warning: --freeze with --weights none keeps random layers as they are; they learn nothing")

    # ---- 6 loss ------------------------------------------------------------------------------------------------------
    # Your own loss: any callable (logits (N, C) float32, labels (N,) int64) -> scalar can stand here instead.
    weight = losses.class_weights(args.class_weights, classes, data.counts(images, "train"))
    criterion = losses.CrossEntropy(weight, args.class_weight_mean, args.label_smoothing).to(device)

    # ---- 7 optimizer, schedule, scaler -------------------------------------------------------------------------------
    # Backbone and head, each with and without weight decay. All parameters are in, so that a thaw needs nothing more.
    groups = freeze.param_groups(model, head, args.lr, args.weight_decay, args.backbone_lr_scale)
    optimizer_class = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
                       "rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad}[args.optimizer]
    momentum = {"momentum": args.momentum} if args.optimizer in ("sgd", "rmsprop") else {}
    optimizer = optimizer_class(groups, **momentum)

    order = data.SeededBatches(len(images.splits["train"]), args.batch_size, args.seed, shuffle=True)
    batch_sizes = order.sizes()
    steps_per_epoch = math.ceil(len(batch_sizes) / args.accumulate)
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    plateau_scale = 1.0  # what --schedule plateau has cut the rate to

    def lr_at(step):
        """The head's rate at optimizer step `step`: a plain function; only the plateau has a state to restore."""
        if step < warmup_steps:
            return args.lr * (step + 1) / warmup_steps
        if args.schedule == "cosine":  # down to zero (Loshchilov and Hutter, "SGDR", 2017)
            progress = (step - warmup_steps) / max(1, args.epochs * steps_per_epoch - warmup_steps)
            return args.lr * 0.5 * (1 + math.cos(math.pi * progress))
        if args.schedule == "step":
            return args.lr * args.gamma ** (step // steps_per_epoch // args.step_epochs)
        return args.lr * plateau_scale

    precision, reason = args.amp, "as given"
    if args.amp == "auto" and saved and saved["device"] == device.type:
        precision, reason = saved["precision"], "as before"
    elif args.amp == "auto":
        precision, reason = auto_precision(model, device)
    if gpus > 1 and precision == "bf16":  # in the threads of DataParallel, autocast falls back to fp16
        if args.amp == "bf16":
            raise ModelError("--amp bf16 does not reach DataParallel's threads: use --amp fp16, or --device cuda:0")
        precision, reason = "fp16", "DataParallel's threads know no other"
    amp_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[precision]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")  # bf16 has float32's range, needs none

    # ---- 8 resume ----------------------------------------------------------------------------------------------------
    best, best_epoch, epochs_without_gain, history = None, None, 0, []
    output = Path(args.output)
    options = vars(args) | {"data": os.path.abspath(args.data), "unfreeze": [f"{e}:{n}" for e, n in thaws.items()]}
    if saved:
        images_per_step = saved["options"]["batch_size"] * saved["options"]["accumulate"]
        if args.batch_size * args.accumulate != images_per_step:
            raise checkpoint.CheckpointError(f"--batch-size times --accumulate is {args.batch_size * args.accumulate} "
                                             f"but the run was started with {images_per_step}: keep the product")
        settings = [{k: g[k] for k in ("lr_scale", "weight_decay")} for g in optimizer.param_groups]
        optimizer.load_state_dict(saved["optimizer"])  # brings back the momenta, and the old rates and decay too
        for group, now in zip(optimizer.param_groups, settings, strict=True):
            group.update(now)
        if scaler.is_enabled() and saved["scaler"]:  # both empty unless in fp16
            scaler.load_state_dict(saved["scaler"])
        checkpoint.set_rng_state(saved["rng"])
        best, best_epoch, epochs_without_gain = saved["best"], saved["best_epoch"], saved["epochs_without_gain"]
        history, plateau_scale = saved["history"], saved["plateau_scale"]
        print("\n".join([f"resumed from {args.resume} at epoch {start_epoch}", *checkpoint.machine_changes(saved)]))
    checkpoint.start_folder(output)
    if history:
        for line in checkpoint.set_aside_later_epochs(saved, output):
            print(line)
        if not checkpoint.take_best_along(args.resume, saved, output):
            best, best_epoch, epochs_without_gain = history[-1][args.monitor], start_epoch - 1, 0
            print(f"best.pt of the epochs before {start_epoch} is not there any more: {args.resume} is best.pt for now")
        checkpoint.write_csv(history, output / "history.csv")

    def state_to_save(next_epoch):
        """All that resuming and predict.py need, in tensors and plain values: read with weights_only=True."""
        return {
            "script": "train_classifier", "options": options, "machine": checkpoint.machine(),
            "model": model.state_dict(), "head": head, "build": {"name": args.model, "options": options_to_build},
            "preprocessing": preprocessing, "classes": classes, "data": fingerprint,
            "optimizer": optimizer.state_dict(), "plateau_scale": plateau_scale, "scaler": scaler.state_dict(),
            "precision": precision, "device": device.type, "rng": checkpoint.rng_state(), "epoch": next_epoch,
            "step": next_epoch * steps_per_epoch, "best": best, "best_epoch": best_epoch,
            "epochs_without_gain": epochs_without_gain, "history": history,
        }

    # ---- 9 several GPUs ----------------------------------------------------------------------------------------------
    # `network` runs; `model` is frozen, thawed and saved: the same parameters under their plain names.
    network = nn.DataParallel(model) if gpus > 1 else model

    # ---- 10 the loop -------------------------------------------------------------------------------------------------
    size, resize_size, interpolation = (preprocessing[k] for k in ("image_size", "resize_size", "interpolation"))
    mean, std = (torch.tensor(preprocessing[k], device=device).view(3, 1, 1) for k in ("mean", "std"))
    augment = data.train_transform(size, args.augment, interpolation, resize_size)
    train_images = data.ImageList(images.splits["train"], augment, args.seed, size=2 * size)  # twice: room for crops
    train_loader = data.make_loader(train_images, order, args.workers, pin_memory=device.type == "cuda")

    def loader_of(split):
        plain = data.eval_transform(size, interpolation, resize_size)
        listed = data.ImageList(images.splits[split], plain, size=2 * size)
        return data.make_loader(listed, data.SeededBatches(len(listed), args.batch_size), args.workers)

    @torch.inference_mode()
    def evaluate(loader, dtype):
        """The network's outputs (N, C) in float32 and the labels (N,) of a whole split, in evaluation mode."""
        network.eval()
        outputs, labels = [], []
        for x, y in data.batches(loader):
            with torch.amp.autocast(device.type, dtype, enabled=dtype is not None):
                outputs.append(network(data.to_input(x, mean, std)).float())
            labels.append(y)
        return torch.cat(outputs), torch.cat(labels).to(device)

    val_loader = loader_of("val")
    print(f"\n{args.model}, {size} px, {device}{f' x {gpus}' if gpus > 1 else ''}, precision {precision} ({reason})\n"
          f"{freeze.group_table(model, head, args.lr, args.backbone_lr_scale)}\n")

    if start_epoch >= args.epochs:
        print(f"all {start_epoch} epochs are done; to train longer, give more --epochs")
    for epoch in range(start_epoch, args.epochs):
        if args.patience and epochs_without_gain >= args.patience:
            print(f"stopped early: no better {args.monitor} for {epochs_without_gain} epochs")
            break
        if epoch in thaws:
            if not (way_back := output / f"before_unfreeze_{epoch}.pt").exists():  # stays as it is when used
                checkpoint.save(state_to_save(epoch), output, name=way_back.name)
            print(f"thaw: {thaws[epoch]}, {freeze.thaw(model, thaws[epoch], head):,} parameters")

        freeze.train_mode(network)  # model.train(), and eval() on every frozen part: no running statistics move there
        order.epoch, step = epoch, epoch * steps_per_epoch
        again = f"python train_classifier.py --resume {output}/last.pt" if epoch else "the same command with"
        seen = 0
        loss_sum, hits, norm_sum = (torch.zeros((), device=device) for _ in range(3))
        started = time.perf_counter()
        bar = tqdm(data.batches(train_loader), f"epoch {epoch}", len(batch_sizes), leave=False, disable=None)
        for i, (x, y) in enumerate(bar):
            x, y = data.to_input(x, mean, std), y.to(device, non_blocking=True)
            with torch.amp.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                logits = network(x)
            loss = criterion(logits.float(), y)  # in float32, out of autocast's reach

            # The batches of one optimizer step count by their share of its pictures; the last step may have fewer.
            first = i - i % args.accumulate
            share = len(y) / sum(batch_sizes[first : first + args.accumulate])
            scaler.scale(loss * share).backward()
            seen += len(y)
            loss_sum += loss.detach() * len(y)  # stays on the device: .item() here would wait for it at every step
            hits += (logits.detach().argmax(1) == y).sum()
            if (i + 1) % args.accumulate and i + 1 < len(batch_sizes):
                continue  # not yet the last batch of this optimizer step

            if args.l1:
                scaler.scale(args.l1 * losses.l1_penalty(model)).backward()
            scaler.unscale_(optimizer)  # nothing to do unless in fp16
            trained = [p for p in model.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm([p.grad for p in trained])
            if args.clip_grad:
                nn.utils.clip_grads_with_norm_(trained, args.clip_grad, norm)
            for group in optimizer.param_groups:
                group["lr"] = group["lr_scale"] * lr_at(step)
            scaler.step(optimizer)  # passes over this step if fp16 has overflowed
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            norm_sum += norm.nan_to_num(0, 0, 0)  # infinite where fp16 has overflowed
            step += 1
            if step % args.log_every == 0 or i + 1 == len(batch_sizes):
                train_loss = loss_sum.item() / seen
                bar.set_postfix_str(f"loss {train_loss:.4f}, {seen / (time.perf_counter() - started):.0f} images/s")
                losses.check_finite(train_loss, f"training loss of epoch {epoch}", f"{again} --lr {args.lr / 2:g}")
        train_seconds = time.perf_counter() - started

        outputs, labels = evaluate(val_loader, amp_dtype)
        confusion = metrics.confusion_matrix(outputs.argmax(1), labels, len(classes))
        scores = {"val_loss": criterion(outputs, labels).item()}
        losses.check_finite(scores["val_loss"], f"validation loss of epoch {epoch}", f"{again} --lr {args.lr / 2:g}")
        scores |= {f"val_{name}": value for name, value in metrics.scores(confusion).items()}
        seconds = time.perf_counter() - started
        history.append({"epoch": epoch, "train_loss": train_loss, "train_accuracy": hits.item() / seen, **scores,
                        "lr": lr_at(step - 1), "grad_norm": norm_sum.item() / steps_per_epoch, "seconds": seconds,
                        "images_per_second": seen / train_seconds})

        now = scores[args.monitor]
        is_best = best is None or (now < best if args.monitor == "val_loss" else now > best)
        if is_best:
            best, best_epoch, epochs_without_gain = now, epoch, 0
        else:
            epochs_without_gain += 1
            if args.schedule == "plateau" and epochs_without_gain % args.plateau_epochs == 0:
                plateau_scale *= args.gamma
        checkpoint.save(state_to_save(epoch + 1), output, best=is_best)
        checkpoint.write_csv(history, output / "history.csv")
        checkpoint.write_json(options, output / "args.json")
        print(f"epoch {epoch:3d}  train_loss {train_loss:.4f}  " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items())
              + f"  lr {history[-1]['lr']:.1e}  {seconds:.1f} s{'  best' if is_best else ''}", flush=True)

    # ---- the end: best.pt, once, on the test split, which has chosen nothing -----------------------------------------
    best_state = checkpoint.load(output / "best.pt", script="train_classifier")
    model.load_state_dict(best_state["model"])
    split = "test" if "test" in images.splits else "val"
    outputs, labels = evaluate(loader_of(split), None)  # in float32, as predict.py does
    confusion = metrics.confusion_matrix(outputs.argmax(1), labels, len(classes)).cpu()
    probabilities, predicted = outputs.softmax(1).max(1)
    rows = zip(images.splits[split], predicted.tolist(), probabilities.tolist(), strict=True)
    checkpoint.write_csv([{"file": file, "truth": classes[truth], "prediction": classes[guess], "probability": p}
                          for (file, truth), guess, p in rows], output / f"{split}_predictions.csv")
    print(f"\nbest.pt: epoch {best_state['epoch'] - 1}, {args.monitor} {best_state['history'][-1][args.monitor]:.4f}\n"
          f"accuracy {metrics.scores(confusion)['accuracy']:.4f} on the {len(labels)} pictures of {split}"
          f"{'' if split == 'test' else ', which chose best.pt: expect a little less on others'}\n\n"
          f"{metrics.report(confusion, classes)}\n\n"
          f"files are in {output}; next: python predict.py --checkpoint {output}/best.pt PICTURES")


def list_layers(args):
    """--list-layers: the table that section 10 prints; for 1000 classes without --data; no weights are needed."""
    options = {"num_classes": len(data.find_images(args.data, args.val_split).classes)} if args.data else {}
    model = build(args.model, **options, **build_options(args.model, args.image_size or 224))
    head = freeze.find_head(model)
    freeze.freeze(model, args.freeze, head)
    print(freeze.group_table(model, head, args.lr, args.backbone_lr_scale))
    for epoch, names in freeze.plan_thaws(args.unfreeze).items():
        print(f"epoch {epoch}: {freeze.thaw(model, names, head):,} parameters thaw ({names})")


def main(argv=None):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may hold what a terminal cannot show
    args = None
    try:
        args, saved = read_arguments(argv)
        if args.list_layers:
            list_layers(args)
        else:
            train(args, saved)
    except (checkpoint.CheckpointError, data.DataError, freeze.FreezeError, losses.LossError, ModelError) as error:
        tqdm.write("error: " + " ".join(str(error).splitlines()), file=sys.stderr)  # clears the bar first
        sys.exit(2)
    except KeyboardInterrupt:
        last = Path(args.output, "last.pt") if args else None
        again = f"; go on with: python train_classifier.py --resume {last}" if last and last.exists() else ""
        print(f"\nstopped{again}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
