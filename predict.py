"""Use a fine-tuned model: pictures in, classes out.

    python predict.py --checkpoint runs/.../best.pt some.jpg a_folder/ 'more/*.png'
    python predict.py --checkpoint runs/.../best.pt a_folder/ --top-k 3 --csv predictions.csv
    python predict.py --checkpoint runs/.../best.pt cats_and_dogs/test          # subfolders are classes: scores too
    python predict.py --checkpoint runs/.../best.pt --weights-only weights.pth  # the bare state_dict, to use elsewhere

A picture that cannot be read is named and passed over; the exit status is then 1. Any other mistake is one line on
stderr and exit status 2.
"""

import glob
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import data
import metrics
from arguments import make_parser, number
from model import ModelError, pick_device, pick_precision, rebuild


def build_parser():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("pictures", nargs="*", metavar="PICTURES", help="picture files, folders (searched to the bottom) and globs")
    add("--checkpoint", required=True, metavar="FILE", help="best.pt or last.pt of a run of train_classifier.py")
    add("--top-k", type=number(int, 1), default=1, metavar="K", help="show the K likeliest (default %(default)s)")
    add("--csv", metavar="FILE", help="write the predictions there")
    add("--weights-only", metavar="FILE", help="write the bare state_dict there; it loads into plain torchvision")
    add("-b", "--batch-size", type=number(int, 1), default=32, metavar="N", help="(default %(default)s)")
    add("-j", "--workers", type=number(int, 0), default=min(4, os.cpu_count() or 1), metavar="N",
        help="processes that decode pictures (default here %(default)s)")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="off", help="precision (default off: float32)")
    add("--device", default="auto", metavar="D", help="auto (cuda, mps, cpu in that order) or a name")
    return parser


def list_pictures(arguments, classes):
    """[(path, label)]: what files, folders and globs stand for, in the order given, no file twice. Labels are -1; in a
    folder whose pictures all lie below subfolders named like classes they are those. Raises data.DataError.
    """
    found = {}
    for argument in arguments:
        matches = [argument] if os.path.exists(argument) else sorted(glob.glob(argument, recursive=True))
        if not matches:
            raise data.DataError(f"no such picture, folder or glob: {argument}")
        for match in matches:
            if not os.path.isdir(match):  # a dangling link too: it is named when it is decoded
                found.setdefault(match, -1)
                continue
            inside = data.list_folder(match)
            if not inside:
                raise data.DataError(f"{match} holds no pictures")
            # match/cat/x.jpg -> "cat"; match/x.jpg -> "x.jpg", which is no class
            tops = [Path(path).relative_to(match).parts[0] for path in inside]
            labelled = set(tops) <= set(classes)
            for path, top in zip(inside, tops, strict=True):
                found.setdefault(path, classes.index(top) if labelled else -1)
    return list(found.items())


def predict(args):
    state = checkpoint.load(args.checkpoint, script="train_classifier")
    classes, preprocessing = state["classes"], state["preprocessing"]
    if args.weights_only:
        checkpoint.write_weights(state["model"], args.weights_only)
        options = {"num_classes": len(classes)} | state["build"]["options"]
        arguments = ", ".join(f"{name}={value}" for name, value in options.items())
        print(f"wrote {args.weights_only}, a state_dict for torchvision.models.{state['build']['name']}({arguments})")
        print("input: RGB in 0..1, shorter side resized to {resize_size} ({interpolation}), centre {image_size} x "
              "{image_size}, mean {mean}, std {std}".format(**preprocessing))
        print(f"outputs: {', '.join(classes)}")
        if state["hidden"]:
            layers = ", ".join(f"nn.{layer}" for layer in rebuild(state).get_submodule(state["head"]))
            print(f'then model.set_submodule("{state["head"]}", nn.Sequential({layers})), before its weights are loaded')
        if state["build"]["name"].startswith("squeezenet"):
            print("then set model.classifier[2] = torch.nn.Identity(): it was trained without the ReLU behind the head")
        if not args.pictures:
            return 0

    model = rebuild(state)
    device = pick_device(args.device)
    model.to(device, memory_format=torch.channels_last).eval()
    _, _, amp_dtype = pick_precision(args.amp, model, device)

    listed = list_pictures(args.pictures, classes)
    if args.csv:
        checkpoint.refuse_other_files(args.csv)  # now, and not after all the predicting
    size = preprocessing["image_size"]
    transform = data.eval_transform(size, preprocessing["interpolation"], preprocessing["resize_size"])
    # The "label" that the loader hands on is the picture's place in the list, since bad pictures drop out of a batch.
    numbered = [(path, place) for place, (path, _) in enumerate(listed)]
    pictures = data.ImageList(numbered, transform, size=2 * size)
    order = data.SeededBatches(len(listed), args.batch_size)
    workers = args.workers if len(listed) > args.batch_size else 0  # starting processes costs more than one batch
    loader = data.make_loader(pictures, order, workers)

    mean, std = (torch.tensor(preprocessing[k], device=device).view(3, 1, 1) for k in ("mean", "std"))
    probabilities, good, bad = torch.zeros(len(listed), len(classes)), [], []
    with torch.inference_mode():
        for x, places in tqdm(data.batches(loader, bad), "predict", len(order), leave=False, disable=None):
            with torch.amp.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                outputs = model(data.to_input(x, mean, std))
            probabilities[places] = outputs.float().softmax(1).cpu()
            good += places.tolist()

    for path, reason in bad:
        print(" ".join(f"cannot read {path} ({reason}): passed over".splitlines()), file=sys.stderr)
    labels = torch.tensor([label for _, label in listed])
    labelled = bool((labels >= 0).all())
    rows = []
    for place in good:
        values, guesses = probabilities[place].topk(min(args.top_k, len(classes)))
        row = {"file": listed[place][0]} | ({"truth": classes[labels[place]]} if labelled else {})
        for rank, (value, guess) in enumerate(zip(values.tolist(), guesses.tolist(), strict=True), start=1):
            ending = "" if rank == 1 else f"_{rank}"
            row |= {f"prediction{ending}": classes[guess], f"probability{ending}": value}
        rows.append(row)
    if rows:
        cells = [list(rows[0]), *([f"{v:.4f}" if isinstance(v, float) else v for v in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
        if args.csv:
            checkpoint.write_csv(rows, args.csv)
        if labelled:
            confusion = metrics.confusion_matrix(probabilities[good].argmax(1), labels[good], len(classes))
            print(f"\naccuracy {metrics.scores(confusion)['accuracy']:.4f} on {len(good)} pictures")
            print(metrics.report(confusion, classes))
    return 1 if bad else 0


def main(argv=None):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what a terminal cannot show
    parser = build_parser()
    args = parser.parse_args(argv)
    if not (args.pictures or args.weights_only):
        parser.error("name pictures, folders or globs to predict, or --weights-only FILE")
    try:
        status = predict(args)
    except (checkpoint.CheckpointError, data.DataError, ModelError) as error:
        print("error: " + " ".join(str(error).splitlines()), file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
