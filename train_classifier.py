"""Fine-tune a torchvision network to tell classes of pictures apart: the full loop, top to bottom, in plain PyTorch.

    python train_classifier.py --data ./cats_and_dogs --freeze backbone            # train the new head alone
    python train_classifier.py --data ./cats_and_dogs                              # train everything
    python train_classifier.py --data ./cats_and_dogs --freeze backbone --unfreeze 1:layer4 --unfreeze 3:all
    python train_classifier.py --model efficientnet_b0 --list-layers               # the names to freeze and thaw
    torchrun --nproc_per_node=2 train_classifier.py --data ./cats_and_dogs --output runs/a --resume     # two GPUs
    python train_classifier.py --resume runs/train_classifier/.../last.pt          # go on after an interruption

--data holds train/ and val/ (and test/), or is one folder to be split; in them one folder of pictures per class. What
comes out lies in --output: best.pt and last.pt, history.csv (one row per epoch), args.json, the predictions.
"""

import itertools
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
import distributed
import ending
import freeze
import losses
import lr_finder
import metrics
import report
from arguments import (MAY_CHANGE, above, add_freezing_options, add_network_options, add_optimizer_options,
                       add_picture_options, add_saving_options, add_training_options, fill_defaults, make_parser,
                       number, refuse_idle, share, shared_rules, typed_options)
from model import (AUXILIARY_WEIGHT, ModelError, auxiliary_heads, build, build_options, check_image_size,
                   load_pretrained, load_weights, mlp_head, pick_device, pick_precision, preprocessing_for, set_dropout)

# ---- 1 arguments -----------------------------------------------------------------------------------------------------


def build_parser():
    """What is the same in every script stands in arguments.py."""
    parser = make_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="DIR", help="train/ and val/ (and test/), or one folder of class folders to be split")
    add("--val-split", type=number(float, 0.01, 0.99), default=0.2, metavar="SHARE",
        help="share of each class that is set aside where there is no val/ (default %(default)s)")
    add("--augment", choices=data.AUGMENT, default="standard",
        help="light: a slight crop, flip; standard: any crop, flip; strong: and colours, distortions, holes (default "
             "%(default)s)")
    add("--mixup", type=above, default=0.0, metavar="A", help="blend pairs of pictures by Beta(A, A); try 0.2")
    add("--cutmix", type=above, default=0.0, metavar="A",
        help="paste a part of one picture into another; try 1; beside --mixup, either at random")
    add_picture_options(add)

    add_network_options(parser)
    add_freezing_options(parser)

    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=["cross-entropy", "focal", "soft-f1", "cost"], default="cross-entropy",
        help="focal: hard pictures count more; soft-f1: macro F1 itself; cost: by --costs (default %(default)s)")
    add("--label-smoothing", type=share, default=0.0, metavar="E", help="(default %(default)s)")
    add("--focal-gamma", type=above, default=2.0, metavar="G", help="focal: 0 is cross-entropy (default %(default)s)")
    add("--costs", metavar="T:P=C,...", help="cost: dog:cat=10, calling a dog a cat costs 10, any other mistake 1")
    add("--class-weights", metavar="W", help="balanced | CLASS=W,... such as dog=10,cat=1: a missed dog costs 10")
    add("--class-weight-mean", choices=["weighted", "plain"], default="weighted",
        help="divide a batch's weighted loss by its sum of weights, as nn.CrossEntropyLoss does (default), or by its "
             "number of pictures, so that a weight of 10 makes a gradient ten times as large")
    add("--l1", type=above, default=0.0, metavar="L", help="L1 penalty on trainable weights; try 1e-6 (default: off)")
    add("--l2-sp", type=above, default=0.0, metavar="ALPHA",
        help="pull the backbone towards the pretrained weights, in place of weight decay; try 0.1 (default: off)")

    add_optimizer_options(parser)
    add_training_options(parser, ["val_accuracy", "val_loss", "val_balanced_accuracy", "val_macro_f1"])
    add_saving_options(parser, "train_classifier")
    return parser


def read_arguments(argv):
    """Return the options, and the checkpoint of a run that is resumed (else None)."""
    parser = build_parser()
    args, typed = parser.parse_args(argv), typed_options(parser, argv)
    args, saved = checkpoint.resume_arguments(args, typed, "train_classifier", MAY_CHANGE, *distributed.started())
    if not args.data and not args.list_layers:
        parser.error("--data is needed: a folder with one folder of pictures per class")
    by_class = args.loss in ("cross-entropy", "focal"), "--loss cross-entropy or focal"
    blended = args.loss != "soft-f1" or not (args.mixup or args.cutmix), "a --loss that can blend classes"
    unmixed = not (args.mixup or args.cutmix), "neither --mixup nor --cutmix, which blend the pictures themselves"
    listing = not args.list_layers, "training: --list-layers shows the network with a linear head"
    refuse_idle(parser, typed, shared_rules(args, freeze.backbone_trains(args.freeze, args.unfreeze), args.processes) | {
        "cache_features": unmixed, "hidden": (args.head == "mlp", "--head mlp"), "head": listing, "dropout": listing,
        "focal_gamma": (args.loss == "focal", "--loss focal"), "costs": (args.loss == "cost", "--loss cost"),
        "class_weights": by_class, "label_smoothing": by_class, "mixup": blended, "cutmix": blended,
        "class_weight_mean": (args.class_weights, "--class-weights"),
        "l2_sp": (freeze.backbone_trains(args.freeze, args.unfreeze) and args.weights.lower() != "none",
                  "a pretrained backbone that trains or thaws"),
    })
    report.check_tensorboard(args.tensorboard)
    fill_defaults(args)
    return args, saved


def train(args, saved, stop):
    # ---- 2 device and processes --------------------------------------------------------------------------------------
    rank, _, processes = distributed.ranks()  # 0 of 1, unless torchrun has started more, each for a device of its own
    device = pick_device(distributed.own_device(args.device, args.sync_bn), args.deterministic)
    gpus = torch.cuda.device_count() if device == torch.device("cuda") and not args.compile else 1
    torch.manual_seed(args.seed)  # for the new head's weights and for dropout

    # ---- 3 data ------------------------------------------------------------------------------------------------------
    images = data.find_images(args.data, args.val_split)
    classes, fingerprint = images.classes, data.fingerprint(images)
    if saved and saved["data"] != fingerprint:
        raise data.DataError(f"{args.data} holds other pictures ({fingerprint}) than the run was started with "
                             f"({saved['data']}): start a new run from its weights, --weights {shlex.quote(args.resume)}")
    print(distributed.from_main(data.describe, images))

    # ---- 4 model and head --------------------------------------------------------------------------------------------
    if saved:
        preprocessing, options_to_build = saved["preprocessing"], saved["build"]["options"]
    else:
        pretrained = distributed.from_main(load_pretrained, args.weights, args.model)
        preprocessing = preprocessing_for(pretrained, args.image_size)
        auxiliary = freeze.backbone_trains(args.freeze, args.unfreeze)  # which auxiliary heads help
        options_to_build = build_options(args.model, preprocessing["image_size"], pretrained, auxiliary)
    model = build(args.model, **options_to_build)

    head = freeze.find_head(model)  # "fc" in a ResNet, "classifier.6" in a VGG, "heads.head" in a ViT
    old_head = model.get_submodule(head)
    if args.head == "mlp":
        new_head = mlp_head(old_head, len(classes), args.hidden)  # its dropout is 0.5
    elif isinstance(old_head, nn.Conv2d):  # SqueezeNet classifies with a 1x1 convolution
        new_head = nn.Conv2d(old_head.in_channels, len(classes), kernel_size=1)
    else:
        new_head = nn.Linear(old_head.in_features, len(classes), bias=old_head.bias is not None)
    model.set_submodule(head, new_head)
    for name in auxiliary_heads(model):  # of GoogLeNet and Inception; each is a small network with a last layer
        block = model.get_submodule(name)
        last = freeze.find_head(block)
        block.set_submodule(last, nn.Linear(block.get_submodule(last).in_features, len(classes)))
    if args.dropout is not None:
        set_dropout(model, head, args.dropout)
    check_image_size(model.eval(), preprocessing["image_size"])
    if saved:
        model.load_state_dict(saved["model"])
    elif pretrained["state_dict"]:
        same_outputs = pretrained["outputs"] in (None, classes)  # one of our checkpoints knows its classes
        said = load_weights(model, pretrained["state_dict"], head, same_outputs)
        print(f"weights: {pretrained['source']}; {said}")
    if args.sync_bn and processes > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # new modules, the same parameters under the same names
    if rank:
        torch.manual_seed(args.seed + rank)  # the new head starts the same in all processes, dropout differs
    heads = (head, *auxiliary_heads(model))  # what no spec freezes

    # ---- 5 freezing --------------------------------------------------------------------------------------------------
    freeze.freeze(model, args.freeze, heads)  # requires_grad = False; train_mode() in section 10 does the other half
    groups = freeze.param_groups(model, heads, args.lr, args.weight_decay, args.backbone_lr_scale, args.layer_decay)
    for group in groups if args.l2_sp else ():  # which pulls back to the start, not to zero; the head keeps its decay
        group["weight_decay"] *= group["layer"] in heads
    head_side = freeze.head_side(model, heads) if args.cache_features else None
    if head_side and (name := freeze.trains_beyond(model, head_side)):
        raise freeze.FreezeError(f"--cache-features needs a frozen backbone, such as --freeze backbone: {name} trains")
    start_epoch, past = (saved["epoch"], saved["options"]["unfreeze"]) if saved else (0, [])
    next_thaw = start_epoch + 1 if saved and saved["sums"] else start_epoch  # stopped within an epoch: its thaw is past
    thaws = freeze.plan_thaws(args.unfreeze, past, next_thaw)
    freeze.check_thaws(thaws, max(args.epochs, next_thaw), model, heads, groups)  # now, not hours later
    for epoch in [e for e in thaws if e < next_thaw]:
        freeze.thaw(model, thaws[epoch], heads, groups)
    if args.batch_size == 1 or len(heads) > 1:  # can BatchNorm train on single pictures, auxiliary heads on small ones?
        check_image_size(freeze.train_mode(model), preprocessing["image_size"], args.batch_size)
    if args.weights.lower() == "none" and args.freeze != "none":
        print("warning: --freeze with --weights none keeps random layers as they are; they learn nothing")
    model.to(device, memory_format=torch.channels_last)

    # ---- 6 loss ------------------------------------------------------------------------------------------------------
    # Your own loss: any callable (logits (N, C) float32, labels (N,) int64) -> scalar can stand here instead. With
    # --mixup or --cutmix it gets class shares (N, C) in place of labels while training.
    weight = losses.class_weights(args.class_weights, classes, data.counts(images, "train"))
    if args.loss == "focal":
        criterion = losses.Focal(args.focal_gamma, weight, args.class_weight_mean, args.label_smoothing)
    elif args.loss == "soft-f1":
        criterion = losses.SoftF1()
    elif args.loss == "cost":
        criterion = losses.CostMatrix(losses.cost_matrix(args.costs or "", classes))
    else:
        criterion = losses.CrossEntropy(weight, args.class_weight_mean, args.label_smoothing)
    criterion.to(device)

    anchor = saved["anchor"] if saved and args.l2_sp else losses.anchor_of(model, heads) if args.l2_sp else {}
    anchor = {name: start.to(device) for name, start in anchor.items()}

    # ---- 7 optimizer, schedule, scaler -------------------------------------------------------------------------------
    # Every parameter is in, frozen or not, so that a thaw needs nothing more.
    optimizer_class = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
                       "rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad}[args.optimizer]
    momentum = {"momentum": args.momentum} if args.optimizer in ("sgd", "rmsprop") else {}
    fused = {"fused": True} if args.optimizer in ("sgd", "adam", "adamw") and device.type in ("cpu", "cuda") else {}
    optimizer = optimizer_class(groups, **momentum, **fused)  # fused: all parameters in one call, several times as fast

    order = data.SeededBatches(len(images.splits["train"]), args.batch_size, args.seed, shuffle=True, rank=rank,
                               processes=processes, along=True)
    batch_sizes, shares = order.sizes(), order.shares()  # those of all processes together; what this one reads of each
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
    precision, reason, amp_dtype = distributed.from_main(pick_precision, amp, model, device, gpus, bool(thaws))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")  # bf16 has float32's range, needs none

    # ---- 8 resume ----------------------------------------------------------------------------------------------------
    best, best_epoch, epochs_without_gain, history = None, None, 0, []
    step, sums = 0, {}  # optimizer steps so far; what the running epoch has summed up
    output = Path(args.output)
    options = vars(args) | {"data": os.path.abspath(args.data), "unfreeze": [f"{e}:{n}" for e, n in thaws.items()]}
    _lock = checkpoint.start_folder(output, options) if rank == 0 else None  # until the end no other run may write there
    board = report.tensorboard_writer(output, saved["epoch"] if saved else 0) if args.tensorboard and not rank else None
    if saved:
        rng, sums = checkpoint.own_state(saved, rank, processes)
        checkpoint.restore(saved, optimizer, scaler, rng)
        notes, best, best_epoch, epochs_without_gain = distributed.from_main(lambda: (
            [*checkpoint.machine_changes(saved), *checkpoint.go_on_in(output, saved, args.resume)],
            *(saved[k] for k in ("best", "best_epoch", "epochs_without_gain"))))  # go_on_in may have set these anew
        history, plateau_scale, step = (saved[k] for k in ("history", "plateau_scale", "step"))
        print("\n".join([f"resumed from {args.resume} at epoch {start_epoch}, step {step}", *notes]))

    def save(next_epoch, totals=None, **how):
        """Save all that resuming and predict.py need, in tensors and plain values: read with weights_only=True."""
        own = checkpoint.rng_state(), {k: float(v) for k, v in sums.items()} if totals else {}
        state = {
            "script": "train_classifier", "options": options, "machine": checkpoint.machine(),
            "model": model.state_dict(), "build": {"name": args.model, "options": options_to_build},
            "head": head, "hidden": args.hidden if args.head == "mlp" else 0,
            "preprocessing": preprocessing, "classes": classes, "data": fingerprint, "anchor": anchor,
            "optimizer": optimizer.state_dict(), "plateau_scale": plateau_scale, "scaler": scaler.state_dict(),
            "precision": precision, "device": device.type, "rng": own[0], "epoch": next_epoch,
            "step": step, "sums": totals or {}, "processes": distributed.of_all(own), "best": best,
            "best_epoch": best_epoch, "epochs_without_gain": epochs_without_gain, "history": history,
        }
        distributed.from_main(checkpoint.save, state, output, way_out=way_out, **how)

    def way_out():
        return checkpoint.slower_command("train_classifier", output, args.lr, thaws, step, distributed.launcher())

    # ---- 9 several GPUs ----------------------------------------------------------------------------------------------
    # `network` runs; `model` is frozen, thawed and saved: the same parameters under their plain names.
    # torchrun: section 10 puts it into a DistributedDataParallel, anew in each epoch, when it is known what trains.
    whole = network = nn.DataParallel(model) if gpus > 1 else torch.compile(model) if args.compile else model

    # ---- 10 the loop -------------------------------------------------------------------------------------------------
    size, resize_size, interpolation = (preprocessing[k] for k in ("image_size", "resize_size", "interpolation"))
    mean, std = (torch.tensor(preprocessing[k], device=device).view(3, 1, 1) for k in ("mean", "std"))
    augment = data.train_transform(size, args.augment, interpolation, resize_size)  # or any v2 transform of your own
    mixer = data.mixer(len(classes), args.mixup, args.cutmix)
    train_images = data.ImageList(images.splits["train"], augment, args.seed, size=2 * size)  # twice: room for crops
    train_loader = data.make_loader(train_images, order, args.workers, pin_memory=device.type == "cuda")

    def loader_of(split):
        numbered = [(path, number) for number, (path, _) in enumerate(images.splits[split])]
        return data.eval_loader(numbered, preprocessing, args.batch_size, args.workers, rank, processes)

    @torch.inference_mode()
    def evaluate(split, batches, dtype):
        """The network's outputs (N, C) for a split, in float32 and evaluation mode; labels, numbers of its pictures."""
        network.eval()
        found = []
        for x, numbers in batches:
            with torch.amp.autocast(device.type, dtype, enabled=dtype is not None):
                found.append((network(data.to_input(x, mean, std)).float(), numbers))
        outputs, numbers = distributed.gather(found)  # each process has read a share
        labels = torch.tensor([images.splits[split][n][1] for n in numbers.tolist()])
        return outputs.to(device), labels.to(device), numbers

    val_loader = loader_of("val")
    skipped = {} if args.on_bad_image == "skip" else None  # {file: what is wrong with it}

    def save_here():
        """Between two steps of the running epoch: a resumed run goes on with its next batch, or with its validation."""
        sums["seconds"] = time.perf_counter() - started
        totals = distributed.add_up(sums, checkpoint.SUMMED)
        if totals["images"]:
            losses.check_finite(totals["loss"] / totals["images"], f"training loss of epoch {epoch}", way_out)
        save(epoch, totals if totals["images"] else None)

    def batches_of(loader, per_step=1, at_least=0, saving=True, in_step=False):
        """Batches of the running epoch; a stop signal or an unreadable picture ends the run here, with its state saved
        if that is between two optimizer steps. in_step: the processes read one batch at a time, all at the same time.
        """
        count, found = 0, data.batches(loader, skipped, at_least, distributed.say if rank else tqdm.write)
        try:
            for count, batch in enumerate(distributed.together(found, stop, in_step), start=1):
                yield batch
                if count % per_step == 0 and (in_step or processes == 1):
                    ending.leave_if_asked(stop)
            if processes > 1 and not in_step:
                ending.leave_if_asked(stop)
        except (data.DataError, distributed.ProcessError, ending.Stopped):
            if saving and count % per_step == 0:
                save_here()
            raise

    if head_side:  # what cached features depend on
        depends_on = train_images, val_loader.dataset, checkpoint.machine(), precision, args.batch_size, processes
        key = data.features_key(model.state_dict(), head, *depends_on)

    def features_of(split, loader, view=0):
        """Batches of what the frozen backbone makes of a split: computed once for each view, as epoch `view` would."""
        file, pictures, order = output / f"features_{split}_{view}.bin", loader.dataset, loader.batch_sampler
        cached = data.read_features(file, key)
        if any(distributed.of_all(cached is None)):
            views = data.SeededBatches(len(pictures), args.batch_size, args.seed, order.shuffle, view, rank, processes)
            found = batches_of(data.make_loader(pictures.numbered(), views, args.workers), at_least=2 * order.shuffle)
            bar = tqdm(found, f"features of {split}", len(views), leave=False, disable=rank or None)
            model.eval()
            with torch.inference_mode(), torch.amp.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                made = ((freeze.head_input(model, head_side, data.to_input(x, mean, std)), numbers) for x, numbers in bar)
                cached = data.share_features(file, key, made, rank, distributed.of_all)
        return data.feature_batches(cached, pictures.labels(), order)

    def losses_without_end():  # for --find-lr: those of the loop below
        freeze.train_mode(model)
        for order.epoch in itertools.count():
            for i, (x, y) in enumerate(batches_of(train_loader, at_least=2, saving=False)):
                x, y = data.mix(data.to_input(x, mean, std), y.to(device), mixer, args.seed, order.epoch, i)
                with torch.amp.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                    outputs = network(x)
                yield criterion((outputs[0] if isinstance(outputs, tuple) else outputs).float(), y)

    print(f"\n{args.model}, {size} px, {device}{f' x {gpus}' if gpus > 1 else ''}, precision {precision} ({reason})\n"
          f"{args.batch_size * processes * args.accumulate} pictures per step: batch size x {processes} x --accumulate\n"
          f"{freeze.group_table(model, heads, optimizer.param_groups)}\n")
    if args.find_lr:
        rates, values = lr_finder.range_test(model, losses_without_end(), optimizer, scaler, args.lr)
        rate, rule = lr_finder.suggest(rates, values)
        report.draw_range_test(rates, values, lr_finder.smooth(values), rate, output / "find_lr.png")
        print(f"suggested: --lr {rate:.1e} ({rule}); the curve is in {output / 'find_lr.png'}")
        return
    if start_epoch >= args.epochs:
        print(f"all {start_epoch} epochs are done; to train longer, give more --epochs")
    ending.wait_for_steps(stop, lambda: checkpoint.resume_command("train_classifier", output, distributed.launcher()))
    for epoch in range(start_epoch, args.epochs):
        if args.patience and epochs_without_gain >= args.patience:
            print(f"stopped early: no better {args.monitor} for {epochs_without_gain} epochs")
            break
        if epoch in thaws and not sums:
            way_back = output / f"before_unfreeze_{epoch}.pt"
            if not (saved and distributed.from_main(way_back.exists)):  # it stays when a run has gone back to it
                save(epoch, name=way_back.name)
            count = freeze.thaw(model, thaws[epoch], heads, optimizer.param_groups)
            print(f"thaw: {thaws[epoch]}, {count:,} parameters")

        order.epoch = epoch
        order.start = min((step - epoch * steps_per_epoch) * args.accumulate, len(batch_sizes))  # 0 unless resumed
        sums = sums or dict.fromkeys(["images", "loss", "hits", "norm", "skipped_steps", "seconds"], 0.0)
        started = time.perf_counter() - sums["seconds"]
        network, source, val_source = whole, train_loader, val_loader
        if head_side and not freeze.trains_beyond(model, head_side):
            network = head_side
            source = features_of("train", train_loader, epoch % args.cache_features)
            val_source = features_of("val", val_loader)
        elif head_side and rank == 0 and data.drop_features(output):
            print("the backbone trains: the cached features are dropped")
        freeze.train_mode(model)  # model.train(), and eval() on every frozen part: no running statistics move there
        replica = nn.parallel.DistributedDataParallel(network) if processes > 1 else network
        bar = tqdm(batches_of(source, args.accumulate, at_least=2, in_step=True), f"epoch {epoch}", len(batch_sizes),
                   leave=False, disable=rank or None, initial=order.start)  # None: a bar if stderr is a terminal
        for i, (x, y) in enumerate(bar, order.start):
            x, y = data.to_input(x, mean, std), y.to(device, non_blocking=True)
            x, y = data.mix(x, y, mixer, args.seed + rank, epoch, i)  # with --mixup, --cutmix: y becomes class shares
            last = (i + 1) % args.accumulate == 0 or i + 1 == len(batch_sizes)  # batch of this optimizer step
            replica.require_backward_grad_sync = last  # else no_sync(), for a DistributedDataParallel; others do not ask
            with torch.amp.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                outputs = replica(x)
            logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
            loss = criterion(logits.float(), y)  # in float32, out of autocast's reach
            pictures = min(len(y), shares[i])  # 0 where this process only runs along with the others
            count = distributed.counts_for(pictures, losses.sum_of_weights(criterion, y))
            sums["loss"] += loss.detach() * count  # stays on the device: .item() would wait for it at every step
            for more in auxiliary:  # not in train_loss, which is to be compared with val_loss
                loss = loss + AUXILIARY_WEIGHT[args.model] * criterion(more.float(), y)

            # The batches of one optimizer step count by their share of its pictures; the last step may have fewer.
            share = processes * count / sum(batch_sizes[i - i % args.accumulate :][: args.accumulate])
            scaler.scale(loss * share).backward()  # several processes: the mean of their gradients
            sums["images"] += pictures
            sums["hits"] += (logits.detach().argmax(1) == (y if y.ndim == 1 else y.argmax(1)))[:pictures].sum()
            if not last:
                continue

            if args.l1:
                scaler.scale(args.l1 * losses.l1_penalty(model)).backward()
            if args.l2_sp:
                scaler.scale(args.l2_sp * losses.l2_sp_penalty(model, anchor)).backward()
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
                totals = distributed.add_up(sums, checkpoint.SUMMED)
                train_loss = totals["loss"] / totals["images"]
                speed = totals["images"] / (time.perf_counter() - started)
                bar.set_postfix_str(f"loss {train_loss:.4f}, {speed:.0f} images/s")
                losses.check_finite(train_loss, f"training loss of epoch {epoch}", way_out)
            if args.save_every and step % args.save_every == 0:
                save_here()
        train_seconds = sums.setdefault("train_seconds", time.perf_counter() - started)
        totals = distributed.add_up(sums, checkpoint.SUMMED)
        distributed.same_buffers(model)

        outputs, labels, _ = evaluate("val", batches_of(val_source), amp_dtype)
        scores = {"val_loss": criterion(outputs, labels).item()}
        losses.check_finite(scores["val_loss"], f"validation loss of epoch {epoch}", way_out)
        found = metrics.class_scores(outputs, labels, criterion.costs if args.loss == "cost" else None)
        scores = distributed.from_main(dict, scores | {f"val_{name}": value for name, value in found.items()})
        seconds, skipped_steps = time.perf_counter() - started, int(totals["skipped_steps"])
        unreadable = sum(len(images.splits[split]) for split in ("train", "val")) - len(labels) - int(totals["images"])
        history.append({"epoch": epoch, "train_loss": totals["loss"] / totals["images"],
                        "train_accuracy": totals["hits"] / totals["images"], **scores,
                        "lr": args.lr * factor_at(step - 1),
                        "grad_norm": totals["norm"] / max(1, steps_per_epoch - skipped_steps),
                        "loss_scale": scaler.get_scale(), "skipped_steps": skipped_steps, "unreadable": unreadable,
                        "seconds": seconds, "images_per_second": totals["images"] / train_seconds})

        now = scores[args.monitor]
        is_best = best is None or (now < best if args.monitor == "val_loss" else now > best)
        if is_best:
            best, best_epoch, epochs_without_gain = now, epoch, 0
        else:
            epochs_without_gain += 1
            if args.schedule == "plateau" and epochs_without_gain % args.plateau_epochs == 0:
                plateau_scale *= args.gamma
        kept = f"epoch_{epoch}.pt" if args.keep_every and (epoch + 1) % args.keep_every == 0 else None
        sums = {}
        save(epoch + 1, best=is_best, keep=kept)
        distributed.from_main(checkpoint.write_csv, history, output / "history.csv")
        report.add_to_tensorboard(board, history[-1])
        shown = dict.fromkeys(["train_loss", "val_loss", "val_accuracy", "val_macro_f1", args.monitor])
        print(f"epoch {epoch:3d}  " + "  ".join(f"{k} {history[-1][k]:.4f}" for k in shown)
              + f"  lr {history[-1]['lr']:.1e}  {seconds:.1f} s{'  best' if is_best else ''}", flush=True)
        if scaler.get_scale() < 1:
            print("warning: fp16's loss scale has collapsed, steps are passed over: start again with --amp bf16 or off")
        ending.leave_if_asked(stop)

    # ---- the end: best.pt, once, on the test split, which has chosen nothing -----------------------------------------
    best_state = distributed.from_main(checkpoint.load, output / "best.pt", "train_classifier")
    print(f"\nbest.pt: epoch {best_state['epoch'] - 1}, {args.monitor} {best_state['history'][-1][args.monitor]:.4f}")
    if not args.no_test:
        model.load_state_dict(best_state["model"])
        network, skipped = whole, skipped and {}  # what can be read now
        split = "test" if "test" in images.splits else "val"
        outputs, labels, numbers = evaluate(split, batches_of(loader_of(split), saving=False), None)  # as predict.py does
        confusion = metrics.confusion_matrix(outputs.argmax(1), labels, len(classes)).cpu()
        files = [images.splits[split][n][0] for n in numbers.tolist()]
        listed = metrics.prediction_rows(files, outputs.softmax(1), classes, labels)
        distributed.from_main(checkpoint.write_csv, listed, output / f"{split}_predictions.csv")
        print(f"accuracy {metrics.scores(confusion)['accuracy']:.4f} on the {len(labels)} pictures of {split}"
              f"{'' if split == 'test' else ', which chose best.pt: expect a little less on others'}\n\n"
              f"{metrics.report(confusion, classes)}")
    print(f"\n{distributed.from_main(report.sum_up, output, history, args.monitor, pictures=not args.no_report)}\n"
          f"next: python predict.py --checkpoint {shlex.quote(str(output / 'best.pt'))} PICTURES")


def list_layers(args):
    """--list-layers: the table that section 10 prints, for a linear head; no weights are needed."""
    options = {"num_classes": len(data.find_images(args.data, args.val_split).classes)} if args.data else {}
    auxiliary = freeze.backbone_trains(args.freeze, args.unfreeze)
    size = args.image_size or load_pretrained("none", args.model)["image_size"]
    model = build(args.model, **options, **build_options(args.model, size, auxiliary=auxiliary))
    heads = (freeze.find_head(model), *auxiliary_heads(model))
    rates = args.lr, args.weight_decay, args.backbone_lr_scale, args.layer_decay
    print(freeze.describe_plan(model, heads, args.freeze, args.unfreeze, args.epochs, *rates))


def main(argv=None):
    with ending.tidy(checkpoint.CheckpointError, data.DataError, distributed.ProcessError, freeze.FreezeError,
                     losses.LossError, lr_finder.RangeTestError, ModelError, report.ReportError) as stop, \
            distributed.joined(stop):
        args, saved = distributed.from_main(read_arguments, argv)
        if args.list_layers:
            list_layers(args)
        else:
            train(args, saved, stop)


if __name__ == "__main__":
    main()
