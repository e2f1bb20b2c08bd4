"""The same job as train_classifier.py's, the way people do it otherwise; speed.py runs these side by side with it.

    python benchmarks/others.py plain --data ./cats_and_dogs --weights resnet18-cifar8-64px.pth --epochs 1 [--frozen [by-hand]]

plain: the loop of the tutorials: torchvision's transforms on PIL pictures, float32, one optimizer. fastai, lightning: a
Learner, a Trainer, with their defaults (float32). timm: its model, its loader and its augmentation in a bare loop, with
what is fastest on a CPU (bfloat16, channels_last, fused AdamW). All of them: ResNet-18 with a new head for the classes,
224 pixels, a random crop (each with its own smallest share) and flip, batches of 32, as many workers, the validation
split after each epoch. timm's loader leaves out the last batch of an epoch where it is not full.
"""

import argparse
import os
import warnings

import torch
import torchvision
from torch import nn
from torchvision import transforms

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def weights_of(file):
    """The state_dict of a file without its head."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    return {k: v.float() for k, v in state.items() if not k.startswith("fc.")}


def resnet18(args, classes, frozen=False):
    model = torchvision.models.resnet18()
    if args.weights:
        model.load_state_dict(weights_of(args.weights), strict=False)
    if frozen:
        for parameter in model.parameters():
            parameter.requires_grad = False
    model.fc = nn.Linear(model.fc.in_features, classes)
    return model


def folders(args):
    """torchvision's ImageFolder over train/ and val/ with the transforms of the tutorials, in DataLoaders."""
    train = transforms.Compose([transforms.RandomResizedCrop(args.size), transforms.RandomHorizontalFlip(),
                                transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    plain = transforms.Compose([transforms.Resize(args.size * 256 // 224), transforms.CenterCrop(args.size),
                                transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    sets = [torchvision.datasets.ImageFolder(os.path.join(args.data, s), t) for s, t in (("train", train), ("val", plain))]
    loaders = [torch.utils.data.DataLoader(d, batch_size=32, shuffle=i == 0, num_workers=args.workers)
               for i, d in enumerate(sets)]
    return loaders, len(sets[0].classes)


def plain(args):
    (train, val), classes = folders(args)
    model = resnet18(args, classes, frozen=args.frozen)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001, momentum=0.9)
    for _ in range(args.epochs):
        model.train()
        for inputs, labels in train:
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = criterion(outputs, labels)
            loss.backward()
            optimizer.step()
        model.eval()
        correct = 0
        with torch.no_grad():
            for inputs, labels in val:
                correct += (model(inputs).argmax(1) == labels).sum().item()
    return correct / len(val.dataset)


def timm_loop(args):
    import timm
    from timm.data import create_dataset, create_loader

    sets = [create_dataset("", root=args.data, split=s) for s in ("train", "val")]
    loaders = [create_loader(d, (3, args.size, args.size), 32, is_training=i == 0, use_prefetcher=False, hflip=0.5,
                             num_workers=args.workers, mean=MEAN, std=STD, color_jitter=None, device=torch.device("cpu"))
               for i, d in enumerate(sets)]
    model = timm.create_model("resnet18", num_classes=len(sets[0].reader.class_to_idx)).to(memory_format=torch.channels_last)
    if args.weights:
        model.load_state_dict(weights_of(args.weights), strict=False)
    if args.frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith("fc.")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    for _ in range(args.epochs):
        model.train()
        for x, y in loaders[0]:
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        correct = 0
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for x, y in loaders[1]:
                correct += (model(x.contiguous(memory_format=torch.channels_last)).argmax(1) == y).sum().item()
    return correct / len(sets[1])


def fastai(args):
    from fastai.vision.all import (CrossEntropyLossFlat, FlipItem, ImageDataLoaders, Learner, Normalize,
                                   RandomResizedCrop, accuracy, defaults)

    defaults.use_cuda = False
    loaders = ImageDataLoaders.from_folder(args.data, valid="val", item_tfms=[RandomResizedCrop(args.size), FlipItem()],
                                           batch_tfms=[Normalize.from_stats(MEAN, STD, cuda=False)], bs=32,
                                           drop_last=False, num_workers=args.workers, device=torch.device("cpu"))
    model = resnet18(args, len(loaders.vocab))
    learner = Learner(loaders, model, CrossEntropyLossFlat(), metrics=accuracy,
                      splitter=lambda m: [[p for n, p in m.named_parameters() if not n.startswith("fc.")], [*m.fc.parameters()]])
    if args.frozen:
        learner.freeze()
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(args.epochs, 1e-3)
    return float(learner.recorder.values[-1][-1])


def lightning(args):
    import lightning
    from lightning.pytorch.callbacks import BaseFinetuning

    (train, val), classes = folders(args)

    class HeadAlone(BaseFinetuning):
        def freeze_before_training(self, module):
            self.freeze([layer for name, layer in module.model.named_children() if name != "fc"])

        def finetune_function(self, module, epoch, optimizer):
            pass  # nothing thaws

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = resnet18(args, classes, frozen=args.frozen == "by-hand")

        def training_step(self, batch, i):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch, i):
            self.log("accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean(), on_epoch=True)

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    trainer = lightning.Trainer(max_epochs=args.epochs, accelerator="cpu", enable_progress_bar=False, logger=False,
                                enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0,
                                callbacks=[HeadAlone()] if args.frozen == "own" else [])
    trainer.fit(Classifier(), train, val)
    return float(trainer.callback_metrics["accuracy"])


SIDES = {"plain": plain, "timm": timm_loop, "fastai": fastai, "lightning": lightning}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=list(SIDES))
    parser.add_argument("--data", required=True, metavar="DIR", help="train/ and val/")
    parser.add_argument("--weights", metavar="FILE", help="of a ResNet-18 (default: random)")
    parser.add_argument("--epochs", type=int, default=1, metavar="N")
    parser.add_argument("--size", type=int, default=224, metavar="N")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N")
    parser.add_argument("--frozen", nargs="?", const="own", choices=["own", "by-hand"],
                        help="train the new head alone, as each of them does that; by-hand: lightning with requires_grad = "
                             "False in place of its callback")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    print(f"{args.side}: accuracy {SIDES[args.side](args):.4f} after {args.epochs} epochs")


if __name__ == "__main__":
    main()
