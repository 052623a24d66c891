"""Two processes of one machine that share one pool of past policies and communicate through a pipe."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal

import pytest
import torch
from torch import nn

import seppo_fast.references.tiers as tiers
from seppo_fast.distributed.machine import Node
from seppo_fast.references import ReferencePool
from seppo_fast.references.layout import PackedLayout
from seppo_fast.references.tiers import Budget, PoolFullError

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
FORK = multiprocessing.get_context("fork")


def weight_of(value):
    layer = nn.Linear(300, 7, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


SIZE = PackedLayout.of(weight_of(0.0)).size


def gatherer(rank, pipe):
    def gather(value):
        pipe.send(value)
        other = pipe.recv()
        return [value, other] if rank == 0 else [other, value]

    return gather


def in_two(work, *arguments):
    """Returns, by rank, the results of `work(rank, node, *arguments)` in two processes that run at the same time."""

    def run(rank, pipe, result):
        torch.set_num_threads(1)
        result.send(work(rank, Node(gatherer(rank, pipe), rank), *arguments))

    pipes, results = FORK.Pipe(), [FORK.Pipe(duplex=False) for _ in range(2)]
    processes = [FORK.Process(target=run, args=(rank, pipes[rank], results[rank][1])) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    return [receiver.recv() for receiver, _ in results]


def segments():
    """Returns the inodes of the shared memory segments that this process maps."""
    with open("/proc/self/maps") as maps:
        return sorted({line.split()[4] for line in maps if "memfd:seppo-references" in line})


def test_alone_nothing_is_asked():
    node = Node()
    assert (node.world, node.owns, node.min(3), node.agree(None), node.from_owner("x")) == (1, True, 3, None, "x")


def share(rank, node, folder):
    assert node.world == 2 and node.owns == (rank == 0)
    assert node.same("same") and not node.same(rank)
    assert node.min(5 + rank) == 5 and node.agree("no" if rank else None) == "no" and node.from_owner(rank) == 0
    pool = ReferencePool(0, keep=4, budget=Budget(host=2 * SIZE, disk=2 * SIZE), folder=folder, node=node)
    values = {}
    for number in range(9):
        pool.add(weight_of(number + 100.0 * rank))  # the owner's weights are kept
    layer = weight_of(-1.0)
    for number in pool.tiers:
        with pool.resident(layer, number):
            values[number] = layer.weight.unique().tolist()
    draws = [pool.draw(number) for number in range(20)]
    return pool.tiers, values, segments(), draws


def test_both_read_the_one_copy_of_the_owner(tmp_path):
    (ours, values, inodes, draws), others = in_two(share, tmp_path)
    assert (ours, values, inodes, draws) == others
    assert sorted(ours.values()) == ["disk", "disk", "host", "host"] and len(inodes) == 2
    assert values == {number: [float(number)] for number in ours}
    assert os.listdir(tmp_path) == []


def refuse_disk(rank, node, folder):
    if rank == 0:

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        tiers.write_checkpoint = full  # in this process only
    pool = ReferencePool(0, budget=Budget(host=SIZE, disk=SIZE), folder=folder, node=node)
    pool.add(weight_of(1.0))
    with pytest.raises(PoolFullError, match="no space left"):
        pool.add(weight_of(2.0))
    return len(pool)


def test_a_disk_that_refuses_one_refuses_both(tmp_path):
    assert in_two(refuse_disk, tmp_path) == [1, 1]


def refuse_memory(rank, node, folder, refused):
    if rank == refused:

        def none(*_):
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

        if rank == 0:
            os.memfd_create = none
        else:
            os.open = none
    pool = ReferencePool(0, budget=Budget(host=9 * SIZE, disk=SIZE), folder=folder, node=node)
    pool.add(weight_of(1.0))
    return pool.tiers, segments()


@pytest.mark.parametrize("refused", [0, 1])
def test_memory_that_one_does_not_get_sends_both_down_a_tier(tmp_path, refused):
    assert in_two(refuse_memory, tmp_path, refused) == [({0: "disk"}, [])] * 2


def survive(rank, pipes, result, folder, killed):
    torch.set_num_threads(1)
    pipe = pipes[rank]
    pipes[1 - rank].close()  # inherited by fork; each end must be open in one process only
    pool = ReferencePool(0, budget=Budget(host=SIZE), folder=folder, node=Node(gatherer(rank, pipe), rank))
    pool.add(weight_of(7.0))
    if rank == killed:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises((EOFError, OSError)):  # the other end of the pipe is gone
        pipe.recv()
    layer = weight_of(-1.0)
    pool.load_into(layer, 0)
    result.send((layer.weight.unique().tolist(), len(segments())))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_takes_nothing_with_it_and_leaves_nothing(tmp_path, killed):
    """The other one reads on; the memory has no name, so nothing is left when that ends too."""
    before = os.listdir("/dev/shm")
    pipes, (receiver, sender) = FORK.Pipe(), FORK.Pipe(duplex=False)
    processes = [FORK.Process(target=survive, args=(rank, pipes, sender, tmp_path, killed)) for rank in range(2)]
    for process in processes:
        process.start()
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.join(60)
    assert processes[killed].exitcode == -signal.SIGKILL and processes[1 - killed].exitcode == 0
    assert receiver.recv() == ([7.0], 1)
    assert os.listdir("/dev/shm") == before and os.listdir(tmp_path) == []
