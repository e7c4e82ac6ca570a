"""The part of `records.verify` that looks at a whole experiment: its ledger, its arms, and the track's rule."""
from collections import Counter

from records import safe, stats
from records.check import LARGEST, Problems, check_record, same, short
from records.check_report import check_report
from records.check_source import departures
from records.checked_log import parse_json
from records.log import NAME
from records.source import path_problem, sha256, unpack_source
from records.tracks import DIRECTIONS, get_track

OF_A_RUN = ("seed", "name", "records", "runs", "wandb")     # settings in which runs of one arm may differ
MOST_ARMS, MOST_RUNS = 200, 20_000
STATUSES = ("complete", "failed", "interrupted", "running")
SHAPE = {"schema": int, "track": str, "name": str, "started": str, "status": str, "question": dict, "arms": list,
         "schedule": list, "runs": list}
SHAPES = {"arms": {"label": str, "command": list},
          "schedule": {"index": int, "arm": str, "seed": int},
          "runs": {"index": int, "arm": str, "seed": int, "status": str, "folder": (str, type(None)),
                   "record_sha256": (str, type(None)), "log_sha256": (str, type(None))}}


def check_experiment(folder, prefix, problems, notes):
    """Add what is wrong with the experiment in `folder` (Path) to `problems`, and what to know to `notes` (lists of
    str); their messages begin with `prefix`."""
    name = f"{prefix}experiment.json"
    try:
        content = safe.read(folder, "experiment.json", LARGEST)
        ledger = parse_json(content)
    except ValueError as error:     # Unsafe is one
        problems.append(f"{name}, line {getattr(error, 'lineno', 1)}: not read ({str(error)[:200]})")
        return
    found = Problems(name, content)
    if _shape_is_right(found, ledger):
        _check_plan(found, ledger, notes)
        sources = _read_sources(folder, prefix, found)
        records = _check_runs(folder, prefix, found, ledger, sources, notes)
        _check_folders(folder, found, ledger, notes)
        _check_arms(found, folder, prefix, ledger, records)
        claim = ledger.get("claim")
        if isinstance(claim, dict) and claim.get("kind") == "target":
            for text in rule_problems(ledger, records, claim.get("arm")):
                found.add(("claim",), f"it claims the target, but {text}")
        elif claim is not None and (not isinstance(claim, dict) or claim.get("kind") != "experiment"):
            found.add(("claim",), f"claim is {short(claim)}, expected kind target or experiment")
        if not found:
            check_report(folder, prefix, found, notes)
    problems += found


def _shape_is_right(found, ledger):
    if not isinstance(ledger, dict):
        found.add(("schema",), "expected a JSON object")
        return False
    for key, kind in SHAPE.items():
        if type(ledger.get(key)) is not kind:
            found.add((key,), f"{key} is {short(ledger.get(key))}, expected {kind.__name__}")
    if found:
        return False
    for key, most in (("arms", MOST_ARMS), ("schedule", MOST_RUNS), ("runs", MOST_RUNS)):
        if len(ledger[key]) > most:
            found.add((key,), f"{len(ledger[key])} {key}, more than the {most} that are read")
            return False
    if ledger["schema"] != 1:
        found.add(("schema",), f"schema is {ledger['schema']}, expected 1")
    for key in ("track", "name"):
        if not NAME.fullmatch(ledger[key]):
            found.add((key,), f"{key} is {short(ledger[key])}, expected letters, digits, '.', '_' and '-'")
    for key, shape in SHAPES.items():
        for index, item in enumerate(ledger[key]):
            if not isinstance(item, dict) or any(
                    part not in item or not isinstance(item[part], kind) or isinstance(item[part], bool)
                    for part, kind in shape.items()):
                found.add((key, index), f"{short(item)} has not {', '.join(shape)} as expected")
                return False
    labels = [arm["label"] for arm in ledger["arms"]]
    for index, label in enumerate(labels):
        if not NAME.fullmatch(label) or labels.count(label) > 1:
            found.add(("arms", index), f"the label {short(label)} cannot name a folder, or is there twice")
    for key in ("schedule", "runs"):
        for index, item in enumerate(ledger[key]):
            if item["arm"] not in labels:
                found.add((key, index), f"the arm {short(item['arm'])} is none of {', '.join(labels)[:200]}")
    return not found


def _check_plan(found, ledger, notes):
    question, schedule, track = ledger["question"], ledger["schedule"], get_track(ledger["track"])
    metric, direction = question.get("metric"), question.get("direction")
    if metric not in DIRECTIONS or DIRECTIONS[metric] != direction or track and track.metric != metric:
        found.add(("question",), f"metric {short(metric)}, direction {short(direction)}, which are not the track's")
    for index, planned in enumerate(schedule):
        if planned["index"] != index:
            found.add(("schedule", index), f"index {planned['index']}, expected {index}: a run was taken out")
            return
    for arm in ledger["arms"]:
        seeds = [planned["seed"] for planned in schedule if planned["arm"] == arm["label"]]
        declared = question.get("runs")
        if len(set(seeds)) < len(seeds):
            found.add(("schedule",), f"arm {arm['label']} has a seed twice")
        if declared is not None and len(seeds) != declared:
            found.add(("schedule",), f"arm {arm['label']} has {len(seeds)} runs, declared were {short(declared)}")
    if question.get("gathered"):
        notes.append(f"{found.name}: these runs were gathered after they were made: that there were no others, nothing "
                     "can show")
    started = {entry["index"] for entry in ledger["runs"] if entry["status"] in ("complete", "failed")}
    missing = [planned for planned in schedule if planned["index"] not in started]
    sequential = question.get("sequential")
    if missing and isinstance(sequential, dict) and type(sequential.get("sure_after")) is int:
        counts = Counter(schedule[index]["arm"] for index in started if index < len(schedule))
        if any(counts[arm["label"]] < sequential["sure_after"] for arm in ledger["arms"]):
            found.add(("runs",), f"sure after {sequential['sure_after']} runs of each arm, of which some are missing")
    elif missing and ledger["status"] == "complete":
        found.add(("runs",), f"the run {missing[0]['index']} (arm {missing[0]['arm']}, seed {missing[0]['seed']}) and "
                             f"{len(missing) - 1} more were declared and are missing")
    elif missing:
        notes.append(f"{found.name}: not finished: {len(missing)} of {len(schedule)} declared runs are still to come")


def _read_sources(folder, prefix, found):
    """sources/: dict of the SHA-256 of a packed source -> (its place, bytes, dict of path -> SHA-256)."""
    sources = {}
    try:
        for name in safe.folders(folder / "sources"):
            place = f"sources/{name}"
            content = safe.read(folder, place, LARGEST)
            if content is None or name != f"{sha256(content)[:16]}.txt":
                found.append(f"{prefix}{ascii(place)[1:-1]}, line 1: its content is not what its name, the beginning "
                             "of its SHA-256, says")
                continue
            try:
                files = unpack_source(content)
            except ValueError as error:
                found.append(f"{prefix}{place}: {error}")
                continue
            sources[sha256(content)] = (place, content, {path: sha256(file) for path, file in files.items()})
    except safe.Unsafe as error:
        found.append(f"{prefix}{error}")
    return sources


def _check_runs(folder, prefix, found, ledger, sources, notes):
    """Check every run of the ledger; returns dict of its place in ledger["runs"] -> record (dict)."""
    records, used = {}, set()
    for number, entry in enumerate(ledger["runs"]):
        where, place = ("runs", number), entry["folder"]
        planned = ledger["schedule"][entry["index"]] if 0 <= entry["index"] < len(ledger["schedule"]) else {}
        for key in ("arm", "seed"):
            if planned.get(key) != entry[key]:
                found.add((*where, key), f"{key} {short(entry[key])} was not planned for index {entry['index']}")
        if entry["status"] not in STATUSES:
            found.add((*where, "status"), f"status is {short(entry['status'])}, expected {', '.join(STATUSES)}")
        if place is None:
            continue
        if path_problem(place) or place.count("/") != 1 or not place.startswith("runs/") or place in used:
            found.add((*where, "folder"), f"folder is {short(place)}, expected one of its own inside runs/")
            continue
        used.add(place)
        record = _check_run(folder, prefix, found, where, entry, sources, notes)
        if record is not None:
            records[number] = record
            _check_entry(found, where, entry, record, ledger, notes)
    return records


def _check_run(folder, prefix, found, where, entry, sources, notes):
    """Read and check one run; returns its record (dict), or None where there is none or it is not to be used."""
    place = entry["folder"]
    try:
        record = safe.read(folder, f"{place}/record.json", LARGEST)
        log = safe.read_log(folder, f"{place}/log.txt", LARGEST)
        own = safe.read(folder, f"{place}/source.txt", LARGEST)
        safe.read_picture(folder, f"{place}/profile.png", LARGEST)
    except safe.Unsafe as error:
        found.append(f"{prefix}{error}")
        return None
    for key, content in (("record_sha256", record), ("log_sha256", log)):
        digest = None if content is None else sha256(content)
        if entry[key] != digest and not (entry[key] is None and entry["status"] in ("running", "interrupted")):
            found.add((*where, key), f"{key} is {short(entry[key])}, but in {place} it is {short(digest)}")
    if record is None or log is None:
        if entry["status"] == "complete":
            found.add((*where, "folder"), f"{place} has no record of a complete run")
        return None
    try:
        content = parse_json(record)
        hashes = content["source"]
    except (ValueError, TypeError, KeyError):
        content, hashes = None, None
    matching = [item for item in sources.values() if item[2] == hashes] if own is None else []
    source, name = (own, f"{place}/source.txt") if own is not None else \
        (matching[0][1], matching[0][0]) if matching else (None, "sources/")
    if source is None and isinstance(hashes, dict) and hashes:
        # killed while it ended, a run may have more in its source.txt already
        larger = [item for item in sources.values() if hashes.items() <= item[2].items()]
        source, name = (larger[0][1], larger[0][0]) if larger else (None, name)
    problems = check_record(record, log, source, notes,
                            [f"{prefix}{place}/record.json", f"{prefix}{place}/log.txt", f"{prefix}{name}"])
    found += problems
    return None if problems else content


def _check_entry(found, where, entry, record, ledger, notes):
    """Whether the ledger and the experiment's declarations say of a run what its record (dict) says."""
    departs = []
    for key, value in (("seed", entry["seed"]), ("track", ledger["track"]),
                       ("target", ledger["question"].get("target"))):
        if not same(record[key], value) and record[key] != value:
            departs.append(f"{key} is {short(value)} here, but {short(record[key])} in {entry['folder']}/record.json")
    command = next(arm for arm in ledger["arms"] if arm["label"] == entry["arm"])["command"]
    if not record.get("imported") and record["command"][:len(command)] != command:
        departs.append(f"the command of arm {entry['arm']} is {short(command)}, but that of {entry['folder']} "
                       f"{short(record['command'])}")
    if record["status"] != entry["status"] and not (entry["status"] == "running" == ledger["status"]):
        departs.append(f"status is {entry['status']} here, but {record['status']} in {entry['folder']}/record.json")
    for text in departs:
        if entry["status"] == "failed":     # the experiment refused this run and says so
            notes.append(f"{found.name}: {text}")
        else:
            found.add(where, text)


def _check_folders(folder, found, ledger, notes):
    known = {entry["folder"] for entry in ledger["runs"]}
    try:
        for name in safe.folders(folder / "runs"):
            if f"runs/{name}" not in known:
                found.add(("runs",), f"runs/{ascii(name)[1:-1]} is not in the ledger")
        present = {f"runs/{name}" for name in safe.folders(folder / "runs")}
    except safe.Unsafe as error:
        found.add(("runs",), str(error))
        return
    for number, entry in enumerate(ledger["runs"]):
        if entry["folder"] is not None and entry["folder"] not in present and entry["status"] != "running":
            if entry["status"] == "interrupted" and entry["record_sha256"] is None:
                notes.append(f"{found.name}: {entry['folder']} of a run that was interrupted is not there")
            else:
                found.add(("runs", number, "folder"), f"{ascii(entry['folder'])[1:-1]} is missing")


def _check_arms(found, folder, prefix, ledger, records):
    for index, arm in enumerate(ledger["arms"]):
        label, mine = arm["label"], [(number, record) for number, record in records.items()
                                     if ledger["runs"][number]["arm"] == arm["label"]
                                     and ledger["runs"][number]["status"] == "complete"]
        for number, record in mine[1:]:
            first = mine[0][1]
            changed = sorted(path for path in first["source"].keys() | record["source"].keys()
                             if first["source"].get(path) != record["source"].get(path))
            if changed:
                found.add(("runs", number), f"the source of arm {label} changed between its runs: "
                                            f"{ascii(', '.join(changed))[1:-1][:200]}")
            differs = [key for key in first["config"].keys() | record["config"].keys() if key not in OF_A_RUN
                       and not same(first["config"].get(key), record["config"].get(key))]
            if differs:
                found.add(("runs", number), f"the settings of arm {label} changed between its runs: "
                                            f"{ascii(', '.join(sorted(differs)))[1:-1][:200]}")
        patch = arm.get("patch_sha256")
        if patch is not None:
            try:
                content = safe.read(folder, f"patches/{label}.patch", LARGEST)
            except safe.Unsafe as error:
                found.append(f"{prefix}{error}")
                continue
            if content is None or sha256(content) != patch:
                found.add(("arms", index), f"patches/{label}.patch does not have the SHA-256 that the ledger noted")


def rule_problems(ledger, records, label):
    """Why an arm has not reached the target of its track under the track's rule: list of str, empty where it has.

    ledger: experiment.json (dict).  records: dict of place in ledger["runs"] -> record (dict), those that verify.
    label: of the arm.
    """
    track = get_track(ledger["track"])
    if track is None or track.rule is None:
        return [f"the track {ledger['track']} has no target"]
    if label not in [arm["label"] for arm in ledger["arms"]]:
        return [f"there is no arm {short(label)}"]
    problems, question = [], ledger["question"]
    if question.get("sequential"):
        problems.append("its number of runs was not fixed before (--until-sure), which the rule needs")
    entries = {number: entry for number, entry in enumerate(ledger["runs"]) if entry["arm"] == label}
    planned = [run["index"] for run in ledger["schedule"] if run["arm"] == label]
    failed = [entry for entry in entries.values() if entry["status"] == "failed"]
    if failed:
        problems.append(f"{len(failed)} of its runs failed: {failed[0]['folder']}")
    complete = {number: entry for number, entry in entries.items() if entry["status"] == "complete"}
    if sorted(entry["index"] for entry in complete.values()) != sorted(planned):
        problems.append(f"not every declared run of arm {label} is there, once and complete: {len(complete)} of "
                        f"{len(planned)}")
    if lost := [entry["folder"] for number, entry in complete.items() if number not in records]:
        return [*problems, f"{lost[0]} does not verify"]
    runs = [records[number] for number in complete]
    for run, entry in zip(runs, complete.values()):
        problems += [f"of {entry['folder']}: {text}" for _, text in departures(run, track)]
    machines = {(run["hardware"].get("accelerator"), run["hardware"].get("accelerator_count")) for run in runs}
    if len(machines) > 1:
        problems.append(f"its runs were made on different hardware: {ascii(sorted(map(str, machines)))}")
    values = [run[track.metric] for run in runs]
    if len(values) < track.rule.least_runs:
        problems.append(f"it has {len(values)} runs, the rule of {track.name} needs at least {track.rule.least_runs}")
    elif not problems:
        try:
            p = stats.target_p(values, track.target, track.direction)
        except ValueError as error:
            return [f"no test can be made of its values: {error}"]
        if not p < track.rule.alpha:
            problems.append(f"its mean {sum(values) / len(values):.5f} (n = {len(values)}) is not beyond "
                            f"{track.target:g} at p < {track.rule.alpha:g}: p = {p:.3g}")
    return problems
