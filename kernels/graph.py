"""A function as a CUDA graph."""

import torch


def capturing() -> bool:
    """Whether a CUDA graph is being captured: what is launched now runs later, and the host may not wait for it."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def captured(work, before=lambda: None, pool=None):
    """Capture what `work` launches: returns a function that replays it and returns what `work` returned, whose tensors
    every replay fills anew. `work` takes no arguments, never waits for the device, and its inputs stay where they are.

    before: called before each of the four calls of `work` that this takes, three of them to set up what is set up once.
    pool: torch.cuda.graph_pool_handle(), for graphs that share memory: replaying one then destroys what another made,
          but for what lives on after its capture.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            before()
            work()
        before()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = work()

    def replay():
        graph.replay()
        return result

    return replay
