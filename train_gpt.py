"""Train a GPT on a folder of token shards, against the clock, to a target validation loss.

    torchrun --nproc_per_node=8 train_gpt.py          the FineWeb record run (preset `record`)
    python train_gpt.py --preset wiki                  one GPU, 125M tokens of the wiki benchmark shards
    python train_gpt.py --preset local                 no GPU, no network: a small byte-level GPT on Python's sources
    python train_gpt.py --help                         every setting

Result of the preset `wiki`: a validation loss of 3.3183 after 89.6 s of training on one NVIDIA H200, mean of n = 4 runs
(standard deviations 0.0032 and 0.1 s; torch 2.11, triton 3.6; records/wiki-3.324/2026-11-28_214053_speedrun-1270); each
ends below the target of 3.324, which modded-nanogpt's code reaches on the same data and kind of GPU after 127.3 s. What
each part is worth: records/studies/gpt-parts. The FineWeb run on 8 GPUs: not yet measured.

One file, one story: settings, schedules, attention, model, training, runs. The same run on 1, 2, 4 or 8 GPUs sees the
same batches; fewer GPUs accumulate gradients. Ideas from modded-nanogpt, which are credited where they are used:
https://github.com/KellerJordan/modded-nanogpt
"""

import itertools
import math
import os
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data import fineweb, local_text, shards
from data.shards import Batch, DataError, TrainLoader, document_token, validation_batches
from kernels import attention as fused
from kernels import why_not
from kernels.add_rows import add_rows, add_rows_eager
from kernels.cross_entropy import MOST_SCALE, softcapped_cross_entropy
from kernels.relu_squared import relu_squared_mlp, relu_squared_mlp_eager
from optim import OPTIMIZERS, POLARS, NonFiniteError, budgets, get_optimizer, route, route_table
from optim.parts import part
from optim.probe import probe
from records.log import Record, RecordError, end_on_signal
from records.profile import model_flops, profile_step, report
from records.series import Series, failures_in, spread
from records.settings import SettingsError, check, option, parse

REPOSITORY = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass
class Settings:
    """The defaults are the FineWeb record run; PRESETS holds the others."""

    preset: str = "record"
    track: str = option("fineweb-3.28", "which leaderboard the record belongs to: its folder under --records")
    name: str = option("gpt", "what to call this run: letters, digits, '.', '_', '-'")
    target: float | None = option(3.28, "validation loss to reach, nats per token", least=0)
    records: str = option("records", "folder in which the record is written")
    seed: int = option(0, "seed of initial weights and order of the data; further runs take the next ones", least=0)
    runs: int = option(1, "runs in this process; more than one make an experiment with a ledger", least=1, most=10000)
    device: str = option("auto", "auto takes a GPU if there is one", choices=("auto", "cuda", "cpu"))
    dtype: str = option("bfloat16", "of activations; weights stay float32", choices=("bfloat16", "float32"))
    compile: bool = option(True, "torch.compile")
    # data
    data: str = option("data/fineweb10B", "folder of token shards")
    source: str = option("fineweb", "what fills a missing --data folder", choices=("fineweb", "local", "none"))
    vocab_size: int = option(50257, "of the tokenizer; its last id starts every document", least=2, most=65536)
    sequence_length: int = option(16384, "tokens in a sequence: whole documents, the last one cut", least=1)
    max_document: int = option(2048, "longer documents are cut into pieces of this many tokens", least=1)
    val_tokens: int = option(10485760, "validation runs on the first so many tokens of the val shards", least=1)
    val_every: int = option(125, "steps between validations; the last step always validates", least=1)
    # model
    layers: int = option(12, "transformer blocks", least=1)
    heads: int = option(6, "attention heads", least=1)
    width: int = option(768, "residual stream; 4 × width in the MLPs", least=1)
    value_embeddings: int = option(3, "embeddings added to the values of the first and last so many blocks", least=0)
    bigram: int = option(251520, "rows of the embedding of a token with the one before it, hashed; 0: none",
                         least=0, most=2**31)
    key_shift: bool = option(True, "in blocks of the whole window, half of a key is that of the token before")
    attention_gates: str = option("wide", "a gate for each head's output: in no block, in those of the whole window, "
                                  "in all", choices=("none", "wide", "all"))
    value_gates: bool = option(True, "a gate for each head's value embedding")
    logit_cap: str = option("23,5,7.5", "A, B, C: logits become A · sigmoid((logit + B) / C), at most A apart")
    head_precision: str = option("fp8", "of the head's products: bfloat16 is --dtype; fp8 needs a GPU",
                                 choices=("bfloat16", "fp8"))
    window: int = option(1664, "tokens that attention looks back over in the end, in every fourth and the last block",
                         least=2)
    short_window: int | None = option(768, "the same in the other blocks; none: half of --window", least=1)
    window_start: int | None = option(384, "--window of the first steps; none: an eighth of it", least=2)
    # training
    steps: int = option(1300, "optimizer steps", least=1)
    batch_tokens: int = option(393216, "tokens in a step, over all GPUs", least=1)
    batch_schedule: str = option("1,2,3", "sizes of the batch in equal parts of the run, such as 1,2,3; the last is "
                                "batch_tokens")
    batch_lr_power: float = option(0.5, "learning rates fall with smaller batches, to this power of the size", least=0)
    device_batch_tokens: int = option(65536, "tokens at once on a GPU; lower it if memory runs out", least=1)
    optimizer: str = option("turbo-muon-5", "for the matrices; Adam takes the rest", choices=tuple(OPTIMIZERS))
    polar: str | None = option(None, "how it orthogonalises; none: in the optimizer's own way", choices=tuple(POLARS))
    engine: str = option("auto", "orthogonalise with the fused kernels (auto: where they run) or in plain torch",
                         choices=("auto", "fused", "eager"))
    lr: float = option(0.04, "of the matrices", least=0)
    weight_decay: float = option(0.048, "of the matrices, decoupled: times lr in each step, and scheduled like it",
                                 least=0)
    cautious: bool = option(False, "weight decay only where it does what the update does")
    row_normalize: bool = option(True, "NorMuon: rows of the matrices' updates have one size over time")
    momentum: float = option(0.95, "of the matrices, after --momentum-warmup steps from 0.85", least=0, most=0.9999)
    momentum_warmup: int = option(300, "steps", least=0)
    momentum_cooldown: int = option(50, "steps over which the momentum falls to 0.85 in the end; where it still rises, "
                                   "the lower of both counts", least=0)
    embedding_lr: float = option(0.3, "Adam, for token and value embeddings", least=0)
    head_lr: float = option(0.014, "Adam, for the output head", least=0)
    scalar_lr: float = option(0.015, "Adam, for the mixing weights of blocks", least=0)
    adam_beta1: float = option(0.8, "Adam's decay of mean gradients; 0.95 for their squares", least=0, most=0.9999)
    cooldown: float = option(0.6, "learning rates fall linearly over this last fraction of training", least=0, most=1)
    final_lr: float = option(0.15, "fraction of the learning rates that the cooldown ends at", least=0, most=1)
    # what else to keep
    profile: bool = option(False, "after the last step of the last run, time the parts and kernels of further ones, of "
                           "each stage: table, FLOPs and profile.png in the record")
    probe: bool = option(False, "at each validation, off the clock: condition and error of momentum, update and weight "
                         "by operator type, into the record")
    wandb: str | None = option(None, "log to Weights & Biases in this group of runs; offline without a login")

    def __post_init__(self):
        check(self)
        if self.device_batch_tokens < self.sequence_length:
            raise SettingsError(f"--device-batch-tokens {self.device_batch_tokens} is less than one sequence: "
                                f"at least --sequence-length {self.sequence_length}")
        if self.width % (4 * self.heads):
            raise SettingsError(f"--width {self.width} must be a multiple of 4 × --heads {self.heads} (rotary pairs)")
        if not 0 <= 2 * self.value_embeddings <= self.layers:
            raise SettingsError(f"--value-embeddings {self.value_embeddings} needs at least twice as many --layers, "
                                f"not {self.layers}")
        if min(self.numbers("batch_schedule")) <= 0:
            raise SettingsError(f"--batch-schedule {self.batch_schedule}: sizes of a batch must be more than 0")
        if self.optimizer == "adamw" and (self.polar or self.cautious or self.row_normalize):
            raise SettingsError("--polar, --cautious and --row-normalize need an --optimizer that leaves the matrices "
                                "to Muon, not adamw")
        cap = self.numbers("logit_cap")
        if len(cap) != 3 or not 0 < cap[0] <= MOST_SCALE or not cap[2] > 0:
            raise SettingsError(f"--logit-cap {self.logit_cap} must be three numbers A,B,C with 0 < A <= "
                                f"{MOST_SCALE:g} (or exp underflows) and C > 0")
        for setting in ("short_window", "window_start"):
            if (getattr(self, setting) or 0) > self.window:
                raise SettingsError(f"--{setting.replace('_', '-')} {getattr(self, setting)} must be at most --window "
                                    f"{self.window}")

    def numbers(self, setting: str) -> list[float]:
        """What a setting says that holds numbers with commas between them."""
        text = getattr(self, setting)
        with suppress(ValueError):
            numbers = [float(number) for number in text.split(",")]
            if all(map(math.isfinite, numbers)):
                return numbers
        raise SettingsError(f"--{setting.replace('_', '-')} {text!r} expects numbers with commas between, such as "
                            f"{getattr(type(self), setting)}")

    def batch_sizes(self) -> list[int]:
        """Tokens in a step, for each of the equal parts of the steps."""
        sizes = self.numbers("batch_schedule")
        return [round(self.batch_tokens * size / sizes[-1]) for size in sizes]

    def sequences_at_once(self, setting: str, world_size: int, most: int | None = None) -> int:
        """Sequences of a pass when `world_size` processes share the tokens of `setting` in as few passes as fit; all
        batches of a schedule take passes of one size, because each size is compiled anew."""
        most, share = most or self.device_batch_tokens // self.sequence_length, 0
        for tokens in self.batch_sizes() if setting == "batch_tokens" else [getattr(self, setting)]:
            sequences, rest = divmod(tokens, self.sequence_length)
            if rest or sequences % world_size or not sequences:
                part = f" (of --batch-schedule {self.batch_schedule})" if tokens != getattr(self, setting) else ""
                raise SettingsError(f"--{setting.replace('_', '-')} {tokens}{part} must be a multiple of "
                                    f"{world_size * self.sequence_length}: {world_size} processes × --sequence-length "
                                    f"{self.sequence_length}; or change --nproc_per_node")
            share = math.gcd(share, sequences // world_size)
        return max(size for size in range(1, min(share, most) + 1) if share % size == 0)


PRESETS = {
    "record": {},  # 8 GPUs, FineWeb to 3.28: not yet measured
    "wiki": dict(track="wiki-3.324", target=3.324, data="data/wiki", source="none", val_tokens=2097152, val_every=305,
                 layers=8, width=512, heads=4, window=1024, short_window=384, window_start=256, steps=1270,
                 batch_tokens=131072, batch_schedule="1,2", lr=0.035, momentum_warmup=150, momentum_cooldown=100,
                 embedding_lr=0.45, head_lr=0.01),
    "local": dict(track="text-local", target=None, data="data/local", source="local", vocab_size=257, dtype="float32",
                  compile=False, sequence_length=1024, max_document=1024, val_tokens=65536, val_every=75, layers=4,
                  heads=4, width=128, value_embeddings=2, bigram=8192, head_precision="bfloat16", window=128,
                  short_window=None, window_start=None, steps=450, batch_tokens=2048, batch_schedule="1",
                  device_batch_tokens=4096, momentum_warmup=50, lr=0.022),
}

# ---------------------------------------------------------------------------------------------------------------------
# Schedules: plain functions of the step


def batch_at(step: int, s: Settings) -> int:
    """Tokens in `step` (0 is the first). Small batches serve while the loss falls fast (modded-nanogpt)."""
    sizes = s.batch_sizes()
    return sizes[min(step, s.steps - 1) * len(sizes) // s.steps]


def tokens_before(step: int, s: Settings) -> int:
    return sum(batch_at(earlier, s) for earlier in range(step))


def lr_scale(step: int, s: Settings) -> float:
    """Fraction of the learning rates at `step`: constant, then linear down to final_lr; less for smaller batches."""
    left = (s.steps - step) / s.steps
    cooled = 1.0 if left >= s.cooldown else s.final_lr + (1 - s.final_lr) * left / s.cooldown
    return cooled * (batch_at(step, s) / s.batch_tokens) ** s.batch_lr_power


def momentum_at(step: int, s: Settings) -> float:
    """Muon's momentum: 0.85 at first, when gradients turn fast, then `momentum`, and 0.85 again in the end
    (modded-nanogpt)."""
    reached = min(1.0, step / s.momentum_warmup if s.momentum_warmup else 1.0,
                  (s.steps - step) / s.momentum_cooldown if s.momentum_cooldown else 1.0)
    return (1 - reached) * min(0.85, s.momentum) + reached * s.momentum


def first_window(s: Settings) -> int:
    return max(2, s.window // 8) if s.window_start is None else s.window_start


def windows_at(step: int, s: Settings) -> tuple[int, int]:
    """Tokens that attention looks back over in most blocks, and in the others. Both grow in eight steps.

    Short windows first cost less and lose nothing while the model learns short contexts (modded-nanogpt).
    """
    grown = -(-8 * (min(step, s.steps - 1) + 1) // s.steps) - 1  # 0 … 7
    window = first_window(s) + (s.window - first_window(s)) * grown // 7
    return window // 2 if s.short_window is None else max(1, window * s.short_window // s.window), window


def stages(s: Settings) -> list[tuple[list[int], str]]:
    """Stretches of steps that do the same work, as long as they are: the steps, and which work."""

    def work(step: int) -> str:
        return f"{batch_at(step, s)} tokens, windows {' and '.join(map(str, windows_at(step, s)))}"

    return [(list(steps), same) for same, steps in itertools.groupby(range(s.steps), work)]


# ---------------------------------------------------------------------------------------------------------------------
# Attention over a stream of documents: causal, within a document, within a window


SCALE = 0.12  # of scores, products of q and k of root mean square 1


def most_score(s: Settings) -> float:
    """What no score exceeds: q and k have the size √head_dim, and a shifted key is of two halves of such."""
    return 1.02 * SCALE * s.width / s.heads * (2**0.5 if s.key_shift else 1)  # 1.02: rounding to bfloat16


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int, bound: float) -> Tensor:
    """q, k, v and result (tokens, heads, head_dim). Token i sees j with i − window < j ≤ i in its own document.

    documents (2, tokens) int32: where the document of each token begins and ends (kernels/attention.py, `bounds`).
    bound: at least the size of every score. Half precision on a GPU takes that file's kernels; everything else
    `blockwise_attention`, which computes the same.
    """
    if q.is_cuda and q.dtype != torch.float32:
        return fused.attention(q, k, v, documents, window, scale=SCALE, bound=bound)
    return blockwise_attention(q, k, v, documents, window)


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int) -> Tensor:
    """As `attention`, in dense torch: blocks of `window` queries see the keys of their own and the previous block."""
    tokens, heads, head_dim = q.shape
    blocks = -(-tokens // window)
    document = F.pad(documents[0], (0, blocks * window - tokens), value=-1).view(blocks, window)

    def in_blocks(x: Tensor) -> Tensor:  # (blocks, heads, window, head_dim)
        return F.pad(x, (0, 0, 0, 0, 0, blocks * window - tokens)).view(blocks, window, heads, head_dim).transpose(1, 2)

    def with_previous(x: Tensor, dim: int) -> Tensor:
        return torch.cat([torch.roll(x, 1, dims=0), x], dim=dim)

    place = torch.arange(2 * window, device=q.device)
    distance = place[window:, None] - place[None, :]  # (window, 2 window) from query to key
    mask = (distance >= 0) & (distance < window) & (document[:, :, None] == with_previous(document, 1)[:, None, :])
    mask[0, :, :window] = False  # the first block has no previous one
    mask |= distance == 0  # padding sees itself, so that no softmax is empty
    k, v = with_previous(in_blocks(k), 2), with_previous(in_blocks(v), 2)
    y = F.scaled_dot_product_attention(in_blocks(q), k, v, attn_mask=mask[:, None], scale=SCALE)
    return y.transpose(1, 2).reshape(blocks * window, heads, head_dim)[:tokens]


# ---------------------------------------------------------------------------------------------------------------------
# Model


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def starts(documents: Tensor) -> Tensor:
    """(tokens,) bool: does a document start here?"""
    return documents[0] == torch.arange(documents.size(1), device=documents.device)


class LookUp(torch.autograd.Function):
    """model.rows_of(table, rows), whose gradient is added to table.grad where it lies. Autograd would make a gradient
    of the whole table in every pass and add that: 16 bytes for each of some 300M parameters."""

    @staticmethod
    def forward(ctx, table: Tensor, rows: Tensor, model) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.table, ctx.model = table, model
        return model.rows_of(table, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if ctx.table.grad is None:
            ctx.table.grad = torch.zeros_like(ctx.table)
        ctx.model.add_to_rows(ctx.table.grad, *ctx.saved_tensors, grad)
        return None, None, None


class Linear(nn.Linear):
    """No bias; float32 weight, product in the dtype of the input. Uniform with a standard deviation of ½ / √inputs."""

    def __init__(self, inputs: int, outputs: int, zero: bool = False):
        self.zero = zero
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self):
        bound = 0.0 if self.zero else 0.5 * (3 / self.in_features) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    """Rotary position embedding (arXiv 2104.09864); the slow half of the frequencies is 0, which leaves those
    dimensions free of position (modded-nanogpt)."""

    def __init__(self, head_dim: int, sequence_length: int):
        super().__init__()
        turning = head_dim // 4
        frequency = torch.cat([(1 / 1024) ** torch.linspace(0, 1, turning), torch.zeros(head_dim // 2 - turning)])
        angle = torch.outer(torch.arange(sequence_length, dtype=torch.float32), frequency)
        for name, first, second in (("cos", angle.cos(), angle.cos()), ("sin", angle.sin(), -angle.sin())):
            self.register_buffer(name, torch.cat([first, second], dim=1)[None, :, None, :], persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (sequences · length, heads, head_dim)
        halves = x.float().view(-1, self.cos.size(1), *x.shape[1:])
        turned = halves * self.cos + halves.roll(x.size(-1) // 2, -1) * self.sin  # rolled: compiles into one kernel
        return turned.view(x.shape).to(x.dtype)


class Gate(nn.Module):
    """Factors that start at 1, (tokens, outputs): 2 · sigmoid of a linear map of a token's first channels. Cheap, as a
    gate of all channels is not (modded-nanogpt)."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.channels = min(12, width)
        self.weight = nn.Parameter(torch.zeros(outputs * self.channels))  # a vector, because it is not for Muon

    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.sigmoid(F.linear(x[:, :self.channels], self.weight.view(-1, self.channels).to(x.dtype)))


class Attention(nn.Module):
    """value_embedding: as in Block. gated: has each head's output a gate? shift: the half of a key without position is
    that of the token before, so one layer finds what followed a token (modded-nanogpt)."""

    def __init__(self, s: Settings, rotary: Rotary, value_embedding: bool, gated: bool, shift: bool):
        super().__init__()
        self.heads, self.rotary, self.bound = s.heads, rotary, most_score(s)
        self.q, self.k, self.v = (Linear(s.width, s.width) for _ in range(3))
        self.o = Linear(s.width, s.width, zero=True)
        self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5])) if value_embedding else None
        self.value_gate = Gate(s.width, s.heads) if value_embedding and s.value_gates else None
        self.gate = Gate(s.width, s.heads) if gated else None
        still = torch.arange(s.width // s.heads) % (s.width // s.heads // 2) >= s.width // s.heads // 4
        self.register_buffer("shifted", still if shift else None, persistent=False)

    def forward(self, x: Tensor, value: Tensor | None, documents: Tensor, window: int) -> Tensor:
        weight = torch.cat([self.q.weight, self.k.weight, self.v.weight]).to(x.dtype)  # one product instead of three
        q, k, v = F.linear(x, weight).view(x.size(0), 3, self.heads, -1).unbind(1)  # (tokens, heads, head_dim)
        if value is not None:
            mix = self.value_mix.to(x.dtype)
            value = value.view_as(v)
            if self.value_gate is not None:
                value = self.value_gate(x)[:, :, None] * value
            v = mix[0] * v + mix[1] * value
        q, k = self.rotary(norm(q)), self.rotary(norm(k))
        if self.shifted is not None:
            k = torch.where(self.shifted & ~starts(documents)[:, None, None], k.roll(1, 0), k)
        y = attention(q, k, v, documents, window, self.bound)
        if self.gate is not None:
            y = y * self.gate(x)[:, :, None]
        return self.o(y.reshape(x.shape))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = Linear(width, 4 * width), Linear(4 * width, width, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        mlp = relu_squared_mlp if x.is_cuda and x.dtype != torch.float32 else relu_squared_mlp_eager
        return mlp(x, self.up.weight, self.down.weight)  # ReLU², arXiv 2109.08668


class Block(nn.Module):
    """x: residual stream; x0: the embedding it began with. value_embedding: is there one? wide: has it the whole
    window?"""

    def __init__(self, s: Settings, rotary: Rotary, value_embedding: bool, wide: bool):
        super().__init__()
        gated = s.attention_gates in ("all", "wide" if wide else "all")
        self.attention = Attention(s, rotary, value_embedding, gated, s.key_shift and wide)
        self.mlp = MLP(s.width)
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0]))  # of the two streams

    def forward(self, x: Tensor, x0: Tensor, value: Tensor | None, documents: Tensor, window: int) -> Tensor:
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attention(norm(x), value, documents, window)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Decoder-only transformer: rotary, QK-norm, ReLU², value embeddings shared by the first and the last blocks,
    untied head with vocabulary padded to 128, softcapped logits (modded-nanogpt)."""

    def __init__(self, s: Settings):
        super().__init__()
        padded = -(-s.vocab_size // 128) * 128
        self.dtype, self.cap, self.compiled = getattr(torch, s.dtype), tuple(s.numbers("logit_cap")), False
        self.precision = s.head_precision
        rotary = Rotary(s.width // s.heads, s.sequence_length)
        self.tokens = nn.Embedding(padded, s.width)
        self.values = nn.ModuleList(nn.Embedding(padded, s.width) for _ in range(s.value_embeddings))
        self.value_of = {i: i for i in range(s.value_embeddings)}
        self.value_of |= {s.layers - s.value_embeddings + i: i for i in range(s.value_embeddings)}
        self.wide = {i for i in range(s.layers) if i % 4 == 3} | {s.layers - 1}
        self.blocks = nn.ModuleList(Block(s, rotary, i in self.value_of, i in self.wide) for i in range(s.layers))
        self.head = Linear(s.width, padded, zero=True)
        self.document = document_token(s.vocab_size)
        self.bigram = nn.Embedding.from_pretrained(torch.zeros(s.bigram, s.width), freeze=False) if s.bigram else None

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def forward(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor, windows: tuple[int, int]) -> Tensor:
        """Mean cross entropy, () float32, nats per token.

        tokens, targets (sequences, length) int64; cu_seqlens (documents + 1,) int32: where documents begin in their
        flattened stream, and the end; windows: of most blocks and of the wide ones.
        """
        documents = fused.bounds(cu_seqlens, tokens.numel())
        x0, values = self.embed(tokens.flatten(), documents)
        x = x0.view_as(x0)  # one tensor given twice would compile the first block anew
        for i, block in enumerate(self.blocks):
            value = values[self.value_of[i]] if i in self.value_of else None
            x = block(x, x0, value, documents, windows[i in self.wide])
        return self.loss(x, targets.flatten())

    def embed(self, tokens: Tensor, documents: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The stream before the first block, and embeddings for the values."""
        x, bigram = LookUp.apply(self.tokens.weight, tokens, self), None
        if self.bigram is not None:
            bigram = LookUp.apply(self.bigram.weight, self.pair_rows(tokens, documents), self)
        return self.first(x, bigram), [LookUp.apply(v.weight, tokens, self) for v in self.values]

    def rows_of(self, table: Tensor, rows: Tensor) -> Tensor:
        return F.embedding(rows, table).to(self.dtype)

    def add_to_rows(self, table: Tensor, rows: Tensor, x: Tensor) -> None:
        (add_rows if table.is_cuda else add_rows_eager)(table, rows, x.contiguous())

    def pair_rows(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """Rows in the bigram embedding (modded-nanogpt). 32 bits of a hash of both tokens (Knuth's multiplication by
        2³² / golden ratio, then a step of MurmurHash3's finaliser), scaled; what overflows int64 is masked away."""
        before = torch.where(starts(documents), self.document, tokens.roll(1))
        mixed = (before << 16 | tokens) * 2654435769 & 0xFFFFFFFF
        return ((mixed ^ mixed >> 15) * 2246822507 & 0xFFFFFFFF) * self.bigram.num_embeddings >> 32

    def first(self, x: Tensor, bigram: Tensor | None) -> Tensor:
        """The stream of embeddings of tokens and, if there are any, of each token with the one before it."""
        return norm(x) if bigram is None else norm(x) + bigram

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of softcapped logits, targets (tokens,)."""
        return softcapped_cross_entropy(norm(x), self.head.weight, targets, cap=self.cap, precision=self.precision)

    def compile_parts(self) -> None:
        """torch.compile by parts: blocks of one kind share a graph, so compiling takes seconds and not minutes."""
        torch._dynamo.config.recompile_limit = 64  # kinds of block × training or validation × fixed or symbolic window
        self.compiled = True
        for name in ("rows_of", "pair_rows", "first", "loss"):
            setattr(self, name, torch.compile(getattr(self, name), fullgraph=True))
        for block in self.blocks:
            block.compile(fullgraph=True)


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Clock:
    """Seconds of training: runs between start() and stop(), both after the device has finished its work."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.began = device, 0.0, None

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        self.began = self._now()

    def stop(self) -> float:
        self.seconds, self.began = self.seconds + self._now() - self.began, None
        return self.seconds

    def running(self) -> float:
        """An estimate that does not wait for the device."""
        return self.seconds + time.perf_counter() - self.began


@contextmanager
def process_group(device: torch.device):
    """torch.distributed for the processes that torchrun started: yields (rank, world size), (0, 1) without torchrun."""
    if "RANK" not in os.environ:
        yield 0, 1
        return
    gpu = device.type == "cuda"
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    yield dist.get_rank(), dist.get_world_size()
    dist.barrier()  # torchrun may end all ranks when the first one ends: let rank 0 finish the record
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are still in a collective


def pick_device(s: Settings) -> torch.device:
    if s.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda, but torch finds no GPU: look at nvidia-smi, or use --device cpu")
    cpu = s.device == "cpu" or not torch.cuda.is_available()
    obstacle = "it needs a GPU" if cpu else why_not(torch.device("cuda"))
    if s.head_precision == "fp8" and obstacle:
        raise SettingsError(f"--head-precision fp8: {obstacle}; use --head-precision bfloat16")
    if cpu:
        return torch.device("cpu")
    if s.dtype == "bfloat16" and s.width // s.heads not in fused.HEAD_DIMS:
        raise SettingsError(f"--width {s.width} and --heads {s.heads} make heads of {s.width // s.heads} channels: on "
                            f"a GPU expected one of {', '.join(map(str, fused.HEAD_DIMS))}")
    local_rank, processes = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > torch.cuda.device_count():
        raise SettingsError(f"{processes} processes for {torch.cuda.device_count()} GPUs: start at most "
                            f"--nproc_per_node={torch.cuda.device_count()}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def open_data(s: Settings, rank: int, world_size: int):
    """The training stream and this rank's validation batches; fills the folder first if `source` says how."""
    train_tokens = tokens_before(s.steps, s)
    train_shards = min(103, 1 + train_tokens // 80_000_000)  # of 100M tokens; sequences use about 88 %
    hint = {"fineweb": fineweb.command(s.data, train_shards), "local": f"python -m data.local_text {s.data}",
            "none": f"python -m data.tokenize_text TEXTS {s.data}"}[s.source]
    if s.source == "fineweb":
        fineweb.ensure(s.data, train_shards)
    elif s.source == "local":
        local_text.ensure(s.data)
    at_once = s.sequences_at_once("batch_tokens", world_size)
    val_at_once = s.sequences_at_once("val_tokens", world_size, most=at_once)  # not more: a new shape compiles anew
    shared = dict(sequence_length=s.sequence_length, max_document=s.max_document, vocab_size=s.vocab_size, rank=rank,
                  world_size=world_size, hint=hint)
    loader = TrainLoader(s.data, seed=s.seed, **shared)
    loader.require(train_tokens // s.sequence_length)
    validation = validation_batches(s.data, tokens=s.val_tokens, **shared,
                                    sequences_per_pass=val_at_once)
    return loader, validation


def make_optimizer(s: Settings, model: GPT):
    options = {name: value for name in ("polar", "cautious", "row_normalize")  # recipes may have their own
               if (value := getattr(s, name))}
    return get_optimizer(s.optimizer, route(model), lr=s.lr, weight_decay=s.weight_decay, momentum=s.momentum,
                         engine=s.engine, embedding_lr=s.embedding_lr, head_lr=s.head_lr, scalar_lr=s.scalar_lr,
                         adam_betas=(s.adam_beta1, 0.95), **options)


def set_schedule(optimizer, step: int, s: Settings) -> None:
    for group in optimizer.param_groups:
        for name in ("lr", "weight_decay"):
            group[name] = group["initial_" + name] * lr_scale(step, s)
        if "momentum" in group:
            group["momentum"] = momentum_at(step, s)


def pass_loss(model: GPT, batch: Batch, windows: tuple[int, int]) -> Tensor:
    """() float32 nats per token of one pass; backward may follow."""
    batch = batch.to(model.device)
    return model(batch.tokens, batch.targets, batch.cu_seqlens, windows)


def train_step(model: GPT, optimizer, batches, count: int, windows: tuple[int, int]) -> None:
    with part("forward and backward"):
        for _ in range(count):
            (pass_loss(model, next(batches), windows) / count).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def step_flops(model: GPT, batches, windows: tuple[int, int]) -> int:
    """Model FLOPs (records.profile) of a step of these batches. Gates are left out."""
    groups = route(model)
    parameters = sum(p.numel() for kind in ("matrix", "head") for _, p in groups[kind])
    attention = [(model.tokens.embedding_dim, windows[i in model.wide]) for i in range(len(model.blocks))]
    return sum(model_flops(parameters, batch.cu_seqlens, attention) for batch in batches)


PROFILED = 3  # steps of each stage


def profile_stages(s: Settings, model: GPT, optimizer, loader: TrainLoader, world_size: int):
    """Yields what profile_step finds in each stage. Runs after the training: the weights it changes nobody needs."""
    at_once, device = s.sequences_at_once("batch_tokens", world_size), model.device
    for steps, work in stages(s):
        windows = windows_at(steps[0], s)
        first, sequences = (tokens_at(steps[0], s) // s.sequence_length for tokens_at in (tokens_before, batch_at))
        count = sequences // world_size // at_once
        batches = [loader.batch(first, sequences, part, count) for part in range(count)]
        again = itertools.cycle([batch.pin() for batch in batches] if device.type == "cuda" else batches)
        yield dict(first_step=steps[0], steps=len(steps), work=work) | profile_step(
            lambda: train_step(model, optimizer, again, count, windows),
            step_flops(model, batches, windows), count=PROFILED, device=device)


def validate(model: GPT, batches, windows: tuple[int, int], world_size: int) -> float:
    """Mean loss over the validation tokens of all ranks."""
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    with torch.set_grad_enabled(model.compiled):  # without gradients everything would be compiled once more
        for batch in batches:
            total += pass_loss(model, batch, windows).detach()
    total /= len(batches)
    if world_size > 1:
        dist.all_reduce(total)
    return total.item() / world_size


def requests(s: Settings, world_size: int):
    """(first sequence, sequences of the step, part, parts) of all passes of the run, for TrainLoader.batch."""
    first, at_once = 0, s.sequences_at_once("batch_tokens", world_size)
    for step in range(s.steps):
        sequences = batch_at(step, s) // s.sequence_length
        passes = sequences // world_size // at_once
        yield from ((first, sequences, part, passes) for part in range(passes))
        first += sequences


def new_model(s: Settings, seed: int, device: torch.device) -> GPT:
    torch.manual_seed(seed)
    with torch.device(device):
        return GPT(s)


@torch.no_grad()
def reset(model: GPT, s: Settings, seed: int) -> None:
    """Everything in the model as in a new one of this seed, in place: what is compiled for it stays of use."""
    new = new_model(s, seed, model.device)
    for mine, its in zip((*model.parameters(), *model.buffers()), (*new.parameters(), *new.buffers()), strict=True):
        mine.copy_(its)
    model.zero_grad()


def warm_up(s: Settings, model: GPT, loader: TrainLoader, validation, world_size: int) -> None:
    """Compile and load everything the runs will need. They `reset` the weights that this changes."""
    optimizer, sequences = make_optimizer(s, model), batch_at(0, s) // s.sequence_length
    count = sequences // world_size // s.sequences_at_once("batch_tokens", world_size)
    for step in (0, s.steps):  # a second size of the windows makes it symbolic in what torch.compile makes
        windows, batches = windows_at(step, s), (loader.batch(0, sequences, part, count) for part in range(count))
        train_step(model, optimizer, batches, count, windows)
        validate(model, validation[:1], windows, world_size)


def one_run(s: Settings, seed: int, model: GPT, loader: TrainLoader, validation, world_size: int, record: Record,
            facts: dict) -> tuple[float, float]:
    """Train from the beginning: (validation loss, seconds). facts: what the process found out before, for `record`."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    reset(model, s, seed)
    optimizer = make_optimizer(s, model)
    for group in optimizer.param_groups:
        group |= {"initial_lr": group["lr"], "initial_weight_decay": group["weight_decay"]}
    for budget in budgets(optimizer):  # AMO's table goes into the log, too
        budget.say = record.line
    probes: dict[str, dict] = {}
    batches = loader.prefetch(requests(s, world_size), pin=device.type == "cuda")
    pass_tokens = s.sequences_at_once("batch_tokens", world_size) * s.sequence_length * world_size
    clock = Clock(device)
    clock.start()
    for step in range(s.steps + 1):
        windows = windows_at(step, s)
        if step % s.val_every == 0 or step == s.steps:
            seconds = clock.stop()
            optimizer.check_finite()
            loss = validate(model, validation, windows, world_size)
            record.validation(step, loss, seconds, tokens_before(step, s))
            if s.probe:
                probes[str(step)] = probe(optimizer, model)
            if not math.isfinite(loss):
                raise NonFiniteError(f"step {step}: the validation loss is {loss}; lower --lr or --embedding-lr")
            clock.start()
        if step == s.steps:
            break
        set_schedule(optimizer, step, s)
        train_step(model, optimizer, batches, batch_at(step, s) // pass_tokens, windows)
        record.progress(step + 1, clock.running())

    extra = {"optimizer": s.optimizer} | {"amo": budget.commitment for budget in budgets(optimizer)} | facts
    if s.probe:
        extra["probe"] = probes
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    if s.profile:
        table, extra["profile"] = report(profile_stages(s, model, optimizer, loader, world_size),
                                         torch.cuda.get_device_name(device) if device.type == "cuda" else None)
        record.line(table)
    record.finish(peak_memory_bytes=peak, extra=extra)
    return loss, seconds


def train(s: Settings, device: torch.device, rank: int, world_size: int, started: list[Path]) -> None:
    """All runs, one after the other. They share what no seed has a say in: files and their hashes, the model and what
    is compiled for it. started: gets the folder of what was measured."""
    loader, validation = open_data(s, rank, world_size)
    gpu = None if device.type == "cpu" else "0" if world_size == 1 else "all"
    series = Series(s.records, track=s.track, name=s.name, target=s.target, runs=s.runs, first_seed=s.seed,
                    script=Path(__file__), repository=REPOSITORY, gpu=gpu, processes=world_size, enabled=rank == 0)
    model, hashes, facts, results = None, {}, {}, []
    for planned in series.schedule:
        with series.run(planned) as (root, name):
            record = Record(root, track=s.track, name=name, target=s.target, steps=s.steps, seed=planned["seed"],
                            config=asdict(s), script=Path(__file__), repository=REPOSITORY, device=str(device),
                            enabled=rank == 0, wandb=s.wandb)
            started.append(series.ledger.folder if series.ledger else record.folder)
            with failures_in(record, partial(explain, s=s)):
                loader = loader.with_seed(planned["seed"])
                loader.require(tokens_before(s.steps, s) // s.sequence_length)
                if rank == 0:
                    files = loader.files_used + shards.shard_paths(s.data, "val")
                    hashes |= {path: shards.sha256(path) for path in files if path not in hashes}
                    record.data({path.name: hashes[path] for path in files})
                first = model is None
                if first:
                    model = new_model(s, planned["seed"], device)
                record.line(route_table(route(model)))
                record.line(f"seed {planned['seed']}, {in_passes(s, device, world_size)}")
                if first:
                    began = time.perf_counter()
                    if s.compile:
                        model.compile_parts()
                    warm_up(s, model, loader, validation, world_size)
                    record.line(f"compiled and warmed up in {time.perf_counter() - began:.1f} s")
                    if s.source == "local" and rank == 0:
                        facts["bigram loss"] = bigram_loss(s)
                this = replace(s, profile=s.profile and planned == series.schedule[-1])
                results.append(one_run(this, planned["seed"], model, loader, validation, world_size, record, facts))
        found = {"runs": len(results)} | dict(zip(("val_loss", "seconds"), map(spread, zip(*results))))
        if series.ledger:
            (loss, seconds), means = results[-1], [found[key]["mean"] for key in ("val_loss", "seconds")]
            print(f"run {len(results)}/{s.runs} seed {planned['seed']}: {loss:.5f} in {seconds:.3f} s; mean "
                  f"{means[0]:.5f} in {means[1]:.3f} s", flush=True)
    series.finish(found)


def in_passes(s: Settings, device: torch.device, world_size: int) -> str:
    """What a step is cut into, in words."""
    at_once = s.sequences_at_once("batch_tokens", world_size) * s.sequence_length
    passes = [size // (at_once * world_size) for size in s.batch_sizes()]
    return (f"{world_size} process{'es' * (world_size > 1)} on {device.type}, {', '.join(map(str, passes))} "
            f"pass{'es' * (max(passes) > 1)} of {at_once} tokens a step")


def bigram_loss(s: Settings) -> float:
    """Loss of a byte-bigram model of the whole training text on the same validation tokens: what a GPT must beat."""
    text = np.concatenate([shards.open_shard(path, s.vocab_size) for path in shards.shard_paths(s.data, "train")])
    val = shards.open_shard(shards.shard_paths(s.data, "val")[0], s.vocab_size)[: s.val_tokens + 1]
    return local_text.bigram_loss(text, val, s.vocab_size)


def explain(error: Exception, s: Settings) -> str | None:
    """What a user can do about `error`; None for a mistake of ours, whose traceback is for whoever mends it."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory: lower --device-batch-tokens (now {s.device_batch_tokens})"
    return str(error) if isinstance(error, (DataError, SettingsError, RecordError, NonFiniteError)) else None


def main(argv: list[str] | None = None) -> None:
    s = parse(Settings, sys.argv[1:] if argv is None else argv, presets=PRESETS, program="train_gpt.py",
              description=__doc__.split("\n")[0], default_preset="record" if torch.cuda.is_available() else "local")
    started: list[Path] = []  # the folder of what was measured, once there is one
    rank = int(os.environ.get("RANK", "0"))
    end_on_signal((lambda: f"interrupted; what was measured so far: {started[0] if started else 'nothing'}")
                  if rank == 0 else None)
    try:
        device = pick_device(s)
        for setting in ("batch_tokens", "val_tokens"):  # on every rank before any of them waits for the others
            s.sequences_at_once(setting, int(os.environ.get("WORLD_SIZE", "1")))
        with process_group(device) as (rank, world_size):
            train(s, device, rank, world_size, started)
        return
    except Exception as error:
        message = explain(error, s)
        if message is None:
            raise
        speaks = rank == 0 or isinstance(error, torch.OutOfMemoryError)  # the others meet all but this one, too
    if speaks:
        print(f"train_gpt.py: {message}", file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        time.sleep(0 if rank == 0 else 3)  # torchrun ends all ranks when the first one ends: let rank 0 speak
        os._exit(1)  # the usual way out may wait for ranks that are still in a collective
    sys.exit(1)


if __name__ == "__main__":
    main()
