"""A record of somebody else's run, from its log:  python -m records import LOG --track fineweb-3.28

Reads the lines that the community's scripts print (modded-nanogpt and its relatives):

    step:125/1750 val_loss:4.3123 train_time:23145ms step_avg:185.16ms

after a header with the source and a line of =, or without one. The log is all there is: seed, settings and data stay
unknown, and the record is marked as imported. Its log.txt is the log, with control characters escaped; `verify` reads
record.json from it anew.
"""
import math
import os
import re
import sys
from datetime import datetime, timezone
from pathlib import Path

from records.checked_log import text_lines
from records.files import RecordError, write_whole
from records.log import CONTROL, NAME, SCHEMA, new_folder, not_finite, reaches, record_bytes
from records.source import pack_source, path_problem, sha256
from records.tracks import get_track, metric_of

LARGEST = 16 * 2**20            # bytes of a log, as in records.check
VALIDATION = re.compile(r"step:([0-9]{1,15})/([0-9]{1,15})\s+(val_loss|accuracy):(\S+)\s+"
                        r"train_time:([0-9]{1,15}(?:\.[0-9]{1,15})?)(ms|s)\b")
TOKENS = re.compile(r"\btokens:([0-9]{1,15})\b")
END_OF_SOURCE = re.compile(r"={40,}")
VERSIONS = {"python": re.compile(r"Running Python ([0-9][\w.+-]*)"), "torch": re.compile(r"PyTorch ([0-9][\w.+-]*)"),
            "cuda": re.compile(r"compiled for CUDA ([0-9][\w.]*)")}
GPU = re.compile(r"^\|\s+[0-9]+\s+(NVIDIA .*?)\s+(?:On|Off)\s+\|")      # a row of nvidia-smi
HINT = "expected lines such as step:125/1750 val_loss:4.3123 train_time:23145ms"


def imported_record(log, origin):
    """The record that a log gives.

    log: content of log.txt (bytes).  origin: dict of what the log does not say: track, name (str), started (str, ISO
    time of the run or of the import), script (str, what to call the source in the header), tokens_per_step (int or
    None), original_sha256 (str, of the log as it came).
    Returns (record.json as dict, source.txt as bytes or None).  Raises RecordError naming the line of the log.
    """
    problems = []
    lines = text_lines(log, "log.txt", problems)
    if problems:
        raise RecordError(problems[0])
    if lines[0].startswith("schema: "):
        raise RecordError("log.txt, line 1: this is the log of a record of this repository; copy its whole folder, or "
                          "submit it: python -m records submit FOLDER")
    start = _end_of_source(lines)
    points, planned, broken = _points(lines, start, origin)
    metric, track = metric_of(origin["track"]), get_track(origin["track"])
    target = track.target if track else None
    first = next((point for point in points if target is not None and point[metric] is not None
                  and reaches(metric, point[metric], target)), None)
    last = points[-1]
    source = pack_source({origin["script"]: "\n".join([*lines[:start - 1], ""]).encode()}) if start else None
    status = "failed" if broken else "complete" if last["step"] >= planned else "interrupted"
    message = broken or (None if status == "complete" else f"the log ends at step {last['step']} of {planned}")
    gpus = [found[1] for line in lines[start:] if (found := GPU.match(line[:200]))]
    versions = {key: next((found[1] for line in lines[start:] if (found := pattern.search(line[:1000]))), None)
                for key, pattern in VERSIONS.items()}
    return {
        "schema": SCHEMA, "track": origin["track"], "name": origin["name"], "target": target, "steps_planned": planned,
        "seed": None, "started": origin["started"], "command": [], "config": {},
        "hardware": {"accelerator": gpus[0] if len(set(gpus)) == 1 else None, "accelerator_count": len(gpus) or None},
        "versions": versions, "git": {"commit": None, "dirty": None, "diff": None},
        "source": {} if source is None else {origin["script"]: sha256("\n".join([*lines[:start - 1], ""]).encode())},
        "status": status, "message": message, "reached": None if target is None else first is not None,
        "time_to_target_s": first and first["train_time_s"], "train_time_s": last["train_time_s"],
        "steps": last["step"], "tokens": last["tokens"], metric: last[metric], "validation": points, "data": {},
        "peak_memory_bytes": None, "extra": {}, "log_sha256": sha256(log), "imported": origin,
    }, source


def _end_of_source(lines):
    """How many lines the header with the source has, its line of = included; 0 where there is none."""
    for number, line in enumerate(lines, 1):
        if VALIDATION.match(line):
            return 0
        if END_OF_SOURCE.fullmatch(line):
            return number if number > 1 and any("import " in before for before in lines[:number]) else 0
    return 0


def _points(lines, start, origin):
    """The validations below line `start`: (list of points, steps planned, message about one that is not finite)."""
    metric, points, planned, broken = metric_of(origin["track"]), [], None, None
    for number, line in enumerate(lines[start:], start + 1):
        found = VALIDATION.match(line)
        if not found:
            if line.startswith("step:") and " val_loss:" in line:
                raise RecordError(f"log.txt, line {number}: {line[:100]!a} cannot be read; {HINT}")
            continue
        step, of, name, text, time, unit = found.groups()
        try:
            value = float(text)
        except ValueError:
            raise RecordError(f"log.txt, line {number}: {name}:{text[:40]!a} is no number") from None
        if name != metric:
            raise RecordError(f"log.txt, line {number}: it measures {name}, the track {origin['track']} {metric}")
        if planned is not None and int(of) != planned:
            raise RecordError(f"log.txt, line {number}: {of} steps planned, {planned} in the lines before; expected "
                              "the log of one run")
        planned, tokens = int(of), TOKENS.search(line)
        per_step = origin["tokens_per_step"]
        point = {"step": int(step), "tokens": int(tokens[1]) if tokens else int(step) * per_step if per_step else None,
                 "train_time_s": float(time) if unit == "s" else float(time) / 1000,
                 metric: value if math.isfinite(value) else None}
        if points and (point["step"] <= points[-1]["step"] or point["train_time_s"] < points[-1]["train_time_s"]):
            raise RecordError(f"log.txt, line {number}: step {point['step']} at {point['train_time_s']} s follows step "
                              f"{points[-1]['step']} at {points[-1]['train_time_s']} s; expected the log of one run, "
                              "whose clock only goes forward")
        points.append(point)
        if not math.isfinite(value) and broken is None:
            broken = not_finite(metric, value, point["step"])
    if not points:
        raise RecordError(f"log.txt, line {start + 1}: no validation line from here on; {HINT}")
    return points, planned, broken


def check_imported(content, log, source, problems, notes, names):
    """Hold an imported record against its log.

    content: record.json (dict).  log: bytes of log.txt.  source: bytes of source.txt, or None.  problems:
    records.check.Problems, which is added to and returned.  notes: list of str.  names: what messages call the files.
    """
    origin = content["imported"]
    kinds = {"track": str, "name": str, "started": str, "script": str, "tokens_per_step": (int, type(None)),
             "original_sha256": str}
    if not isinstance(origin, dict) or origin.keys() != kinds.keys() or any(
            not isinstance(origin[key], kind) or isinstance(origin[key], bool) for key, kind in kinds.items()) \
            or not NAME.fullmatch(origin["track"]) or not NAME.fullmatch(origin["name"]) \
            or path_problem(origin["script"]) or not re.fullmatch("[0-9a-f]{64}", origin["original_sha256"]):
        problems.add(("imported",), f"expected exactly {', '.join(kinds)}")
        return problems
    try:
        rebuilt, packed = imported_record(log, origin)
    except RecordError as error:
        problems.append(str(error).replace("log.txt", names[1], 1))
        return problems
    from records.check import same, short
    for key in sorted(rebuilt.keys() | content.keys()):
        if key not in content or key not in rebuilt or not same(content[key], rebuilt[key]):
            problems.add((key,), f"{key} is {short(content.get(key))}, but {names[1]} gives {short(rebuilt.get(key))}")
    if packed != source:
        problems.append(f"{names[2]}, line 1: it is not the header of {names[1]}" if packed else
                        f"{names[2]}, line 1: {names[1]} has no source in its header")
    notes.append(f"{names[0]}: imported: seed, settings and data are not known, and nothing but the log vouches for it")
    return problems


def import_log(log, root, *, track, name, script=None, started=None, tokens_per_step=None):
    """Make a record of a log.

    log: bytes.  root: folder of all records (Path).  The rest as in `imported_record`; script None means the track's.
    Returns the Path of its folder.  Raises RecordError.
    """
    if len(log) > LARGEST:
        raise RecordError(f"the log has {len(log)} bytes, more than {LARGEST}: expected a log of step lines")
    for key, value in (("track", track), ("name", name)):
        if not NAME.fullmatch(value):
            raise RecordError(f"the {key} {value!r} cannot name a folder: expected letters, digits, '.', '_' and '-'; "
                              f"choose another with --{key}")
    known = get_track(track)
    script = script or (known.script if known else "train.py")
    if path_problem(script):
        raise RecordError(f"--script {script!r}: expected a file name such as train_gpt.py")
    try:
        began = datetime.fromisoformat(started) if started else datetime.now(timezone.utc)
    except ValueError:
        raise RecordError(f"--started {started!r}: expected a time such as 2026-01-31T23:59:59") from None
    began = (began if began.tzinfo else began.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)
    text = log.decode(errors="backslashreplace").replace("\r\n", "\n")
    text = CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    clean = (text if text.endswith("\n") else f"{text}\n").encode()
    record, source = imported_record(clean, {
        "track": track, "name": name, "started": began.isoformat(timespec="seconds"), "script": script,
        "tokens_per_step": tokens_per_step, "original_sha256": sha256(log)})
    folder = new_folder(Path(root) / track, f"{began:%Y-%m-%d_%H%M%S}_{name}")
    if source is not None:
        write_whole(folder / "source.txt", source)
    write_whole(folder / "log.txt", clean)
    write_whole(folder / "record.json", record_bytes(record))
    return folder


def add_arguments(parser):
    """Give the argparse parser of `python -m records import` its arguments."""
    parser.add_argument("logs", nargs="+", metavar="LOG", help="log files, one run each")
    parser.add_argument("--track", required=True, help="such as fineweb-3.28")
    parser.add_argument("--name", help="of the record (default: the log's file name; with several logs their number "
                                       "follows)")
    parser.add_argument("--records", default="records", help="folder of all records (default: %(default)s)")
    parser.add_argument("--script", help="what to call the source in the header (default: the track's script)")
    parser.add_argument("--started", help="when the run began, ISO format (default: now, the time of the import)")
    parser.add_argument("--tokens-per-step", type=int, help="where the log does not say how many tokens were seen")


def main(options):
    """Run the command. options: Namespace of add_arguments.  Returns 0, or 2 with one line on stderr."""
    try:
        for number, path in enumerate(map(Path, options.logs), 1):
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-") or "imported"
            if options.name:
                name = options.name if len(options.logs) == 1 else f"{options.name}-{number}"
            try:
                with open(path, "rb") as file:
                    log = file.read(LARGEST + 1)
            except OSError as error:
                raise RecordError(f"cannot read {path}: {error.strerror}") from None
            try:
                folder = import_log(log, options.records, track=options.track, name=name, script=options.script,
                                    started=options.started, tokens_per_step=options.tokens_per_step)
            except RecordError as error:
                raise RecordError(f"{path}: {str(error).removeprefix('log.txt, ')}") from None
            print(os.path.relpath(folder))
    except RecordError as error:
        print(f"records import: {error}", file=sys.stderr)
        return 2
    return 0
