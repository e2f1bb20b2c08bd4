"""Several processes that train one network together, one for each GPU (or on CPUs), as torchrun starts them:

    torchrun --nproc_per_node=4 train.py

    with joined():                                      # torchrun has said how in the environment
        rank, local_rank, processes = ranks()           # 0 to 3, the same, 4
        device = torch.device(own_device())             # cuda:0 to cuda:3, or the CPU
        network = DistributedDataParallel(model)        # PyTorch's own: averages the gradients in every backward()
        for batch in together(loader):                  # each process reads its own share; an error in one ends all
            ...
        totals = add_up({"loss": loss_sum, "images": count}, ["loss", "images"])
        outputs, numbers = gather(pairs_of_batches)     # of all processes, in the order of the data set

In a single process all of them are there, too, and do nothing. What the processes tell each other here goes from CPU to
CPU: no GPU is waited for. This file needs torch alone and can be copied into any project.
"""

import contextlib
import os
import secrets
import sys
import time
import warnings

import torch
import torch.distributed as dist

FROM_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ProcessError(Exception):
    """The processes cannot go on together. The message is one line that names the way out."""


# ---- start


@contextlib.contextmanager
def joined(stop=None):
    """Within the block, one of several processes if torchrun has started this one so; only the first prints then.

    stop: of `ending.tidy`, if that is in use: a stop signal to any process is then agreed between all, and of several
    processes that end with an error one says so.
    """
    if any(name not in os.environ for name in FROM_TORCHRUN) or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    store, rank, size = next(dist.rendezvous("env://"))
    store = _clean(store, rank, size)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    # Counted by each machine for itself.
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(_largest(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("ignore")
    if stop:
        stop.agree, stop.announces = agree, rank == 0
        stop.about = lambda error: _about(error, store)
    yield
    dist.destroy_process_group()  # not after an error: it might wait for the others


def _clean(store, rank, size):
    """A part of the store that only these processes use. torchrun --max-restarts keeps it from one start to the next,
    with the addresses of the dead, and the machines do not agree on the number of starts. So each process brings a
    random word, and all together are the name of the part: the first says it, again whenever a word has changed, until
    the others have all seen the same.
    """
    own = secrets.token_hex(8)
    store.set(f"word {rank}", own)
    while True:
        if rank == 0:
            name = " ".join(store.get(f"word {number}").decode() for number in range(size))
            store.set("name", name)
            if store.check([f"{name} seen by {number}" for number in range(1, size)]):
                store.set(f"{name} is it", "yes")
                return dist.PrefixStore(name, store)
        elif own in (name := store.get("name").decode()):
            store.set(f"{name} seen by {rank}", "yes")
            if store.check([f"{name} is it"]):
                return dist.PrefixStore(name, store)
        time.sleep(0.02)


def ranks():
    """(number of this process, its number on this machine, number of processes): (0, 0, 1) if it is alone."""
    if not dist.is_initialized():
        return 0, 0, 1
    return dist.get_rank(), int(os.environ["LOCAL_RANK"]), dist.get_world_size()


def started():
    """The number of processes, and whether torchrun --max-restarts has started them again after one of them had died."""
    return ranks()[2], int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def launcher():
    """What stands before the name of the script in a command that goes on with this run."""
    processes, here = ranks()[2], int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    machines = f"--nnodes={processes // here} ... " if processes > here else ""
    return "python" if processes == 1 else f"torchrun {machines}--nproc_per_node={here}"


def own_device(name="auto", sync_bn=False):
    """The name of this process's device: of several processes on a machine each takes a GPU of its own, or all take the
    CPU. name: auto, cuda or cpu; in a single process any name, which is returned as it is. sync_bn: is
    nn.SyncBatchNorm to be used? Raises ProcessError.
    """
    _, local_rank, processes = ranks()
    if processes == 1:
        return name
    if name not in ("auto", "cuda", "cpu"):
        raise ProcessError(f"--device {name}: several processes take a GPU each, or the CPU: give auto, cuda or cpu")
    if name == "cpu" or name == "auto" and not torch.cuda.is_available():
        if sync_bn:
            raise ProcessError("--sync-bn needs GPUs: PyTorch has no BatchNorm over several processes on a CPU")
        return "cpu"
    if local_rank >= torch.cuda.device_count():
        raise ProcessError(f"there are {torch.cuda.device_count()} GPUs here: lower torchrun's --nproc_per_node to that, "
                           "or give --device cpu")
    torch.cuda.set_device(local_rank)
    return f"cuda:{local_rank}"


def say(text):
    """Print a line, from any process."""
    print(text, file=sys.stderr)


# ---- what the processes tell each other


def from_main(function, *args, **named):
    """Call function(*args, **named) in the first process alone and return the result in all, when it is there. What
    ends the first process ends the others.
    """
    if not dist.is_initialized():
        return function(*args, **named)
    said = [None, None]  # the result; the exit status
    if dist.get_rank() == 0:
        try:
            said = [function(*args, **named), None]
        except BaseException as error:
            dist.broadcast_object_list([None, error.code or 0 if isinstance(error, SystemExit) else 2])
            raise
    dist.broadcast_object_list(said)
    if said[1] is not None:
        raise SystemExit(said[1])
    return said[0]


def of_all(value):
    """The values of all processes, in a list."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(number):
    """The largest of the numbers of all processes, where None is less than any: so that all heed a stop signal that one
    has heard, after the same step. All processes have to call it.
    """
    return _largest(number or 0) or None


def _largest(number):
    if not dist.is_initialized():
        return number
    numbers = torch.tensor(number)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


def add_up(sums, names):
    """A dict of numbers and tensors as a dict of numbers, those under `names` summed over all processes."""
    values = {name: float(value) for name, value in sums.items()}
    if dist.is_initialized():
        names = [name for name in names if name in values]
        totals = torch.tensor([values[name] for name in names], dtype=torch.float64)
        dist.all_reduce(totals)
        values |= zip(names, totals.tolist(), strict=True)
    return values


def counts_for(count, weight=None):
    """How many pictures the loss of this process's batch stands for in the mean over those of all processes.

    count: the pictures in it. weight: the sum of their weights if the loss is a mean that was divided by that, a tensor
    (); else None, and the answer is `count`. In a single process it always is.
    """
    if weight is None or not dist.is_initialized():
        return count
    own = torch.stack([weight.new_tensor(float(count)), weight * (count > 0)])
    totals = own.clone()
    dist.all_reduce(totals)
    return totals[0] * own[1] / totals[1]


def gather(found):
    """Join the outputs of all processes. found: a list with a pair for each batch, tensors (N, ...) and the numbers (N,)
    of its samples in the data set. Returns both as one tensor each, in the order of the numbers. Raises ProcessError if
    no process has a batch.
    """
    if dist.is_initialized():  # a small split may leave a process none
        found = [pair for pairs in of_all([(o.cpu(), n.cpu()) for o, n in found]) for pair in pairs]
    if not found:
        raise ProcessError("no picture of this split can be read: has the disk gone away? python data.py --check DIR "
                           "lists what cannot be read")
    outputs, numbers = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not dist.is_initialized():
        return outputs, numbers
    order = numbers.argsort()
    return outputs[order], numbers[order]


def same_buffers(model):
    """Give all processes the first one's running statistics. While training, DistributedDataParallel does so in every
    step, but not after the last.
    """
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def together(batches, stop=None, in_step=True):
    """Yield from `batches` until all processes come to their end. An error that ends one of them in one process is
    raised there, and ProcessError in the others.

    in_step: all have the same number of batches, and they look at each other before each one, so that none waits within
    a step for one that does not come. Else they look at the end alone, and one that hears a stop signal (`stop` of
    ending.tidy) goes there at once.
    """
    if not dist.is_initialized():
        yield from batches
        return
    batches = iter(batches)
    while True:
        batch, error = None, None
        try:
            batch = next(batches, None)
        except Exception as caught:
            error = caught
        ends = batch is None or not in_step and stop is not None and stop.signal is not None
        if in_step or ends:
            failed = _largest(int(error is not None))
            if error:
                raise error
            if failed:
                raise ProcessError("another process has ended this run")
        if ends:
            return
        yield batch


# ---- the last words


def _about(error, store):
    """What to say of an error that ends this process, and whether this is the one that says it: the first of all that
    asks. One that only sees that another has gone says so if nobody else has said anything.
    """
    text = str(error)
    if isinstance(error, RuntimeError) and any(w in text for w in ("gloo", "by peer", "NCCL", "Broken pipe")):
        error = ProcessError("another process of this run has ended, or the network between them has failed: the "
                             f"lines around this one may say more; go on with --resume ({text.splitlines()[0][:150]})")
    elif isinstance(error, ProcessError) and "another process" in text:
        return error, False
    try:
        return error, store.add("last words", 1) == 1
    except RuntimeError:  # torchrun has gone, too
        return error, True
