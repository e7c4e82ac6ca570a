"""Functions as CUDA graphs."""

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


class Replays:
    """work(key, *tensors) as CUDA graphs: one for each key and shapes, captured when they first come and replayed from
    then on. They share the memory of what they make on the way: a result lasts until the next call, what `work` adds
    to tensors from outside stays. Capturing runs `work` three times, each after `before`, and another one follows."""

    def __init__(self, work, before=lambda: None):
        self.work, self.before, self.pool, self.inputs, self.graphs = work, before, None, {}, {}

    def __call__(self, key, *tensors):
        shapes = tuple(x.shape for x in tensors)
        if shapes not in self.inputs:
            self.inputs[shapes] = [torch.empty_like(x) for x in tensors]
        inputs = self.inputs[shapes]
        for mine, its in zip(inputs, tensors):
            mine.copy_(its, non_blocking=True)
        if (key, shapes) not in self.graphs:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            self.graphs[key, shapes] = captured(lambda: self.work(key, *inputs), self.before, self.pool)
        return self.graphs[key, shapes]()
