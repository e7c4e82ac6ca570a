"""Functions on several ranks, each a process with torch.distributed around it."""

import os
import socket

import torch
import torch.multiprocessing as mp

# A fork has everything imported, which takes a new process seconds; but it must not meet a CUDA context.
START = "spawn" if torch.cuda.is_available() else "fork"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(function, size: int, *arguments) -> None:
    """function(rank, size, *arguments) on each rank of a gloo group; with size 1 in this process, without a group."""
    if size == 1:
        function(0, 1, *arguments)
    else:
        mp.start_processes(_one, (function, size, free_port(), *arguments), size, start_method=START)


def _one(rank, function, size, port, *arguments):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
                      WORLD_SIZE=str(size))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    function(rank, size, *arguments)
    torch.distributed.barrier()  # as train_gpt.py: reductions that nobody waited for after an error must have ended
    torch.distributed.destroy_process_group()
