"""The parts of `records.check` that look at source.txt, at the settings it gives, and at the track."""
from records.configuration import UNKNOWN, Undecided, expected
from records.environment import PATH
from records.settings import SettingsError
from records.source import sha256, unpack_source
from records.tracks import get_track

RECORDED = {"track": "track", "name": "name", "target": "target", "steps": "steps_planned", "seed": "seed"}


def check_source(problems, content, source, name, notes, ended):
    """Whether source.txt (bytes, or None) is what record.json (dict) has the hashes of.  ended: whether the run did.

    Adds to `problems` and `notes`; returns dict of path -> bytes, or None where source.txt is missing or damaged.
    """
    if source is None:
        problems.add(("source",), f"{name} is missing: nothing shows which code ran")
        return None
    try:
        files = unpack_source(source)
    except ValueError as error:
        problems.append(f"{name}: {error}")
        return None
    hashes = {path: sha256(file) for path, file in files.items()}
    for path, value in content["source"].items():
        if path not in hashes:
            problems.add(("source", path), f"{path!a} is not in {name}")
        elif hashes[path] != value:
            problems.add(("source", path), f"{path!a} has the SHA-256 {value}, but in {name} {hashes[path]}")
    if more := hashes.keys() - content["source"].keys():
        text = f"{name} has parts that record.json does not know: {', '.join(map(ascii, sorted(more)))[:200]}"
        if ended:
            problems.add(("source",), text)
        else:
            notes.append(f"{text}; the run was killed while it ended")
    return files


def check_configuration(problems, content, files, notes):
    """Whether `config` is what the source's defaults, its preset and the command line give.

    files: dict of path -> bytes from source.txt, or None.  What cannot be decided without running it is a note.
    """
    if files is None:
        return
    config = content["config"]
    try:
        values, recorded, remarks = expected(files, content["command"], config.get("preset"))
    except Undecided as error:
        notes.append(f"{problems.name}: whether config is what the source gives was not decided: {_ascii(error)}")
        return
    except SettingsError as error:
        problems.add(("command",), f"the command does not fit the settings in the source: {_ascii(error)}")
        return
    notes += [f"{problems.name}: {remark}" for remark in remarks]
    unknown = sorted(name for name, value in values.items() if value is UNKNOWN)
    if unknown:
        notes.append(f"{problems.name}: no literal in the source says what these settings are: {', '.join(unknown)}")
    for name in sorted(values.keys() | config.keys()):
        if name not in values:
            problems.add(("config", name), f"config has {name!a}, which is no setting of {content['command'][0]}")
        elif name not in config:
            problems.add(("config",), f"config has no {name!a}, a setting of {content['command'][0]}")
        elif values[name] is not UNKNOWN and not _equal(values[name], config[name]):
            problems.add(("config", name), f"{name} is {config[name]!a}, but the source and the command line give "
                                           f"{values[name]!a}"[:300])
    for argument, key in RECORDED.items():
        setting = recorded.get(argument)
        if setting in config and not _equal(config[setting], content[key]):
            problems.add((key,), f"{key} is {content[key]!a}, but the setting {setting} is {config[setting]!a}"[:300])
    first, runs = config.get("seed"), config.get("runs")    # a process that makes several runs counts on from its seed
    if type(first) is type(runs) is int:
        if not first <= content["seed"] < first + runs:
            problems.add(("seed",), f"seed is {content['seed']}, but the settings seed and runs are {first} and {runs}")
        if runs == 1 and config.get("name") != content["name"]:
            problems.add(("name",), f"name is {content['name']!a}, but the setting is {config.get('name')!a}"[:300])


def _ascii(error):
    return ascii(str(error))[1:-1][:300]


def _equal(value, recorded):
    """Whether a record holds `value` as `recorded`: infinity as text, absolute paths cut to their end."""
    if isinstance(value, str):
        return recorded in (value, PATH.sub(lambda match: ".../" + match[0].rstrip("/").rpartition("/")[2], value))
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return recorded == str(value)
    return isinstance(value, bool) == isinstance(recorded, bool) and value == recorded


def check_track(problems, content, notes):
    """Whether the run is one of its track. Another data set is a problem; another target, script or setting than the
    track's is one in a run that claims to have reached the target, and a note otherwise."""
    track = get_track(content["track"])
    if track is None:
        notes.append(f"{problems.name}: {content['track']} is no track of records/tracks.py: its data set and its rule "
                     "are not known")
        return
    for name, value in content["data"].items():
        if name in track.data and value != track.data[name]:
            problems.add(("data", name), f"{name} is not the file of the track {track.name}, SHA-256 "
                                         f"{track.data[name]}")
        elif name not in track.data and track.complete:
            problems.add(("data", name), f"{name!a} is no file of the data set of the track {track.name}")
    breaks = departures(content, track)
    if content["reached"] and track.target is not None:
        for path, text in breaks:
            problems.add(path, f"{text}: this does not reach the target of the track {track.name}")
    else:
        notes += [f"{problems.name}: {text}" for _, text in breaks]


def departures(content, track):
    """Where a record (dict) is not a run of its Track: list of (path in record.json, str), empty where it is one."""
    found = []
    if not content["command"] or content["command"][0].rpartition("/")[2] != track.script:
        found.append((("command",), f"it did not run {track.script}"))
    if track.target is not None and content["target"] != track.target:
        found.append((("target",), f"its target is {content['target']}, the track's {track.target}"))
    for name, value in track.fixed.items():
        if content["config"].get(name) != value:
            found.append((("config",), f"its {name} is {content['config'].get(name)!a}, the track's {value}"[:200]))
    held_out = [name for name in track.data if "val" in name or "test" in name]
    for name in held_out:
        if content["validation"] and name not in content["data"]:
            found.append((("data",), f"it does not say which {name} it validated on"))
    return found
