"""Several processes that train one network together, one for each GPU (or on CPUs), as torchrun starts them:

    torchrun --nproc_per_node=4 train.py

    with joined():                                      # torchrun has said how in the environment
        rank, processes = ranks()                       # 0 to 3, 4
        device = torch.device("cuda", local_rank)       # LOCAL_RANK in the environment
        network = DistributedDataParallel(model)        # PyTorch's own: averages the gradients in every backward()
        for batch in in_step(loader):                   # each process reads its own share; an error in one ends all
            ...
        scores = broadcast(scores)                      # those of the first process, in all
        outputs, numbers = all_gather_batches(found)    # of all processes, in the order of the data set

The names are those of torch.distributed. In a single process all of them are there, too, and do nothing. What the
processes tell each other here goes from CPU to CPU: no GPU is waited for. This file needs torch alone and can be copied
into any project.
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
    # (On Windows there is no NCCL.)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    # Counted by each machine for itself.
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(all_reduce_max(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))))
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
    """(number of this process, number of processes): (0, 1) if it is alone."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def started():
    """The number of processes, and whether torchrun --max-restarts has started them again after one of them had died."""
    return ranks()[1], int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


# ---- what the processes tell each other


def broadcast(value):
    """The first process's value, in all of them. (It has to pickle.)"""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def all_gather(value):
    """The values of all processes, in a list."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather_batches(found):
    """Join the outputs of all processes. found: a list with a pair for each batch, tensors (N, ...) and the numbers (N,)
    of its samples in the data set. Returns both as one tensor each, in the order of the numbers (of several processes on
    the CPU). Raises ProcessError if no process has a batch.
    """
    if dist.is_initialized():  # a small split may leave a process none
        found = [pair for pairs in all_gather([(o.cpu(), n.cpu()) for o, n in found]) for pair in pairs]
    if not found:
        raise ProcessError("no picture of this split can be read: has the disk gone away? python data.py --check DIR "
                           "lists what cannot be read")
    outputs, numbers = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not dist.is_initialized():
        return outputs, numbers
    order = numbers.argsort()
    return outputs[order], numbers[order]


def all_reduce_max(number):
    """The largest of the numbers of all processes."""
    if not dist.is_initialized():
        return number
    numbers = torch.tensor(number)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


def agree(number):
    """The largest of the numbers of all processes, where None is less than any: so that all heed a stop signal that one
    has heard, after the same step. All processes have to call it.
    """
    return all_reduce_max(number or 0) or None


def broadcast_buffers(model):
    """Give all processes the first one's running statistics. While training, DistributedDataParallel does so in every
    step, but not after the last.
    """
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def average_gradients(parameters):
    """Give all processes the mean of their gradients, for parameters outside a DistributedDataParallel, which does so
    for its own: those of a loss, say. One without a gradient in a process counts as zeros there.
    """
    for parameter in parameters if dist.is_initialized() else ():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def from_main(function, *args):
    """Call function(*args) in the first process alone and return the result in all, when it is there. What ends the
    first process, an error of argparse too, ends the others in silence.
    """
    if not dist.is_initialized():
        return function(*args)
    said = [None, None]  # the result; the exit status
    if dist.get_rank() == 0:
        try:
            said = [function(*args), None]
        except BaseException as error:
            dist.broadcast_object_list([None, error.code or 0 if isinstance(error, SystemExit) else 2])
            raise
    dist.broadcast_object_list(said)
    if said[1] is not None:
        raise SystemExit(said[1])
    return said[0]


# ---- reading side by side


def in_step(steps):
    """Yield from `steps`, of which all processes have the same number: they look at each other before each one, so that
    none waits within a step for one that does not come. An error in one process, while it reads, is raised there, and
    ProcessError in the others.
    """
    if not dist.is_initialized():
        yield from steps
        return
    steps = iter(steps)
    while True:
        step, error = None, None
        try:
            step = next(steps, None)
        except Exception as caught:
            error = caught
        _end_together(error)
        if step is None:
            return
        yield step


def at_own_pace(batches, stop, leave_if_asked):
    """Yield from `batches`, of which processes may have different numbers: they look at each other at the end alone. An
    error in one process is raised there then, and ProcessError in the others.

    stop, leave_if_asked: those of ending.py. A single process heeds a stop signal after each batch; of several, one
    that hears it goes to the end at once, where all of them heed it.
    """
    if not dist.is_initialized():
        for batch in batches:
            yield batch
            leave_if_asked(stop)
        return
    error = None
    try:
        for batch in batches:
            if stop.signal is not None:
                break
            yield batch
    except Exception as caught:
        error = caught
    _end_together(error)
    leave_if_asked(stop)


def _end_together(error):
    """Raise the error that this process has met, if any, or ProcessError if another one has."""
    failed = all_reduce_max(int(error is not None))
    if error:
        raise error
    if failed:
        raise ProcessError("another process has ended this run")


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
