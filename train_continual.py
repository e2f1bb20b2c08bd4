"""Go on with a fine-tuned classifier on new pictures, known classes or more of them, without forgetting the old ones:
the full loop, top to bottom, in plain PyTorch.

    python train_continual.py --from runs/old/best.pt --data ./thumbnails --method l2-sp                 # no old pictures
    python train_continual.py --from runs/old/best.pt --old-data ./photos --data ./thumbnails --method ewc
    python train_continual.py --from runs/old/best.pt --old-data ./photos --data ./thumbnails --method replay
    python train_continual.py --resume runs/train_continual/.../last.pt            # go on after an interruption

Network, image size and classes come from the checkpoint. --data and --old-data hold train/ and val/ (and test/), or are
one folder each to be split; in them one folder of pictures per class. Classes are known by their names: old ones keep
their outputs, new ones get outputs behind them. Given --old-data, the old validation split is scored beside the new one.
"""

import functools
import math
import os
import shlex
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import checkpoint
import data
import ending
import freeze
import losses
import metrics
import report
from arguments import (MAY_CHANGE, above, add_optimizer_options, add_picture_options, add_saving_options,
                       add_training_options, count, fill_defaults, make_parser, number, refuse_idle, share,
                       shared_rules, typed_options)
from model import (AUXILIARY_WEIGHT, ModelError, auxiliary_heads, check_image_size, grow_outputs, pick_device,
                   pick_precision, rebuild, set_dropout)

# ---- 1 arguments -----------------------------------------------------------------------------------------------------

METHODS = ("none", "freeze", "l2-sp", "ewc", "replay")
OF_OLD = ("mean_accuracy", "old_val_accuracy", "old_val_loss")  # what --monitor can be with --old-data alone


def build_parser():
    """What is the same in every script stands in arguments.py."""
    parser = make_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="DIR", help="the new pictures: train/ and val/ (and test/), or one folder of class folders")
    add("--old-data", metavar="DIR", help="the old pictures, likewise: scored in every epoch; ewc and replay need them")
    add("--from", metavar="FILE", help="best.pt of train_classifier.py or of this script: where to go on from")
    add("--val-split", type=number(float, 0.01, 0.99), default=0.2, metavar="SHARE",
        help="share of each class that is set aside where there is no val/ (default %(default)s)")
    add("--augment", choices=data.AUGMENT, default="standard",
        help="light: a slight crop, flip; standard: any crop, flip; strong: and colours, distortions, holes (default "
             "%(default)s)")
    add_picture_options(add, without=["--image-size", "--cache-features"])

    add = parser.add_argument_group("method").add_argument
    add("--method", default="none", metavar="M",
        help="against forgetting: none | freeze | l2-sp | ewc | replay, or some of them, joined by +, such as "
             "ewc+replay (default %(default)s)")
    add("--freeze", default="backbone", metavar="SPEC",
        help="freeze: what stays as it is, in the words of train_classifier.py (default %(default)s)")
    add("--l2-sp", type=above, default=1, metavar="ALPHA",
        help="l2-sp: pull of the backbone towards where it started, in place of weight decay (default %(default)s)")
    add("--ewc", type=above, default=10000, metavar="LAMBDA",
        help="ewc: pull of each weight towards where it started, times its Fisher information (default %(default)s)")
    add("--fisher", choices=["true", "empirical"], default="true",
        help="ewc: from the model's own predictions, or from the labels (default %(default)s)")
    add("--fisher-size", type=count, default=200, metavar="N",
        help="ewc: old pictures that it is computed from, each alone (default %(default)s; 0: all)")
    add("--replay-fraction", type=number(float, 0, 0.99), default=0.5, metavar="F",
        help="replay: share of old pictures in each batch (default %(default)s)")
    add("--replay-size", type=count, default=0, metavar="N",
        help="replay: old pictures that are kept, as many of each class, chosen by the seed (default 0: all)")
    add("--label-smoothing", type=share, default=0.0, metavar="E", help="(default %(default)s)")
    add("--dropout", type=number(float, 0, 0.99), metavar="P", help="beside the head (default: as it was)")

    add_optimizer_options(parser, without=["--find-lr"])
    add_training_options(parser, ["mean_accuracy", "val_accuracy", "val_loss", "val_balanced_accuracy", "val_macro_f1",
                                  "old_val_accuracy", "old_val_loss"], without=["--compile", "--sync-bn"])
    add_saving_options(parser, "train_continual")
    return parser


def read_arguments(argv):
    """Return the options, and the checkpoint of a run that is resumed (else None)."""
    parser = build_parser()
    args, typed = parser.parse_args(argv), typed_options(parser, argv)
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        parser.error("train_continual.py runs in one process: start it without torchrun; it uses all GPUs that it sees")
    args, saved = checkpoint.resume_arguments(args, typed, "train_continual", MAY_CHANGE)
    methods, old = args.method.split("+"), bool(args.old_data)
    if unknown := [name for name in methods if name not in METHODS]:
        parser.error(f"--method knows no '{unknown[0]}': there are {', '.join(METHODS)}, joined by +")
    if saved and "replay" in methods and args.batch_size != saved["options"]["batch_size"]:
        parser.error(f"--batch-size is {args.batch_size} but the run was started with {saved['options']['batch_size']}: "
                     "it stays, since it decides which old pictures are replayed when")
    if len(set(methods)) < len(methods) or "none" in methods and len(methods) > 1:
        parser.error(f"--method {args.method}: each name once, and none alone")
    if {"l2-sp", "ewc"} <= set(methods):
        parser.error(f"--method {args.method}: l2-sp and ewc pull towards the same point, one with the same force "
                     "everywhere, the other where the old task needs it: take one of them")
    if {"freeze", "l2-sp"} <= set(methods) and args.freeze == "backbone":
        parser.error(f"--method {args.method}: l2-sp pulls the backbone back, and all of it is frozen: freeze less, as "
                     "by --freeze bn, or take one of them")
    for option, missing in (("--from: best.pt of the model to go on with", not vars(args)["from"]),
                            ("--data: the new pictures, one folder for each class", not args.data),
                            (f"--old-data: --method {args.method} learns from old pictures",
                             not old and {"ewc", "replay"} & set(methods))):
        if missing:
            parser.error(f"{option.partition(':')[0]} is needed{option[option.index(':'):]}")
    trains = "freeze" not in methods or args.freeze != "backbone"
    rules = {option: (method in methods, f"--method {method}") for option, method in report.OF_METHODS.items()}
    rules["monitor"] = old or args.monitor not in OF_OLD, "--old-data, or another word"
    refuse_idle(parser, typed, shared_rules(args, trains) | rules)
    if not old and "monitor" not in typed and args.monitor in OF_OLD:
        args.monitor = "val_accuracy"
    report.check_tensorboard(args.tensorboard)
    fill_defaults(args)
    return args, saved


def train(args, saved, stop):
    # ---- 2 device and processes --------------------------------------------------------------------------------------
    device = pick_device(args.device, args.deterministic)
    gpus = torch.cuda.device_count() if device == torch.device("cuda") else 1
    torch.manual_seed(args.seed)  # for the outputs of new classes and for dropout

    # ---- 3 data ------------------------------------------------------------------------------------------------------
    methods, origin = args.method.split("+"), vars(args)["from"]
    start = saved or checkpoint.load(origin)
    if "classes" not in start:
        raise checkpoint.CheckpointError(f"{origin} was written by {start['script']}.py: --from takes a classifier")
    known = saved["classes"][: saved["known"]] if saved else start["classes"]
    images = data.find_images(args.data, args.val_split, least=1)
    old = data.find_images(args.old_data, args.val_split, least=1) if args.old_data else None
    if old and (strange := [name for name in old.classes if name not in known]):
        raise data.DataError(f"{args.old_data} has the class '{strange[0]}', which the model of {origin} does not know: "
                             f"it knows {', '.join(known)}; new classes belong into --data")
    fingerprint = "; old: ".join(data.fingerprint(found) for found in (images, old) if found)
    if saved and saved["data"] != fingerprint:
        raise data.DataError(f"{args.data} or --old-data holds other pictures ({fingerprint}) than the run was started "
                             f"with ({saved['data']}): start a new run, --from {shlex.quote(args.resume)}")
    fresh = [name for name in images.classes if name not in known]
    print(f"new pictures{', of which new classes: ' + ', '.join(fresh) if fresh else ''}\n"
          f"{data.describe(images, hints=False)}")
    if old:
        print(f"old pictures\n{data.describe(old, hints=False)}")
    classes = [*known, *fresh]  # old outputs stay where they are, whatever the order of the folders
    images, old = (found and data.relabel(found, classes) for found in (images, old))
    buffer = data.balanced(old.splits["train"], args.replay_size, args.seed) if "replay" in methods else []
    preprocessing = start["preprocessing"]
    size, resize_size, interpolation = (preprocessing[k] for k in ("image_size", "resize_size", "interpolation"))
    mean, std = (torch.tensor(preprocessing[k], device=device).view(3, 1, 1) for k in ("mean", "std"))
    skipped = {} if args.on_bad_image == "skip" else None  # {file: what is wrong with it}

    def loader_of(samples):
        return data.eval_loader(samples, preprocessing, args.batch_size, args.workers)

    # ---- 4 model and head --------------------------------------------------------------------------------------------
    model, head, name = rebuild(start), start["head"], start["build"]["name"]
    heads = (head, *auxiliary_heads(model))  # what no spec freezes
    if fresh and not saved:
        for layer in (freeze.find_head(model), *(f"{h}.{freeze.find_head(model.get_submodule(h))}" for h in heads[1:])):
            grow_outputs(model, layer, len(fresh))
    if args.dropout is None:
        args.dropout = start["options"].get("dropout")
    if args.dropout is not None:
        set_dropout(model, head, args.dropout)

    # ---- 5 freezing --------------------------------------------------------------------------------------------------
    freeze.freeze(model, args.freeze if "freeze" in methods else "none", heads)
    groups = freeze.param_groups(model, heads, args.lr, args.weight_decay, args.backbone_lr_scale, args.layer_decay)
    if args.batch_size == 1 or len(heads) > 1:  # can BatchNorm train on single pictures, auxiliary heads on small ones?
        check_image_size(freeze.train_mode(model), size, args.batch_size)
    model.to(device, memory_format=torch.channels_last)

    # ---- 6 loss ------------------------------------------------------------------------------------------------------
    criterion = losses.CrossEntropy(label_smoothing=args.label_smoothing)
    anchor, fisher = (saved["anchor"], saved["fisher"]) if saved else ({}, {})
    if "l2-sp" in methods:
        anchor = anchor or losses.anchor_of(model, heads)
        for group in groups:  # the head keeps its decay towards zero
            group["weight_decay"] *= group["layer"] in heads
    if "ewc" in methods and not saved:
        sample = data.balanced(old.splits["train"], args.fisher_size, args.seed)
        found = tqdm(data.batches(loader_of(sample), skipped), "Fisher information, batches", leave=False, disable=None)
        pictures, started = ((data.to_input(x, mean, std), y) for x, y in found), time.perf_counter()
        anchor = losses.anchor_of(model)
        fisher = losses.fisher_diagonal(model, pictures, args.fisher, len(known), args.seed)  # in float32
        print(f"{args.fisher} Fisher information of {len(sample)} old pictures: {time.perf_counter() - started:.1f} s")
    pulled = [n for n, p in model.named_parameters() if p.requires_grad and n in anchor]
    if {"l2-sp", "ewc"} & set(methods) and not pulled:
        raise losses.LossError(f"--method {args.method} has nothing to pull: --freeze {args.freeze} keeps all of it "
                               "still")
    anchor, fisher = ({k: v.to(device) for k, v in found.items()} for found in (anchor, fisher))

    # ---- 7 optimizer, schedule, scaler -------------------------------------------------------------------------------
    optimizer_class = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
                       "rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad}[args.optimizer]
    momentum = {"momentum": args.momentum} if args.optimizer in ("sgd", "rmsprop") else {}
    fused = {"fused": True} if args.optimizer in ("sgd", "adam", "adamw") and device.type in ("cpu", "cuda") else {}
    optimizer = optimizer_class(groups, **momentum, **fused)  # fused: all parameters in one call, several times as fast

    new_count = len(images.splits["train"])
    order = data.SeededBatches(new_count, args.batch_size, args.seed, shuffle=True)
    if buffer:  # an epoch is still one pass through the new pictures
        order = data.ReplayBatches(new_count, len(buffer), args.batch_size, args.replay_fraction, args.seed)
    batch_sizes = order.sizes()
    steps_per_epoch = math.ceil(len(batch_sizes) / args.accumulate)
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    plateau_scale = 1.0  # what --schedule plateau has cut the rate to

    def factor_at(step):
        """The share of its peak rate that each group has at optimizer step `step`: a plain function of the step."""
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if args.schedule == "cosine":  # down to zero (Loshchilov and Hutter, "SGDR", 2017)
            progress = (step - warmup_steps) / max(1, args.epochs * steps_per_epoch - warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * progress))
        if args.schedule == "step":
            return args.gamma ** (step // steps_per_epoch // args.step_epochs)
        return plateau_scale

    amp = saved["precision"] if saved and args.amp == "auto" and saved["device"] == device.type else args.amp
    precision, reason, amp_dtype = pick_precision(amp, model, device, gpus)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")  # bf16 has float32's range, needs none

    # ---- 8 resume ----------------------------------------------------------------------------------------------------
    best, best_epoch, epochs_without_gain, history = None, None, 0, []
    start_epoch, step, sums, before = 0, 0, {}, {}  # sums: of the running epoch; before: the scores at the start
    output = Path(args.output)
    options = vars(args) | {k: os.path.abspath(vars(args)[k]) for k in ("data", "old_data") if vars(args)[k]}
    _lock = checkpoint.start_folder(output, options)  # until the end no other run may write there
    board = report.tensorboard_writer(output, saved["epoch"] if saved else 0) if args.tensorboard else None
    if saved:
        checkpoint.restore(saved, optimizer, scaler, saved["rng"])
        notes = [*checkpoint.machine_changes(saved), *checkpoint.go_on_in(output, saved, args.resume)]
        best, best_epoch, epochs_without_gain = (saved[k] for k in ("best", "best_epoch", "epochs_without_gain"))
        history, plateau_scale, step, sums = (saved[k] for k in ("history", "plateau_scale", "step", "sums"))
        start_epoch, before = saved["epoch"], saved["before"]
        print("\n".join([f"resumed from {args.resume} at epoch {start_epoch}, step {step}", *notes]))

    def save(next_epoch, sums=None, **how):
        """Save all that resuming and predict.py need, in tensors and plain values: read with weights_only=True."""
        state = {
            "script": "train_continual", "options": options, "machine": checkpoint.machine(),
            "model": model.state_dict(), "build": start["build"], "head": head, "hidden": start["hidden"],
            "preprocessing": preprocessing, "classes": classes, "known": len(known), "data": fingerprint,
            "anchor": anchor, "fisher": fisher, "before": before,
            "optimizer": optimizer.state_dict(), "plateau_scale": plateau_scale, "scaler": scaler.state_dict(),
            "precision": precision, "device": device.type, "rng": checkpoint.rng_state(), "epoch": next_epoch,
            "step": step, "sums": sums or {}, "best": best, "best_epoch": best_epoch,
            "epochs_without_gain": epochs_without_gain, "history": history,
        }
        checkpoint.save(state, output, way_out=way_out, **how)

    def way_out():
        return checkpoint.slower_command("train_continual", output, args.lr, {}, step)

    # ---- 9 several GPUs ----------------------------------------------------------------------------------------------
    # `network` runs; `model` is frozen, pulled and saved: the same parameters under their plain names.
    network = nn.DataParallel(model) if gpus > 1 else model

    # ---- 10 the loop -------------------------------------------------------------------------------------------------
    augment = data.train_transform(size, args.augment, interpolation, resize_size)  # or any v2 transform of your own
    train_images = data.ImageList([*images.splits["train"], *buffer], augment, args.seed, size=2 * size)
    train_loader = data.make_loader(train_images, order, args.workers, pin_memory=device.type == "cuda")
    val_loaders = {"val": loader_of(images.splits["val"])} | ({"old_val": loader_of(old.splits["val"])} if old else {})

    @torch.inference_mode()
    def evaluate(batches, dtype):
        """The network's outputs (N, C) in float32 and the labels (N,) of a whole split, in evaluation mode."""
        network.eval()
        outputs, labels = [], []
        for x, y in batches:
            with torch.amp.autocast(device.type, dtype, enabled=dtype is not None):
                outputs.append(network(data.to_input(x, mean, std)).float())
            labels.append(y)
        if not outputs:
            raise data.DataError(data.NONE_READ)
        return torch.cat(outputs), torch.cat(labels).to(device)

    def validate(batches_of):
        """The scores of the new and the old validation split, and how many pictures they are from."""
        scores, seen = {}, 0
        for split, loader in val_loaders.items():
            outputs, labels = evaluate(batches_of(loader), amp_dtype)
            scores[f"{split}_loss"] = criterion(outputs, labels).item()
            scores |= {f"{split}_{key}": value for key, value in metrics.class_scores(outputs, labels).items()}
            seen += len(labels)
        if old:  # both tasks count the same
            scores["mean_accuracy"] = (scores["val_accuracy"] + scores["old_val_accuracy"]) / 2
        return scores, seen

    def save_here():
        """Between two steps of the running epoch: a resumed run goes on with its next batch, or with its validation."""
        if sums["images"]:
            losses.check_finite(float(sums["loss"]) / sums["images"], f"training loss of epoch {epoch}", way_out)
        sums["seconds"] = time.perf_counter() - started
        save(epoch, {k: float(v) for k, v in sums.items()} if sums["images"] else None)

    def batches_of(loader, per_step=1, at_least=0, saving=True):
        """Batches of the running epoch; a stop signal or an unreadable picture ends the run here, with its state saved
        if that is between two optimizer steps.
        """
        count = 0
        try:
            for count, batch in enumerate(data.batches(loader, skipped, at_least, tqdm.write), start=1):
                yield batch
                if count % per_step == 0:
                    ending.leave_if_asked(stop)
        except (data.DataError, ending.Stopped):
            if saving and count % per_step == 0:
                save_here()
            raise

    print(f"\n{name}, {size} px, {device}{f' x {gpus}' if gpus > 1 else ''}, precision {precision} ({reason}), method "
          f"{args.method}\n{freeze.group_table(model, heads, optimizer.param_groups)}\n")
    if not saved:
        before, _ = validate(lambda loader: data.batches(loader, skipped))
        print("before     " + "  ".join(f"{k} {v:.4f}" for k, v in before.items() if k.endswith(("loss", "l_accuracy"))))
    if start_epoch >= args.epochs:
        print(f"all {start_epoch} epochs are done; to train longer, give more --epochs")
    ending.wait_for_steps(stop, functools.partial(checkpoint.resume_command, "train_continual", output))
    for epoch in range(start_epoch, args.epochs):
        if args.patience and epochs_without_gain >= args.patience:
            print(f"stopped early: no better {args.monitor} for {epochs_without_gain} epochs")
            break
        order.epoch = epoch
        order.start = min((step - epoch * steps_per_epoch) * args.accumulate, len(batch_sizes))  # 0 unless resumed
        sums = sums or dict.fromkeys(["images", "loss", "hits", "norm", "skipped_steps", "seconds"], 0.0)
        started = time.perf_counter() - sums["seconds"]
        freeze.train_mode(model)  # model.train(), and eval() on every frozen part: no running statistics move there
        bar = tqdm(batches_of(train_loader, args.accumulate, at_least=2), f"epoch {epoch}", len(batch_sizes), leave=False,
                   disable=None, initial=order.start)
        for i, (x, y) in enumerate(bar, order.start):
            x, y = data.to_input(x, mean, std), y.to(device, non_blocking=True)
            with torch.amp.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                outputs = network(x)
            logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
            loss = criterion(logits.float(), y)  # in float32, out of autocast's reach
            sums["loss"] += loss.detach() * len(y)  # stays on the device: .item() would wait for it at every step
            for more in auxiliary:  # not in train_loss, which is to be compared with val_loss
                loss = loss + AUXILIARY_WEIGHT[name] * criterion(more.float(), y)

            # The batches of one optimizer step count by their share of its pictures; the last step may have fewer.
            first = i - i % args.accumulate
            part = len(y) / sum(batch_sizes[first : first + args.accumulate])
            scaler.scale(loss * part).backward()
            sums["images"] += len(y)
            sums["hits"] += (logits.detach().argmax(1) == y).sum()
            if (i + 1) % args.accumulate and i + 1 < len(batch_sizes):
                continue  # not yet the last batch of this optimizer step

            # What pulls back, once per step and not in train_loss.
            if "l2-sp" in methods:
                scaler.scale(args.l2_sp * losses.l2_sp_penalty(model, anchor)).backward()
            if "ewc" in methods:
                scaler.scale(args.ewc * losses.ewc_penalty(model, anchor, fisher)).backward()
            scaler.unscale_(optimizer)  # nothing to do unless in fp16
            trained = [p for p in model.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm([p.grad for p in trained])
            if args.clip_grad:
                nn.utils.clip_grads_with_norm_(trained, args.clip_grad, norm)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor_at(step)
            scaler.step(optimizer)  # passes over this step if fp16 has overflowed
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            sums["norm"] += norm.nan_to_num(0, 0, 0)  # not finite where fp16 has overflowed
            sums["skipped_steps"] += scaler.is_enabled() * ~norm.isfinite()
            step += 1
            if step % args.log_every == 0 or i + 1 == len(batch_sizes):
                train_loss = sums["loss"].item() / sums["images"]
                speed = sums["images"] / (time.perf_counter() - started)
                bar.set_postfix_str(f"loss {train_loss:.4f}, {speed:.0f} images/s")
                losses.check_finite(train_loss, f"training loss of epoch {epoch}", way_out)
            if args.save_every and step % args.save_every == 0:
                save_here()
        train_loss = float(sums["loss"]) / sums["images"]
        train_seconds = sums.setdefault("train_seconds", time.perf_counter() - started)

        scores, seen = validate(batches_of)
        losses.check_finite(scores["val_loss"], f"validation loss of epoch {epoch}", way_out)
        seconds, skipped_steps = time.perf_counter() - started, int(sums["skipped_steps"])
        listed = sum(batch_sizes) + sum(len(loader.dataset) for loader in val_loaders.values())
        history.append({"epoch": epoch, "train_loss": train_loss, "train_accuracy": float(sums["hits"]) / sums["images"],
                        **scores, "lr": args.lr * factor_at(step - 1),
                        "grad_norm": float(sums["norm"]) / max(1, steps_per_epoch - skipped_steps),
                        "loss_scale": scaler.get_scale(), "skipped_steps": skipped_steps,
                        "unreadable": listed - seen - int(sums["images"]),
                        "seconds": seconds, "images_per_second": sums["images"] / train_seconds})

        now = scores[args.monitor]
        is_best = best is None or (now < best if args.monitor.endswith("loss") else now > best)
        if is_best:
            best, best_epoch, epochs_without_gain = now, epoch, 0
        else:
            epochs_without_gain += 1
            if args.schedule == "plateau" and epochs_without_gain % args.plateau_epochs == 0:
                plateau_scale *= args.gamma
        kept = f"epoch_{epoch}.pt" if args.keep_every and (epoch + 1) % args.keep_every == 0 else None
        sums = {}
        save(epoch + 1, best=is_best, keep=kept)
        checkpoint.write_csv(history, output / "history.csv")
        report.add_to_tensorboard(board, history[-1])
        shown = ["train_loss", "val_loss", "val_accuracy", *["old_val_accuracy"][: bool(old)], args.monitor]
        print(f"epoch {epoch:3d}  " + "  ".join(f"{k} {history[-1][k]:.4f}" for k in dict.fromkeys(shown))
              + f"  lr {history[-1]['lr']:.1e}  {seconds:.1f} s{'  best' if is_best else ''}", flush=True)
        if scaler.get_scale() < 1:
            print("warning: fp16's loss scale has collapsed, steps are passed over: start again with --amp bf16 or off")
        ending.leave_if_asked(stop)

    # ---- the end: best.pt, once, on the test splits, which have chosen nothing ---------------------------------------
    best_state = checkpoint.load(output / "best.pt", script="train_continual")
    print(f"\nbest.pt: epoch {best_state['epoch'] - 1}, {args.monitor} {best_state['history'][-1][args.monitor]:.4f}")
    for key in ("val_accuracy", *["old_val_accuracy"][: bool(old)]):
        print(f"{key}: {before[key]:.4f} before, {best_state['history'][-1][key]:.4f} now")
    model.load_state_dict(best_state["model"])
    for which, found in {"": images, "old_": old}.items() if not args.no_test else ():
        if not found:
            continue
        skipped = skipped and {}  # what can be read now
        split = "test" if "test" in found.splits else "val"
        outputs, labels = evaluate(batches_of(loader_of(found.splits[split]), saving=False), None)  # as predict.py does
        confusion = metrics.confusion_matrix(outputs.argmax(1), labels, len(classes)).cpu()
        files = [file for file, _ in found.splits[split] if file not in (skipped or {})]
        listed = metrics.prediction_rows(files, outputs.softmax(1), classes, labels)
        checkpoint.write_csv(listed, output / f"{which}{split}_predictions.csv")
        chose = "" if split == "test" else ", which chose best.pt: expect a little less on others"
        print(f"\n{'old' if which else 'new'} pictures: accuracy {metrics.scores(confusion)['accuracy']:.4f} on the "
              f"{len(labels)} of {split}{chose}\n\n{metrics.report(confusion, classes)}")
    print(f"\n{report.sum_up(output, history, args.monitor, pictures=not args.no_report)}\n"
          f"next: python predict.py --checkpoint {shlex.quote(str(output / 'best.pt'))} PICTURES")


def main(argv=None):
    with ending.tidy(checkpoint.CheckpointError, data.DataError, freeze.FreezeError, losses.LossError, ModelError,
                     report.ReportError) as stop:
        args, saved = read_arguments(argv)
        train(args, saved, stop)


if __name__ == "__main__":
    main()
