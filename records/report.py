"""What an experiment ends with: report.md, report.json, loss.png and loss.svg in its folder."""
import json
from pathlib import Path

from records.compare import as_markdown, compare_experiment
from records.files import write_whole
from records.plot import arms_curves
from records.runs import read_experiment


def write_report(folder):
    """Compare the arms of the experiment in `folder` (str or Path), whose schedule must have been carried out.

    Returns the report as Markdown (str).  Raises RecordError where the arms cannot be compared.
    """
    folder = Path(folder)
    experiment = read_experiment(folder)
    comparison = compare_experiment(experiment)
    inside = f"{folder}/"       # where the experiment lies is nobody's business: folders of runs are shown from there
    content = json.dumps(comparison.as_json(), indent=1, allow_nan=False).replace(json.dumps(inside)[1:-1], "")
    heading, _, rest = as_markdown(comparison).replace(inside, "").partition("\n")
    text = f"{heading}\n\n{_question(experiment.ledger)}\n{rest.rstrip()}\n"
    try:
        arms_curves(experiment.arms, folder / "loss", f"{comparison.track}: {', '.join(experiment.arms)}")
        text += "\n![The arms' curves](loss.svg)\n"
    except ImportError as error:
        text += f"\nNot drawn ({error}); once matplotlib is installed: python -m records plot FOLDER\n"
    write_whole(folder / "report.json", content.encode() + b"\n")
    write_whole(folder / "report.md", text.encode())
    return text


def _question(ledger):
    """One paragraph: what was declared before the first run, and how it ended."""
    question, statuses = ledger["question"], [run["status"] for run in ledger["runs"]]
    rule, failed, interrupted = question["sequential"], statuses.count("failed"), statuses.count("interrupted")
    if rule is None:
        plan = f"{question['runs']} run{'s' * (question['runs'] > 1)} of each arm, declared before the first one"
    else:
        end = f"after {rule['sure_after']}" if rule["sure_after"] is not None else "not, so all were run"
        plan = ("runs were to go on until an anytime-valid sequential test was sure, "
                f"{question['runs']} of each arm at most; it was sure {end}")
    counts = ((failed, "failed"), (interrupted, "interrupted and run again"))
    more = [f"{count} {word}" for count, word in counts if count]
    block = ledger.get("block", 1)
    processes = "every one a process of its own" if block == 1 else f"{block} of an arm at a time in one process"
    return (f"Experiment of {ledger['started'][:10]}: {plan}. Runs were interleaved (A B B A), {processes}, "
            f"seeds from {ledger['first_seed']} on, each once in every arm"
            + (f"; {', '.join(more)}" if more else "") + ".")
