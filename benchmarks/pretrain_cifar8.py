"""Make stand-in pretrained weights where ImageNet's cannot be downloaded: a ResNet-18 from eight classes of CIFAR-10.

    python benchmarks/pretrain_cifar8.py --cifar ./cifar --out resnet18-cifar8-64px.pth      # torchvision downloads 170 MB
    python benchmarks/pretrain_cifar8.py --cifar ./cifar --thumbnails ./thumbnails           # the other two classes, as files

The eight classes are all but cat and dog, so that a cats-and-dogs task is new to the network. 40,000 thumbnails,
enlarged from 32 to 64 pixels; shifts by up to 4 pixels and flips; SGD with Nesterov momentum 0.9, weight decay 5e-4,
batch 128, one cycle up to a rate of 0.2 (Smith, "Super-Convergence", 2018), label smoothing 0.05, bf16 where asked.
Writes a float16 state_dict of torchvision's resnet18 with num_classes=8. On two CPU cores an epoch takes some minutes.
"""

import argparse
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision.transforms import v2

NEW_TASK = ("cat", "dog")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def load_split(folder, train, download):
    """(uint8 (N, 3, 32, 32), int64 (N,), class names) of CIFAR-10 without the classes of the new task."""
    cifar = torchvision.datasets.CIFAR10(folder, train=train, download=download)
    kept = [i for i, name in enumerate(cifar.classes) if name not in NEW_TASK]
    renumber = torch.full((len(cifar.classes),), -1)
    renumber[kept] = torch.arange(len(kept))
    labels = renumber[torch.tensor(cifar.targets)]
    pictures = torch.from_numpy(cifar.data).permute(0, 3, 1, 2)
    return pictures[labels >= 0], labels[labels >= 0], [cifar.classes[i] for i in kept]


def write_thumbnails(cifar, folder, download):
    """Write the first 200 training and 100 test thumbnails of each class of the new task as PNG files."""
    for split, count in (("train", 200), ("test", 100)):
        found = torchvision.datasets.CIFAR10(cifar, train=split == "train", download=download)
        for name in NEW_TASK:
            place = Path(folder, split, name)
            place.mkdir(parents=True, exist_ok=True)
            numbers = [i for i, label in enumerate(found.targets) if found.classes[label] == name]
            for i in numbers[:count]:
                v2.functional.to_pil_image(found.data[i]).save(place / f"{i:05}.png")


def to_input(pictures, device):
    """Enlarge uint8 (N, 3, 32, 32) to normalized float32 (N, 3, 64, 64)."""
    x = v2.functional.resize(pictures.to(device), [64, 64], antialias=True).float() / 255
    return v2.functional.normalize(x, MEAN, STD).contiguous(memory_format=torch.channels_last)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", default="./cifar", metavar="DIR", help="where CIFAR-10 is or goes (default %(default)s)")
    parser.add_argument("--out", default="resnet18-cifar8-64px.pth", metavar="FILE", help="(default %(default)s)")
    parser.add_argument("--thumbnails", metavar="DIR", help="do not train: write cats and dogs there")
    parser.add_argument("--epochs", type=int, default=14, help="(default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="(default %(default)s)")
    parser.add_argument("--no-download", action="store_true", help="CIFAR-10 is there already")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast: twice as fast where the CPU or GPU has bf16")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    args = parser.parse_args(argv)
    if args.thumbnails:
        write_thumbnails(args.cifar, args.thumbnails, download=not args.no_download)
        return

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x_train, y_train, classes = load_split(args.cifar, train=True, download=not args.no_download)
    x_test, y_test, _ = load_split(args.cifar, train=False, download=not args.no_download)
    print(f"{len(x_train)} training and {len(x_test)} test thumbnails of {', '.join(classes)}")

    model = torchvision.models.resnet18(num_classes=len(classes)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = args.epochs * (len(x_train) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=steps)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
    augment = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])

    for epoch in range(args.epochs):
        model.train()
        order = torch.randperm(len(x_train))[: len(x_train) // args.batch_size * args.batch_size]
        for batch in order.split(args.batch_size):
            pictures = torch.stack([augment(picture) for picture in x_train[batch]])
            with torch.amp.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                loss = criterion(model(to_input(pictures, device)).float(), y_train[batch].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.inference_mode():
            guesses = torch.cat([model(to_input(part, device)).argmax(1).cpu() for part in x_test.split(256)])
        print(f"epoch {epoch}: test accuracy {(guesses == y_test).double().mean():.4f}", flush=True)

    torch.save({k: v.half() if v.is_floating_point() else v for k, v in model.cpu().state_dict().items()}, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
