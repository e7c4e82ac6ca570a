"""The tracks: which script races on which data to which target, and what it takes to have reached it.

A record belongs to the track that its `track` names; TRACKS holds those this repository knows. Any other name is a
track of somebody's own: its records are kept and compared like all others, but nothing says which data or which rule
it has, so no result on it counts as a target reached (`get_track` answers None).
"""
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rule:
    """When the runs of one recipe have reached the target: their mean is at or beyond it, p < alpha in a one-sided
    one-sample t-test, over every run that was declared, the failed ones included (those make it fail).

    alpha: float.  least_runs: int, how many runs there must be (2 is what the test itself needs).
    """
    alpha: float
    least_runs: int = 2

    def __str__(self):
        return f"the mean of at least {self.least_runs} runs is at or beyond the target at p < {self.alpha:g} " \
               "(one-sided t-test)"


@dataclass(frozen=True)
class Track:
    """script: file name.  metric: "val_loss" (nats per token, lower is better) or "accuracy" (fraction, higher is
    better): the key of a validation point and of its line in log.txt.  target: float, or None where there is none.
    rule: Rule, or None where there is no target.  data: dict of file name -> SHA-256, what is known of the data set;
    a name missing from it cannot be checked.  complete: whether `data` names every file of the data set.
    fixed: dict of setting -> value, without which the metric means something else.  hardware: what its times are on.
    """
    name: str
    script: str
    metric: str
    target: float | None
    rule: Rule | None
    hardware: str
    data: dict = field(default_factory=dict)
    complete: bool = False
    fixed: dict = field(default_factory=dict)

    @property
    def direction(self):
        """"down" where lower is better, "up" where higher is."""
        return DIRECTIONS[self.metric]


DIRECTIONS = {"val_loss": "down", "accuracy": "up"}

# The first validation shard of kjj0/fineweb10B-gpt2 at the revision that data/fineweb.py pins. Train shards are checked
# by that download against the Hub's hashes; a record names those of the shards it used.
FINEWEB = {"fineweb_val_000000.bin": "5b95c8e0966f0861685b307b23dc5ae42b228ef74b28cb499784ae021f201640"}

# 150M GPT-2 tokens of encyclopedic English in six train shards; the validation shard has 4,194,304 tokens.
WIKI = {
    "train_000001.bin": "145f6263536e5c27e1a4da744a0b834bb803eb288be773e40b852802c1f11376",
    "train_000002.bin": "11f5b0bf43e3b2a120a5ba849ead119af99f33044e5dce04440c6fdcad768d67",
    "train_000003.bin": "92caac04f95defcdba3324ebd9811b94ab8079295023b98ca353b695d2a17d4e",
    "train_000004.bin": "900eb6ce53eea1fcd808e1979d41a3609b0ac37a003f06566b2017198f3e3630",
    "train_000005.bin": "8c8dca3cfc5dd614c297e41ac46ec06108fee4db8144e2468916c0e9db281255",
    "train_000006.bin": "419f2be3d846aa067d10f50dbf940725d16c1daaad2c138c77ec705b64cfe139",
    "val_000000.bin": "5c48b0878643231534b3bb4f5db8f2f1ab305f3dc26d162169856b0c8ec32896",
}

# The batches of the official binary archive, cifar-10-binary.tar.gz.
CIFAR10 = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}

TRACKS = {track.name: track for track in (
    # The community's rule: modded-nanogpt's README, "mean validation loss ≤ 3.28 at p < 0.01".
    Track("fineweb-3.28", "train_gpt.py", "val_loss", 3.28, Rule(0.01), "8 NVIDIA H100 or H200",
          FINEWEB, complete=False, fixed={"vocab_size": 50257, "val_tokens": 10485760}),
    # The target is where modded-nanogpt's record #89 ends on the same tokens.
    Track("wiki-3.324", "train_gpt.py", "val_loss", 3.324, Rule(0.01), "1 NVIDIA H200",
          WIKI, complete=True, fixed={"vocab_size": 50257, "val_tokens": 2097152}),
    # One run's accuracy has a standard deviation of 0.13 points, as much as recipes differ by: hence 200 runs.
    Track("cifar10-94", "train_cifar.py", "accuracy", 0.94, Rule(0.01, least_runs=200), "1 NVIDIA A100 or H200",
          CIFAR10, complete=True, fixed={"test_images": 10000}),
    Track("cifar10-96", "train_cifar.py", "accuracy", 0.96, Rule(0.01), "1 NVIDIA A100 or H200",
          CIFAR10, complete=True, fixed={"test_images": 10000}),
    # Its images are made by the script, of the size that it is told.
    Track("cifar10-local", "train_cifar.py", "accuracy", None, None, "any CPU"),
    # Its text is the standard library of the Python that runs it, so its data differ between versions of Python.
    Track("text-local", "train_gpt.py", "val_loss", None, None, "any CPU"),
)}


def get_track(name):
    """name: str.  Returns its Track, or None where this repository knows no such track."""
    return TRACKS.get(name)


def metric_of(name):
    """The key under which records of the track `name` (str) hold what they measured: "val_loss" unless the track
    says otherwise."""
    track = get_track(name)
    return track.metric if track else "val_loss"
