"""The arms of an experiment: what is run against what, read from the command line of `records ab`."""
import itertools
import re
import shlex
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from records import worktrees
from records.files import RecordError
from records.log import NAME
from records.source import sha256

LETTERS = "abcdef"
# settings that `ab` gives to every run, and how it is told
OURS = {"seed": "choose seeds with --first-seed", "records": "ab has --records for the experiment itself",
        "name": "ab has --name for the experiment itself",
        "runs": "ab has --runs for each arm, and --block for those of one process"}
DEFAULT = ("train_gpt.py --preset local --optimizer muon", "train_gpt.py --preset local --optimizer turbo-muon")
DEFAULT_COMMON = ["--steps", "60", "--val-every", "20", "--val-tokens", "16384"]


@dataclass
class Arm:
    """label: str, names folders.  command: script and options (list of str), without seed, records and name.
    rev, commit: what it runs instead of the working tree (str), or None.  dirty: whether that differs from a commit.
    patch: bytes applied to `commit`, or None.  folder: Path the command runs in, None until there is one."""
    label: str
    command: list[str]
    rev: str | None = None
    commit: str | None = None
    dirty: bool | None = None
    patch: bytes | None = field(default=None, repr=False)
    folder: Path | None = None

    @property
    def overrides(self):
        """The settings on its command line: dict of name -> text, the last one where a name comes twice."""
        return settings_of(self.command)

    @property
    def in_worktree(self):
        return self.rev is not None or self.patch is not None

    def as_json(self, scrub):
        """What the ledger says of it: dict.  scrub: function that takes absolute paths out of text, as in a record."""
        return {"label": self.label, "command": [scrub(word) for word in self.command],
                "overrides": {key: scrub(value) for key, value in self.overrides.items()}, "rev": self.rev,
                "commit": self.commit, "dirty": self.dirty,
                "patch_sha256": None if self.patch is None else sha256(self.patch), "source_sha256": None}


def settings_of(command):
    """command: list of str that begins with a script.  Returns dict of setting -> text; "true" for a bare --flag."""
    found, key = {}, None
    for word in command[1:]:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            found[key] = value if equals else "true"
            key = None if equals else key
        elif key is not None:
            found[key], key = word, None
    return found


def add_arguments(parser):
    for letter in LETTERS:
        what = {"a": "the arm that others are compared with", "b": "the arm compared with it"}.get(letter, "one more")
        parser.add_argument(f"--{letter}", metavar="COMMAND", help=f'{what}: "SCRIPT --key value ..."')
        parser.add_argument(f"--{letter}-rev", metavar="REV", help="run it from this git revision" if letter < "c" else
                            "likewise")
        parser.add_argument(f"--{letter}-patch", metavar="FILE", help="run it with this patch applied (to --a-rev, or "
                            "to HEAD)" if letter < "c" else "likewise")
    parser.add_argument("--arm", action="append", default=[], metavar="LABEL=COMMAND", help="an arm with a name; "
                        "repeat it")
    parser.add_argument("--grid", nargs="+", action="extend", default=[], metavar="SETTING=VALUE,VALUE",
                        help="an arm for each combination of these values, added to the command of --a")


def given(options):
    """The options on the command line that define arms: list of str such as "--b-rev"."""
    names = [letter + tail for letter in LETTERS for tail in ("", "_rev", "_patch")] + ["arm", "grid"]
    return [f"--{name.replace('_', '-')}" for name in names if getattr(options, name)]


def read_arms(options, repository):
    """The arms that the command line asks for: list of Arm, at least two, the reference first.

    options: what the parser of add_arguments gave, and `common`: list of str, options of every arm.
    repository: Path.  Raises RecordError that names the option to change.
    """
    common = list(options.common)
    letters = sorted({name[2] for name in given(options) if name not in ("--arm", "--grid")})
    if options.grid:
        if set(letters) - {"a"} or options.arm:
            raise RecordError("--grid makes all arms itself: give it the one command --a, or leave --grid out")
        base = _words(options.a or DEFAULT[0], "--a", common)
        arms = [Arm(label, base + words) for label, words in _grid(options.grid)]
    elif not letters and not options.arm:
        common = common or DEFAULT_COMMON
        arms = [Arm("", _words(command, "the default", common)) for command in DEFAULT]
    else:
        first = options.a or DEFAULT[0].partition(" --optimizer")[0]
        arms = [_lettered(letter, options, first, common) for letter in sorted({"a", *letters}) if letters]
        for text in options.arm:
            label, equals, command = text.partition("=")
            if not equals:
                raise RecordError(f"--arm {text!r}: expected LABEL=\"SCRIPT --key value ...\"")
            arms.append(Arm(label, _words(command, f"--arm {label}", common)))
    if len(arms) < 2:
        raise RecordError("one arm cannot be compared: give --b, --b-rev, --b-patch, --arm or --grid as well")
    _resolve(arms, options, repository)
    if not options.grid and not options.arm:
        for arm, label in zip(arms, _labels(arms)):
            arm.label = label
    for arm in arms:
        if not NAME.fullmatch(arm.label):
            raise RecordError(f"the label {arm.label!r} cannot name a folder: expected letters, digits, '.', '_' "
                              "and '-', a letter or digit first")
    if len({arm.label for arm in arms}) < len(arms):
        raise RecordError(f"two arms have the same label: {', '.join(arm.label for arm in arms)}")
    alike = {}
    for arm in arms:
        other = alike.setdefault((*arm.command, arm.commit, arm.dirty, arm.patch), arm)
        if other is not arm and not options.same:
            raise RecordError(f"arms {other.label} and {arm.label} are the same: {shlex.join(arm.command)}; "
                              "--same lets them be (an A/A experiment)")
    return arms


def _lettered(letter, options, first, common):
    command = getattr(options, letter) or first
    patch, file = None, getattr(options, f"{letter}_patch")
    if file:
        try:
            patch = Path(file).read_bytes()
        except OSError as error:
            raise RecordError(f"--{letter}-patch {file}: {error.strerror}") from error
    return Arm(letter, _words(command, f"--{letter}", common), rev=getattr(options, f"{letter}_rev"), patch=patch)


def _words(command, option, common):
    """The words of `command` with the common options between the script and its own, which override them."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise RecordError(f"{option} {command!r}: {error}") from error
    if not words or not words[0].endswith(".py"):
        raise RecordError(f"{option} {command!r}: expected a script first, such as \"train_gpt.py --optimizer muon\"")
    words = [words[0], *common, *words[1:]]
    for key in OURS:
        if key in settings_of(words):
            raise RecordError(f"{option}: ab gives every run its own --{key}; leave it out of the command "
                              f"({OURS[key]})")
    return words


def _grid(texts):
    """(label, options) of each combination of `texts` (list of "setting=value,value"), the first value first."""
    axes = []
    for text in texts:
        key, _, values = text.partition("=")
        values = [value for value in values.split(",") if value]
        if not re.fullmatch(r"[A-Za-z][\w-]*", key) or not values or len(set(values)) < len(values):
            raise RecordError(f"--grid {text!r}: expected SETTING=VALUE,VALUE with values that differ")
        if key.replace("-", "_") in OURS:
            raise RecordError(f"--grid {text!r}: ab gives every run its own --{key}")
        axes.append([(f"--{key.replace('_', '-')}", value) for value in values])
    return [("_".join(_plain(value) for _, value in cell), [word for pair in cell for word in pair])
            for cell in itertools.product(*axes)]


def _labels(arms):
    """Names for arms that were given as letters: the values of the settings they differ in, where that is all they
    differ in and few; else the letters."""
    letters = LETTERS[:len(arms)] if not any(arm.label for arm in arms) else [arm.label for arm in arms]
    settings = [arm.overrides for arm in arms]
    if any(arm.in_worktree for arm in arms) or len({arm.command[0] for arm in arms}) > 1 \
            or len({frozenset(each) for each in settings}) > 1:
        return list(letters)
    differing = [key for key in settings[0] if len({each[key] for each in settings}) > 1]
    labels = ["_".join(_plain(each[key]) for key in differing) for each in settings]
    good = len(differing) in (1, 2) and len(set(labels)) == len(labels) and all(map(NAME.fullmatch, labels))
    return labels if good and max(map(len, labels)) <= 40 else list(letters)


def _plain(value):
    return re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-._") or "none"


def _resolve(arms, options, repository):
    """Find the commits. A patch is for --a-rev, or for the last commit, which the working tree must then equal."""
    base = getattr(options, "a_rev", None)
    for arm in arms:
        if arm.in_worktree:
            arm.commit = worktrees.commit_of(repository, arm.rev or base or "HEAD")
            arm.dirty = arm.patch is not None
    plain = [arm for arm in arms if not arm.in_worktree]
    if not plain:
        return
    try:
        commit, dirty = worktrees.commit_of(repository, "HEAD"), worktrees.is_dirty(repository)
    except RecordError:
        if any(arm.in_worktree for arm in arms):
            raise
        commit = dirty = None       # not a checkout, which is fine without revisions
    for arm in plain:
        arm.commit, arm.dirty = commit, dirty
    if dirty and any(arm.patch is not None and arm.rev is None for arm in arms):
        raise RecordError("the working tree differs from the last commit, so that the arms would differ by more than "
                          "the patch: commit the changes, or run arm a from a commit too with --a-rev HEAD")


@contextmanager
def opened(arms, repository):
    """While entered, every arm has the folder its command runs in: the repository (Path), or a worktree that sees the
    repository's data."""
    try:
        for arm in arms:
            arm.folder = repository
            if arm.in_worktree:
                arm.folder = worktrees.add(repository, arm.label, arm.commit, arm.patch)
            refresh_links(arm, repository)
            if not (arm.folder / arm.command[0]).is_file():
                where = "the working tree" if not arm.in_worktree else f"commit {arm.commit[:12]}"
                raise RecordError(f"arm {arm.label}: no script {arm.command[0]} in {where}")
        yield
    finally:
        for arm in arms:
            if arm.folder not in (None, repository):
                worktrees.remove(repository, arm.folder)
            arm.folder = None


def refresh_links(arm, repository):
    """Let the worktree of an arm see the repository's data, and the files that its command names."""
    if arm.folder == repository:
        return
    worktrees.link_ignored(repository, arm.folder)
    for value in arm.overrides.values():
        relative = Path(value)
        if not relative.is_absolute() and ".." not in relative.parts and relative.parts \
                and (repository / relative).exists():
            worktrees.link(repository, arm.folder, value)


def describe(arms, stop):
    """Ask each arm's script for its settings (`SCRIPT OPTIONS --help`), which also finds mistyped options before
    anything is written.

    stop: records.processes.Stop; a signal ends the wait.  Returns list of dict of setting -> text, one for each arm,
    or None where a signal came.  Raises RecordError with the script's own message.
    """
    asked = {}      # what --help shows depends on the script and its preset: arms that differ in values ask once
    for arm in arms:
        key = (arm.folder, arm.command[0], tuple(arm.overrides), arm.overrides.get("preset"))
        asked.setdefault(key, []).append(arm)
    answers = {}
    for alike in asked.values():
        text = _help(alike[0], stop)
        if text is None:
            return None
        shown = re.findall(r"^\s*--([\w-]+) \S+ = (.*)$", text, re.MULTILINE)
        for arm in alike:
            answers[arm.label] = {key.replace("-", "_"): value for key, value in shown} | arm.overrides
    return [answers[arm.label] for arm in arms]


def _help(arm, stop):
    process = subprocess.Popen([sys.executable, *arm.command, "--help"], cwd=arm.folder, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        while stop.number is None:
            try:
                stdout, stderr = process.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                continue
        else:
            return None
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    if process.returncode:
        lines = stderr.decode(errors="replace").strip().splitlines() or [f"status {process.returncode}"]
        raise RecordError(f"arm {arm.label}: {lines[-1]}")
    return stdout.decode(errors="replace")
