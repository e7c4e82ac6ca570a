"""Loss curves as PNG:  python -m records.plot FOLDER [FOLDER ...]"""
import json
import os
import sys
from pathlib import Path

from records.files import RecordError, writing

BLUE, RED, GREY = "#1f5fbf", "#c8372d", "#6b6b6b"


def loss_curve(folder):
    """Draw validation loss against train time and against tokens.

    folder: a record's folder (str or Path) with record.json.  Returns the Path of the loss.png written there.
    Raises RecordError where the record cannot be read or loss.png not written, ImportError without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder = Path(folder)
    record = _read(folder)
    points = [point for point in record["validation"] if point["val_loss"] is not None]
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{record['track']}: {record['name']}", fontsize=12, fontweight="bold")
    million = max((point["tokens"] for point in points), default=0) >= 1e6
    time_axes, token_axes = figure.subplots(1, 2, sharey=True)
    _panel(time_axes, [point["train_time_s"] for point in points], points, record)
    _panel(token_axes, [point["tokens"] / (1e6 if million else 1) for point in points], points, record)
    time_axes.set(xlabel="train time, seconds", ylabel="validation loss")
    token_axes.set(xlabel="training tokens, millions" if million else "training tokens")
    temporary, final = folder / "loss.png.tmp", folder / "loss.png"
    with writing(final):
        with open(temporary, "wb") as file:
            figure.savefig(file, format="png")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
    return final


def _read(folder):
    try:
        return json.loads((folder / "record.json").read_bytes())
    except (OSError, ValueError) as error:
        raise RecordError(f"cannot read {folder / 'record.json'} ({error}); "
                          "expected a record's folder, records/<track>/<time>_<name>") from error


def _panel(axes, x, points, record):
    losses = [point["val_loss"] for point in points]
    axes.plot(x, losses, color=BLUE, linewidth=1.8, marker="o", markersize=3, zorder=3)
    if record["target"] is not None:
        axes.axhline(record["target"], color=RED, linewidth=1.2, linestyle="--")
        axes.annotate(f"target {record['target']:g}", (0, record["target"]), xycoords=("axes fraction", "data"),
                      xytext=(5, 4), textcoords="offset points", color=RED, fontsize=9)
    if points:
        axes.annotate(f"{losses[-1]:.4f}", (x[-1], losses[-1]), xytext=(7, 0), textcoords="offset points",
                      va="center", color=BLUE, fontsize=9)
        _limit(axes, losses, record["target"])
    else:
        axes.text(0.5, 0.5, "no finite validation loss", transform=axes.transAxes, ha="center", color=GREY)
    axes.grid(color="#e3e3e3", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY, labelleft=True)


def _limit(axes, losses, target):
    """Show the part of the curve that decides: the first losses of a run are far above the rest."""
    lowest = min(losses + ([target] if target is not None else []))
    later = losses[len(losses) // 8:]
    highest = max(later + ([target] if target is not None else []))
    margin = 0.06 * (highest - lowest) or 0.1
    axes.set_ylim(lowest - margin, highest + margin)


def main(folders):
    """Draw the curve of each folder (list of str). Returns the exit status: 0, or 2 with one line on stderr."""
    if not folders or folders[0].startswith("-"):
        print("usage: python -m records.plot FOLDER [FOLDER ...]", file=sys.stderr)
        return 2
    try:
        for folder in folders:
            print(loss_curve(folder))
    except (RecordError, ImportError) as error:
        hint = "; install it with python -m pip install matplotlib" if isinstance(error, ImportError) else ""
        print(f"records.plot: {error}{hint}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
