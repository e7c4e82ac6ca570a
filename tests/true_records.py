"""Records as a run writes them, without the run: for the tests of what verifies, submits and replays them."""
import contextlib
import io
import sys
from pathlib import Path
from unittest import mock

from records.log import Record
from records.settings import option, parse  # noqa: F401  (what SCRIPT imports)
from records.tracks import TRACKS

PICTURE = b"\x89PNG\r\n\x1a\n" + b"pixels" + b"\0\0\0\0IEND\xaeB`\x82"   # what begins and ends as a PNG does
SCRIPT = '''"""A script whose settings are read as those of train_gpt.py are."""
from dataclasses import asdict, dataclass
from records.settings import option, parse

WIDE = 2 * 64


@dataclass
class Settings:
    preset: str = "quick"
    track: str = option("text-local", "track")
    name: str = option("gpt", "name")
    target: float | None = option(None, "target")
    records: str = option("records", "folder")
    seed: int = option(0, "seed")
    steps: int = option(100, "steps", least=1)
    lr: float = option(0.05, "learning rate")
    width: int = option(WIDE, "width")
    compile: bool = option(True, "compile")
    softcap: float = option(float("inf"), "no literal")
    vocab_size: int = option(50257, "vocabulary")
    val_tokens: int = option(2097152, "tokens")


PRESETS = {"quick": {}, "wiki": dict(track="wiki-3.324", target=3.324, compile=False)}

if __name__ == "__main__":
    s = parse(Settings, None, presets=PRESETS, program="train_gpt.py", description="", default_preset="quick")
    Record(s.records, track=s.track, name=s.name, target=s.target, steps=s.steps, seed=s.seed, config=asdict(s))
'''


def repository(folder, script=SCRIPT):
    """A repository with the script and run.sh in `folder` (Path); returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train_gpt.py").write_text(script)
    (folder / "run.sh").write_text("#!/usr/bin/env bash\nexec python \"$@\"\n")
    return folder


def write_run(root, values, repository, *, arguments=("--preset", "wiki"), step_s=0.25, end="finish", metric_at=None,
              **settings):
    """Write the record of a run under `root` (Path) as train_gpt.py does; returns its folder (Path).

    values: metric at evenly spaced validations, the first at step 0.  repository: Path.  arguments: its command line.
    step_s: seconds a step.  end: "finish", "fail" or None, as if killed.  settings: what it sets beyond the script's
    defaults; they are added to the command line.
    """
    space = {"__name__": "script"}
    exec(compile((repository / "train_gpt.py").read_text(), "train_gpt.py", "exec"), space)     # this file's own script
    argv = [*arguments, *(word for key, value in settings.items()
                          for word in (f"--{key.replace('_', '-')}", str(value).lower() if isinstance(value, bool)
                                       else str(value)))]
    s = parse(space["Settings"], argv, presets=space["PRESETS"], program="train_gpt.py", description="",
              default_preset="quick")
    config = space["asdict"](s)
    data = TRACKS["wiki-3.324"].data if s.track == "wiki-3.324" else {"val_000000.bin": "ab" * 32}
    with mock.patch.object(sys, "argv", ["train_gpt.py", *argv]), contextlib.redirect_stdout(io.StringIO()), \
            mock.patch.object(Record, "_draw", lambda record: None):
        run = Record(root, track=s.track, name=s.name, target=s.target, steps=s.steps, seed=s.seed, config=config,
                     script=repository / "train_gpt.py", repository=repository, device="cpu")
        run.data({name: data[name] for name in list(data)[-2:]})
        run.line("embedding 4 tensors of 1")
        for index, value in enumerate(values):
            step = s.steps * index // max(len(values) - 1, 1)
            if index:
                run.progress(step - 1, step_s * (step - 1))
            run.validation(step, value, step_s * step, 1000 * step)
        if end == "finish":
            run.finish(peak_memory_bytes=2**30, extra={"optimizer": "muon", "bigram loss": 2.5})
        elif end == "fail":
            run.fail("failed", "out of memory\nin two lines")
    return Path(run.folder)
