"""Go on with a fine-tuned classifier on new pictures, known classes or more of them, without forgetting the old ones:
the full loop, top to bottom, in plain PyTorch.

    python train_continual.py --from runs/old/best.pt --data ./thumbnails --method l2-sp                 # no old pictures
    python train_continual.py --from runs/old/best.pt --old-data ./photos --data ./thumbnails --method ewc
    python train_continual.py --from runs/old/best.pt --old-data ./photos --data ./thumbnails --method replay
    python train_continual.py --resume runs/train_continual/.../last.pt            # go on after an interruption

Network, image size and classes come from the checkpoint. --data and --old-data hold train/ and val/ (and test/), or are
one folder each to be split; in them one folder of pictures per class. Classes are known by their names: old ones keep
their outputs, new ones get outputs behind them. Given --old-data, the old validation split is scored beside the new one.

More: docs/continual.md
"""

import math
import os
import time
from contextlib import nullcontext
from functools import partial

# torch's threads wait for each other by spinning, which beside other work takes several times as long. torch reads this
# when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import nn
from tqdm import tqdm

import checkpoint
import data
import distributed
import ending
import freeze
import losses
import metrics
import report
from arguments import (MAY_CHANGE, above, add_optimizer_options, add_picture_options, add_saving_options,
                       add_training_options, count, fill_defaults, make_parser, number, refuse_idle,
                       refuse_unknown_choices, share, shared_rules, typed_options)
from model import (AUXILIARY_WEIGHT, ModelError, auxiliary_heads, check_image_size, grow_outputs, pick_device,
                   pick_precision, preprocessing_for, rebuild, set_dropout)

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
    add_picture_options(add, without=["--image-size", "--resize", "--white", "--cache-features"])

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
    refuse_unknown_choices(parser, args)
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


OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
              "rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad}
# What may end a run between two optimizer steps, so that its state is saved: a stop signal (Ctrl-C, SIGTERM), a
# picture that cannot be read, a split of which none can be.
INTERRUPTIONS = (ending.Stopped, data.DataError, distributed.ProcessError)


def train(args, saved, stop):
    """args: the options; of a resumed run the saved ones, as the command line has changed them. saved: its checkpoint,
    else None. stop: the stop signals.
    """
    # ---- 2 device and processes --------------------------------------------------------------------------------------
    device = pick_device(args.device, args.deterministic)
    # "cuda" without a number stands for all GPUs here: section 9 uses DataParallel.
    gpus = torch.cuda.device_count() if device == torch.device("cuda") else 1
    # For the outputs of new classes and for dropout.
    torch.manual_seed(args.seed)

    # disable=None: a progress bar only where stderr is a terminal. say(): a line that does not tear the bar.
    progress_bar = partial(tqdm, leave=False, disable=None)
    say = tqdm.write

    # ---- 3 data ------------------------------------------------------------------------------------------------------
    # The model to go on with: where this run was interrupted, or what --from names.
    methods = args.method.split("+")
    origin = vars(args)["from"]
    start = saved or checkpoint.load(origin, needs=checkpoint.NEEDED)
    if "classes" not in start:
        raise checkpoint.CheckpointError(f"{origin} was written by {start['script']}.py: --from takes a "
                                         "classifier")
    # The classes that it knew before this run.
    known = saved["classes"][: saved["known"]] if saved else start["classes"]

    # (A single class is enough here.)
    images = data.find_images(args.data, args.val_split, least=1)
    old = data.find_images(args.old_data, args.val_split, least=1) if args.old_data else None
    if old:
        data.refuse_unknown(old, known, args.old_data, f"the model of {origin}")
    fingerprint = data.fingerprint(images)
    if old:
        fingerprint += f"; old: {data.fingerprint(old)}"
    if saved:
        folders = f"{args.data} or --old-data"
        data.refuse_others(fingerprint, saved["data"], folders, args.resume, "--from")
    fresh = [name for name in images.classes if name not in known]
    new_classes = f", of which new classes: {', '.join(fresh)}" if fresh else ""
    print(f"new pictures{new_classes}\n{data.describe(images, hints=False)}")
    if old:
        print(f"old pictures\n{data.describe(old, hints=False)}")

    # Old outputs stay where they are, whatever the order of the folders; those of new classes come behind them.
    classes = [*known, *fresh]
    images = data.relabel(images, classes)
    if old:
        old = data.relabel(old, classes)
    # Old pictures that are learned again, in a share of each batch; they stand behind the new ones in train_images.
    buffer = []
    if "replay" in methods:
        buffer = data.balanced(old.splits["train"], args.replay_size, args.seed)

    preprocessing = preprocessing_for(start["preprocessing"], flip=args.flip)
    size = preprocessing["image_size"]
    # Another mean or std: set preprocessing["mean"] or ["std"] here; predict.py and --export take them from the
    # checkpoint. What else is to be done to all pictures belongs into data.to_input, which predict.py calls, too (a
    # program of --export does not).
    mean = torch.tensor(preprocessing["mean"], device=device).view(3, 1, 1)
    std = torch.tensor(preprocessing["std"], device=device).view(3, 1, 1)
    # uint8 pictures (N, 3, H, W) -> float32 on the device, normalized, channels_last.
    to_input = partial(data.to_input, mean=mean, std=std)

    # Your own augmentation: any transform from a uint8 tensor (3, H, W) to one of (3, size, size), such as those of
    # torchvision.transforms.v2. It draws from torch's random numbers, which are seeded for each picture and epoch. No
    # Normalize: to_input does that. (Several views of a picture: stack them here; in section 10 flatten them into the
    # batch, as to_input(batch.x.flatten(0, 1)).)
    augment = data.augmentation(preprocessing, args.augment)
    print(data.describe_augment(augment, args.augment))
    # Decoded at twice the size that the network gets: room for crops.
    samples = [*images.splits["train"], *buffer]
    white = preprocessing["white"]
    train_images = data.ImageList(samples, augment, args.seed, 2 * size, args.on_bad_image, white)
    # The batch sampler. Seed and epoch alone decide which pictures make up which batch, so a resumed run goes on with
    # the next one. An epoch is one pass through the new pictures, with replay, too.
    new_count = len(images.splits["train"])
    if buffer:
        order = data.ReplayBatches(new_count, len(buffer), args.batch_size, args.replay_fraction, args.seed)
    else:
        order = data.SeededBatches(new_count, args.batch_size, args.seed, shuffle=True)
    train_loader = data.make_loader(train_images, order, args.workers, pin_memory=device.type == "cuda")
    steps_per_epoch = order.steps_per_epoch(args.accumulate)
    # Batches for evaluation hold indices and not labels: pictures may be unreadable, so labels are looked up by
    # index.
    eval_loader = partial(data.eval_loader, preprocessing=preprocessing, batch_size=args.batch_size,
                          workers=args.workers, on_bad_image=args.on_bad_image)
    # What is scored in every epoch: the new pictures and, if they are at hand, the old ones.
    val_labels = data.labels(images, "val").to(device)
    val_splits = {"val": (eval_loader(images.splits["val"]), val_labels)}
    if old:
        old_val_labels = data.labels(old, "val").to(device)
        val_splits["old_val"] = (eval_loader(old.splits["val"]), old_val_labels)
    # The batches of a loader for evaluation: a stop signal ends them.
    batches_of = partial(pictures_of, stop=stop, say=say)

    # ---- 4 model and head --------------------------------------------------------------------------------------------
    # With its weights, and an output for each class that it knows.
    model = rebuild(start)
    head, model_name = start["head"], start["build"]["name"]
    # Auxiliary heads (GoogLeNet, Inception) are small networks, each with a last layer of its own.
    heads = (head, *auxiliary_heads(model))
    if fresh and not saved:
        # The last layers get one more output for each new class; the old ones stay as they are. (A resumed run has
        # them.)
        grow_outputs(model, freeze.find_head(model), len(fresh))
        for auxiliary in auxiliary_heads(model):
            last = freeze.find_head(model.get_submodule(auxiliary))
            grow_outputs(model, f"{auxiliary}.{last}", len(fresh))
    # The dropout right before the head, or in it; if not given, that which the model was trained with.
    if args.dropout is None:
        args.dropout = start["options"].get("dropout")
    if args.dropout is not None:
        set_dropout(model, head, args.dropout)

    # ---- 5 freezing --------------------------------------------------------------------------------------------------
    # Frozen means two things. This is the first: no gradient, so no step. The second stands in section 10: eval().
    spec = args.freeze if "freeze" in methods else "none"
    frozen = freeze.select(model, spec, heads, without_head=True)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    # Two groups for each layer, with and without weight decay (biases and norm layers have none). group["peak_lr"] is
    # --lr for the head and a part of it for the layers before.
    groups = freeze.param_groups(model, heads, args.lr, args.weight_decay, args.backbone_lr_scale, args.layer_decay)
    if "l2-sp" in methods:
        # The backbone is pulled back to its start and not to zero; the head keeps its weight decay.
        for group in groups:
            if group["layer"] not in heads:
                group["weight_decay"] = 0.0

    if args.batch_size == 1 or len(heads) > 1:
        # Does a training pass work, BatchNorm on a single picture, auxiliary heads on small ones? Tried on a copy;
        # train_mode is train(), but eval() for what is frozen.
        freeze.train_mode(model)
        check_image_size(model, size, args.batch_size)
    # Convolutions are faster in this memory format. Parameters stay the same objects, so `groups` still holds them.
    model.to(device, memory_format=torch.channels_last)

    # ---- 6 loss ------------------------------------------------------------------------------------------------------
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    # Your own loss: put it here, as `criterion`. Any function or nn.Module that takes logits (N, C) in float32 and
    # labels (N,) in int64 and returns a scalar, their mean over the pictures. Validation calls it once for the whole
    # split. The next line refuses --label-smoothing if it has no attribute `label_smoothing`.
    losses.refuse_unused(criterion, label_smoothing=args.label_smoothing)
    # A module is moved to the device. If it has parameters of its own, they train at the head's rate and are saved.
    loss_parameters = losses.own_parameters(criterion, device)
    if loss_parameters:
        groups.append({"layer": "loss", "params": loss_parameters, "lr": args.lr,
                       "peak_lr": args.lr, "weight_decay": 0.0})

    # What pulls the weights back: where they began, {name: tensor}, and for ewc how much the old task needs each of
    # them. (Section 1 has refused l2-sp together with ewc.)
    anchor, fisher = {}, {}
    if saved:
        anchor = losses.moved(saved["anchor"], device)
        fisher = losses.moved(saved["fisher"], device)
    elif "l2-sp" in methods:
        anchor = losses.anchor_of(model, heads)
    elif "ewc" in methods:
        anchor = losses.anchor_of(model)
        sample = data.balanced(old.splits["train"], args.fisher_size, args.seed)
        sample_loader = eval_loader(sample)
        # Of the outputs for known classes: those for new ones are random.
        fisher = fisher_of(model, sample_loader, sample, to_input, args.fisher, len(known),
                           args.seed, progress_bar)
    # If all that it could pull is frozen, it would do nothing.
    if "l2-sp" in methods or "ewc" in methods:
        losses.refuse_idle_pull(model, anchor, f"--method {args.method}", f"--freeze {args.freeze}")

    # ---- 7 optimizer, schedule, scaler -------------------------------------------------------------------------------
    # Every parameter is in, frozen or not: one without a gradient is skipped.
    settings = {}
    if args.optimizer in ("sgd", "rmsprop"):
        settings["momentum"] = args.momentum
    # All parameters in one call, several times as fast. (SGD's fused form is not ready for a first step that overflows
    # in fp16, nor for a layer of which a part has thawed.)
    if args.optimizer in ("adam", "adamw") and device.type in ("cpu", "cuda"):
        settings["fused"] = True
    optimizer = OPTIMIZERS[args.optimizer](groups, **settings)

    # epoch, step, best, best_epoch, epochs_without_gain, plateau_scale, history: plain values.
    progress = checkpoint.Progress()
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)

    # A schedule of PyTorch's instead: make it here, for steps and not epochs, as scheduler = OneCycleLR(optimizer,
    # max_lr=[group["peak_lr"] for group in groups], total_steps=args.epochs * steps_per_epoch). Save it in section 8,
    # by parts["scheduler"] = scheduler. In section 10 drop the two lines that set group["lr"], and call
    # scheduler.step() after scaler.update(). (cycle_momentum=False leaves --momentum alone.) --schedule and its
    # options have no effect then, and a resumed run cannot have more --epochs.
    def factor_at(step):
        """The share of its peak rate that each group has at optimizer step `step`, from 0."""
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if args.schedule == "cosine":  # down to zero (Loshchilov and Hutter, "SGDR", 2017)
            done = (step - warmup_steps) / max(1, args.epochs * steps_per_epoch - warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * done))
        if args.schedule == "step":
            return args.gamma ** (step // steps_per_epoch // args.step_epochs)
        return progress.plateau_scale  # plateau: section 10 lowers it; constant: stays 1

    # A resumed run keeps its precision, unless the device, more GPUs or --amp say otherwise.
    amp = args.amp
    if saved and amp == "auto" and gpus == 1 and saved["device"] == device.type:
        amp = saved["precision"]
    precision, reason, amp_dtype = pick_precision(amp, model, device, gpus)
    autocast = torch.amp.autocast(device.type, amp_dtype, enabled=amp_dtype is not None)
    # fp16 has a small range: its loss is scaled up, so that gradients do not vanish. bf16 has float32's range.
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    # ---- 8 what is saved, and resume ---------------------------------------------------------------------------------
    # The sums of the running epoch: over pictures (with their number, "images") and over steps. They stay on the
    # device until they are read.
    meter = metrics.Meter(["loss", "hits"], ["norm", "skipped_steps"])
    # What training changes: each has state_dict() and load_state_dict().
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    if loss_parameters:
        parts["criterion"] = criterion
    # What it does not change: the name of the script, which --resume looks at, the options, what predict.py needs to
    # build the network, what pulls back.
    options = vars(args) | {"data": os.path.abspath(args.data)}
    if args.old_data:
        options["old_data"] = os.path.abspath(args.old_data)
    about = {"script": "train_continual", "options": options, "data": fingerprint,
             "build": start["build"], "loss": losses.name_of(criterion), "head": head, "hidden": start["hidden"],
             "preprocessing": preprocessing, "precision": precision, "device": device.type}
    about |= {"classes": classes, "known": len(known), "anchor": anchor, "fisher": fisher}
    # The run folder.
    run = checkpoint.Run(args.output, parts, progress, meter, about)
    if saved:
        # Loads every part, the progress, the sums of an epoch that was interrupted, and the random numbers. An
        # optimizer keeps the peak rates and the weight decay that it has now: those may be changed.
        print(run.resume_from(saved, args.resume))

    # ---- 9 several GPUs ----------------------------------------------------------------------------------------------
    # `model` is frozen, pulled and saved, under its plain names; `network` is the same one, ready to run.
    network = nn.DataParallel(model) if gpus > 1 else model

    # ---- 10 the loop -------------------------------------------------------------------------------------------------
    where = f"{device} x {gpus}" if gpus > 1 else device
    print(f"\n{model_name}, {size} px, {where}, precision {precision} ({reason}), method {args.method}")
    print(f"{freeze.group_table(model, heads, optimizer.param_groups)}\n")
    # The scores before any training, to compare with. The outputs of new classes are random still.
    if saved:
        before = saved["before"]
    else:
        # (With data.batches itself: a stop signal still ends the program at once.)
        before, _ = validate(network, val_splits, criterion, data.batches, autocast, to_input, device)
        print(f"before     {in_words(before)}")
    run.about["before"] = before
    if progress.epoch >= args.epochs:
        print(f"all {progress.epoch} epochs are done; to train longer, give more --epochs")
    # The line for each epoch, and TensorBoard, where rows of an earlier run from first_epoch on are hidden.
    log = report.Log(run.folder, args.tensorboard, first_epoch=progress.epoch)
    shown = ["train_loss", "val_loss", "val_accuracy", args.monitor]
    if old:
        shown.insert(3, "old_val_accuracy")
    # By the name of the metric: that of a loss, a cost or an error (mae, mse) is to be low, any other is to be high.
    lower_is_better = report.better_is_lower(args.monitor)
    # From here on a stop signal waits for leave_if_asked, between two steps; the last line then tells how to go on.
    ending.wait_for_steps(stop, run.resume_command)

    for epoch in range(progress.epoch, args.epochs):
        if args.patience and progress.epochs_without_gain >= args.patience:
            print(f"stopped early: no better {args.monitor} for {progress.epochs_without_gain} epochs")
            break
        meter.start_clock()

        # INTERRUPTIONS: a stop signal, an unreadable picture or split. In this block they arise between two optimizer
        # steps alone: the state is saved, then the exception goes on its way.
        with run.saved_if_interrupted(*INTERRUPTIONS):
            # The second half of freezing: eval() for what is frozen. In train() mode the running statistics of its
            # BatchNorms would move, and its dropout would be on. Right again after every thaw.
            model.train()
            for part in freeze.frozen_parts(model):
                part.eval()

            # One turn of the loop is one optimizer step. It gets --accumulate batches (x, y, samples, number),
            # already read, and how many pictures they have. (A last batch of one picture, which BatchNorm could not
            # take, is merged into the one before.) A resumed run goes on with the first batch that it has not seen.
            steps_done = progress.step - epoch * steps_per_epoch
            order.set_epoch(epoch, start=steps_done * args.accumulate)
            steps = data.steps(train_loader, order, args.accumulate, say)
            bar = progress_bar(steps, f"epoch {epoch}", steps_per_epoch, initial=steps_done)
            for batches, step_pictures in bar:
                for batch in batches:
                    x = to_input(batch.x)
                    y = batch.y.to(device, non_blocking=True)
                    with autocast:
                        outputs = network(x)
                    # In training, a network with auxiliary heads returns their outputs behind those of the head.
                    logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
                    # In float32, out of autocast's reach.
                    loss = criterion(logits.float(), y)

                    # The loss is a mean over the batch; it counts for as many pictures as that has.
                    meter.add("images", batch.samples)
                    meter.add("loss", loss.detach() * batch.samples)
                    meter.add("hits", metrics.correct(logits, y).sum())
                    # Not in train_loss: val_loss has no such part either.
                    for more in auxiliary:
                        loss = loss + AUXILIARY_WEIGHT[model_name] * criterion(more.float(), y)

                    # The step follows the mean of its batches' losses, by number of pictures.
                    scaler.scale(loss * (batch.samples / step_pictures)).backward()

                # What pulls back: not in train_loss, and once a step, so with a backward() of its own.
                if "l2-sp" in methods:
                    pull = args.l2_sp * losses.l2_sp_penalty(model, anchor)
                    scaler.scale(pull).backward()
                if "ewc" in methods:
                    pull = args.ewc * losses.ewc_penalty(model, anchor, fisher)
                    scaler.scale(pull).backward()

                # Before clipping: fp16's gradients are those of a scaled loss.
                scaler.unscale_(optimizer)
                # clip_grad_norm_ in its two halves, since the norm is logged in any case.
                trained = [p for p in [*model.parameters(), *loss_parameters] if p.grad is not None]
                norm = nn.utils.get_total_norm([p.grad for p in trained])
                if args.clip_grad:
                    nn.utils.clip_grads_with_norm_(trained, args.clip_grad, norm)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * factor_at(progress.step)
                # Skips this step if fp16 has overflowed; the norm is not finite then.
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                progress.step += 1
                # A step that was skipped counts in skipped_steps, not in the norm.
                meter.add_norm(norm, scaler)

                # A look at the sums now and then: it makes a GPU wait. A loss that is not finite ends the run.
                if progress.step % args.log_every == 0 or progress.step == (epoch + 1) * steps_per_epoch:
                    bar.set_postfix_str(meter.summary())
                    run.check_finite(meter.mean("loss"), f"training loss of epoch {epoch}")
                if args.save_every and progress.step % args.save_every == 0:
                    run.save()  # last.pt; never with a loss or weight that is not finite
                ending.leave_if_asked(stop)
            meter.stop_clock()

            scores, unread_val = validate(network, val_splits, criterion, batches_of, autocast, to_input, device)
        run.check_finite(scores["val_loss"], f"validation loss of epoch {epoch}")
        row = {"epoch": epoch, "train_loss": meter.mean("loss"), "train_accuracy": meter.mean("hits"), **scores}
        # lr, grad_norm, loss_scale, skipped_steps, unreadable, seconds, images_per_second.
        row |= meter.columns(optimizer, scaler, steps_per_epoch, sum(order.sizes()), unread_val)
        progress.history.append(row)

        # What "best" means: the highest score so far, or the lowest of a loss. NaN is worse than any number. Of equal
        # scores, such as accuracies on few pictures, the one with the lower val_loss is the best; but that is no gain,
        # and --patience goes on counting.
        score = scores[args.monitor]
        gain = metrics.is_better(score, progress.best, lower_is_better)
        is_best = gain or metrics.wins_tie(progress.history, progress.best_epoch, args.monitor)
        if is_best:
            progress.best, progress.best_epoch = score, epoch
        progress.epochs_without_gain = 0 if gain else progress.epochs_without_gain + 1
        if args.schedule == "plateau" and not gain and progress.epochs_without_gain % args.plateau_epochs == 0:
            progress.plateau_scale *= args.gamma
        progress.epoch = epoch + 1
        # `row` has these sums; the next epoch begins with none.
        meter.clear()
        run.save(best=is_best, keep_every=args.keep_every)
        log.epoch(row, is_best, shown)
        ending.leave_if_asked(stop)

    # The end: best.pt, once, on the test splits, by which nothing was chosen (without one: on val, which chose
    # best.pt).
    best_weights, best_row = run.load_best()
    print(f"\nbest.pt: epoch {best_row['epoch']}, {args.monitor} {best_row[args.monitor]:.4f}")
    for split in val_splits:
        accuracy = f"{split}_accuracy"
        print(f"{accuracy}: {before[accuracy]:.4f} before, {best_row[accuracy]:.4f} now")
    model.load_state_dict(best_weights)
    for task, found in (("new", images), ("old", old)):
        if args.no_test or found is None:
            continue
        split = "test" if "test" in found.splits else "val"
        test_loader = eval_loader(found.splits[split])
        # Without autocast, so in float32, as predict.py does.
        outputs, indices = evaluate(network, batches_of(test_loader), nullcontext(), to_input, device)
        test(outputs, indices, found, split, task, run.folder)
    print(report.sum_up(run.folder, progress.history, args.monitor, not args.no_report))


def pictures_of(loader, at_least=0, stop=None, say=print):
    """The batches of a split; a stop signal ends them. at_least: readable pictures that a batch with unreadable ones must
    have.
    """
    return distributed.at_own_pace(data.batches(loader, at_least, say), stop, ending.leave_if_asked)


@torch.inference_mode()
def evaluate(network, batches, autocast, to_input, device):
    """The network's outputs (N, C) for a split in float32, and the indices (N,) of its pictures that could be read."""
    network.eval()
    found = []
    for x, indices in batches:
        with autocast:
            outputs = network(to_input(x))
        found.append((outputs.float(), indices))
    outputs, indices = distributed.all_gather_batches(found)
    return outputs.to(device), indices


def validate(network, splits, criterion, batches_of, autocast, to_input, device):
    """The scores of the new validation split and the old one, and how many of their pictures could not be read.
    splits: {"val": (loader, labels (N,)), maybe "old_val": ...}. batches_of: gives the batches of a loader.
    """
    scores, unread = {}, 0
    for split, (loader, labels_of_all) in splits.items():
        outputs, indices = evaluate(network, batches_of(loader), autocast, to_input, device)
        labels = labels_of_all[indices]
        unread += len(labels_of_all) - len(labels)
        # A metric of your own, from logits (N, C) and labels (N,): add it to these scores, as
        # scores[f"{split}_kappa"] = ... A higher one is better, unless its name speaks of a loss, cost or error (mae,
        # mse). To choose best.pt by it, put its name into the list that section 1 hands to add_training_options.
        with torch.no_grad():
            scores[f"{split}_loss"] = criterion(outputs, labels).item()
        for name, value in metrics.class_scores(outputs, labels).items():
            scores[f"{split}_{name}"] = value
    if "old_val" in splits:
        # Both tasks count the same.
        scores["mean_accuracy"] = (scores["val_accuracy"] + scores["old_val_accuracy"]) / 2
    return metrics.as_numbers(scores), unread


def in_words(scores):
    """The losses and accuracies among them, in a line."""
    return "  ".join(f"{k} {v:.4f}" for k, v in scores.items() if k.endswith(("loss", "l_accuracy")))


def fisher_of(model, loader, sample, to_input, kind, known, seed, progress_bar):
    """The Fisher information of the old pictures of a sample [(path, label), ...], in float32: {name: tensor}."""
    began = time.perf_counter()
    labels = torch.tensor([label for _, label in sample])
    batches = progress_bar(data.batches(loader), "Fisher information, batches")
    pictures = ((to_input(x), labels[indices]) for x, indices in batches)
    fisher = losses.fisher_diagonal(model, pictures, kind, known, seed)
    print(f"{kind} Fisher information of {len(sample)} old pictures: {time.perf_counter() - began:.1f} s")
    return fisher


def test(outputs, indices, images, split, task, folder):
    """Print the scores of a split of the new or old pictures (`task`), and write its predictions into the folder.
    outputs: those of the network (N, C) for the pictures of these indices (N,).
    """
    samples = [images.splits[split][index] for index in indices.tolist()]
    labels = data.labels(images, split)[indices].to(outputs.device)
    confusion = metrics.confusion_matrix(outputs.argmax(1), labels, len(images.classes)).cpu()
    files = [file for file, _ in samples]
    rows = metrics.prediction_rows(files, outputs.softmax(1), images.classes, labels)
    which = "old_" if task == "old" else ""
    checkpoint.write_csv(rows, folder / f"{which}{split}_predictions.csv")
    chose = "" if split == "test" else ", which chose best.pt: expect a little less on others"
    accuracy = metrics.scores(confusion)["accuracy"]
    print(f"\n{task} pictures: accuracy {accuracy:.4f} on the {len(labels)} of {split}{chose}\n")
    print(metrics.report(confusion, images.classes))


def main(argv=None):
    with ending.tidy(checkpoint.CheckpointError, data.DataError, distributed.ProcessError, freeze.FreezeError,
                     losses.LossError, ModelError, report.ReportError) as stop:
        args, saved = read_arguments(argv)
        train(args, saved, stop)


if __name__ == "__main__":
    main()
