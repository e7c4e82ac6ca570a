"""log.txt read by someone who does not trust it: every line of the record's own has to be exactly as records.log writes
it, and every complaint names the line. Bytes may be anything; time and memory grow with their number only."""
import json
import math
import re
from dataclasses import dataclass, field

from records.log import CONTROL, COUNT, LATER, SEPARATOR, VALIDATION

PROGRESS = re.compile(rf"step:({COUNT})/({COUNT}) train_time:({COUNT})ms step_avg:(\S+)ms")
DESCRIPTION = ("schema", "track", "name", "target", "steps_planned", "seed", "started", "command", "config", "hardware",
               "versions", "git", "source")
MOST_LINES = 500_000
NOT_FINITE = ("nan", "inf", "-inf")


@dataclass
class LogPoint:
    """A validation line. text: the metric as written, six decimals or one of NOT_FINITE.  line: its number, from 1."""
    step: int
    tokens: int
    milliseconds: int
    metric: str
    text: str
    line: int


@dataclass
class CheckedLog:
    """facts: dict of key -> (value, line) of the description.  data, sources: the `data` and `source` lines below it,
    list of (value, line).  result: the same of the `result` line, or None.  tail: the lines after it (list of str).
    points: list of LogPoint.  clock: (step, milliseconds) of every step line, in order.  last: line of the last one.
    problems: list of str."""
    name: str
    facts: dict = field(default_factory=dict)
    data: list = field(default_factory=list)
    sources: list = field(default_factory=list)
    result: tuple | None = None
    tail: list = field(default_factory=list)
    points: list = field(default_factory=list)
    clock: list = field(default_factory=list)
    last: int = 0
    problems: list = field(default_factory=list)

    def wrong(self, line, text):
        self.problems.append(f"{self.name}, line {line}: {text}")


def parse_json(content):
    """The JSON value in `content` (str or bytes).  Raises ValueError, also for what other readers may read otherwise:
    NaN, numbers beyond any float, a key given twice, nesting without end."""
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    def number(text):
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"the number {text[:40]} is too large")
        return value

    def once(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key is given twice in one object")
        return found
    try:
        content = content.decode() if isinstance(content, bytes) else content   # json would guess at UTF-16
        return json.loads(content, parse_constant=refuse, parse_float=number, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def text_lines(content, name, problems):
    """The lines of `content` (bytes); None, with a complaint in `problems`, where it is no text that is safe to show."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problems.append(f"{name}, line {line}: byte {content[error.start]:#04x} at {error.start} is not UTF-8")
        return None
    if found := CONTROL.search(text):
        line = text.count("\n", 0, found.start()) + 1
        problems.append(f"{name}, line {line}: the control character {ascii(found[0])}, which no record writes")
        return None
    count = text.count("\n")
    if not text.endswith("\n"):
        problems.append(f"{name}, line {count + 1}: cut off, or empty: no newline at its end")
        return None
    if count > MOST_LINES:
        problems.append(f"{name}, line {MOST_LINES + 1}: more lines than any log needs")
        return None
    return text[:-1].split("\n")


def read_log(content, name="log.txt"):
    """content: bytes of a log.txt.  name: what complaints call it.  Returns CheckedLog."""
    log = CheckedLog(name)
    lines = text_lines(content, name, log.problems)
    if lines is None:
        return log
    if SEPARATOR not in lines:
        log.wrong(1, f"no line of {len(SEPARATOR)} '=' ends a description of the run: not the log.txt of a record")
        return log
    start = lines.index(SEPARATOR)
    for number, line in enumerate(lines[:start], 1):
        key, _, text = line.partition(": ")
        if key not in DESCRIPTION or key in log.facts:
            log.wrong(number, f"{line[:60]!r} is no fact of a description, or a second one of its kind")
        elif (value := _value(log, number, text)) is not None:
            log.facts[key] = value
    for key in DESCRIPTION:
        if key not in log.facts:
            log.wrong(start + 1, f"the description above has no {key!r} that can be read")
    for number, line in enumerate(lines[start + 1:], start + 2):
        _body_line(log, number, line)
    return log


def _value(log, number, text):
    try:
        value = parse_json(text)
        if json.dumps(value) != text:
            raise ValueError("spelled as no record spells it")
        return value, number
    except ValueError as error:
        log.wrong(number, f"not JSON ({str(error)[:120]})")
        return None


def _body_line(log, number, line):
    key, _, text = line.partition(": ")
    own = line.startswith("step:") or key in LATER and text.startswith("{")
    if log.result is not None:
        if own:
            log.wrong(number, f"{line[:60]!r} after the result of line {log.result[1]}")
        log.tail.append(line)
    elif line.startswith("step:"):
        _step_line(log, number, line)
    elif own and (value := _value(log, number, text)) is not None:
        if key == "result":
            log.result = value
        else:
            (log.data if key == "data" else log.sources).append(value)


def _step_line(log, number, line):
    validation, progress = VALIDATION.fullmatch(line), PROGRESS.fullmatch(line)
    if not validation and not progress:
        return log.wrong(number, f"{line[:100]!r} is neither a validation nor a progress line")
    if validation:
        step, planned, metric, text, milliseconds, average, tokens = validation.groups()
    else:
        step, planned, milliseconds, average = progress.groups()
    counts = [step, planned, milliseconds] + ([tokens] if validation else [])
    if any(count != str(int(count)) for count in counts):
        return log.wrong(number, "a number begins with a zero")
    step, planned, milliseconds = int(step), int(planned), int(milliseconds)
    if "steps_planned" in log.facts and planned != log.facts["steps_planned"][0]:
        log.wrong(number, f"{planned} steps planned, expected {str(log.facts['steps_planned'][0])[:40]} as in line "
                          f"{log.facts['steps_planned'][1]}")
    if average != f"{milliseconds / max(step, 1):.2f}":
        log.wrong(number, f"step_avg:{average[:40]}ms, but {milliseconds} ms / {step} steps is "
                          f"{milliseconds / max(step, 1):.2f}")
    before = log.clock[-1] if log.clock else (0, 0)
    if milliseconds < before[1] or step < before[0]:
        log.wrong(number, f"step {step} at {milliseconds} ms follows step {before[0]} at {before[1]} ms of line "
                          f"{log.last}: steps and clock only go forward")
    log.clock.append((step, milliseconds))
    log.last = number
    if validation:
        if log.points and (step <= log.points[-1].step or int(tokens) < log.points[-1].tokens):
            log.wrong(number, f"the validation at step {step}, {tokens} tokens follows that at step "
                              f"{log.points[-1].step}, {log.points[-1].tokens} tokens, of line {log.points[-1].line}")
        if text not in NOT_FINITE and not re.fullmatch(r"-?[0-9]{1,310}\.[0-9]{6}", text):
            log.wrong(number, f"{metric}:{text[:40]} is no number with six decimals")
        log.points.append(LogPoint(step, int(tokens), milliseconds, metric, text, number))
