"""Which network? Size, published accuracy, and speed on this machine, side by side.

    python benchmarks/which_model.py                                    # a choice of fifteen, about a quarter of an hour
    python benchmarks/which_model.py --models resnet18,resnet50 --rounds 5

ms per image: one image of 224 x 224 pixels at a time, in float32, as predict.py does. Training images/s: batches of 32 in
memory (no decoding), everything trained or the head alone (`--freeze backbone`), in the precision of `--amp auto`, SGD.
The networks are interleaved in several rounds; the medians are shown, and the widest spread between rounds. ImageNet
accuracy is what torchvision publishes for the default weights, at their own image size.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402
import freeze  # noqa: E402
import model as models  # noqa: E402

CHOICE = ("squeezenet1_1,mobilenet_v3_small,shufflenet_v2_x1_0,mobilenet_v3_large,resnet18,regnet_y_400mf,efficientnet_b0,"
          "densenet121,resnet50,efficientnet_v2_s,swin_t,convnext_tiny,vit_b_32,vit_b_16,vgg16")


def seconds(function, device, least):
    """The median time of one call, of as many calls as fit into `least` seconds, two at least; one call goes before."""
    times = []
    while len(times) < 3 or sum(times) < least:
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def measure(name, device, least, batch=32, size=224, amp="auto"):
    """(ms per image, training images/s with everything, with the head alone)."""
    model = models.build(name, num_classes=2, **models.build_options(name, size)).to(device)
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    y = torch.arange(batch, device=device) % 2

    @torch.inference_mode()
    def predict():
        model(x[:1])

    def step():
        with torch.amp.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            outputs = model(x)
        scaler.scale(nn.functional.cross_entropy(outputs.float(), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    model.eval()
    found = [1000 * seconds(predict, device, least)]
    for spec in ("none", "backbone"):
        freeze.freeze(model, spec, freeze.find_head(model))
        freeze.train_mode(model)
        _, _, amp_dtype = models.pick_precision(amp, model, device)
        scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
        found.append(batch / seconds(step, device, least))
    return found


def compare_precisions(names, device, args):
    """What --amp auto chooses, beside what it could choose: training images/s in float32 and in bf16, in turn."""
    print("| network | everything: `--amp auto` | float32 | bf16 | head alone: `--amp auto` | float32 | bf16 |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        model = models.build(name)
        chosen = [models.auto_precision(model.requires_grad_(trains), device)[0] for trains in (True, False)]
        rounds = [[measure(name, device, args.seconds, args.batch_size, amp=amp)[1:] for amp in ("off", "bf16")]
                  for _ in range(args.rounds)]
        cells = [[one[precision][what] for one in rounds] for what in (0, 1) for precision in (0, 1)]
        cells = [f"{statistics.median(c):.1f} ({min(c):.1f} to {max(c):.1f})" for c in cells]
        print(f"| `{name}` | {' | '.join([chosen[0], *cells[:2], chosen[1], *cells[2:]])} |", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=CHOICE, metavar="A,B", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="per measurement (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="of training (default %(default)s)")
    parser.add_argument("--precisions", action="store_true", help="compare float32 and bf16 instead")
    args = parser.parse_args(argv)
    device = models.pick_device()
    if args.precisions:
        compare_precisions(args.models.split(","), device, args)
        return
    found = {name: [] for name in args.models.split(",")}
    for _ in range(args.rounds):
        for name, rounds in found.items():
            rounds.append(measure(name, device, args.seconds, args.batch_size))
            print(name, *(f"{v:.1f}" for v in rounds[-1]), file=sys.stderr, flush=True)

    print("| network | parameters | ImageNet accuracy | ms per image | training images/s, everything | head alone |")
    print("|---|---|---|---|---|---|")
    spread = 0.0
    for name, rounds in found.items():
        columns = list(zip(*rounds, strict=True))
        spread = max([spread, *(max(c) / min(c) - 1 for c in columns)])
        latency, everything, head = map(statistics.median, columns)
        meta = torchvision.models.get_model_weights(name).DEFAULT.meta
        print(f"| `{name}` | {meta['num_params'] / 1e6:.1f} M | {meta['_metrics']['ImageNet-1K']['acc@1']:.1f} % | "
              f"{latency:.1f} | {everything:.1f} | {head:.1f} |")
    machine = checkpoint.machine()
    print(f"\n{args.rounds} rounds, widest spread {100 * spread:.0f} %; {machine['cpu']}, {machine['threads']} threads; torch "
          f"{machine['torch']}, torchvision {torchvision.__version__}, Python {platform.python_version()}"
          f"{', ' + torch.cuda.get_device_name() if torch.cuda.is_available() else ''}")


if __name__ == "__main__":
    main()
