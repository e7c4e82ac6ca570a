"""python -m kernels.tune SHAPE…: measure how to cut the products for these matrices, and remember it for this GPU.

    python -m kernels.tune 768x768 12x768x3072          writes ~/.cache/turborun/tiles.json, which every later run reads

Times the fused polar factor (published Turbo-Muon coefficients) by CUDA-graph replay for every cut in tiles.CANDIDATES;
a cut that this GPU cannot run is listed with its reason. Delete the file to go back to the built-in table.
"""

import argparse
import sys

import torch

from optim import polynomials

from . import tiles, why_not
from .bench import graph_us, inputs, label_of, parse_shapes, reason, set_count
from .newton_schulz import orthogonalise


def measure(shape: tuple[int, int, int], cut: tiles.Tiles, time, device: torch.device) -> float:
    """Microseconds for `shape` = (batch, n, m) with this cut, by `time`(function of a list of tensors, input sets)."""
    batch, n, m = shape
    sets = [[inputs("gaussian", n, m, seed, device, batch)] for seed in range(set_count(4 * batch * n * m))]
    return time(lambda xs: orthogonalise(xs, polynomials.TURBO, tiles=cut), sets)


def tune(shape: tuple[int, int, int], candidates, time, device: torch.device, say=print) -> tiles.Tiles:
    """The fastest of `candidates`; RuntimeError if none of them runs."""
    best = None
    for cut in candidates:
        try:
            microseconds = measure(shape, cut, time, device)
        except Exception as error:  # out of shared memory, say: of no concern to the others
            say(f"  {cut}: {reason(error)}")
            continue
        say(f"  {cut}: {microseconds:.1f} µs")
        if best is None or microseconds < best[0]:
            best = microseconds, cut
    if best is None:
        raise RuntimeError(f"none of {len(candidates)} cuts runs on {device}")
    return best[1]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("shapes", nargs="+", metavar="SHAPE", help="such as 768x768 or 12x768x3072")
    options = parser.parse_args(argv)
    device = torch.device("cuda")
    try:
        shapes = [shape for spec in options.shapes for shape in parse_shapes(spec)]
        if not torch.cuda.is_available() or why_not(device):
            raise ValueError(f"the kernels cannot be tuned here: {why_not(torch.device('cpu'))}")
    except (argparse.ArgumentTypeError, ValueError) as error:
        print(f"kernels.tune: {error}", file=sys.stderr)
        return 2
    for batch, n, m in shapes:
        wide = (batch, min(n, m), max(n, m))
        print(label_of((wide,)))
        best = tune(wide, tiles.CANDIDATES, lambda function, sets: graph_us(function, sets, 20)[0], device)
        path = tiles.remember({tiles.key(wide[1], batch, device): best})
        print(f"  best: {best} -> {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
