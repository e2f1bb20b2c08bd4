"""Fine-tune a torchvision network to read numbers off pictures: the full loop, top to bottom, in plain PyTorch.

    python train_regressor.py --data ./houses --labels labels.csv --target price --log-target
    python train_regressor.py --data ./houses --target price,area --freeze backbone       # two numbers, new head alone
    python train_regressor.py --data ./houses --target price --quantiles 0.1,0.5,0.9      # a range with each number
    torchrun --nproc_per_node=2 train_regressor.py --data ./houses --target price --output runs/a --resume     # two GPUs
    python train_regressor.py --resume runs/train_regressor/.../last.pt                   # go on after an interruption

--labels is a CSV below --data with a column `file` (paths below --data, or beside the CSV), the numeric columns that
--target names, and maybe a column `split` of train, val and test. Targets are standardized with the training split's
mean and standard deviation: the loss is in those units, every metric and prediction in your own. What comes out lies in
--output: best.pt and last.pt, history.csv (one row per epoch), args.json, the predictions.

More: docs/numbers.md
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
                       make_parser, names, number, numbers, refuse_idle, refuse_unknown_choices, shared_rules,
                       typed_options)
from model import (AUXILIARY_WEIGHT, ModelError, auxiliary_heads, build, build_options, check_image_size,
                   load_pretrained, load_weights, mlp_head, pick_device, pick_precision, preprocessing_for, set_dropout)

# ---- 1 arguments -----------------------------------------------------------------------------------------------------


def build_parser():
    """What is the same in every script stands in arguments.py."""
    parser = make_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="DIR", help="the folder of --labels and of its pictures")
    add_table_options(add, "labels.csv")
    add("--target", type=names, metavar="A,B", help="the column to predict, or several")
    add("--log-target", action="store_true", help="learn the logarithm: for prices and other sizes above zero")
    add("--sample-weight", metavar="COLUMN", help="a column that says how much each picture counts")
    add("--val-split", type=number(float, 0.01, 0.99), default=0.2, metavar="SHARE",
        help="share that is set aside where there is no column split (default %(default)s)")
    add("--augment", choices=data.AUGMENT, default="none",
        help="none changes no number; light: a slight crop, flip (sizes change by a fifth, left becomes right); "
             "standard: any crop (sizes and counts change); strong: colours too (default %(default)s)")
    add_picture_options(add)

    add_network_options(parser)
    add_freezing_options(parser)

    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=["mse", "l1", "huber"], default="huber",
        help="mse: towards the mean; l1: towards the median; huber: between them (default %(default)s)")
    add("--huber-delta", type=number(float, 1e-6), default=1.0, metavar="D",
        help="huber: standard deviations from which on an error counts linearly (default %(default)s)")
    add("--quantiles", type=numbers(0, 1), metavar="Q,...",
        help="instead of --loss, such as 0.1,0.5,0.9: a range with every number")
    add("--l1", type=above, default=0.0, metavar="L", help="L1 penalty on trainable weights; try 1e-6 (default: off)")

    add_optimizer_options(parser)
    add_training_options(parser, ["val_loss", "val_r2"], "; val_r2: the mean over the targets")
    add_saving_options(parser, "train_regressor")
    return parser


def read_arguments(argv):
    """Return the options, and the checkpoint of a run that is resumed (else None)."""
    parser = build_parser()
    args, typed = parser.parse_args(argv), typed_options(parser, argv)
    args, saved = checkpoint.resume_arguments(args, typed, "train_regressor", MAY_CHANGE, *distributed.started())
    refuse_unknown_choices(parser, args)
    if not (args.data and args.target) and not args.list_layers:
        parser.error("--data and --target are needed: the folder of --labels, and a column of numbers in that file")
    if args.quantiles and 0.5 not in args.quantiles:
        parser.error("--quantiles need 0.5 among them: that is the number that is reported")
    refuse_idle(parser, typed, shared_rules(args, freeze.backbone_trains(args.freeze, args.unfreeze), args.processes) | {
        "loss": (not args.quantiles, "no --quantiles, which have a loss of their own"),
        "huber_delta": (args.loss == "huber" and not args.quantiles, "--loss huber"),
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
    # Under torchrun each process takes a GPU of its own, cuda:0, cuda:1 and so on, or all take the CPU, where
    # --sync-bn is refused. --deterministic makes all operations so, from here on.
    device = pick_device(args.device, args.deterministic, args.sync_bn)
    # In a single process, "cuda" without a number means all GPUs: section 9 uses DataParallel. torch.compile takes
    # one.
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
    table = tables.read_table(labels_file, args.target, data.split_by_hash, args.val_split,
                              args.sample_weight, args.log_target, args.file_column, args.data)
    # The columns that --target names, of which one may hold a comma.
    targets = table.targets
    fingerprint = tables.fingerprint(table)
    # A resumed run needs the rows that it began with.
    if saved:
        tables.refuse_others(fingerprint, saved["data"], labels_file, args.resume)
    # This opens files, to find pictures that are in two splits, so only the first process does it.
    if rank == 0:
        print(tables.describe(table))
        for line in data.pictures_to_know_of(table.splits):
            print(line)
    # The network learns standardized numbers, (value - mean) / std, both of the training split; with --log-target, of
    # the logarithms.
    scale = tables.fit_scale(table.values["train"], args.log_target)
    # Targets (N, T); weights (N,), how much each picture counts: 1, unless --sample-weight names a column.
    train_targets, train_weights = tables.tensors(table, "train", scale, device)
    val_targets, val_weights = tables.tensors(table, "val", scale, device)
    if args.monitor == "val_r2":
        tables.refuse_constant(val_targets, labels_file)
    # What a prediction has to beat: the same number for all pictures.
    baseline = tables.baselines(table.values["train"])

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
    # uint8 pictures (N, 3, H, W) -> float32 on the device, normalized, channels_last. (Cached features are only
    # moved.)
    to_input = partial(data.to_input, mean=mean, std=std)

    # Your own augmentation: any transform from a uint8 tensor (3, H, W) to one of (3, size, size), such as those of
    # torchvision.transforms.v2. It draws from torch's random numbers, which are seeded for each picture and epoch. No
    # Normalize: to_input does that. (Several views of a picture: stack them here; in section 10, and in trial_losses
    # for --find-lr, flatten them into the batch, as to_input(batch.x.flatten(0, 1)).)
    augment = data.augmentation(preprocessing, args.augment)
    # Decoded at twice the size that the network gets: room for crops.
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
    # Each picture comes with the number of its row in the split, here and in training: train_targets[rows] are its
    # targets.
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

    # The last layer was made for classes: a new one takes its place, with one output for each target and quantile.
    outputs_for = tables.output_names(targets, args.log_target, args.quantiles)
    output_shape = [len(targets)]  # of a picture: (T,) or (T, Q)
    if args.quantiles:
        output_shape.append(len(args.quantiles))
    # It is "fc" in a ResNet, "classifier.6" in a VGG, "heads.head" in a ViT.
    head = freeze.find_head(model)
    old_head = model.get_submodule(head)
    # (A head of your own: change mlp_head in model.py, and say --head mlp. predict.py builds its network by it, too.)
    if args.head == "mlp":
        new_head = mlp_head(old_head, len(outputs_for), args.hidden)  # its dropout is 0.5
    elif isinstance(old_head, nn.Conv2d):  # SqueezeNet classifies with a 1x1 convolution
        new_head = nn.Conv2d(old_head.in_channels, len(outputs_for), kernel_size=1)
    else:
        new_head = nn.Linear(old_head.in_features, len(outputs_for), bias=old_head.bias is not None)
    model.set_submodule(head, new_head)
    # An auxiliary head is a small network with a last layer of its own.
    for name in auxiliary_heads(model):
        block = model.get_submodule(name)
        last = freeze.find_head(block)
        inputs = block.get_submodule(last).in_features
        block.set_submodule(last, nn.Linear(inputs, len(outputs_for)))
    heads = (head, *auxiliary_heads(model))
    # The dropout right before the head, or in it.
    if args.dropout is not None:
        set_dropout(model, head, args.dropout)

    # Can the network take pictures of this size?
    model.eval()
    check_image_size(model, size)
    # (Section 8 loads the weights of a resumed run.)
    if not saved and pretrained["state_dict"] is not None:
        # Our own checkpoints name their outputs: their head is loaded, too, if those are equal. Other files (None):
        # if its shape fits.
        same_outputs = pretrained["outputs"] in (None, outputs_for)
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

    # {epoch: what thaws at its start}. For the epochs that a resumed run has begun, its checkpoint decides, and they
    # are repeated here; for later ones, --unfreeze.
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
        # Does a training pass work, BatchNorm on a single picture, auxiliary heads on small ones? Tried on a copy;
        # train_mode is train(), but eval() for what is frozen.
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
    if args.quantiles:
        criterion = losses.Quantile(args.quantiles)
    else:
        criterion = losses.Regression(args.loss, args.huber_delta)
    # Your own loss: put it here, as `criterion`. Any function or nn.Module that takes outputs (N, T) or, with
    # --quantiles, (N, T, Q), targets (N, T) and weights (N,), all float32 and standardized, and returns a scalar: the
    # mean over the pictures of weight times loss.

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
    # What training changes: each has state_dict() and load_state_dict().
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    if loss_parameters:
        parts["criterion"] = criterion
    # What it does not change: the name of the script, which --resume looks at, the options, with all thaws, past and
    # to come, and what predict.py needs to build the network.
    options = vars(args) | {"data": os.path.abspath(args.data), "unfreeze": freeze.thaw_specs(thaws)}
    hidden = args.hidden if args.head == "mlp" else 0
    loss_name = losses.name_of(criterion)
    about = {"script": "train_regressor", "options": options, "data": fingerprint,
             "build": {"name": args.model, "options": options_to_build},
             "loss": loss_name, "head": head, "hidden": hidden, "preprocessing": preprocessing,
             "precision": precision, "device": device.type}
    about |= {"outputs": outputs_for, "targets": targets, "quantiles": args.quantiles,
              "scale": scale, "baseline": baseline}
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
    if args.find_lr:
        trial = trial_losses(model, whole, train_loader, order, criterion, train_targets,
                             train_weights, output_shape, autocast, to_input, say)
        find_lr(model, trial, optimizer, scaler, args.lr, run.folder)
        return
    if progress.epoch >= args.epochs:
        print(f"all {progress.epoch} epochs are done; to train longer, give more --epochs")

    # The batches of a loader for evaluation: a stop signal ends them.
    batches_of = partial(pictures_of, stop=stop, say=say)
    # --cache-features K: as long as the backbone is frozen, K augmented views of each picture go through it, once. A
    # file is used again only if all that affects its rounding is the same.
    depends_on = checkpoint.machine(), precision, args.batch_size, processes
    cache = features.Cache(run.folder, args.cache_features, model, heads, train_loader, val_loader,
                           batches_of, to_input, autocast, progress_bar, depends_on)
    # The line for each epoch, and TensorBoard, where rows of an earlier run from first_epoch on are hidden.
    log = report.Log(run.folder, args.tensorboard and rank == 0, first_epoch=progress.epoch)
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

            # One turn of the loop is one optimizer step. It gets --accumulate batches (x, y, samples, number),
            # already read, and how many pictures they have in all processes. (A last batch of one picture, which
            # BatchNorm could not take, is merged into the one before.) in_step: a step begins when all processes have
            # read theirs; an error in one ends all. A resumed run goes on with the first batch that it has not seen.
            steps_done = progress.step - epoch * steps_per_epoch
            order.set_epoch(epoch, start=steps_done * args.accumulate)
            steps = distributed.in_step(data.steps(train_source, order, args.accumulate, say))
            bar = progress_bar(steps, f"epoch {epoch}", steps_per_epoch, initial=steps_done)
            for batches, step_pictures in bar:
                for batch in batches:
                    x = to_input(batch.x)
                    rows = batch.y.to(device, non_blocking=True)
                    if processes > 1:
                        # What no_sync() does: the gradients are averaged once a step, in its last backward().
                        replica.require_backward_grad_sync = batch is batches[-1]
                    with autocast:
                        outputs = replica(x)
                    # Numbers (N, T) or quantiles (N, T, Q), in float32, out of autocast's reach. In training, a
                    # network with auxiliary heads returns their outputs behind those of the head.
                    outputs, *auxiliary = in_shape(outputs, output_shape)
                    loss = criterion(outputs, train_targets[rows], train_weights[rows])

                    # The loss is a mean over the batch; it counts for as many pictures as that has, and for none if
                    # they are padding.
                    meter.add("images", batch.samples)
                    meter.add("loss", loss.detach() * batch.samples)
                    # Not in train_loss: val_loss has no such part either.
                    for more in auxiliary:
                        more_loss = criterion(more, train_targets[rows], train_weights[rows])
                        loss = loss + AUXILIARY_WEIGHT[args.model] * more_loss

                    # The step follows the mean of its batches' losses, by number of pictures. DDP averages over the
                    # processes: times their number, that is a sum.
                    share = processes * batch.samples / step_pictures
                    scaler.scale(loss * share).backward()

                # Penalty: not in train_loss, and once a step, so with a backward() of its own. DDP has averaged the
                # gradients already; these are the same in all processes.
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

                # A look at the sums now and then: it makes a GPU wait. A loss that is not finite ends the run. They
                # are those of all processes, so all have to take part.
                if progress.step % args.log_every == 0 or progress.step == (epoch + 1) * steps_per_epoch:
                    bar.set_postfix_str(meter.summary())
                    run.check_finite(meter.mean("loss"), f"training loss of epoch {epoch}")
                if args.save_every and progress.step % args.save_every == 0:
                    run.save()  # last.pt; never with a loss or weight that is not finite
                ending.leave_if_asked(stop)
            meter.stop_clock()

            # DDP copies the first process's running statistics before a step's first forward pass; this, after the
            # last step.
            distributed.broadcast_buffers(model)
            outputs, rows = evaluate(network, batches_of(val_source), output_shape, autocast, to_input, device)

        # A metric of your own, from predictions and truth (N, T): add it to these scores, before the broadcast, as
        # scores["val_worst_error"] = ... A higher one is better, unless its name speaks of a loss, cost or error
        # (mae, mse). To choose best.pt by it, put its name into the list that section 1 hands to
        # add_training_options. All processes take the first one's scores.
        with torch.no_grad():
            scores = {"val_loss": criterion(outputs, val_targets[rows], val_weights[rows]).item()}
        # In the targets' own units, on the CPU: (N, T); with --quantiles the medians, and all of them (N, T, Q).
        predictions, quantiles = tables.to_own_units(outputs, scale, args.quantiles)
        truth = table.values["val"][rows]
        for name, value in metrics.score_columns(targets, predictions, truth, quantiles).items():
            scores[f"val_{name}"] = value
        scores = distributed.broadcast(metrics.as_numbers(scores))
        run.check_finite(scores["val_loss"], f"validation loss of epoch {epoch}")
        unread_val = len(val_targets) - len(rows)
        row = {"epoch": epoch, "train_loss": meter.mean("loss"), **scores}
        # lr, grad_norm, loss_scale, skipped_steps, unreadable, seconds, images_per_second.
        row |= meter.columns(optimizer, scaler, steps_per_epoch, len(train_images), unread_val)
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
        # With several targets these are val_mae_price, val_r2_price and so on.
        beginnings = ("train_loss", "val_loss", "val_mae", "val_r2")
        log.epoch(row, is_best, [name for name in row if name.startswith(beginnings)], ".5g")
        ending.leave_if_asked(stop)

    # The end: best.pt, once, on the test split, by which nothing was chosen (without one: on val, which chose
    # best.pt).
    best_weights, best_row = run.load_best()
    print(f"\nbest.pt: epoch {best_row['epoch']}, {args.monitor} {best_row[args.monitor]:.4f}")
    if not args.no_test:
        model.load_state_dict(best_weights)
        split = "test" if "test" in table.splits else "val"
        test_loader = eval_loader(table.splits[split])
        # Without autocast, so in float32, as predict.py does.
        outputs, rows = evaluate(whole, batches_of(test_loader), output_shape, nullcontext(), to_input, device)
        test(outputs, rows, table, split, scale, args.quantiles, baseline, run.folder)
    # The summary, and the report, unless --no-report.
    if rank == 0:
        print(report.sum_up(run.folder, progress.history, args.monitor, not args.no_report))


def in_shape(outputs, shape):
    """The outputs of a network for N pictures, and behind them those of its auxiliary heads, in a list: each (N, *shape),
    in float32.
    """
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [found.float().view(len(found), *shape) for found in outputs]


def pictures_of(loader, at_least=0, stop=None, say=print):
    """The batches of a split, of which each process reads its share at its own pace; a stop signal ends them. at_least:
    readable pictures that a batch with unreadable ones must have.
    """
    return distributed.at_own_pace(data.batches(loader, at_least, say), stop, ending.leave_if_asked)


@torch.inference_mode()
def evaluate(network, batches, output_shape, autocast, to_input, device):
    """The network's outputs for a split, (N, *output_shape), standardized, in float32, and the numbers (N,) of the rows
    whose pictures could be read.
    """
    network.eval()
    found = []
    for x, rows in batches:
        with autocast:
            outputs = network(to_input(x))
        found.append((in_shape(outputs, output_shape)[0], rows))
    # Of all processes: they come by way of the CPU.
    outputs, rows = distributed.all_gather_batches(found)
    return outputs.to(device), rows


def test(outputs, rows, table, split, scale, quantiles, baseline, folder):
    """Print the scores of a split, and write its predictions into the folder. outputs: those of the network for the rows
    of these numbers (N,).
    """
    targets = table.targets
    predictions, ranges = tables.to_own_units(outputs, scale, quantiles)
    truth = table.values[split][rows]
    rank, _ = distributed.ranks()
    if rank == 0:
        files = [table.splits[split][row][0] for row in rows.tolist()]
        listed = tables.prediction_rows(files, targets, predictions, ranges, quantiles, truth)
        checkpoint.write_csv(listed, folder / f"{split}_predictions.csv")
    chose = "" if split == "test" else ", which chose best.pt: expect a little less on others"
    ways = {"this model": predictions}
    for name, values in baseline.items():
        ways[name] = torch.tensor(values, dtype=torch.float64)
    print(f"on the {len(truth)} pictures of {split}{chose}:\n")
    print(metrics.regression_report(targets, truth, ways, ranges))


def trial_losses(model, network, loader, order, criterion, targets, weights, output_shape, autocast, to_input, say):
    """For --find-lr: the losses of one batch after another, without end. lr_finder makes an optimizer step with each."""
    freeze.train_mode(model)
    for epoch in itertools.count():
        order.set_epoch(epoch)
        for x, rows in data.batches(loader, at_least=2, say=say):
            rows = rows.to(targets.device)
            with autocast:
                outputs = network(to_input(x))
            yield criterion(in_shape(outputs, output_shape)[0], targets[rows], weights[rows])


def find_lr(model, trial, optimizer, scaler, lr, folder):
    """--find-lr: raise the rate from step to step, see where the loss falls and where it breaks; the weights are put back."""
    rates, values = lr_finder.range_test(model, trial, optimizer, scaler, lr)
    rate, rule = lr_finder.suggest(rates, values)
    report.draw_range_test(rates, values, lr_finder.smooth(values), rate, folder / "find_lr.png")
    print(f"suggested: --lr {rate:.1e} ({rule}); the curve is in {folder / 'find_lr.png'}")


def list_layers(args):
    """--list-layers: the table that section 10 prints, for a linear head; no weights are needed."""
    options = {"num_classes": len(tables.output_names(args.target, False, args.quantiles))} if args.target else {}
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
