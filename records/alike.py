"""How alike the arms of a comparison are beside what they are meant to differ in: settings, steps, code, data, seeds,
hardware. Whoever reads "B is better" needs to know what else B had."""
import json

OWN = ("name", "seed", "records", "runs")       # settings that every run, or every process, has for itself
SHOWN = 6                               # names in one note, at most


def alike(arms):
    """arms: dict of label -> list of Run, none empty.

    Returns (settings, notes, hardware_differs). settings: dict of setting -> list of values, one for each arm, where
    the arms differ and each has one value. notes: list of sentences. hardware_differs: dict of label -> bool, whether
    the runs of that arm and of the first did not all have the same hardware.
    """
    settings, notes = {}, []
    keys = sorted({key for runs in arms.values() for run in runs for key in run.config} - set(OWN))
    for key in keys:
        per_arm = {label: {_text(run.config.get(key, "not given")) for run in runs} for label, runs in arms.items()}
        mixed = [label for label, values in per_arm.items() if len(values) > 1]
        if mixed:
            notes.append(f"runs of {_join(mixed)} differ in --{key.replace('_', '-')}: "
                         f"{_join(sorted(set().union(*per_arm.values())))}")
        elif len(set().union(*per_arm.values())) > 1:
            settings[key] = [next(iter(values)) for values in per_arm.values()]
    notes += _amounts(arms) + _validations(arms) + _seeds(arms)
    notes += _hashes(arms, "source", "the code differs", "code")
    # a seed may order the data, and by it decide which files a run gets to: then runs of one seed are compared
    paired = len({tuple(sorted(str(run.seed) for run in runs)) for runs in arms.values()}) == 1
    notes += _hashes(arms, "data", "the data differ", "data", together=(lambda run: str(run.seed)) if paired else None)
    machines = {label: {_machine(run.record) for run in runs} for label, runs in arms.items()}
    first = next(iter(machines.values()))
    differs = {label: len(first | names) > 1 for label, names in machines.items()}
    if any(differs.values()):
        notes.append("the hardware differs, so times say little: " + "; ".join(
            f"{label}: {_join(sorted(names))}" for label, names in machines.items()))
    versions = {_versions(run.record) for runs in arms.values() for run in runs}
    if len(versions) > 1:
        notes.append(f"the versions of torch differ: {_join(sorted(versions))}")
    return settings, notes, differs


def _amounts(arms):
    """Steps and tokens that differ: then the final metric is no comparison at equal work."""
    notes = []
    for word, of in (("steps", lambda run: run.steps), ("tokens", lambda run: run.tokens)):
        per_arm = {label: sorted({of(run) for run in runs if of(run) is not None}) for label, runs in arms.items()}
        if len({value for values in per_arm.values() for value in values}) > 1:
            notes.append(f"the runs have different numbers of {word}, so final values are not at equal work: " +
                         "; ".join(f"{label}: {_join([f'{value:,}' for value in values]) or 'not said'}"
                                   for label, values in per_arm.items()))
    return notes


def _validations(arms):
    counts = {label: sorted({len(run.curve) for run in runs}) for label, runs in arms.items()}
    if len({count for values in counts.values() for count in values}) > 1:
        return ["the runs were validated at different intervals, and the straight line between two validations is late "
                "by more the further they are apart; number of validations: " +
                "; ".join(f"{label}: {_join(values)}" for label, values in counts.items())]
    return []


def _seeds(arms):
    notes = []
    for label, runs in arms.items():
        seeds = [run.seed for run in runs if run.seed is not None]
        again = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if again:
            notes.append(f"{label} has several runs of seed {_join(again)}: they may not be independent")
    return notes


def _hashes(arms, key, words, what, together=None):
    """Files of the record's `key` ("source" or "data") that are not the same in all runs; `together` of a run: only
    runs for which it is the same need the same files (their content has to be the same in all)."""
    together = together or (lambda run: None)
    versions, holders, groups, contents = {}, {}, {}, {}
    for label, run in ((label, run) for label, runs in arms.items() for run in runs):
        group, files = together(run), run.record.get(key)
        groups[group] = groups.get(group, 0) + 1
        contents.setdefault((label, group), set()).add(_text(files))
        for name, digest in (files if isinstance(files, dict) else {}).items():
            versions.setdefault(name, set()).add(str(digest))
            holders.setdefault(name, {}).setdefault(group, []).append(label)
    changed = sorted(name for name, digests in versions.items() if len(digests) > 1)
    lacking = {name: [label for group, labels in by.items() if len(labels) < groups[group] for label in labels]
               for name, by in holders.items()}
    partial = sorted(name for name, labels in lacking.items() if labels)
    within = list(dict.fromkeys(label for (label, _), found in contents.items() if len(found) > 1))
    if not changed and not partial:
        return []
    notes = []
    if changed:
        notes.append(f"{words}: {_join(changed)}")
    if partial:
        by = {name: _join(dict.fromkeys(lacking[name])) for name in partial}
        notes.append(f"{what} that not all runs loaded: "
                     + _join([f"{name} ({labels})" for name, labels in by.items()]))
    if within:
        notes.append(f"runs of {_join(within)} differ in their {what}, so they are not of one "
                     f"{'recipe' if what == 'code' else 'data set'}")
    return notes


def _machine(record):
    hardware = record.get("hardware")
    hardware = hardware if isinstance(hardware, dict) else {}
    name = hardware.get("accelerator")
    if name is None:
        return f"{hardware.get('cpu', 'not said')}, {hardware.get('cpu_count', '?')} cores"
    return f"{hardware.get('accelerator_count', '?')} × {name}"


def _versions(record):
    versions = record.get("versions")
    return str(versions.get("torch")) if isinstance(versions, dict) else "not said"


def _text(value):
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _join(values):
    texts = [str(value) for value in values]
    more = [f"{len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return ", ".join(texts[:SHOWN] + more)
