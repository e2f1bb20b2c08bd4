"""Fine-tune a torchvision network to give pictures any number of labels: the full loop, top to bottom, in plain PyTorch.

    python train_multilabel.py --data ./beaches --target water,people,haze --freeze backbone     # columns of 0 and 1
    python train_multilabel.py --data ./beaches --target tags --separator " "                    # a column of names
    python train_multilabel.py --data ./beaches --target water,haze --pos-weight balanced        # rare labels count more
    torchrun --nproc_per_node=2 train_multilabel.py --data ./beaches --target water --output runs/a --resume  # two GPUs
    python train_multilabel.py --resume runs/train_multilabel/.../last.pt                  # go on after an interruption

--labels is a CSV below --data with a column `file` (paths below --data, or beside the CSV), the labels that --target
names, and maybe a column `split` of train, val and test. A label is a column of 1 (it is there), 0 (it is not) or
nothing (not known, which counts neither way); or a word in one column of names. What comes out lies in --output:
best.pt, with a threshold for each label, and last.pt, history.csv (one row per epoch), args.json, the predictions.

More: docs/labels.md
"""

import itertools
import math
import os
import sys
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
import features
import freeze
import losses
import lr_finder
import metrics
import report
import tables
from arguments import (MAY_CHANGE, above, add_freezing_options, add_network_options, add_optimizer_options,
                       add_picture_options, add_saving_options, add_table_options, add_training_options, fill_defaults,
                       make_parser, names, number, refuse_idle, refuse_unknown_choices, shared_rules, typed_options)
from model import (AUXILIARY_WEIGHT, ModelError, auxiliary_heads, build, build_options, check_image_size,
                   load_pretrained, load_weights, mlp_head, pick_device, pick_precision, preprocessing_for, set_dropout)

# ---- 1 arguments -----------------------------------------------------------------------------------------------------


def build_parser():
    """What is the same in every script stands in arguments.py."""
    parser = make_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="DIR", help="the folder of --labels and of its pictures")
    add_table_options(add, "labels.csv")
    add("--target", type=names, metavar="A,B",
        help="columns of 1, 0 or nothing (not known), a label each; or with --separator one column of names")
    add("--separator", metavar="S", help="what stands between the names in that column: ' ' or ';', say")
    add("--val-split", type=number(float, 0.01, 0.99), default=0.2, metavar="SHARE",
        help="share that is set aside where there is no column split (default %(default)s)")
    add("--augment", choices=data.AUGMENT, default="light",
        help="light: a slight crop, flip; standard: any crop, which may cut off what a label is about, flip; strong: "
             "and colours, distortions, holes (default %(default)s)")
    add_picture_options(add)

    add_network_options(parser)
    add_freezing_options(parser)

    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=["bce", "focal"], default="bce",
        help="bce: binary cross-entropy, a yes or no for each label; focal: hard cells count more (default "
             "%(default)s)")
    add("--focal-gamma", type=above, default=2.0, metavar="G", help="focal: 0 is bce (default %(default)s)")
    add("--pos-weight", metavar="W",
        help="balanced | LABEL=W,... such as haze=10: missing haze costs ten times a false alarm")
    add("--l1", type=above, default=0.0, metavar="L", help="L1 penalty on trainable weights; try 1e-6 (default: off)")

    add_optimizer_options(parser)
    add_training_options(parser, ["val_map", "val_loss", "val_macro_f1", "val_micro_f1"],
                         "; val_map: mean average precision; F1: at the thresholds that suit the epoch")
    add_saving_options(parser, "train_multilabel")
    return parser


def read_arguments(argv):
    """Return the options, and the checkpoint of a run that is resumed (else None)."""
    parser = build_parser()
    args, typed = parser.parse_args(argv), typed_options(parser, argv)
    args, saved = checkpoint.resume_arguments(args, typed, "train_multilabel", MAY_CHANGE, *distributed.started())
    refuse_unknown_choices(parser, args)
    if not (args.data and args.target) and not args.list_layers:
        parser.error("--data and --target are needed: the folder of --labels, and columns of labels in that file")
    if args.separator == "":
        parser.error("--separator is empty: say what stands between the names, such as --separator ' '")
    refuse_idle(parser, typed, shared_rules(args, freeze.backbone_trains(args.freeze, args.unfreeze), args.processes) | {
        "focal_gamma": (args.loss == "focal", "--loss focal"),
    })
    report.check_tensorboard(args.tensorboard)
    fill_defaults(args)
    return args, saved


OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
              "rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad}
# What may end a run between two optimizer steps, so that its state is saved: a stop signal (Ctrl-C, SIGTERM), a
# picture that cannot be read, the end of another process.
INTERRUPTIONS = (ending.Stopped, data.DataError, distributed.ProcessError)


def train(args, saved, stop):
    """args: the options; of a resumed run the saved ones, as the command line has changed them. saved: its checkpoint,
    else None. stop: the stop signals.
    """
    # ---- 2 device and processes --------------------------------------------------------------------------------------
    # torchrun starts one process for each GPU; without it, this is number 0 of 1.
    rank, processes = distributed.ranks()
    # Under torchrun each process takes a GPU of its own (cuda:0, cuda:1 and so on), or all take the CPU.
    # --sync-bn needs GPUs, so with the CPU it is refused. --deterministic: from here on, every operation gives the
    # same bits on every run, or raises an error.
    device = pick_device(args.device, args.deterministic, args.sync_bn)
    # In a single process, "cuda" without a number means all GPUs, by DataParallel (section 9); but with --compile
    # only one is used.
    all_gpus = device == torch.device("cuda") and not args.compile
    gpus = torch.cuda.device_count() if all_gpus else 1
    # For the new head's weights and for dropout.
    torch.manual_seed(args.seed)

    # disable=None: a progress bar only where stderr is a terminal. say(): a line beside it. The first process alone
    # has a bar and a stdout: what the others print() is dropped, what they say() goes to stderr.
    progress_bar = partial(tqdm, leave=False, disable=None if rank == 0 else True)
    say = partial(tqdm.write, file=None if rank == 0 else sys.stderr)

    # ---- 3 data ------------------------------------------------------------------------------------------------------
    labels_file = tables.table_path(args.data, args.labels)
    # Rows without a split: a share of --val-split is set aside, by a hash of the file's name.
    table = tables.read_labels(labels_file, args.target, data.split_by_hash, args.val_split,
                               args.separator, args.file_column, args.data)
    # The columns that --target names; or, with --separator, the names that occur in the training split.
    labels = table.targets
    fingerprint = tables.fingerprint(table)
    # A resumed run needs the rows that it began with.
    if saved:
        tables.refuse_others(fingerprint, saved["data"], labels_file, args.resume)
    # This opens files, to find pictures that are in two splits, so only the first process does it.
    if rank == 0:
        print(tables.describe_labels(table))
        for line in data.pictures_to_know_of(table.splits):
            print(line)
    # Targets (N, L): 1, 0. Weights (N, L), how much each of these cells counts: 0 where it is not known, and the same
    # for all others, so that the mean over all cells is 1.
    train_targets, train_weights = tables.label_tensors(table, "train", device)
    val_targets, val_weights = tables.label_tensors(table, "val", device)
    # Average precision and F1 say nothing if no label is 1 in any validation row; the loss does.
    if args.monitor != "val_loss":
        tables.refuse_no_ones(table.values["val"], labels_file, args.monitor)

    # The weights say for which picture size and normalization they were trained. One process downloads them for all.
    if saved:
        preprocessing = preprocessing_for(saved["preprocessing"])
    else:
        pretrained = load_pretrained(args.weights, args.model) if rank == 0 else None
        pretrained = distributed.broadcast(pretrained)
        preprocessing = preprocessing_for(pretrained, args.image_size, args.resize, args.white, args.flip)
    size = preprocessing["image_size"]
    # Another mean or std: set preprocessing["mean"] or ["std"] here; predict.py and --export take them from the
    # checkpoint. What else is to be done to all pictures belongs into data.to_input, which predict.py calls, too (a
    # program of --export does not).
    mean = torch.tensor(preprocessing["mean"], device=device).view(3, 1, 1)
    std = torch.tensor(preprocessing["std"], device=device).view(3, 1, 1)
    # uint8 pictures (N, 3, H, W) -> float32 on the device, normalized, channels_last. (With --cache-features, batches
    # hold features in place of pictures: those are moved to the device, and that is all.)
    to_input = partial(data.to_input, mean=mean, std=std)

    # Your own augmentation: any transform from a uint8 tensor (3, H, W) to one of (3, size, size), such as those of
    # torchvision.transforms.v2. It draws from torch's random numbers, which are seeded for each picture and epoch. No
    # Normalize: to_input does that. (Several views of a picture: stack them here; in section 10, and in trial_losses
    # for --find-lr, flatten them into the batch, as to_input(batch.x.flatten(0, 1)).)
    augment = data.augmentation(preprocessing, args.augment)
    # Decoded at twice the size that the network gets: room for crops. "white": which number is white in grey pictures
    # of 16 or 32 bits.
    train_images = data.ImageList(table.splits["train"], augment, args.seed, 2 * size, args.on_bad_image,
                                  preprocessing["white"])
    print(data.describe_views(train_images, preprocessing, args.augment))
    # The batch sampler. Seed and epoch alone decide which pictures make up which batch, so a resumed run goes on with
    # the next one. A batch has --batch-size pictures in each process; pad: at the end of an epoch, a process for
    # which none are left gets some that count 0, so that all processes make the same number of steps.
    order = data.SeededBatches(len(train_images), args.batch_size, args.seed, shuffle=True,
                               rank=rank, processes=processes, pad=True)
    pin_memory = device.type == "cuda"
    train_loader = data.make_loader(train_images, order, args.workers, pin_memory)
    steps_per_epoch = order.steps_per_epoch(args.accumulate)
    # For validation here, and for the test at the end. No loader gives targets: each picture comes with the number of
    # its row in the split, and the targets of a batch are train_targets[rows] or val_targets[rows].
    eval_loader = partial(data.eval_loader, preprocessing=preprocessing, batch_size=args.batch_size,
                          workers=args.workers, rank=rank, processes=processes, on_bad_image=args.on_bad_image)
    val_loader = eval_loader(table.splits["val"])

    # ---- 4 model and head --------------------------------------------------------------------------------------------
    # Arguments of the network's constructor: whether there are auxiliary heads, the size that a ViT is built for, and
    # whether GoogLeNet and Inception scale their input, as their ImageNet weights expect.
    if saved:
        options_to_build = saved["build"]["options"]
    else:
        # Auxiliary heads (GoogLeNet, Inception) help earlier layers to train: built only if the backbone is to train.
        auxiliary = freeze.backbone_trains(args.freeze, args.unfreeze)
        options_to_build = build_options(args.model, size, pretrained, auxiliary)
    model = build(args.model, **options_to_build)

    # The last layer was made for classes: a new one takes its place, with one output for each label. It is "fc" in a
    # ResNet, "classifier.6" in a VGG, "heads.head" in a ViT.
    head = freeze.find_head(model)
    old_head = model.get_submodule(head)
    # (A head of your own: change mlp_head in model.py, and say --head mlp. predict.py builds its network by it, too.)
    if args.head == "mlp":
        new_head = mlp_head(old_head, len(labels), args.hidden)  # its dropout is 0.5
    elif isinstance(old_head, nn.Conv2d):  # SqueezeNet classifies with a 1x1 convolution
        new_head = nn.Conv2d(old_head.in_channels, len(labels), kernel_size=1)
    else:
        new_head = nn.Linear(old_head.in_features, len(labels), bias=old_head.bias is not None)
    model.set_submodule(head, new_head)
    # An auxiliary head is a small network with a last layer of its own.
    for name in auxiliary_heads(model):
        block = model.get_submodule(name)
        last = freeze.find_head(block)
        inputs = block.get_submodule(last).in_features
        block.set_submodule(last, nn.Linear(inputs, len(labels)))
    heads = (head, *auxiliary_heads(model))
    # The dropout right before the head, or in it.
    if args.dropout is not None:
        set_dropout(model, head, args.dropout)

    # Can the network take pictures of this size?
    model.eval()
    check_image_size(model, size)
    # (Section 8 loads the weights of a resumed run.)
    if not saved and pretrained["state_dict"] is not None:
        # A checkpoint of ours names its labels, and its head is loaded only if they are the same as here. Any other
        # file names none ("outputs" is None): its head is loaded if it has the right shape.
        same_outputs = pretrained["outputs"] in (None, labels)
        said = load_weights(model, pretrained["state_dict"], head, same_outputs)
        print(f"weights: {pretrained['source']}; {said}")
    # From here on each process draws its own random numbers: the new head starts the same, dropout differs.
    if rank > 0:
        torch.manual_seed(args.seed + rank)

    # ---- 5 freezing --------------------------------------------------------------------------------------------------
    # Frozen means two things. This is the first: no gradient, so no step. The second stands in section 10: eval().
    # The names of the parameters that --freeze means; the new head always trains.
    frozen = freeze.select(model, args.freeze, heads, without_head=True)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)

    # Two groups for each layer, with and without weight decay (biases and norm layers have none). group["peak_lr"] is
    # --lr for the head and a multiple of it for the layers before.
    groups = freeze.param_groups(model, heads, args.lr, args.weight_decay, args.backbone_lr_scale, args.layer_decay)
    if args.cache_features:
        features.refuse_a_backbone_that_trains(model, heads)

    # {epoch: what thaws at its start}. Of a resumed run, the thaws of epochs that it has begun are those in its
    # checkpoint, whatever --unfreeze says now, and the loop below does them again on the new model. Those of later
    # epochs are from --unfreeze.
    epochs_begun = checkpoint.epochs_begun(saved)
    saved_thaws = saved["options"]["unfreeze"] if saved else []
    thaws = freeze.plan_thaws(args.unfreeze, saved_thaws, epochs_begun)
    # A thaw that cannot be done is refused now, not hours later. (A resumed run may have fewer --epochs than it has
    # begun.)
    freeze.check_thaws(thaws, max(args.epochs, epochs_begun), model, heads, groups)
    for thaw_epoch, layers in thaws.items():
        if thaw_epoch < epochs_begun:
            freeze.thaw(model, layers, heads, groups)

    if args.batch_size == 1 or len(heads) > 1:
        # Section 4 tried eval(). Training can fail where that works: BatchNorm refuses a single picture, auxiliary
        # heads refuse small ones. train_mode: train(), but eval() for what is frozen. The trial runs on a copy, so the
        # running statistics of `model` stay.
        freeze.train_mode(model)
        check_image_size(model, size, args.batch_size)
    if args.weights.lower() == "none" and args.freeze != "none":
        print("warning: --freeze with --weights none keeps random layers as they are; they learn nothing")
    if args.sync_bn and processes > 1:
        # New modules with the same parameters under the same names.
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # Convolutions are faster in this memory format. Parameters stay the same objects, so `groups` still holds them.
    model.to(device, memory_format=torch.channels_last)

    # ---- 6 loss ------------------------------------------------------------------------------------------------------
    # How much a 1 of each label counts against a 0: a tensor (L,), or None.
    pos_weight = losses.pos_weights(args.pos_weight, labels, table.values["train"], device)
    if args.loss == "focal":
        criterion = losses.BinaryFocal(args.focal_gamma, pos_weight)
    else:
        # Each label is a yes or no of its own: a sigmoid for each output, and no softmax over them.
        criterion = partial(masked_cross_entropy, pos_weight=pos_weight)
    # Your own loss: put it here, as `criterion`. Any function or nn.Module that takes logits (N, L), targets (N, L) of
    # 0 and 1 and weights (N, L), all float32, and returns a scalar: the mean over the cells of weight times loss.
    # (nn.BCEWithLogitsLoss takes no weights; masked_cross_entropy, below, does.) The next line refuses --pos-weight if
    # it has no `pos_weight`, as an attribute or an argument of functools.partial.
    losses.refuse_unused(criterion, pos_weight=pos_weight)
    # A module is moved to the device. If it has parameters of its own, they train at the head's rate and are saved.
    loss_parameters = losses.own_parameters(criterion, device)
    if loss_parameters:
        groups.append({"layer": "loss", "params": loss_parameters, "lr": args.lr,
                       "peak_lr": args.lr, "weight_decay": 0.0})

    # ---- 7 optimizer, schedule, scaler -------------------------------------------------------------------------------
    # Every parameter is in, frozen or not, so that a thaw needs nothing more: one without a gradient is skipped.
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
    # "auto" takes bf16 or fp16 if this device and the layers that train, or will after a thaw, gain by it;
    # DataParallel cannot use bf16, since its threads run autocast in its default, fp16. Machines may differ, so what
    # the first process picks counts.
    picked = pick_precision(amp, model, device, gpus, bool(thaws))
    precision, reason, amp_dtype = distributed.broadcast(picked)
    autocast = torch.amp.autocast(device.type, amp_dtype, enabled=amp_dtype is not None)
    # fp16 has a small range: its loss is scaled up, so that gradients do not vanish. bf16 has float32's range.
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    # ---- 8 what is saved, and resume ---------------------------------------------------------------------------------
    # The sums of the running epoch: over pictures (with their number, "images") and over steps. They stay on the
    # device until they are read.
    meter = metrics.Meter(["loss"], ["norm", "skipped_steps"])
    # From which probability on a label is given: 0.5, until each validation chooses anew.
    thresholds = metrics.Thresholds(labels)
    # What training changes: each has state_dict() and load_state_dict().
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "thresholds": thresholds}
    if loss_parameters:
        parts["criterion"] = criterion
    # What it does not change: the name of the script, which --resume looks at, the options, with all thaws, past and
    # to come, and what predict.py needs to build the network.
    options = vars(args) | {"data": os.path.abspath(args.data), "unfreeze": freeze.thaw_specs(thaws)}
    hidden = args.hidden if args.head == "mlp" else 0
    loss_name = losses.name_of(criterion)
    about = {"script": "train_multilabel", "options": options, "data": fingerprint,
             "build": {"name": args.model, "options": options_to_build}, "labels": labels,
             "loss": loss_name, "head": head, "hidden": hidden, "preprocessing": preprocessing,
             "precision": precision, "device": device.type}
    # The run folder. All processes call its methods, and the first one writes.
    run = checkpoint.Run(args.output, parts, progress, meter, about)
    if saved:
        # Loads every part, the progress, the sums of an epoch that was interrupted, and the random numbers. An
        # optimizer keeps the peak rates and the weight decay that it has now: those may be changed.
        print(run.resume_from(saved, args.resume))

    # ---- 9 several GPUs ----------------------------------------------------------------------------------------------
    # `model` is frozen, thawed and saved, under its plain names; `whole` is the same network, ready to run. (Under
    # torchrun, section 10 wraps it in DistributedDataParallel, anew in each epoch, when it is known what trains.)
    whole = model
    if gpus > 1:
        whole = nn.DataParallel(model)
    elif args.compile:
        whole = torch.compile(model)

    # ---- 10 the loop -------------------------------------------------------------------------------------------------
    where = f"{device} x {gpus}" if gpus > 1 else device
    print(f"\n{args.model}, {size} px, {where}, precision {precision} ({reason})")
    per_step = args.batch_size * processes * args.accumulate
    print(f"{per_step} pictures per step: batch size x {processes} x --accumulate")
    print(f"{freeze.group_table(model, heads, optimizer.param_groups)}\n")
    # (Refused under torchrun, so no gradients need averaging.)
    if args.find_lr:
        trial = trial_losses(model, whole, train_loader, order, criterion, train_targets,
                             train_weights, autocast, to_input, say)
        find_lr(model, trial, optimizer, scaler, args.lr, run.folder)
        return
    if progress.epoch >= args.epochs:
        print(f"all {progress.epoch} epochs are done; to train longer, give more --epochs")

    # The batches of a loader for evaluation: a stop signal ends them.
    batches_of = partial(pictures_of, stop=stop, say=say)
    # --cache-features K: as long as the backbone is frozen, K augmented views of each picture go through it, once, and
    # its features are kept in files of the run folder. A resumed run reads them again, unless something changed that
    # they depend on, be it in the last bits: weights, pictures, and depends_on. machine(): the types of CPU and GPU,
    # the number of threads, the version of torch.
    depends_on = checkpoint.machine(), precision, args.batch_size, processes
    cache = features.Cache(run.folder, args.cache_features, model, heads, train_loader, val_loader,
                           batches_of, to_input, autocast, progress_bar, depends_on)
    # Prints a line for each epoch, and writes TensorBoard's file. first_epoch: TensorBoard drops what the interrupted
    # run wrote for this epoch and later ones, since they are done again.
    log = report.Log(run.folder, args.tensorboard and rank == 0, first_epoch=progress.epoch)
    shown = ["train_loss", "val_loss", "val_map", "val_macro_f1", args.monitor]
    # By the name of the metric: that of a loss, a cost or an error (mae, mse) is to be low, any other is to be high.
    lower_is_better = report.better_is_lower(args.monitor)
    # From here on a stop signal waits for leave_if_asked, between two steps; the last line then tells how to go on.
    ending.wait_for_steps(stop, run.resume_command)

    for epoch in range(progress.epoch, args.epochs):
        if args.patience and progress.epochs_without_gain >= args.patience:
            print(f"stopped early: no better {args.monitor} for {progress.epochs_without_gain} epochs")
            break
        if epoch in thaws and epoch >= epochs_begun:
            # To go back to, if the thaw spoils the model.
            run.save(name=f"before_unfreeze_{epoch}.pt")
            # requires_grad = True, and a rate of its own where one is given. (`groups` are no longer the optimizer's
            # after a load: load_state_dict makes new ones.)
            count = freeze.thaw(model, thaws[epoch], heads, optimizer.param_groups)
            print(f"thaw: {thaws[epoch]}, {count:,} parameters")
        meter.start_clock()

        # INTERRUPTIONS: a stop signal, an unreadable picture, the end of another process. In this block they arise
        # between two optimizer steps alone: the state is saved, then the exception goes on its way.
        with run.saved_if_interrupted(*INTERRUPTIONS):
            # The whole network on pictures; or, as long as the backbone is frozen and cached, its head on features.
            network, train_source, val_source = cache.route(whole, epoch)

            # The second half of freezing: eval() for each module of which nothing trains, with all inside it. In
            # train() mode its BatchNorms would move their running statistics, and its dropout would be on.
            model.train()
            for part in freeze.frozen_parts(model):
                part.eval()
            # DDP averages the gradients of the processes. It asks what trains when it is made, so it is made after
            # any thaw.
            replica = nn.parallel.DistributedDataParallel(network) if processes > 1 else network

            # One turn of the loop is one optimizer step. It gets --accumulate batches, which are read before the step
            # begins, and step_pictures: how many pictures they have in all processes together. Of a batch: x the
            # pictures, y the numbers of their rows, pictures how many count (padding does not). A last batch of one
            # picture, which BatchNorm could not take, is merged into the one before.
            # in_step: a step begins when every process has read its batches, and an error in one ends all, so that
            # none waits for another that is gone. A resumed run goes on with the first batch that it has not seen.
            steps_done = progress.step - epoch * steps_per_epoch
            order.set_epoch(epoch, start=steps_done * args.accumulate)
            steps = distributed.in_step(data.steps(train_source, order, args.accumulate, say))
            bar = progress_bar(steps, f"epoch {epoch}", steps_per_epoch, initial=steps_done)
            for batches, step_pictures in bar:
                for batch in batches:
                    x = to_input(batch.x)
                    # Not the targets: where they stand in train_targets.
                    rows = batch.y.to(device, non_blocking=True)
                    if processes > 1:
                        # What no_sync() does: the gradients are averaged once a step, in its last backward().
                        replica.require_backward_grad_sync = batch is batches[-1]
                    with autocast:
                        outputs = replica(x)
                    # In training, a network with auxiliary heads returns their outputs behind those of the head.
                    logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
                    # In float32, out of autocast's reach.
                    loss = criterion(logits.float(), train_targets[rows], train_weights[rows])

                    # `loss` is a mean over all cells of the batch, also those that are not known, which add 0. It is
                    # weighted here by the number of pictures (0 for padding), and train_loss divides by their sum: so
                    # each known cell counts the same in it, whichever batch it is in.
                    meter.add("images", batch.samples)
                    meter.add("loss", loss.detach() * batch.samples)
                    # Not in train_loss: val_loss has no such part either.
                    for more in auxiliary:
                        more_loss = criterion(more.float(), train_targets[rows], train_weights[rows])
                        loss = loss + AUXILIARY_WEIGHT[args.model] * more_loss

                    # The step follows the mean of its batches' losses, by number of pictures. DDP averages over the
                    # processes: times their number, that is a sum.
                    share = processes * batch.samples / step_pictures
                    scaler.scale(loss * share).backward()

                # The penalty is added once a step and not once a batch, so it has a backward() of its own; it is not
                # in train_loss. DDP has averaged the losses' gradients by now and takes no part in this backward():
                # these gradients are the same in all processes anyway.
                if args.l1:
                    # Of convolutions and linear layers: no biases, no norm layers.
                    weights = [w for w in freeze.decaying_weights(model) if w.requires_grad]
                    l1 = torch.stack([w.float().abs().sum() for w in weights]).sum()
                    scaler.scale(args.l1 * l1).backward()
                # DDP does not know the loss's own parameters.
                distributed.average_gradients(loss_parameters)

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

                # Reading the meter's sums makes a GPU wait, so only every --log-every steps and at the end of an epoch.
                # A loss that is not finite ends the run. The sums are taken over all processes, so each has to get
                # here, not the first one alone.
                if progress.step % args.log_every == 0 or progress.step == (epoch + 1) * steps_per_epoch:
                    bar.set_postfix_str(meter.summary())
                    run.check_finite(meter.mean("loss"), f"training loss of epoch {epoch}")
                if args.save_every and progress.step % args.save_every == 0:
                    run.save()  # last.pt; never with a loss or weight that is not finite
                ending.leave_if_asked(stop)
            meter.stop_clock()

            # BatchNorm's running statistics differ between processes after a step. DDP copies the first process's to
            # the others when the next one begins; after the last step of an epoch there is none, so it is done here.
            distributed.broadcast_buffers(model)
            outputs, rows = evaluate(network, batches_of(val_source), autocast, to_input, device)

        # A metric of your own, from probabilities and truth (N, L), where nan is not known: add it to these scores,
        # before the broadcast, as scores["val_worst_ap"] = ... A higher one is better, unless its name speaks of a
        # loss, cost or error (mae, mse). To choose best.pt by it, put its name into the list that section 1 hands to
        # add_training_options. All processes take the first one's scores.
        with torch.no_grad():
            scores = {"val_loss": criterion(outputs, val_targets[rows], val_weights[rows]).item()}
        # In float64: in float32 a sigmoid is exactly 1 from about 17 on, and sure pictures could not be ranked.
        probabilities, truth = outputs.cpu().double().sigmoid(), table.values["val"][rows]
        # Those by which each label has its highest F1 here. best.pt keeps those of its own epoch.
        thresholds.choose(probabilities, truth)
        for name, value in metrics.label_scores(probabilities, truth, thresholds.values).items():
            scores[f"val_{name}"] = value
        scores = distributed.broadcast(metrics.as_numbers(scores))
        run.check_finite(scores["val_loss"], f"validation loss of epoch {epoch}")
        unread_val = len(val_targets) - len(rows)
        row = {"epoch": epoch, "train_loss": meter.mean("loss"), **scores}
        # lr, grad_norm, loss_scale, skipped_steps, unreadable, seconds, images_per_second.
        row |= meter.columns(optimizer, scaler, steps_per_epoch, len(train_images), unread_val)
        progress.history.append(row)

        # What "best" means: the highest score so far, or the lowest of a loss. NaN is worse than any number. Of equal
        # scores, which are frequent with few pictures, the epoch with the lower val_loss becomes the best one; but
        # that is no gain, and --patience goes on counting.
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

    # The end: best.pt, once, on the test split, by which nothing was chosen (without one: on val, which chose
    # best.pt).
    best_weights, best_row, best_thresholds = run.load_best("thresholds")
    print(f"\nbest.pt: epoch {best_row['epoch']}, {args.monitor} {best_row[args.monitor]:.4f}")
    if not args.no_test:
        model.load_state_dict(best_weights)
        thresholds.load_state_dict(best_thresholds)
        split = "test" if "test" in table.splits else "val"
        test_loader = eval_loader(table.splits[split])
        # Without autocast, so in float32, as predict.py does.
        outputs, rows = evaluate(whole, batches_of(test_loader), nullcontext(), to_input, device)
        test(outputs, rows, table, split, thresholds.values, run.folder)
    # The summary, and the report, unless --no-report.
    if rank == 0:
        print(report.sum_up(run.folder, progress.history, args.monitor, not args.no_report))


def masked_cross_entropy(logits, targets, weights, pos_weight=None):
    """Binary cross-entropy of each cell (N, L) times its weight, 0 where it is not known; the mean over all cells."""
    cells = nn.functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weight, reduction="none")
    return (cells * weights).mean()


def pictures_of(loader, at_least=0, stop=None, say=print):
    """The batches of a split, of which each process reads its share at its own pace; a stop signal ends them. at_least:
    readable pictures that a batch with unreadable ones must have.
    """
    return distributed.at_own_pace(data.batches(loader, at_least, say), stop, ending.leave_if_asked)


@torch.inference_mode()
def evaluate(network, batches, autocast, to_input, device):
    """The network's outputs (N, L) for a split in float32, and the numbers (N,) of the rows whose pictures could be
    read.
    """
    network.eval()
    found = []
    for x, rows in batches:
        with autocast:
            outputs = network(to_input(x))
        found.append((outputs.float(), rows))
    # Of all processes: they come by way of the CPU.
    outputs, rows = distributed.all_gather_batches(found)
    return outputs.to(device), rows


def test(outputs, rows, table, split, thresholds, folder):
    """Print the scores of a split, and write its predictions into the folder. outputs: those of the network (N, L) for
    the rows of these numbers (N,).
    """
    probabilities, truth = outputs.cpu().double().sigmoid(), table.values[split][rows]
    rank, _ = distributed.ranks()
    if rank == 0:
        files = [table.splits[split][row][0] for row in rows.tolist()]
        listed = metrics.label_rows(files, table.targets, probabilities, thresholds, truth)
        checkpoint.write_csv(listed, folder / f"{split}_predictions.csv")
    chose = "" if split == "test" else ", which chose best.pt and the thresholds: expect less on others"
    print(f"on the {len(truth)} pictures of {split}{chose}:\n")
    print(metrics.label_report(table.targets, probabilities, truth, thresholds))


def trial_losses(model, network, loader, order, criterion, targets, weights, autocast, to_input, say):
    """For --find-lr: the losses of one batch after another, without end. lr_finder makes an optimizer step with each."""
    freeze.train_mode(model)
    for epoch in itertools.count():
        order.set_epoch(epoch)
        for x, rows in data.batches(loader, at_least=2, say=say):
            rows = rows.to(targets.device)
            with autocast:
                outputs = network(to_input(x))
            logits = outputs[0] if isinstance(outputs, tuple) else outputs
            yield criterion(logits.float(), targets[rows], weights[rows])


def find_lr(model, trial, optimizer, scaler, lr, folder):
    """--find-lr: raise the rate from step to step, see where the loss falls and where it breaks; the weights are put back."""
    rates, values = lr_finder.range_test(model, trial, optimizer, scaler, lr)
    rate, rule = lr_finder.suggest(rates, values)
    report.draw_range_test(rates, values, lr_finder.smooth(values), rate, folder / "find_lr.png")
    print(f"suggested: --lr {rate:.1e} ({rule}); the curve is in {folder / 'find_lr.png'}")


def list_layers(args):
    """--list-layers: the table that section 10 prints, for a linear head; no weights are needed."""
    # How many names a column holds, only the table says.
    options = {"num_classes": len(args.target)} if args.target and not args.separator else {}
    auxiliary = freeze.backbone_trains(args.freeze, args.unfreeze)
    size = args.image_size or load_pretrained("none", args.model)["image_size"]
    model = build(args.model, **options, **build_options(args.model, size, auxiliary=auxiliary))
    heads = (freeze.find_head(model), *auxiliary_heads(model))
    rates = args.lr, args.weight_decay, args.backbone_lr_scale, args.layer_decay
    print(freeze.describe_plan(model, heads, args.freeze, args.unfreeze, args.epochs, *rates))


def main(argv=None):
    with ending.tidy(checkpoint.CheckpointError, data.DataError, distributed.ProcessError, features.FeaturesError,
                     freeze.FreezeError, losses.LossError, lr_finder.RangeTestError, ModelError,
                     report.ReportError, tables.TableError) as stop, distributed.joined(stop):
        args, saved = distributed.from_main(read_arguments, argv)
        if args.list_layers:
            list_layers(args)
        else:
            train(args, saved, stop)


if __name__ == "__main__":
    main()
