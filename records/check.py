"""Whether a record is true: every claim of record.json is rebuilt from log.txt and source.txt and compared.

All of it happens in memory on bytes that may be anything; nothing of a record is executed, imported or unpacked to
disk. Every key of record.json is a claim. The log vouches for each: for the metric with six decimals in runs that were
killed and in schema 1, with all its digits otherwise. From schema 2 on log_sha256 fixes the log as a whole; in a log
without it, what claims nothing can change unnoticed: free text, and a progress line that is taken out.
"""
import json
import re
from datetime import datetime, timedelta

from records.check_source import check_configuration, check_source, check_track
from records.checked_log import DESCRIPTION, NOT_FINITE, parse_json, read_log
from records.log import CONTROL, NAME, RESERVED, RESULT, not_finite, reaches
from records.source import sha256
from records.summary import summary
from records.tracks import metric_of

LARGEST = 16 * 2**20        # bytes of any file of a record
MOST = 30                   # problems listed of one record
NONE, NUMBER = type(None), (int, float)
TYPES = {"schema": int, "track": str, "name": str, "target": (*NUMBER, NONE), "steps_planned": int, "seed": int,
         "started": str, "command": list, "config": dict, "hardware": dict, "versions": dict, "git": dict,
         "source": dict, "status": str, "message": (str, NONE), "reached": (bool, NONE),
         "time_to_target_s": (*NUMBER, NONE), "train_time_s": NUMBER, "steps": int, "tokens": int,
         "validation": list, "data": dict, "peak_memory_bytes": (int, NONE), "extra": dict}


class Problems(list):
    """What is wrong with a record: list of str, each with the file and the line.  name: of record.json."""

    def __init__(self, name, content):
        super().__init__()
        self.name, self.text = name, content.decode(errors="replace")

    def add(self, path, text):
        """path: tuple of keys and indices that lead to a value of record.json, or "file, line 3".  text: str."""
        if not isinstance(path, str):       # looking for the line takes time, and nobody reads that many
            path = self._place(*path) if len(self) < MOST else self.name
        self.append(f"{path}: {text}")

    def _place(self, key, *rest):
        found = re.search(rf"^ {re.escape(json.dumps(key))}:", self.text, re.MULTILINE)     # as Record indents it
        position = found.start() if found else 0
        for part in rest:
            pattern = re.compile(r"\{" if isinstance(part, int) else re.escape(json.dumps(part)) + r"\s*:")
            for _ in range(part + 1 if isinstance(part, int) else 1):
                found = pattern.search(self.text, position)
                position = found.end() if found else position
        return f"{self.name}, line {self.text.count(chr(10), 0, position) + 1}"


def check_record(record, log, source, notes=None, names=("record.json", "log.txt", "source.txt")):
    """Hold the files of a run against each other.

    record, log, source: content of record.json, log.txt (not compressed) and source.txt (bytes; source may be None).
    notes: list that receives what cannot be decided (str), or None.  names: what the messages call the files.
    Returns the problems, list of str, empty where every claim holds.
    """
    notes = [] if notes is None else notes
    for name, content in zip(names, (record, log, source or b"")):
        if len(content) > LARGEST:
            return [f"{name}, line 1: {len(content)} bytes, more than the {LARGEST} that any record needs"]
    problems = Problems(names[0], record)
    try:
        content = parse_json(record)
    except ValueError as error:     # of json, of a number, or of UTF-8
        line = getattr(error, "lineno", 1)
        return [f"{names[0]}, line {line}: not JSON ({str(error)[:120]})"]
    if isinstance(content, dict) and content.get("imported") is not None:
        from records.import_log import check_imported
        return check_imported(content, log, source, problems, notes, names)[:MOST]
    if not _types_are_right(problems, content):
        return problems[:MOST]
    found = read_log(log, names[1])
    problems += found.problems
    if found.facts:
        metric = metric_of(content["track"])
        _check_description(problems, content, found)
        _check_points(problems, content, found, metric, notes)
        _check_result(problems, content, found, metric)
    _check_end(problems, content, found, log)
    files = check_source(problems, content, source, names[2], notes, ended=found.result is not None)
    check_configuration(problems, content, files, notes)
    check_track(problems, content, notes)
    return problems[:MOST] + [f"{names[0]}: {len(problems) - MOST} more problems"] * (len(problems) > MOST)


def short(value):
    """A value for a message: JSON, at most 80 characters, ASCII."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def same(first, second):
    """Whether two JSON values are the same; 1, 1.0 and true are not."""
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


def _types_are_right(problems, content):
    if not isinstance(content, dict):
        problems.add(("schema",), "expected a JSON object")
        return False
    schema = content.get("schema")
    if type(schema) is not int or schema not in (1, 2):
        problems.add(("schema",), f"schema is {short(schema)}, expected 1 or 2")
        return False
    metric = metric_of(content["track"]) if isinstance(content.get("track"), str) else "val_loss"
    types = TYPES | {metric: (*NUMBER, NONE)} | ({"log_sha256": (str, NONE)} if schema > 1 else {})
    for key in types.keys() - content.keys():
        problems.add((key,), f"{key} is missing")
    for key in content.keys() - types.keys():
        problems.add((key,), f"{short(key)} is no key of schema {schema}: nothing vouches for it")
    for key in types.keys() & content.keys():
        _check_type(problems, (key,), content[key], types[key])
    if problems:
        return False
    for key in ("steps_planned", "steps", "tokens", "train_time_s", "peak_memory_bytes"):
        if content[key] is not None and content[key] < 0:
            problems.add((key,), f"{key} is {short(content[key])}, expected at least 0")
    for key in ("track", "name"):
        if not NAME.fullmatch(content[key]) or len(content[key]) > 200:
            problems.add((key,), f"{key} is {short(content[key])}, expected letters, digits, '.', '_' and '-'")
    if content["status"] not in ("complete", "failed", "interrupted"):
        problems.add(("status",), f"status is {short(content['status'])}, expected complete, failed or interrupted")
    if not all(isinstance(part, str) for part in content["command"]):
        problems.add(("command",), f"command is {short(content['command'])}, expected a list of text")
    for key in ("source", "data"):
        for name, value in content[key].items():
            if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
                problems.add((key, name), f"{short(value)} is no SHA-256 in hexadecimal")
    for index, point in enumerate(content["validation"]):
        kinds = {"step": int, "tokens": int, "train_time_s": NUMBER, metric: (*NUMBER, NONE)}
        if not isinstance(point, dict) or point.keys() != kinds.keys():
            problems.add(("validation", index), f"{short(point)} has not exactly the keys {', '.join(kinds)}")
            break
        for key, kind in kinds.items():
            _check_type(problems, ("validation", index, key), point[key], kind)
    _check_started(problems, content["started"])
    return not problems


def _check_type(problems, path, value, kinds):
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
        problems.add(path, f"{path[-1]} is {short(value)}, expected {' or '.join(kind.__name__ for kind in kinds)}")
    elif type(value) in NUMBER and abs(value) > 1e300:
        problems.add(path, f"{path[-1]} is {short(value)}, which is no measurement")


def _check_started(problems, text):
    try:
        if datetime.fromisoformat(text).utcoffset() != timedelta(0) or len(text) != len("2026-01-01T00:00:00+00:00"):
            raise ValueError
    except ValueError:
        problems.add(("started",), f"started is {short(text)}, expected a time in UTC like 2026-01-31T23:59:59+00:00")


def _check_description(problems, content, found):
    for key in DESCRIPTION:
        value, line = found.facts.get(key, (None, 0))
        claimed = content[key]
        if key == "git":
            diff = claimed.get("diff")
            if not isinstance(diff, (str, NONE)) or bool(diff) != bool(claimed.get("dirty")):
                problems.add(("git",), "diff and dirty do not go together")
                continue
            claimed = {"commit": claimed.get("commit"), "dirty": claimed.get("dirty"), "diff_sha256":
                       None if diff is None else sha256(diff.encode(errors="surrogatepass"))}
            if content["git"].keys() != {"commit", "dirty", "diff"}:
                problems.add(("git",), "expected exactly commit, dirty and diff")
        if key == "source" and found.sources:
            before, (value, line) = value, found.sources[-1]
            if isinstance(before, dict) and not before.items() <= value.items():
                problems.add(f"{found.name}, line {line}", "a source that changed while the run went on")
        if line and not same(claimed, value):
            problems.add((key,), f"{key} is {short(claimed)}, but {found.name} line {line} has {short(value)}")
    merged = {}
    for value, line in found.data:
        if not merged.items() <= value.items():
            problems.add(f"{found.name}, line {line}", "a data file that an earlier line had is missing or another")
        merged = value
    if not same(merged, content["data"]):
        where = f"line {found.data[-1][1]} has" if found.data else "has"
        problems.add(("data",), f"data is {short(content['data'])}, but {found.name} {where} {short(merged)}")


def _check_points(problems, content, found, metric, notes):
    claimed, logged = content["validation"], found.points
    unfinished = content["status"] == "interrupted" and found.result is None
    if unfinished and len(logged) == len(claimed) + 1:
        notes.append(f"{found.name}, line {logged[-1].line}: one validation more than record.json has: the run was "
                     "killed between the two")
        logged = logged[:-1]
    for index, (point, line) in enumerate(zip(claimed, logged)):
        value = point[metric]
        text = f"{value:.6f}" if value is not None else line.text if line.text in NOT_FINITE else "nan"
        for key, ours, theirs in (("step", point["step"], line.step), ("tokens", point["tokens"], line.tokens),
                                  ("train_time_s", point["train_time_s"], line.milliseconds / 1000),
                                  (metric, text, line.text), ("metric", metric, line.metric)):
            if ours != theirs:
                problems.add(("validation", index, key),
                             f"{key} {ours}, but {found.name} line {line.line} has {theirs}")
    if len(claimed) > len(logged):
        problems.add(("validation", len(logged)), f"the validation at step {claimed[len(logged)]['step']} is not in "
                                                  f"{found.name}")
    for line in logged[len(claimed):]:
        problems.add(f"{found.name}, line {line.line}", f"the validation at step {line.step} is not in record.json")
    last = claimed[-1] if claimed else {metric: None, "tokens": 0}
    for key in (metric, "tokens"):
        if not same(content[key], last[key]):
            problems.add((key,), f"{key} is {short(content[key])}, but the last validation has {short(last[key])}")
    target, reached, seconds = content["target"], None, None
    if target is not None:
        first = next((point for point in claimed if point[metric] is not None
                      and reaches(metric, point[metric], target)), None)
        reached, seconds = first is not None, first and first["train_time_s"]
    for key, value in (("reached", reached), ("time_to_target_s", seconds)):
        if not same(content[key], value):
            problems.add((key,), f"{key} is {short(content[key])}, but the validations give {short(value)} "
                                 f"for a target of {target}")


def _check_result(problems, content, found, metric):
    status, points = content["status"], content["validation"]
    broken = next((line for line in found.points if line.text in NOT_FINITE), None)
    if broken and status != "failed":
        problems.add(("status",), f"status is {status}, but {found.name} line {broken.line} has {metric}:{broken.text}")
    if status == "complete" and content["message"] is not None:
        problems.add(("message",), f"a message in a complete run: {short(content['message'])}")
    last = (points[-1]["step"], points[-1]["train_time_s"]) if points else (0, 0.0)
    clock = [(step, milliseconds / 1000) for step, milliseconds in found.clock]
    reached = (content["steps"], content["train_time_s"])
    if found.result is None:
        message = not_finite(metric, float(broken.text), broken.step) if broken else None
        if status != ("failed" if broken else "interrupted"):
            problems.add(("status",), f"status is {status}, but {found.name} has no result line")
        for key, value in (("message", message), ("peak_memory_bytes", None), ("extra", {})):
            if not same(content[key], value):
                problems.add((key,), f"{key} is {short(content[key])}, but {found.name} has no result line")
        if reached != last and reached not in clock:
            problems.add(("steps",), f"step {reached[0]} at {reached[1]} s is not in {found.name}")
        return
    result, line = found.result
    for key in RESULT:
        if key not in result or not same(result[key], content[key]):
            problems.add((key,), f"{key} is {short(content[key])}, but {found.name} line {line} has "
                                 f"{short(result.get(key))}")
    values = [point[metric] for point in points]
    expected = set(RESULT) | ({"values"} if content["schema"] > 1 else set())
    if result.keys() != expected:
        problems.add(f"{found.name}, line {line}", f"the result has not exactly the keys {', '.join(sorted(expected))}")
    elif content["schema"] > 1 and not same(result["values"], values):
        where = next((index for index, (ours, theirs) in enumerate(zip(values, result["values"] or []))
                      if not same(ours, theirs)), None) if isinstance(result["values"], list) else None
        path = ("validation",) if where is None else ("validation", where, metric)
        problems.add(path, f"the values of {metric} are not those of {found.name} line {line}")
    end = clock[-1] if clock else (0, 0.0)
    if reached[0] < end[0] or reached[1] < end[1] or reached[0] == end[0] and points and end == last != reached:
        problems.add(("train_time_s",), f"step {reached[0]} at {reached[1]} s, but {found.name} line {found.last} is "
                                        f"at step {end[0]}, {end[1]} s")
    if not problems:        # of a record that contradicts itself there is no summary
        _check_tail(problems, content, found)


def _check_tail(problems, content, found):
    """The summary is what readers of a log believe: it has to say what the record says."""
    if not found.tail and content["schema"] == 1:
        return
    place = next((line for line in found.tail if line.startswith("record  ")), "")
    texts = [summary(content, place.partition("  ")[2].lstrip())]
    if content["status"] != "complete":
        texts.append(f"{content['status']}: {content['message']}")
    texts = [CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), RESERVED.sub(" ", text)) + "\n"
             for text in texts]
    text = "\n".join([*found.tail, ""])
    if not any(text.startswith(expected) for expected in texts):
        wrong = next((index for index, (ours, theirs) in enumerate(zip(found.tail, texts[-1].split("\n")))
                      if ours != theirs), 0)
        problems.add(f"{found.name}, line {found.result[1] + 1 + wrong}", "the summary is not that of this record")


def _check_end(problems, content, found, log):
    if content["schema"] == 1:
        return
    ended, claimed = found.result is not None, content["log_sha256"]
    if claimed is None and ended:
        problems.add(("log_sha256",), "log_sha256 is missing from a run that ended")
    elif claimed is not None and claimed != sha256(log):
        problems.add(("log_sha256",), f"log_sha256 is {short(claimed)}, but {found.name} has {sha256(log)}")
