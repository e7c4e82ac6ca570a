"""README.md of a submitted record, from its ledger and its runs only."""
import statistics
from collections import Counter

from records import stats
from records.compare import as_markdown, compare_experiment
from records.files import RecordError
from records.replay import command_of, source_of
from records.runs import read_experiment
from records.source import sha256, unpack_source
from records.tracks import get_track

WORDS = {"val_loss": "validation loss", "accuracy": "accuracy"}
LISTED = 40         # runs in the table of all runs


def readme(folder, ledger):
    """folder: Path of the record.  ledger: its experiment.json (dict), which has been verified.  Returns Markdown."""
    arms = read_experiment(folder).arms
    place = f"records/{ledger['track']}/{folder.name.lstrip('.')}"
    lines = [f"# {ledger['name']} on {ledger['track']}", "", _claim(ledger, arms), "", "## What changed", "",
             _text(ledger["what"])]
    lines += _code(folder, arms)
    lines += ["", "## Result", "", *_arm_table(ledger, arms)]
    if len(arms) > 1:
        lines += ["", *_comparison(folder)]
    lines += ["", "## Runs", "", *_declared(ledger), "", *_run_table(ledger, arms)]
    pictures = [f"{entry['folder']}/profile.png" for entry in ledger["runs"][:LISTED] if entry["folder"]]
    if shown := [f"[{name}]({name})" for name in pictures if (folder / name).is_file()]:
        lines += ["", f"Where the time of a step went in each stage: {', '.join(shown)}."]
    lines += ["", "## Hardware", "", *_hardware(arms), "", "## Again", "", "```sh"]
    for label, runs in arms.items():
        if runs:
            lines += [f"python -m records replay {place} FOLDER" + (f" --arm {label}" if len(arms) > 1 else ""),
                      f"cd FOLDER && {_code_text(command_of(runs[0].record))}"]
    lines += [f"python -m records verify {place}", "```", "",
              "The first command unpacks the code of that arm and lists the data files it read, by SHA-256."]
    return "\n".join(lines) + "\n"


def _claim(ledger, arms):
    track, claim = get_track(ledger["track"]), ledger["claim"]
    if claim["kind"] == "target":
        runs = [run for run in arms[claim["arm"]] if run.status == "complete"]
        values = [run.final for run in runs]
        p = stats.target_p(values, track.target, track.direction)
        return (f"**Claims the target.** {claim['arm']}: {WORDS[track.metric]} {statistics.mean(values):.5f} (mean of "
                f"n = {len(values)}, standard deviation {statistics.stdev(values):.5f}); that the mean is "
                f"{'at most' if track.direction == 'down' else 'at least'} {track.target:g} has p = {p:.2g} (one-sided "
                f"t-test, the track asks for p < {track.rule.alpha:g}). Train time "
                f"{_spread([run.train_time_s for run in runs], 2)} s.")
    if track is None or track.rule is None:
        return "**An experiment.** Its track has no target, so it claims none."
    return (f"**An experiment, not a claim.** It is evidence about what its runs show and does not claim the track's "
            f"target, {WORDS[track.metric]} {track.target:g}: {track.rule}.")


def _code(folder, arms):
    """Which files differ between the arms' sources."""
    files = {}
    for label, runs in arms.items():
        packed = source_of(runs[0].folder, runs[0].record) if runs else None
        if packed is not None:
            files[label] = {path: sha256(content) for path, content in unpack_source(packed).items()}
    if len(files) < 2:
        return []
    first, *others = files
    lines = [""]
    for label in others:
        here, there = files[first], files[label]
        found = {"differs in": [path for path in here if there.get(path, here[path]) != here[path]],
                 "loads besides": there.keys() - here, "does without": here.keys() - there}
        said = [f"{verb} " + ", ".join(f"`{_text(path)}`" for path in sorted(paths))
                for verb, paths in found.items() if paths]
        lines.append(f"Against the code of {first}, {label} " + ("; ".join(said) or "has the same") + ".")
    return lines


def _arm_table(ledger, arms):
    track = get_track(ledger["track"])
    word = WORDS[ledger["question"]["metric"]]
    test = track is not None and track.rule is not None
    lines = [f"| arm | n | final {word} | train time, s | ms a step | steps |"
             + (f" p, mean {'≤' if track.direction == 'down' else '≥'} {track.target:g} |" if test else "")]
    lines.append("|" + "-|" * (lines[0].count("|") - 1))
    for label, runs in arms.items():
        done = [run for run in runs if run.final is not None]
        cells = [label, f"{len(done)}" + (f" of {len(runs)}" if len(done) < len(runs) else "")]
        cells += [_spread([run.final for run in done], 5), _spread([run.train_time_s for run in done], 2),
                  _spread([run.step_ms for run in done if run.step_ms is not None], 2),
                  ", ".join(sorted({str(run.steps) for run in done})) or "none"]
        if test:
            try:
                cells.append(f"{stats.target_p([run.final for run in done], track.target, track.direction):.2g}")
            except ValueError:
                cells.append("no test")     # fewer than two runs, or all alike
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _comparison(folder):
    if (folder / "report.md").is_file():
        return ["The arms against each other, with intervals and tests: [report.md](report.md)."]
    try:
        text = as_markdown(compare_experiment(read_experiment(folder))).replace(f"{folder}/", "")
    except RecordError as error:
        return [f"The arms cannot be compared: {_text(str(error))}"]
    return ["### The arms against each other", "", *(f"##{line}" if line.startswith("#") else line
                                                     for line in text.strip().split("\n")[2:])]


def _declared(ledger):
    counts = Counter(entry["status"] for entry in ledger["runs"])
    said = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    if ledger["question"].get("gathered"):
        return [f"{said}. They were made one by one and gathered afterwards: nothing shows how many were planned, or "
                "that there were no others."]
    if ledger["question"].get("sequential"):
        return [f"{said}; at most {ledger['question'].get('runs')} of each arm, until an anytime-valid test was sure."]
    return [f"{said}; {ledger['question'].get('runs')} of each arm were declared before the first one."]


def _run_table(ledger, arms):
    found = {run.folder.name: run for runs in arms.values() for run in runs}
    lines = [f"| run | arm | seed | status | {WORDS[ledger['question']['metric']]} | train time, s |", "|-|-|-|-|-|-|"]
    for entry in ledger["runs"][:LISTED]:
        run = found.get((entry["folder"] or "").rpartition("/")[2])
        name = f"[{entry['folder']}]({entry['folder']})" if run else "none"
        value = "" if run is None or run.final is None else f"{run.final:.5f}"
        lines.append(f"| {name} | {entry['arm']} | {entry['seed']} | {entry['status']} | {value} | "
                     f"{'' if run is None else f'{run.train_time_s:.2f}'} |")
    if len(ledger["runs"]) > LISTED:
        lines += ["", f"{len(ledger['runs']) - LISTED} more are in experiment.json."]
    return lines


def _hardware(arms):
    kinds = Counter()
    for run in (run for runs in arms.values() for run in runs):
        machine, versions = run.record["hardware"], run.record["versions"]
        device = f"{machine.get('accelerator_count')} × {machine['accelerator']}" if machine.get("accelerator") else \
            f"{machine.get('cpu_count')} cores of {machine.get('cpu')}" if machine.get("cpu") else "not known"
        said = [f"{key} {versions[key]}" for key in ("torch", "triton", "cuda", "python") if versions.get(key)]
        kinds[_text("; ".join([device, ", ".join(said)] if said else [device]))] += 1
    return [f"- {kind}: {count} run{'s' * (count > 1)}" for kind, count in kinds.most_common()]


def _spread(values, digits):
    if not values:
        return "none"
    sd = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{sd}"


def _text(text):
    """Text of a record as Markdown that shows as it is: no markup, no control characters."""
    shown = "".join(letter if letter.isprintable() else " " for letter in str(text))
    return "".join("\\" + letter if letter in "\\`*_[]<>|#!" else letter for letter in shown)


def _code_text(text):
    """A command for inside a block of code."""
    return "".join(letter if letter.isprintable() else " " for letter in text).replace("```", "'''")
