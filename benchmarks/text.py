"""Sentences: train_text_classifier.py beside a plain loop, whole commands; and how many sentences a classifier needs.

    python benchmarks/text.py --data reviews.csv --model ./minilm
    python benchmarks/text.py --data reviews.csv --model ./minilm --limit 500 --repeats 1      # a quick try
    python benchmarks/text.py --data reviews.csv --model ./minilm --accuracy --seeds 5         # of 100 and 1,000
    python benchmarks/text.py --data reviews.csv --model ./minilm --plain --epochs 1 [--frozen]    # the plain loop

--data is a CSV file with the columns text, label and split; --model the folder of a BERT, or its name on the hub.

The plain loop does what transformers' example for text classification without its Trainer does
(run_glue_no_trainer.py): AutoModelForSequenceClassification with its own head, AdamW with one rate that falls linearly
to zero, shuffled batches that are padded to their longest text, float32, the validation split after each epoch. To
freeze the encoder it sets requires_grad = False, and each text goes through it in every epoch. Its rates are 5e-5, the
default there, and 1e-3 for a head alone. Both sides have batches of 32 and end with the accuracy on the test split: the
plain loop's after its last epoch, ours of best.pt. Ours writes no report. They run in turn, --repeats times, and the
ratios are taken within each round.

--accuracy: for each count and seed, so many training sentences are drawn by the seed, as many of each class, and a
quarter as many for validation; the test split is whole. Ours alone.
"""

import argparse
import csv
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from strategies import accuracy_of, on_what, run, this_machine

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402

JOBS = {
    "everything, one epoch": {"ours": "--epochs 1", "plain": "--epochs 1"},
    "a frozen encoder, ten epochs": {
        "ours": "--epochs 10 --freeze backbone --pool mean --cache-features 1", "plain": "--epochs 10 --frozen"},
}
WAYS = {
    "head only, on the mean": "--freeze backbone --pool mean --cache-features 1 --epochs 20",
    "everything": "--epochs 10",
}

# ---- the plain loop


def plain(args, rows):
    """Train; returns the accuracy on the test split."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classes = sorted({row["label"] for row in rows})
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(classes))
    model.to(device)
    if args.frozen:
        for parameter in model.base_model.parameters():
            parameter.requires_grad = False

    def loader_of(split, shuffle=False):
        some = [row for row in rows if row["split"] == split]
        pieces = tokenizer([row["text"] for row in some], truncation=True, max_length=128, padding=False)
        items = [{name: values[i] for name, values in pieces.items()} | {"labels": classes.index(row["label"])}
                 for i, row in enumerate(some)]
        return torch.utils.data.DataLoader(items, batch_size=32, shuffle=shuffle, collate_fn=padded)

    def padded(items):
        return tokenizer.pad(items, return_tensors="pt")

    def accuracy(loader):
        model.eval()
        right = 0
        for batch in loader:
            batch = batch.to(device)
            with torch.no_grad():
                outputs = model(**batch)
            right += (outputs.logits.argmax(1) == batch["labels"]).sum().item()
        return right / len(loader.dataset)

    train, val, test = loader_of("train", shuffle=True), loader_of("val"), loader_of("test")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if args.frozen else 5e-5, weight_decay=0.0)
    steps = args.epochs * len(train)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for epoch in range(args.epochs):
        model.train()
        for batch in train:
            loss = model(**batch.to(device)).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        print(f"epoch {epoch}: val accuracy {accuracy(val):.4f}", flush=True)
    return accuracy(test)


# ---- how long whole commands take


def run_ours(options, data, model, output):
    """Run train_text_classifier.py: (the test accuracy, seconds)."""
    command = ["train_text_classifier.py", "--data", str(data), "--model", model, "--no-report", *shlex.split(options)]
    rows, seconds = run(command, output)
    return accuracy_of(rows)[0], seconds


def run_plain(options, data, model, output):
    """As `run_ours`, of the plain loop, which writes nothing."""
    command = [sys.executable, __file__, "--plain", "--data", str(data), "--model", model, *shlex.split(options)]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - started
    return float(done.stdout.split()[-1]), seconds


SIDES = {"ours": run_ours, "plain": run_plain}


def compare(args, data, output):
    """Run both sides and print the table."""
    jobs = {job: options for job, options in JOBS.items() if args.job in job}
    found = {(job, side): [] for job in jobs for side in SIDES}
    for number in range(args.repeats):
        for job, options in jobs.items():
            # The one that comes first in this round comes second in the next.
            for side in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
                accuracy, seconds = SIDES[side](f"{options[side]} --seed {number}", data, args.model, output)
                found[job, side].append((accuracy, seconds))
                print(f"round {number + 1}: {job}, {side}: {accuracy:.4f}, {seconds:.1f} s", file=sys.stderr)
    precision = checkpoint.load(output / "best.pt", "train_text_classifier")["precision"]
    print(f"{this_machine('transformers')}; ours trains in {'float32' if precision == 'off' else precision}, the plain "
          "loop in float32\n")
    print("| job | side | seconds, median | lowest to highest | times ours | test accuracy, mean | lowest to highest |")
    print("|---|---|---|---|---|---|---|")
    for (job, side), results in found.items():
        accuracies, seconds = zip(*results, strict=True)
        ratio = statistics.median(b / a for (_, b), (_, a) in zip(results, found[job, "ours"], strict=True))
        print(f"| {job} | {side} | {statistics.median(seconds):.1f} | {min(seconds):.1f} to {max(seconds):.1f} | "
              f"{ratio:.2f} | {statistics.mean(accuracies):.3f} | {min(accuracies):.3f} to {max(accuracies):.3f} |")


# ---- how many sentences it takes


def draw(rows, count, seed):
    """`count` rows of train and a quarter as many of val, as many of each class, drawn by the seed; all of test."""
    rng, drawn = random.Random(seed), [row for row in rows if row["split"] == "test"]
    classes = sorted({row["label"] for row in rows})
    for split, number in (("train", count), ("val", count // 4)):
        for label in classes:
            some = [row for row in rows if (row["split"], row["label"]) == (split, label)]
            if len(some) < number // len(classes):
                sys.exit(f"{split} has {len(some)} sentences of the class {label}: give lower --counts")
            drawn += rng.sample(some, number // len(classes))
    return drawn


def count_sentences(args, rows, data, output):
    """Run ours on so many sentences, and print the table of accuracies."""
    ways = {options: options for options in args.rows} if args.rows else WAYS
    counts = [int(count) for count in args.counts.split(",")]
    found = {(way, count): [] for way in ways for count in counts}
    for seed in range(args.seeds):
        for count in counts:
            checkpoint.write_csv(draw(rows, count, seed), data)
            for way, options in ways.items():
                accuracy, seconds = run_ours(f"{options} --seed {seed}", data, args.model, output)
                found[way, count].append(accuracy)
                print(f"seed {seed}: {count} sentences, {options}: {accuracy:.4f}, {seconds:.1f} s", file=sys.stderr)
    tested = sum(row["split"] == "test" for row in rows)
    print(on_what(args.seeds, tested, "sentences", "transformers"))
    print(f"| training sentences | {' | '.join(f'{count:,}' for count in counts)} |\n|---|{'---|' * len(counts)}")
    for way in ways:
        cells = [f"{statistics.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in (found[way, c] for c in counts)]
        print(f"| {way} | {' | '.join(cells)} |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FILE", help="a CSV file with the columns text, label, split")
    parser.add_argument("--model", required=True, metavar="DIR", help="as in train_text_classifier.py")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N training sentences (default: all)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="(default %(default)s)")
    parser.add_argument("--job", choices=["everything", "frozen"], default="", help="(default: both)")
    parser.add_argument("--accuracy", action="store_true", help="how many sentences it takes, and not how long")
    parser.add_argument("--counts", default="100,1000", metavar="N,...", help="with --accuracy (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="with --accuracy (default %(default)s)")
    parser.add_argument("--rows", nargs="+", metavar="OPTIONS",
                        help="with --accuracy: a row for each of these options of the script, in place of the two ways")
    parser.add_argument("--plain", action="store_true", help="the plain loop alone")
    parser.add_argument("--epochs", type=int, default=1, metavar="N", help="with --plain (default %(default)s)")
    parser.add_argument("--frozen", action="store_true", help="with --plain: train the new head alone")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="with --plain (default %(default)s)")
    args = parser.parse_args(argv)
    with open(args.data, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if args.limit:
        first = [row for row in rows if row["split"] == "train"][: args.limit]
        rows = first + [row for row in rows if row["split"] != "train"]
    if args.plain:
        print(f"plain: {args.epochs} epochs, test accuracy {plain(args, rows):.4f}")
        return
    with tempfile.TemporaryDirectory(prefix="text-") as temporary:
        data, output = Path(temporary, "texts.csv"), Path(temporary, "run")
        if args.accuracy:
            count_sentences(args, rows, data, output)
        else:
            checkpoint.write_csv(rows, data)
            compare(args, data, output)


if __name__ == "__main__":
    main()
