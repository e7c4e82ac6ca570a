"""Folders of runs with chosen curves, for the tests of what reads and compares them."""
import json

HARDWARE = {"accelerator": "NVIDIA H200", "accelerator_count": 1, "cpu": "some", "cpu_count": 8}


def record(curve, *, metric="val_loss", step_s=0.25, **changes):
    """record.json of a run.  curve: list of (step, value).  step_s: seconds a step, or a function of the step."""
    seconds = step_s if callable(step_s) else lambda step: step_s * step
    points = [{"step": step, "tokens": 1000 * step, "train_time_s": round(seconds(step), 3), metric: value}
              for step, value in curve]
    last = points[-1] if points else {"step": 0, "tokens": 0, "train_time_s": 0.0, metric: None}
    return {"schema": 1, "track": "somebody-3.3", "name": "run", "seed": 0, "target": 3.3, "status": "complete",
            "message": None, "steps": last["step"], "tokens": last["tokens"], "train_time_s": last["train_time_s"],
            metric: last[metric], "validation": points, "config": {"optimizer": "muon", "seed": 0}, "data": {},
            "source": {"train.py": "00"}, "hardware": HARDWARE, "versions": {"torch": "2.11"}} | changes


def make_run(folder, curve, **changes):
    """Write the record.json of a run.  Returns the folder (Path)."""
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(record(curve, **changes)))
    return folder


def falling(final, steps=100, start=4.0, points=5):
    """A straight curve from `start` to `final` in `points` validations after the first."""
    return [(steps * n // points, start + (final - start) * n / points) for n in range(points + 1)]
