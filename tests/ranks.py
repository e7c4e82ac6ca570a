"""Functions on several ranks, each a process with torch.distributed around it."""

import os
import socket
import time

import torch
import torch.multiprocessing as mp

# A fork has everything imported, which takes a new process seconds; but it must not meet a CUDA context.
START = "spawn" if torch.cuda.is_available() else "fork"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(function, size: int, *arguments, seconds: float = 150) -> None:
    """function(rank, size, *arguments) on each rank of a gloo group; with size 1 in this process, without a group.

    The first error of a rank is raised here; after so many seconds all are killed.
    """
    if size == 1:
        function(0, 1, *arguments)
        return
    ranks = mp.start_processes(_one, (function, size, free_port(), *arguments), size, join=False, start_method=START)
    deadline = time.monotonic() + seconds
    while not ranks.join(max(0, deadline - time.monotonic())):
        if time.monotonic() >= deadline:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"{size} ranks have not ended after {seconds} s")


def _one(rank, function, size, port, *arguments):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
                      WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    function(rank, size, *arguments)
    torch.distributed.barrier()  # as train_gpt.py: reductions that nobody waited for after an error must have ended
    torch.distributed.destroy_process_group()
