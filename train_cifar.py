"""Train a convolutional network on CIFAR-10, against the clock, to a target accuracy on its 10,000 test images.

    python train_cifar.py --runs 200                   one GPU: 94 % (preset `94`), 200 runs, one ledger
    python train_cifar.py --preset 96 --runs 20        one GPU: 96 %
    python train_cifar.py --preset local               no GPU, no network: a small network on synthetic images
    python train_cifar.py --help                       every setting

Result: 94.04 % in 0.747 s, mean of all n = 200 runs of one process (standard deviations 0.12 points and 0.001 s), on
one NVIDIA H200 with torch 2.11 (records/cifar10-94/2026-11-28_152449_turbo-muon). Preset 96: 96.09 % in 9.26 s, n = 20
(0.11 points, 0.02 s; records/cifar10-96/2026-11-28_175629_turbo-muon).

One file, one story: settings, schedules, network, training, runs. The clock runs from the first look at the training
images to the last prediction for the test images, as in airbench; compiling, capturing CUDA graphs, copying the data
set's bytes to the device and drawing initial weights come before it. Network, recipe and views of the test images are
those of airbench by Keller Jordan (https://github.com/KellerJordan/cifar10-airbench, arXiv 2404.00498), written anew.
"""

import time

BEGAN = time.perf_counter()  # before the imports: the way to the first run is part of what is measured

import io
import math
import os
import statistics
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from data import cifar10
from data.shards import DataError
from data.views import training_table, view_table
from kernels.augment import MEAN, STD, whiten, whiten_eager
from kernels.conv_pool import conv_pool, fits
from kernels.graph import captured
from kernels.norm_act import norm_act, norm_act_eager
from optim import OPTIMIZERS, POLARS, Adam, NonFiniteError, get_optimizer, route, route_table
from optim.parts import milliseconds, part, stopwatch
from records.log import Record, RecordError, end_on_signal
from records.series import Series, failures_in, spread
from records.settings import SettingsError, check, option, parse
from records.tracks import metric_of

REPOSITORY = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass
class Settings:
    """The defaults are the 94 % record run; PRESETS holds the others."""

    preset: str = "94"
    track: str = option("cifar10-94", "which leaderboard the record belongs to: its folder under --records")
    name: str = option("cifar", "what to call it: letters, digits, '.', '_', '-'")
    target: float | None = option(0.94, "accuracy to reach, a fraction of the test images", least=0, most=1)
    records: str = option("records", "folder in which the record is written")
    seed: int = option(0, "seed of weights, order and augmentation; further runs take the next ones", least=0)
    runs: int = option(1, "runs in this process; more than one make an experiment with a ledger", least=1, most=10000)
    device: str = option("auto", "auto takes a GPU if there is one", choices=("auto", "cuda", "cpu"))
    dtype: str = option("float16", "of weights and activations; statistics of batch norm are float32",
                        choices=("float16", "float32"))
    # data
    data: str = option("data/cifar10", "folder of the six .bin files, fetched if they are missing")
    source: str = option("official", "CIFAR-10, or images made here without any file",
                         choices=("official", "synthetic"))
    train_images: int = option(50000, "train on the first so many", least=1, most=50000)
    test_images: int = option(10000, "test on the first so many", least=1, most=10000)
    # network
    width1: int = option(64, "filters in the first of three groups of convolutions", least=1)
    width2: int = option(256, "in the second", least=1)
    width3: int = option(256, "in the third", least=1)
    depth: int = option(2, "convolutions in a group; around the last two of three goes a residual", choices=(2, 3))
    activation: str = option("gelu", "after every normalisation", choices=("gelu", "silu"))
    # training
    epochs: float = option(7.88, "times that every image is seen", least=1e-3)
    batch_size: int = option(2000, "images in a step; what an epoch has beyond full batches is left out", least=2)
    translate: int = option(2, "images are shifted by up to so many pixels, mirrored at the border", least=0, most=31)
    cutout: int = option(0, "side of a square of each training image that is blanked, in pixels", least=0, most=31)
    label_smoothing: float = option(0.2, "share of a label that goes to all classes alike", least=0, most=1)
    optimizer: str = option("turbo-muon", "for the filters", choices=tuple(OPTIMIZERS))
    polar: str | None = option(None, "how it orthogonalises; none: in the optimizer's own way", choices=tuple(POLARS))
    lr: float = option(0.24, "of the filters", least=0)
    momentum: float = option(0.6, "of the filters", least=0, most=0.9999)
    rest: str = option("sgd", "optimizer of biases and head: Nesterov momentum, or Adam", choices=("sgd", "adam"))
    bias_lr: float = option(0.053, "of biases; like head-lr for the sum of a batch's losses", least=0)
    head_lr: float = option(0.67, "of the output layer", least=0)
    rest_momentum: float = option(0.85, "of biases and head with sgd", least=0, most=0.9999)
    weight_decay: float = option(0.004, "of biases and head in a step; filters keep a fixed norm instead", least=0)
    warmup: int = option(0, "steps in which learning rates rise to what they are without", least=0)
    whiten_epochs: float = option(1.0, "the bias of the whitening layer trains in the first so many", least=0)
    # evaluation
    views: int = option(6, "of a test image: 1, 2 (mirrored), 6 (shifted by a pixel both ways too)", choices=(1, 2, 6))
    views_for: float = option(0.25, "fraction of test images, the least certain, that get all six", least=0, most=1)
    # machine
    engine: str = option("auto", "fused kernels (auto: where they run) or plain torch",
                         choices=("auto", "fused", "eager"))
    graph: str = option("auto", "CUDA graph of the whole step, of the gradients (auto: what can be captured), or none",
                        choices=("auto", "step", "gradients", "none"))
    compile: bool = option(False, "torch.compile the network instead of taking its fused kernels: a slower start")

    def __post_init__(self):
        check(self)
        if self.batch_size > self.train_images:
            raise SettingsError(f"--batch-size {self.batch_size} is more than --train-images {self.train_images}")
        if self.polar and self.optimizer == "adamw":
            raise SettingsError(f"--polar {self.polar} needs an --optimizer that leaves the filters to Muon, not adamw")
        if self.source == "synthetic" and self.track in ("cifar10-94", "cifar10-96"):
            raise SettingsError(f"--track {self.track} is for CIFAR-10 itself: --source synthetic needs another, such "
                                "as --track cifar10-local")

    @property
    def epoch_steps(self) -> int:
        return self.train_images // self.batch_size

    @property
    def steps(self) -> int:
        return math.ceil(self.epochs * self.epoch_steps)

    @property
    def whiten_steps(self) -> int:
        return min(self.steps, math.ceil(self.whiten_epochs * self.epoch_steps))


PRESETS = {
    "94": {},
    # The deeper, wider network of airbench96 with cut-outs, and Muon in place of SGD. Without the warm-up one run in
    # seven diverged in its first steps (records/studies/cifar-search), with it none of twenty.
    "96": dict(track="cifar10-96", target=0.96, width1=128, width2=384, width3=512, depth=3, activation="silu",
               epochs=32.0, warmup=20, translate=4, cutout=12, lr=0.18, weight_decay=0.002, views_for=0.5),
    "local": dict(track="cifar10-local", target=None, source="synthetic", dtype="float32", train_images=5000,
                  test_images=1000, width1=16, width2=32, width3=32, epochs=4.0, batch_size=125, weight_decay=0.00025,
                  lr=0.12),
}

# ---------------------------------------------------------------------------------------------------------------------
# Schedules: plain functions of the step


def lr_scale(step: int, s: Settings) -> float:
    """Fraction of the learning rates at `step` (0 is the first): linear to 0."""
    return 1 - step / s.steps


def whiten_lr_scale(step: int, s: Settings) -> float:
    """The same for the bias of the whitening layer, which trains for a part of the time only."""
    return max(0.0, 1 - step / s.whiten_steps) if s.whiten_steps else 0.0


def warmed_up(step: int, s: Settings) -> float:
    """Fraction of all these at `step`: rising to 1."""
    return min(1.0, (step + 1) / (s.warmup + 1))


# ---------------------------------------------------------------------------------------------------------------------
# Network

WHITEN_IMAGES, WHITEN_EPS = 5000, 5e-4
NORM_MOMENTUM, NORM_EPS, TEST_BATCH = 0.4, 1e-12, 2000


def whitening_filters(images: Tensor) -> Tensor:
    """(24, 3, 2, 2) float32: the eigenvectors of the 2×2 patches of `images` (count, 32, 32, 3) uint8, normalised,
    divided by the roots of their eigenvalues, and their negatives.

    The 12×12 matrix is decomposed on the host: quicker than a GPU's solver, which makes the host wait as well.
    """
    mean, std = (torch.tensor(v, device=images.device) * 255 for v in (MEAN, STD))
    x = (images.float() - mean) / std
    taps = [x[:, i : i + 31, j : j + 31] for i in (0, 1) for j in (0, 1)]
    patches = torch.cat(taps, dim=-1).flatten(1, 2)  # (count, 961, 12)
    covariance = torch.bmm(patches.mT, patches).double().sum(0) / (patches.size(0) * patches.size(1))
    values, vectors = torch.linalg.eigh(covariance.cpu())
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    filters = (vectors * largest.sign() / (values + WHITEN_EPS).sqrt()).T.reshape(12, 2, 2, 3).permute(0, 3, 1, 2)
    return torch.cat([filters, -filters]).float()


class NormAct(nn.Module):
    """Max-pool where asked for, batch norm without gain, activation: kernels/norm_act.py."""

    def __init__(self, channels: int, act: str, pool: bool, fused: bool):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, dtype=torch.float32))
        self.register_buffer("mean", torch.zeros(channels, dtype=torch.float32))
        self.register_buffer("var", torch.ones(channels, dtype=torch.float32))
        self.act, self.pool, self.fused = act, pool, fused

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        function = norm_act if self.fused else norm_act_eager
        return function(x, self.bias, self.mean, self.var, training=self.training, pool=self.pool, act=self.act,
                        momentum=NORM_MOMENTUM, eps=NORM_EPS, residual=residual)


class Group(nn.Module):
    """Convolutions of 3×3, the first followed by a pool; with three the input of the second is added to the third.

    Few inputs (the network's first group) take kernels/conv_pool.py for the first two where `fused`."""

    def __init__(self, inputs: int, outputs: int, s: Settings, fused: bool):
        super().__init__()
        self.pooling = fused and fits(inputs, outputs)
        self.convs = nn.ModuleList(nn.Conv2d(outputs if i else inputs, outputs, 3, padding=1, bias=False)
                                   for i in range(s.depth))
        self.norms = nn.ModuleList(NormAct(outputs, s.activation, i == 0 and not self.pooling, fused)
                                   for i in range(s.depth))

    def forward(self, x: Tensor) -> Tensor:
        x = conv_pool(x, self.convs[0].weight) if self.pooling else self.convs[0](x)
        x = first = self.norms[0](x)
        x = self.norms[1](self.convs[1](x))
        return x if len(self.convs) == 2 else self.norms[2](self.convs[2](x), first)


class Net(nn.Module):
    """Whitened 2×2 patches -> three groups -> the largest value of each channel -> ten classes (airbench)."""

    def __init__(self, s: Settings, fused: bool):
        super().__init__()
        widths = (24, s.width1, s.width2, s.width3)
        self.act, self.width, self.fused = s.activation, s.width3, fused
        self.register_buffer("whitening", torch.zeros(24, 3, 2, 2))
        self.whitening_bias = nn.Parameter(torch.zeros(24))
        fused = fused and not s.compile  # which fuses by itself
        self.groups = nn.ModuleList(Group(a, b, s, fused) for a, b in zip(widths, widths[1:]))
        self.head = nn.Linear(s.width3, cifar10.CLASSES, bias=False)

    def first_layer(self, images: Tensor, table: Tensor, cutout: int, train_bias: bool) -> Tensor:
        """The augmented images that `table` asks for, whitened: (batch, 24, 31, 31)."""
        bias = self.whitening_bias if train_bias else self.whitening_bias.detach()
        return (whiten if self.fused else whiten_eager)(images, table, cutout, self.whitening, bias, self.act)

    def forward(self, x: Tensor) -> Tensor:
        for group in self.groups:
            x = group(x)
        largest = x.permute(0, 2, 3, 1).flatten(1, 2).max(1).values  # as a 3×3 pool, whose backward is slow
        return self.head(largest / self.width)  # divided first, because float16 ends at 65,504

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Initial weights and statistics, in place: drawn on the host, so that every device begins alike. The whitening
        filters are not among them: they come with the images."""
        generator = torch.Generator().manual_seed(seed)

        def uniform(p: Tensor, bound: float) -> Tensor:
            return (2 * torch.rand(p.shape, generator=generator) - 1) * bound

        for name, p in self.named_parameters():
            if p.ndim == 4:
                weight = uniform(p, (p.size(1) * 9) ** -0.5)
                nn.init.dirac_(weight[: p.size(1)])  # passes its input on (airbench)
                p.copy_(weight)
            elif name == "head.weight":
                p.copy_(uniform(p, 3**0.5))  # standard deviation 1
            else:
                p.copy_(uniform(p, 12**-0.5) if name == "whitening_bias" else torch.zeros(p.shape))
        for norm in (norm for group in self.groups for norm in group.norms):
            norm.mean.zero_()
            norm.var.fill_(1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Training


@dataclass
class Result:
    """What a run came to. seconds: of the whole run; phases: of its parts, in seconds. losses: of every step."""
    accuracy: float
    test_loss: float
    seconds: float
    phases: dict[str, float]
    losses: list[float]


class Trainer:
    """What all runs of a process share: images and network on the device, CUDA graphs. A run depends on its seed alone.

    The work of a step finds its number on the device, so that a graph of it can be replayed without any input.
    """

    def __init__(self, s: Settings, device: torch.device, train: cifar10.Images, test: cifar10.Images):
        self.s, self.device, self.graph = s, device, s.graph if device.type == "cuda" else "none"
        obstacle = kernels.why_not(device)
        if s.engine == "fused" and obstacle:
            raise SettingsError(f"--engine fused: {obstacle}; use --engine auto")
        fused = not obstacle and (s.engine == "fused" or s.engine == "auto" and device.type == "cuda")
        self.images = torch.from_numpy(train.pixels[: s.train_images]).to(device)
        self.test_images = torch.from_numpy(test.pixels[: s.test_images]).to(device)
        self.labels = torch.from_numpy(train.labels[: s.train_images]).to(device)
        smooth = s.label_smoothing  # as probabilities: 8 launches where the loss of torch that smooths takes 19
        self.targets = F.one_hot(self.labels, cifar10.CLASSES) * (1 - smooth) + smooth / cifar10.CLASSES
        self.test_labels = torch.from_numpy(test.labels[: s.test_images]).to(device)
        dtype = getattr(torch, s.dtype)
        self.net = Net(s, fused).to(device, dtype, memory_format=torch.channels_last)
        for norm in (norm for group in self.net.groups for norm in group.norms):
            norm.float()
        if s.compile:
            self.net.compile(dynamic=False)
        self.params = list(self.net.parameters())
        self.filters = [p for p in self.params if p.ndim == 4]
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.losses = torch.zeros(max(s.steps, 16), device=device)
        self.table = torch.zeros(math.ceil(s.epochs) * s.epoch_steps, s.batch_size, 6, dtype=torch.int32, device=device)
        self.rates = None  # learning rates on the device, where a graph has the whole step
        self.views = [view_table(s.test_images, flip, shift, device) for shift in (0, -1, 1) for flip in (0, 1)]

    def gradients(self, train_bias: bool) -> None:
        """Gradients of the summed loss of batch number `step` into .grad; its mean loss into `losses`."""
        for p in self.params:
            p.grad = None
        with part("augmentation and whitening"):
            rows = self.table.index_select(0, self.step)[0]
            targets = self.targets[rows[:, 0]]
            x = self.net.first_layer(self.images, rows, self.s.cutout, train_bias)
        with part("forward"):
            logits = self.net(x).float()
            loss = F.cross_entropy(logits, targets, reduction="sum")
        with part("backward"):
            loss.backward()
        self.losses.index_copy_(0, self.step, loss.detach()[None] / self.s.batch_size)

    def update(self) -> None:
        """Filters get the norm √(their number), then all weights a step."""
        with part("filters to their norm"), torch.no_grad():
            scales = torch._foreach_norm(self.filters, 2, dtype=torch.float32)
            torch._foreach_reciprocal_(scales)
            torch._foreach_mul_(scales, [len(f) ** 0.5 for f in self.filters])
            torch._foreach_mul_(self.filters, scales)
        self.matrices.step()
        with part("biases and head"):
            self.rest.step()
        self.step.add_(1)

    def whole_step(self, train_bias: bool) -> None:
        """Both, at learning rates from a table on the device: what one CUDA graph holds."""
        self.rates.copy_(self.schedule.index_select(0, self.step)[0])
        self.gradients(train_bias)
        self.update()

    def make_optimizers(self) -> None:
        """A new optimizer for the filters and one for the rest; groups say how their learning rate moves."""
        s, routed = self.s, route(self.net)
        filters = {kind: members if kind == "matrix" else [] for kind, members in routed.items()}
        options = {"polar": s.polar} if s.polar else {}  # recipes have their own
        self.matrices = get_optimizer(s.optimizer, filters, lr=s.lr, engine=s.engine, momentum=s.momentum, **options)
        norms = [(name, p) for name, p in routed["scalar"] if name != "whitening_bias"]
        groups = [dict(params=[("whitening_bias", self.net.whitening_bias)], lr=s.bias_lr, scale=whiten_lr_scale),
                  dict(params=norms, lr=s.bias_lr), dict(params=routed["head"], lr=s.head_lr)]
        for group in groups:
            group["weight_decay"] = s.weight_decay / group["lr"] if group["lr"] else 0.0
        sgd = partial(torch.optim.SGD, momentum=s.rest_momentum, nesterov=s.rest_momentum > 0,
                      fused=self.device.type == "cuda")
        self.rest = Adam(groups, betas=(s.rest_momentum, 0.95)) if s.rest == "adam" else sgd(groups)
        self.groups = [*self.matrices.param_groups, *self.rest.param_groups]
        for group in self.groups:
            group["initial_lr"] = group["lr"]

    def rates_at(self, step: int) -> list[float]:
        return [group["initial_lr"] * group.get("scale", lr_scale)(step, self.s) * warmed_up(step, self.s)
                for group in self.groups]

    def prepare(self) -> None:
        """What takes time once: compile kernels, capture graphs, and on a GPU a whole run."""
        self.reset(self.s.seed)
        self.look(self.s.seed)
        others = [one for one in (*self.matrices.optimizers, self.rest) if not isinstance(one, torch.optim.SGD)]
        whole = all(getattr(one, "capturable", False) for one in others)
        if self.graph == "step" and not whole:
            raise SettingsError(f"--graph step: --optimizer {self.s.optimizer} with --rest {self.s.rest} cannot be "
                                "captured; use --graph auto")
        if self.graph == "auto":
            self.graph = "step" if whole else "gradients"
        if self.graph == "step":
            table = [self.rates_at(step) for step in range(self.s.steps)]
            self.schedule = torch.tensor(table, dtype=torch.float32, device=self.device)
            self.rates = self.schedule[0].clone()
            for group, rate in zip(self.groups, self.rates):
                group["lr"] = rate  # a 0-D tensor, so that it can move under a graph
        self.work, self.grads, work = {}, {}, self.whole_step if self.graph == "step" else self.gradients
        # Graphs may share memory: of what one leaves there, others need the gradients alone, which live on here.
        pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        for train_bias in (True, False):
            one = partial(work, train_bias)
            self.work[train_bias] = one if self.graph == "none" else captured(one, self.step.zero_, pool)
            self.grads[train_bias] = [p.grad for p in self.params]
        self.net.eval()
        self.evaluation = self.evaluate if self.graph == "none" else captured(self.evaluate, pool=pool)
        self.net.train()
        if self.device.type == "cuda":
            self.run(self.s.seed)

    def look(self, seed: int) -> None:
        """The first look at the images: whitening; and the order in which they come."""
        s = self.s
        self.net.whitening.copy_(whitening_filters(self.images[:WHITEN_IMAGES]))
        self.table.copy_(training_table(seed, images=s.train_images, batch=s.batch_size, epochs=s.epochs,
                                        translate=s.translate, cutout=s.cutout, size=cifar10.SIZE, device=self.device))

    def reset(self, seed: int) -> None:
        """Everything as before the first step."""
        self.net.reset(seed)
        self.step.zero_()
        if self.rates is None:
            self.make_optimizers()
            return
        for one in (*self.matrices.optimizers, self.rest):  # a graph knows where their state is
            for value in (value for state in one.state.values() for value in state.values() if value is not None):
                value.zero_()

    def run(self, seed: int, progress=lambda step, seconds: None) -> Result:
        """Train from the beginning and test. progress: called after each step, on a CPU only."""
        s = self.s
        self.reset(seed)
        began, marks = self.now(), [self.mark()]
        self.look(seed)
        marks.append(self.mark())
        for step in range(s.steps):
            train_bias = step < s.whiten_steps
            if self.graph == "gradients" and step in (0, s.whiten_steps):
                for p, gradient in zip(self.params, self.grads[train_bias]):
                    p.grad = gradient  # where this graph leaves it
            self.work[train_bias]()
            if self.graph != "step":
                for group, rate in zip(self.groups, self.rates_at(step)):
                    group["lr"] = rate
                self.update()
            if self.device.type == "cpu":
                progress(step + 1, time.perf_counter() - began)
        marks.append(self.mark())
        self.net.eval()
        accuracy, test_loss = self.evaluation().tolist()
        seconds = time.perf_counter() - began
        self.net.train()
        marks.append(self.mark())
        self.now()
        if self.graph != "step":
            self.matrices.check_finite()
        losses = self.losses[: s.steps].tolist()
        if not all(map(math.isfinite, [*losses, test_loss])):
            bad = next((f"of step {i + 1} is {loss}" for i, loss in enumerate(losses) if not math.isfinite(loss)),
                       f"on the test images is {test_loss}")
            raise NonFiniteError(f"the loss {bad}; lower --lr, --head-lr or --bias-lr")
        spans = [end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
                 for begin, end in zip(marks, marks[1:])]
        phases = dict(zip(("whitening and draws", "training", "evaluation"), spans))
        return Result(accuracy, test_loss, seconds, phases, losses)

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """(accuracy, mean loss) on the test images, of the mean logits of their views (airbench's weights)."""
        s, n = self.s, self.s.test_images
        logits = self.logits(torch.cat(self.views[: min(s.views, 2)])).view(-1, n, cifar10.CLASSES).mean(0)
        count = math.ceil(s.views_for * n) if s.views == 6 else 0
        if count:
            first, second = logits.topk(2, dim=1).values.unbind(1)
            unsure = (first - second).topk(count, largest=False).indices
            shifted = torch.cat([view.index_select(0, unsure) for view in self.views[2:]])
            shifted = self.logits(shifted).view(4, count, cifar10.CLASSES).mean(0)
            logits = logits.index_copy(0, unsure, (logits[unsure] + shifted) / 2)
        right = (logits.argmax(1) == self.test_labels).double().mean()
        return torch.stack([right, F.cross_entropy(logits, self.test_labels).double()])

    def logits(self, table: Tensor) -> Tensor:
        return torch.cat([self.net(self.net.first_layer(self.test_images, rows, 0, False)).float()
                          for rows in table.split(TEST_BATCH)])

    def step_parts(self) -> dict[str, float]:
        """Milliseconds of the parts of one step, outside of graphs: on a GPU its own time, without waits for the host,
        as the kernels queue up behind a sleeping one."""
        self.reset(self.s.seed)
        for _ in range(3):
            self.now()
            if self.device.type == "cuda":
                torch.cuda._sleep(100_000_000)
            with stopwatch() as watch:
                self.gradients(train_bias=False)
                self.update()
        return {name: round(ms, 4) for name, ms in milliseconds(watch).items()}

    def now(self) -> float:
        """Seconds, after the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def mark(self):
        """A moment in the device's work."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


# ---------------------------------------------------------------------------------------------------------------------
# Runs and their records


def pick_device(s: Settings) -> torch.device:
    if s.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda, but torch finds no GPU: look at nvidia-smi, or use --device cpu")
    device = torch.device("cuda" if s.device != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and s.dtype != "float32":
        raise SettingsError(f"--dtype {s.dtype} is for GPUs: on a CPU use --dtype float32, or --preset local")
    if device.type == "cpu" and s.graph in ("step", "gradients"):
        raise SettingsError(f"--graph {s.graph} is for GPUs: on a CPU leave it out")
    return device


def open_data(s: Settings) -> tuple[cifar10.Images, cifar10.Images]:
    if s.source == "synthetic":
        return cifar10.synthetic(s.train_images, s.test_images)
    cifar10.ensure(s.data)
    return cifar10.load(s.data)


def one_run(trainer: Trainer, s: Settings, seed: int, root, name: str, facts: dict) -> Result:
    """Train once and leave a record of it in `root`. facts: what the process found out before, for the record."""
    record = Record(root, track=s.track, name=name, target=s.target, steps=s.steps, seed=seed, config=asdict(s),
                    script=Path(__file__), repository=REPOSITORY, device=str(trainer.device))
    record.data(facts["data"])
    record.line(route_table(route(trainer.net)))
    record.line(f"seed {seed} on {trainer.device.type}, CUDA graph: {trainer.graph}")
    with failures_in(record, partial(explain, s=s)):
        result = trainer.run(seed, record.progress)
    value = result.accuracy if metric_of(s.track) == "accuracy" else result.test_loss
    record.validation(s.steps, value, result.seconds, s.steps * s.batch_size)
    record.line(table(summarise([result], facts)))
    peak = torch.cuda.max_memory_allocated() if trainer.device.type == "cuda" else None
    extra = {"test accuracy": result.accuracy, "test loss": result.test_loss,
             "first losses": [round(loss, 5) for loss in result.losses[:10]],
             "phases_s": {name: round(seconds, 4) for name, seconds in result.phases.items()},
             "step_parts_ms": facts["step_parts_ms"], "start_s": {"to the first run": round(facts["start_s"], 1)}}
    record.finish(peak_memory_bytes=peak, extra=extra)
    return result


def summarise(results: list[Result], facts: dict) -> dict:
    """Accuracy, time and where it went, of one run or many."""
    found = {"runs": len(results), **{key: facts[key] for key in ("start_s", "step_parts_ms")}}
    for key in ("accuracy", "seconds"):
        found[key] = spread([getattr(result, key) for result in results])
    phases = {name: statistics.fmean(result.phases[name] for result in results) for name in results[0].phases}
    return found | {"phases_s": phases}


def table(found: dict) -> str:
    """What `summarise` found, for people."""
    lines = [f"{found['runs']} run{'s' * (found['runs'] > 1)}, the first {found['start_s']:.1f} s after the start"]
    for key in ("accuracy", "seconds"):
        each = found[key]
        more = "" if each["sd"] is None else f", sd {each['sd']:.5f}, {each['min']:.4f} to {each['max']:.4f}"
        lines.append(f"{key:10} {each['mean']:.5f}{more}")
    lines += [f"  {name:28} {1000 * seconds:9.2f} ms" for name, seconds in found["phases_s"].items()]
    lines += [f"  {name:28} {ms:9.3f} ms a step, outside of graphs" for name, ms in found["step_parts_ms"].items()]
    return "\n".join(lines)


def train(s: Settings) -> None:
    device = pick_device(s)
    train_set, test_set = open_data(s)
    torch.backends.cudnn.benchmark = True
    trainer = Trainer(s, device, train_set, test_set)
    trainer.prepare()
    facts = {"data": train_set.sha256 | test_set.sha256, "step_parts_ms": trainer.step_parts()}
    facts["start_s"] = time.perf_counter() - BEGAN
    if s.runs == 1:
        one_run(trainer, s, s.seed, s.records, s.name, facts)
        return
    series = Series(s.records, track=s.track, name=s.name, target=s.target, runs=s.runs, first_seed=s.seed,
                    script=Path(__file__), repository=REPOSITORY, gpu="0" if device.type == "cuda" else None)
    results = []
    for planned in series.schedule:
        with series.run(planned) as (place, name), redirect_stdout(io.StringIO()):
            results.append(one_run(trainer, s, planned["seed"], place, name, facts))
        last, found = results[-1], summarise(results, facts)
        print(f"run {len(results)}/{s.runs} seed {planned['seed']}: {last.accuracy:.4f} in {last.seconds:.3f} s; mean "
              f"{found['accuracy']['mean']:.5f} in {found['seconds']['mean']:.4f} s", flush=True)
    series.finish(found)
    print(table(found))


def explain(error: Exception, s: Settings) -> str | None:
    """What a user can do about `error`; None for a mistake of ours, whose traceback is for whoever mends it."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory: lower --batch-size (now {s.batch_size})"
    return str(error) if isinstance(error, (DataError, SettingsError, RecordError, NonFiniteError)) else None


def main(argv: list[str] | None = None) -> None:
    s = parse(Settings, sys.argv[1:] if argv is None else argv, presets=PRESETS, program="train_cifar.py",
              description=__doc__.split("\n")[0], default_preset="94" if torch.cuda.is_available() else "local")
    if os.environ.get("RANK", "0") != "0":
        return  # one of the processes that torchrun starts for further GPUs: this trains on one
    end_on_signal(lambda: f"interrupted; what was measured so far is in {s.records}/{s.track}")
    try:
        train(s)
    except Exception as error:
        if explain(error, s) is None:
            raise
        print(f"train_cifar.py: {explain(error, s)}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
