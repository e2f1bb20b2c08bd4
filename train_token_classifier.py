"""Fine-tune a BERT to find names in sentences, of persons, places, products: a tag for every word. The full loop, top
to bottom, in plain PyTorch. Its networks and tokenizers are those of transformers.

    python train_token_classifier.py --data ./wnut17 --model ./minilm                     # train everything
    python train_token_classifier.py --data ./wnut17 --freeze backbone --cache-features 1 # train the new head alone
    python train_token_classifier.py --data ./wnut17 --freeze backbone --unfreeze 1:bert.encoder.layer.11
    python train_token_classifier.py --data tagged.conll --val-split 0.1                  # one file
    python train_token_classifier.py --model ./minilm --list-layers                       # the names to freeze and thaw
    torchrun --nproc_per_node=2 train_token_classifier.py --data ./wnut17 --output runs/a --resume       # two GPUs
    python train_token_classifier.py --resume runs/train_token_classifier/.../last.pt     # go on after an interruption

--data is a folder that holds train, val (or dev) and test, or one file: CoNLL (a word a line, its tag last, a blank
line behind each sentence) or JSON lines ({"tokens": [...], "tags": [...]}). What comes out lies in --output: best.pt
and last.pt, history.csv (one row per epoch), args.json, the predictions.

More: docs/words.md
"""

import itertools
import math
import os
from contextlib import nullcontext
from functools import partial

# torch's threads wait for each other by spinning, which beside other work takes several times as long. torch reads this
# when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Unless this is set, the tokenizer, which has threads of its own, warns when a DataLoader's workers start after it was
# used. They get numbers and never call it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

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
import text
import words
from arguments import (MAY_CHANGE, above, add_encoder_options, add_freezing_options, add_optimizer_options,
                       add_saving_options, add_text_options, add_training_options, fill_defaults, make_parser, number,
                       refuse_idle, refuse_unknown_choices, share, shared_rules, typed_options)
from model import ModelError, pick_device, pick_precision

# ---- 1 arguments -----------------------------------------------------------------------------------------------------


def build_parser():
    """What is the same in every script stands in arguments.py."""
    parser = make_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    files = "a folder with train, val or dev, and test, of any ending, or one file: CoNLL, or JSON lines (.jsonl)"
    add_text_options(add, files, "that are read at once; longer sentences are read in overlapping windows", "sentences")

    add = add_encoder_options(parser)
    add("--cache-features", type=number(int, 0, 1), default=0, metavar="1",
        help="with --freeze backbone: put each sentence through the encoder once, and not in every epoch (default 0: "
             "off)")
    add_freezing_options(parser)

    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=["cross-entropy", "focal"], default="cross-entropy",
        help="focal: hard words count more (default %(default)s)")
    add("--label-smoothing", type=share, default=0.0, metavar="E", help="(default %(default)s)")
    add("--focal-gamma", type=above, default=2.0, metavar="G", help="focal: 0 is cross-entropy (default %(default)s)")
    add("--class-weights", metavar="W",
        help="balanced | TAG=W,... such as B-person=10,O=0.5: a word of that tag counts as so many")
    add("--class-weight-mean", choices=["weighted", "plain"], default="weighted",
        help="weighted: scale the weights, such that their mean over the words of train is 1 (default); plain: a "
             "weight of 10 makes a gradient ten times as large")
    add("--l1", type=above, default=0.0, metavar="L", help="L1 penalty on trainable weights; try 1e-6 (default: off)")
    add("--l2-sp", type=above, default=0.0, metavar="ALPHA",
        help="pull the encoder towards the pretrained weights, in place of weight decay; try 0.1 (default: off)")

    rates = "adamw and adam 0.0005, or 0.003 with --freeze backbone; others sgd 0.01, rmsprop 0.001, adagrad 0.01"
    add_optimizer_options(parser, rates=rates, schedules=["cosine", "linear", "step", "constant", "plateau"])
    metrics_to_choose = ["val_f1", "val_loss", "val_macro_f1", "val_accuracy"]
    add_training_options(parser, metrics_to_choose, without=("--compile", "--sync-bn"))
    add_saving_options(parser, "train_token_classifier")
    # A pretrained encoder has read far more than these sentences: few passes are enough.
    parser.set_defaults(epochs=3)
    return parser


def read_arguments(argv):
    """Return the options, and the checkpoint of a run that is resumed (else None)."""
    parser = build_parser()
    args, typed = parser.parse_args(argv), typed_options(parser, argv)
    args, saved = checkpoint.resume_arguments(args, typed, "train_token_classifier", MAY_CHANGE, *distributed.started())
    refuse_unknown_choices(parser, args)
    if not args.data and not args.list_layers:
        parser.error("--data is needed: a folder with files of words and their tags, or one file")
    encoder_trains = freeze.backbone_trains(args.freeze, args.unfreeze)
    refuse_idle(parser, typed, shared_rules(args, encoder_trains, args.processes) | {
        "focal_gamma": (args.loss == "focal", "--loss focal"),
        "class_weight_mean": (args.class_weights, "--class-weights"),
        "cache_features": (args.freeze == "backbone", "a frozen encoder, --freeze backbone"),
        "l2_sp": (encoder_trains and args.weights != "none", "a pretrained encoder that trains or thaws"),
    })
    report.check_tensorboard(args.tensorboard)
    # If the encoder trains, now or after a thaw, it gets a tenth of the head's rate: --backbone-lr-scale. Other
    # optimizers have defaults of their own.
    if args.lr is None and args.optimizer in ("adam", "adamw"):
        args.lr = 5e-4 if encoder_trains else 3e-3
    fill_defaults(args)
    return args, saved


OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
              "rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad}
# What may end a run between two optimizer steps, so that its state is saved: a stop signal (Ctrl-C, SIGTERM), the end
# of another process.
INTERRUPTIONS = (ending.Stopped, distributed.ProcessError)


def train(args, saved, stop):
    """args: the options; of a resumed run the saved ones, as the command line has changed them. saved: its checkpoint,
    else None. stop: the stop signals.
    """
    # ---- 2 device and processes --------------------------------------------------------------------------------------
    # torchrun starts one process for each GPU; without it, this is number 0 of 1.
    rank, processes = distributed.ranks()
    # Under torchrun each process takes a GPU of its own, cuda:0, cuda:1 and so on, or all take the CPU.
    # --deterministic: from here on, every operation gives the same bits in every run.
    device = pick_device(args.device, args.deterministic)
    # In a single process, "cuda" without a number means all GPUs: section 9 uses DataParallel.
    gpus = torch.cuda.device_count() if device == torch.device("cuda") else 1
    # For the new head's weights and for dropout.
    torch.manual_seed(args.seed)

    # disable=None: a progress bar only where stderr is a terminal. The first process alone has a bar and a stdout: what
    # the others print() is dropped.
    progress_bar = partial(tqdm, leave=False, disable=None if rank == 0 else True)

    # ---- 3 data ------------------------------------------------------------------------------------------------------
    # .classes: the tags "O", "B-person", "I-person" and so on; .splits["train"]: sentences, each with .words and .tags.
    # All schemes are read; B begins each entity here (IOB2).
    corpus = words.gather(args.data, args.val_split)
    classes = corpus.classes
    fingerprint = words.fingerprint(corpus)
    # A resumed run needs the sentences that it began with.
    if saved:
        text.refuse_others(fingerprint, saved["data"], args.data, args.resume)
    print(words.describe(corpus))

    # A network of transformers, as a dict: "config" (the text of config.json), "tokenizer" (its files), "state_dict"
    # (the weights), "source" (the name). One process downloads it for all. A checkpoint holds all but the weights as
    # "build".
    if saved:
        pretrained = saved["build"]
    else:
        pretrained = text.load_pretrained(args.model, args.weights) if rank == 0 else None
        pretrained = distributed.broadcast(pretrained)
    # Cuts a word into pieces (tokens) and gives each its number. Some words, such as a lone mark of direction, have
    # none.
    tokenizer = text.make_tokenizer(pretrained, of_words=True)
    config = text.make_config(pretrained, classes, tokenizer)
    max_length = text.pick_max_length(args.max_length, config, tokenizer)
    # All are cut here, once, into windows: a sentence, or parts of a long one that overlap. Each word is read in one of
    # them, where it has the most context.
    windows_of = partial(words.WordList, classes=classes, tokenizer=tokenizer, max_length=max_length)
    train_windows, val_windows = windows_of(corpus.splits["train"]), windows_of(corpus.splits["val"])
    # Of the words that are read: those without a piece are not.
    train_labels = train_windows.labels()[train_windows.numbers]
    for note in words.describe_pieces(train_windows, "train", max_length):
        print(note)
    # A batch is padded when it is put together. It is a dict of tensors (N, T), T being the pieces of its longest
    # window: "input_ids", "attention_mask" (1: a piece, 0: padding) and "first", True at the first piece of each word
    # that is read there. Its labels are those of these words (W,), from window to window.
    to_input = partial(text.to_input, device=device)

    # The batch sampler. Seed, epoch and step size decide which windows make up which batch, so a resumed run goes on
    # with the next one. A batch has --batch-size windows in each process; pad: at the end of an epoch, a process for
    # which none are left gets some that count 0, so that all processes make the same number of steps. ByLength: a batch
    # holds windows of about the same length, so that little of it is padding. With --freeze backbone the same windows
    # stay together in every epoch, also after a thaw: what a frozen encoder makes of a word depends, in its last bits,
    # on how far its window is padded, and cached features are to be those of every epoch.
    regroup = args.freeze != "backbone"
    by_length = text.ByLength(train_windows.lengths, args.seed, args.accumulate, regroup)
    order = data.SeededBatches(len(train_windows), args.batch_size, args.seed, shuffle=True,
                               rank=rank, processes=processes, pad=True, arrange=by_length)
    on_gpu = device.type == "cuda"
    train_loader = data.make_loader(train_windows, order, args.workers, on_gpu, train_windows.collate)
    steps_per_epoch = order.steps_per_epoch(args.accumulate)
    # For evaluation, sorted by length; its batches hold the numbers of the words and not labels, which are looked up by
    # them.
    eval_loader = partial(loader_of, batch_size=args.batch_size, workers=args.workers, rank=rank, processes=processes)
    val_loader = eval_loader(val_windows)
    val_labels = val_windows.labels().to(device)
    for note in words.describe_pieces(val_windows, "val", max_length):
        print(note)

    # ---- 4 model and head --------------------------------------------------------------------------------------------
    # As AutoModelForTokenClassification.from_config builds it: an encoder and a head, with random weights so far.
    # (load_weights, below, brings the pretrained ones; those of a resumed run come in section 8.) WordClassifier runs
    # the same layers, but its head sees the first piece of each word alone: hidden[first], (W, H) out of (N, T, H).
    model = words.WordClassifier(text.make_network(config, pretrained["source"], of_words=True))

    # The head is the last layer, "classifier". The one that is there has random weights, too; it is replaced all the
    # same, so that you see where your own goes: any nn.Module from (W, in_features) to (W, classes).
    head = text.find_head(model)
    old_head = model.get_submodule(head)
    new_head = nn.Linear(old_head.in_features, len(classes), bias=old_head.bias is not None)
    model.set_submodule(head, new_head)
    # The dropout before the head.
    if args.dropout is not None:
        text.set_dropout(model, args.dropout)

    if saved:
        fresh = saved["fresh"]
    else:
        # If the file's own head knows the same tags, it is loaded, too.
        same_classes = text.same_head(pretrained, classes)
        # load_state_dict; but where weights of the encoder are missing, that is an error: it would learn from noise.
        said, fresh = text.load_weights(model, pretrained, head, same_classes)
        print(f"weights: {pretrained['source']}; {said}")
    # Layers for which the file had no weights are as new as the head: they train with it, at its rate, and are never
    # frozen.
    heads = (head, *fresh)
    # They are in the model now.
    pretrained.pop("state_dict", None)
    # From here on each process draws random numbers of its own: the new head is the same in all, dropout is not.
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
    if args.l2_sp:
        # The encoder is pulled back to its start and not to zero; the head keeps its weight decay.
        for group in groups:
            if group["layer"] not in heads:
                group["weight_decay"] = 0.0
    # What follows the encoder, as a module with the same layers: it trains on what --cache-features has stored.
    head_side = words.HeadSide(model)
    if args.cache_features:
        features.refuse_a_backbone_that_trains(model, heads, head_side)

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

    if args.weights == "none" and args.freeze != "none":
        print("warning: --freeze with --weights none keeps random layers as they are; they learn nothing")
    model.to(device)

    # ---- 6 loss ------------------------------------------------------------------------------------------------------
    # How much a word of each class counts: a tensor (C,), or None. (A class that train lacks, such as the I of a type
    # whose entities have one word there, counts as if it were there once.)
    counts = train_labels.bincount(minlength=len(classes))
    weight = losses.class_weights(args.class_weights, classes, counts.clamp(min=1).tolist(), device)
    if weight is not None and args.class_weight_mean == "weighted":
        # Their mean over the words of train is 1: they shift the balance between classes, not the gradient's size.
        weight = weight / weight[train_labels.to(device)].mean()
    if args.loss == "focal":
        criterion = losses.Focal(args.focal_gamma, weight, "plain", args.label_smoothing)
    else:
        criterion = partial(mean_cross_entropy, weight=weight, label_smoothing=args.label_smoothing)
    # Your own loss: put it here, as `criterion`. Any function or nn.Module that takes logits (W, C) in float32 and
    # labels (W,) in int64 and returns a scalar, their mean over the words. Validation calls it once for the whole
    # split. The next line refuses --class-weights and --label-smoothing if it has no `weight` or `label_smoothing`, as
    # an attribute or an argument of functools.partial.
    losses.refuse_unused(criterion, weight, args.label_smoothing)
    # A module is moved to the device. If it has parameters of its own, they train at the head's rate and are saved.
    loss_parameters = losses.own_parameters(criterion, device)
    if loss_parameters:
        groups.append({"layer": "loss", "params": loss_parameters, "lr": args.lr,
                       "peak_lr": args.lr, "weight_decay": 0.0})

    # How many words a window has on average: section 10 divides by it, where batches differ in their words.
    words_per_window = len(train_labels) / len(train_windows)

    # L2-SP: where the encoder's weights began, {name: tensor}.
    anchor = {}
    if args.l2_sp and saved:
        anchor = losses.moved(saved["anchor"], device)
    elif args.l2_sp:
        anchor = losses.anchor_of(model, heads)

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
        done = (step - warmup_steps) / max(1, args.epochs * steps_per_epoch - warmup_steps)
        if args.schedule == "cosine":  # down to zero (Loshchilov and Hutter, "SGDR", 2017)
            return 0.5 * (1 + math.cos(math.pi * done))
        if args.schedule == "linear":  # as most who fine-tune a BERT
            return 1 - done
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
    # The sums of the running epoch: over words (with their number, "words") and over steps. They stay on the device
    # until they are read.
    meter = metrics.Meter(["loss", "hits"], ["norm", "skipped_steps"], unit="words")
    # What training changes: each has state_dict() and load_state_dict().
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    if loss_parameters:
        parts["criterion"] = criterion
    # What it does not change: the name of the script, which --resume looks at, the options, with all thaws, past and
    # to come, and what predict_text.py needs to build the network and its tokenizer.
    options = vars(args) | {"data": os.path.abspath(args.data), "unfreeze": freeze.thaw_specs(thaws)}
    build = {name: pretrained[name] for name in ("config", "tokenizer", "source")}
    about = {"script": "train_token_classifier", "options": options, "data": fingerprint,
             "build": build, "classes": classes, "loss": losses.name_of(criterion),
             "head": head, "fresh": fresh, "pool": "words", "max_length": max_length,
             "precision": precision, "device": device.type, "anchor": anchor}
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

    # ---- 10 the loop -------------------------------------------------------------------------------------------------
    where = f"{device} x {gpus}" if gpus > 1 else device
    print(f"\n{pretrained['source']}, {where}, precision {precision} ({reason})")
    per_step = args.batch_size * processes * args.accumulate
    print(f"{per_step} sentences per step: batch size x {processes} x --accumulate")
    print(f"{freeze.group_table(model, heads, optimizer.param_groups)}\n")
    if args.find_lr:
        trial = trial_losses(model, whole, train_loader, order, criterion, autocast, to_input)
        find_lr(model, trial, optimizer, scaler, args.lr, run.folder)
        return
    if progress.epoch >= args.epochs:
        print(f"all {progress.epoch} epochs are done; to train longer, give more --epochs")

    # The batches of a loader for evaluation: a stop signal ends them.
    batches_of = partial(read_batches, stop=stop)
    # --cache-features 1: as long as the encoder is frozen, each sentence goes through it once. A file is used again
    # only if all that affects its rounding is the same.
    depends_on = checkpoint.machine(), precision, args.batch_size, processes, words.WordClassifier, words.HeadSide
    cache = features.Cache(run.folder, args.cache_features, model, heads, train_loader, val_loader,
                           batches_of, to_input, autocast, progress_bar, depends_on, head_side)
    # The line for each epoch, and TensorBoard, where rows of an earlier run from first_epoch on are hidden.
    log = report.Log(run.folder, args.tensorboard and rank == 0, first_epoch=progress.epoch)
    shown = ["train_loss", "val_loss", "val_precision", "val_recall", "val_f1", args.monitor]
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

        # INTERRUPTIONS: a stop signal, the end of another process. In this block they arise between two optimizer steps
        # alone: the state is saved, then the exception goes on its way.
        with run.saved_if_interrupted(*INTERRUPTIONS):
            # The whole network on windows; or, as long as the encoder is frozen and cached, its head on features.
            network, train_source, val_source = cache.route(whole, epoch)

            # The second half of freezing: eval() for each module of which nothing trains, with all inside it. In
            # train() mode its dropout would be on.
            model.train()
            for part in freeze.frozen_parts(model):
                part.eval()
            # DDP averages the gradients of the processes. It asks what trains when it is made, so it is made after
            # any thaw.
            replica = nn.parallel.DistributedDataParallel(network) if processes > 1 else network

            # One turn of the loop is one optimizer step. It gets a list of --accumulate batches, already read, and the
            # number of their windows in all processes. A batch has x, y and `samples`: how many of its windows count (0
            # of those that only fill up). in_step: a step begins when all processes have read theirs; an error in one
            # ends all. A resumed run goes on with the first batch that it has not seen.
            steps_done = progress.step - epoch * steps_per_epoch
            order.set_epoch(epoch, start=steps_done * args.accumulate)
            steps = distributed.in_step(data.steps(train_source, order, args.accumulate))
            bar = progress_bar(steps, f"epoch {epoch}", steps_per_epoch, initial=steps_done)
            for batches, step_windows in bar:
                for batch in batches:
                    x = to_input(batch.x)
                    y = batch.y.to(device, non_blocking=True)
                    if processes > 1:
                        # What no_sync() does: the gradients are averaged once a step, in its last backward().
                        replica.require_backward_grad_sync = batch is batches[-1]
                    with autocast:
                        # It holds no labels, so the network returns logits and no loss of its own.
                        outputs = replica(**x)
                    # In float32, out of autocast's reach.
                    logits = outputs.logits.float()
                    loss = criterion(logits, y)

                    # The loss is the mean over the batch's words, and counts for as many as these are; for 0 in windows
                    # that only fill up.
                    counted = len(y) if batch.samples else 0
                    meter.add("words", counted)
                    meter.add("loss", loss.detach() * counted)
                    meter.add("hits", metrics.correct(logits, y).sum() * (counted > 0))

                    # The sum over the step's words, divided by the words that its windows have on average. (Divided
                    # by those that they have, a word would count more in a step of short sentences, and several
                    # processes would need each other's numbers.) DDP averages over the processes: times their number,
                    # that is a sum.
                    share = processes * counted / (words_per_window * step_windows)
                    scaler.scale(loss * share).backward()

                # Penalties: not in train_loss, and once a step, so with a backward() of their own. DDP has averaged
                # the gradients already; these are the same in all processes.
                if args.l1:
                    # Of all matrices that train, embeddings too: no biases, no norm layers.
                    weights = [w for w in freeze.decaying_weights(model) if w.requires_grad]
                    l1 = torch.stack([w.float().abs().sum() for w in weights]).sum()
                    scaler.scale(args.l1 * l1).backward()
                if args.l2_sp:
                    scaler.scale(args.l2_sp * losses.l2_sp_penalty(model, anchor)).backward()
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

            outputs, numbers = evaluate(network, batches_of(val_source), autocast, to_input, device)
            labels = val_labels[numbers]

        # A metric of your own, from logits (W, C) and labels (W,), or the predicted tags of each sentence: add it to
        # these scores, before the broadcast, as scores["val_kappa"] = ... A higher one is better, unless its name
        # speaks of a loss, cost or error (mae, mse). To choose best.pt by it, put its name into the list that section 1
        # hands to add_training_options. All processes take the first one's scores.
        with torch.no_grad():
            scores = {"val_loss": criterion(outputs, labels).item()}
        # Precision, recall and F1 of whole entities; a word without a piece has the tag O.
        predicted = words.predicted_tags(outputs, numbers, corpus.splits["val"], classes)
        for name, value in words.scores(words.count(corpus.splits["val"], predicted)).items():
            scores[f"val_{name}"] = value
        scores["val_accuracy"], _ = words.word_accuracy(corpus.splits["val"], predicted)
        scores = distributed.broadcast(metrics.as_numbers(scores))
        run.check_finite(scores["val_loss"], f"validation loss of epoch {epoch}")
        row = {"epoch": epoch, "train_loss": meter.mean("loss"), "train_accuracy": meter.mean("hits"), **scores}
        # lr, grad_norm, loss_scale, skipped_steps, seconds, words_per_second.
        row |= meter.columns(optimizer, scaler, steps_per_epoch)
        progress.history.append(row)

        # What "best" means: the highest score so far, or the lowest of a loss. NaN is worse than any number. Of equal
        # scores, such as those on few entities, the one with the lower val_loss is the best; but that is no gain,
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

    # The end: best.pt, once, on the test split, by which nothing was chosen (without one: on val, which chose
    # best.pt).
    best_weights, best_row = run.load_best()
    print(f"\nbest.pt: epoch {best_row['epoch']}, {args.monitor} {best_row[args.monitor]:.4f}")
    if not args.no_test:
        model.load_state_dict(best_weights)
        split = "test" if "test" in corpus.splits else "val"
        windows = windows_of(corpus.splits[split])
        # Without autocast, so in float32, as predict_text.py does.
        outputs, numbers = evaluate(whole, batches_of(eval_loader(windows)), nullcontext(), to_input, device)
        for note in words.describe_pieces(windows, split, max_length):
            print(note)
        test(outputs, numbers, corpus.splits[split], classes, split, run.folder)
    # The summary, and the report, unless --no-report.
    if rank == 0:
        print(report.sum_up(run.folder, progress.history, args.monitor, not args.no_report))


def mean_cross_entropy(logits, labels, weight, label_smoothing):
    """The losses of the words, times their weights, divided by their number and not by the sum of their weights."""
    per_word = nn.functional.cross_entropy(logits, labels, weight, label_smoothing=label_smoothing, reduction="none")
    return per_word.mean()


def loader_of(windows, batch_size, workers, rank, processes):
    """The windows of a split for evaluation, the longest first. Their labels are the numbers of their words."""
    found = windows.numbered()
    longest_first = text.LongestFirst(found.lengths)
    order = data.SeededBatches(len(found), batch_size, rank=rank, processes=processes, arrange=longest_first)
    return data.make_loader(found, order, workers, collate_fn=found.collate)


def read_batches(loader, at_least=0, stop=None):
    """The batches of a split, of which each process reads its share at its own pace; a stop signal ends them."""
    return distributed.at_own_pace(data.batches(loader, at_least), stop, ending.leave_if_asked)


@torch.inference_mode()
def evaluate(network, batches, autocast, to_input, device):
    """The network's outputs (W, C) for a split in float32, and the numbers (W,) of its words."""
    network.eval()
    found = []
    for x, numbers in batches:
        with autocast:
            outputs = network(**to_input(x))
        found.append((outputs.logits.float(), numbers))
    # Of all processes: they come by way of the CPU.
    outputs, numbers = distributed.all_gather_batches(found)
    return outputs.to(device), numbers


def test(outputs, numbers, sentences, classes, split, folder):
    """Print the scores of a split, and write its entities into the folder. outputs: those of the network (W, C) for the
    words of these numbers (W,).
    """
    predicted = words.predicted_tags(outputs, numbers, sentences, classes)
    probabilities = torch.ones(sum(len(sentence.words) for sentence in sentences))
    probabilities[numbers] = outputs.softmax(1).amax(1).cpu()
    rank, _ = distributed.ranks()
    rows = words.prediction_rows(sentences, predicted, probabilities)
    if rank == 0 and rows:
        checkpoint.write_csv(rows, folder / f"{split}_predictions.csv")
    if split != "test":
        print(f"on {split}, which chose best.pt: expect a little less on others")
    print(words.report(sentences, predicted))
    print(f"{split}: {words.describe_scores(words.count(sentences, predicted))}")


def trial_losses(model, network, loader, order, criterion, autocast, to_input):
    """For --find-lr: the loss of one batch after another, without end. lr_finder makes an optimizer step with each."""
    # train(), and eval() for what is frozen, as in section 10.
    freeze.train_mode(model)
    for epoch in itertools.count():
        order.set_epoch(epoch)
        for x, y in data.batches(loader):
            x = to_input(x)
            with autocast:
                outputs = network(**x)
            yield criterion(outputs.logits.float(), y.to(outputs.logits.device))


def find_lr(model, trial, optimizer, scaler, lr, folder):
    """--find-lr: raise the rate from step to step, see where the loss falls and breaks. The weights are put back."""
    rates, values = lr_finder.range_test(model, trial, optimizer, scaler, lr)
    rate, rule = lr_finder.suggest(rates, values)
    report.draw_range_test(rates, values, lr_finder.smooth(values), rate, folder / "find_lr.png")
    print(f"suggested: --lr {rate:.1e} ({rule}); the curve is in {folder / 'find_lr.png'}")


def list_layers(args):
    """--list-layers: the table that section 10 prints, for a linear head."""
    pretrained = text.load_pretrained(args.model, args.weights)
    classes = words.gather(args.data, args.val_split).classes if args.data else ["O", "B", "I"]
    config = text.make_config(pretrained, classes)
    model = words.WordClassifier(text.make_network(config, pretrained["source"], of_words=True))
    head = text.find_head(model)
    _, fresh = text.load_weights(model, pretrained, head)
    rates = args.lr, args.weight_decay, args.backbone_lr_scale, args.layer_decay
    print(freeze.describe_plan(model, (head, *fresh), args.freeze, args.unfreeze, args.epochs, *rates))


def main(argv=None):
    with ending.tidy(checkpoint.CheckpointError, data.DataError, distributed.ProcessError, features.FeaturesError,
                     freeze.FreezeError, losses.LossError, lr_finder.RangeTestError, ModelError,
                     report.ReportError, text.TextError, words.WordError) as stop, distributed.joined(stop):
        args, saved = distributed.from_main(read_arguments, argv)
        if args.list_layers:
            list_layers(args)
        else:
            train(args, saved, stop)


if __name__ == "__main__":
    main()
