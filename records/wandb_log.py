"""Weights & Biases, where a run asks for it: the validation points as they come and a summary at the end.

wandb is imported when a run asks for it and not before. Without a login it works offline, into the folder wandb/ (or
$WANDB_DIR); `wandb sync` uploads that later. Whatever goes wrong with it is said in one line and the run goes on
without. Of the machine it gets what the record has, not the host's name, its console or its code.
"""
import os

PROJECT = "turborun"    # unless $WANDB_PROJECT says otherwise
LOGIN_SECONDS = 30      # for a server that does not answer; it comes before training, not within


def start(group, name, record, say):
    """Begin a run in Weights & Biases.

    group: str, such as the id of an A/B experiment.  name: of the run (str).  record: its record.json so far (dict).
    say: function that takes a line of text.  Returns a WandbLog, or None where wandb cannot be used.
    """
    try:
        import wandb
        mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in(wandb) else "offline")
        settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, save_code=False,
                                  x_disable_stats=True, x_disable_machine_info=True, init_timeout=LOGIN_SECONDS)
        run = wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), group=group or None, name=name, mode=mode,
                         config={key: record[key] for key in KEPT if key in record}, settings=settings,
                         reinit="create_new")
    except Exception as error:      # its exceptions differ between versions, and none of them may end a run
        say(_failure(error, "python -m pip install wandb" if isinstance(error, ImportError) else "the run goes on"))
        return None
    say(f"Weights & Biases: {mode}, group {group!r}")
    return WandbLog(run, say)


KEPT = ("track", "target", "steps_planned", "seed", "command", "config", "hardware", "versions")
RESULTS = ("status", "message", "reached", "time_to_target_s", "train_time_s", "steps", "tokens", "val_loss",
           "accuracy", "peak_memory_bytes", "extra")


class WandbLog:
    """A run of Weights & Biases that ends at its first failure, with one line to `say` (function of a str)."""

    def __init__(self, run, say):
        self._run, self._say = run, say

    def point(self, point):
        """Send a validation point.  point: dict of step, tokens, train_time_s and the metric."""
        values = {key: value for key, value in point.items() if key != "step" and value is not None}
        self._try(lambda run: run.log(values, step=point["step"]))

    def finish(self, record):
        """Send the results of the record (dict) and end; a run that is not complete is marked as failed there."""
        self._try(lambda run: run.summary.update({key: record[key] for key in RESULTS if record.get(key) is not None}))
        self._try(lambda run: run.finish(exit_code=0 if record["status"] == "complete" else 1))
        self._run = None

    def _try(self, action):
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            self._run = None
            self._say(_failure(error, "the run goes on without it"))


def _logged_in(wandb):
    try:
        return wandb.login(prompt=False)
    except TypeError:       # before 0.31 it knows no `prompt`
        return bool(wandb.api.api_key)


def _failure(error, advice):
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"Weights & Biases is not used ({text[:200]}); {advice}"
