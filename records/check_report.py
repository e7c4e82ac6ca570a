"""The part of `records.verify` that looks at report.json of an experiment: its numbers are computed anew from the runs,
with the statistics of this version of the repository."""
import math

from records import safe
from records.check import LARGEST
from records.checked_log import parse_json
from records.compare import compare_experiment
from records.files import RecordError
from records.runs import read_experiment

NUMBERS = ("arms", "results")   # the parts of the report whose numbers are compared; its sentences follow from them
RELATIVE = 1e-6                 # difference that versions of scipy may make


def check_report(folder, prefix, problems, notes):
    """Add to `problems` each number of report.json in `folder` (Path) that the runs, which verify, do not give."""
    try:
        content = safe.read(folder, "report.json", LARGEST)
        claimed = {} if content is None else parse_json(content)
    except ValueError as error:
        problems.append(f"{prefix}report.json: not read ({str(error)[:200]})")
        return
    if not isinstance(claimed, dict) or not claimed:
        return
    try:
        computed = compare_experiment(read_experiment(folder)).as_json()
    except (RecordError, ValueError) as error:
        problems.append(f"{prefix}report.json: there is a report, but its runs cannot be compared: "
                        f"{ascii(str(error))[1:-1][:200]}")
        return
    found, missing = [], []
    for key in NUMBERS:
        _differences(claimed.get(key), computed[key], key, found, missing)
    problems += [f"{prefix}report.json: {text}" for text in found[:10]]
    if missing:
        notes.append(f"{prefix}report.json: made by another version of the comparison, which has "
                     f"{ascii(missing[0])[1:-1]} besides; that was not checked")


def _differences(claimed, computed, place, found, missing):
    if isinstance(claimed, dict) and isinstance(computed, dict):
        pairs = [(value, computed.get(key), f"{place}.{key}", key in computed) for key, value in claimed.items()]
    elif isinstance(claimed, list) and isinstance(computed, list):
        if len(claimed) != len(computed):
            found.append(f"{place} has {len(claimed)} entries, the runs give {len(computed)}")
            return
        pairs = [(value, other, f"{place}[{index}]", True) for index, (value, other) in
                 enumerate(zip(claimed, computed))]
    else:
        numbers = [isinstance(value, (int, float)) and not isinstance(value, bool) for value in (claimed, computed)]
        if all(numbers) and not math.isclose(claimed, computed, rel_tol=RELATIVE, abs_tol=1e-12) \
                or numbers[0] != numbers[1]:
            found.append(f"{ascii(place)[1:-1]} is {claimed!a}, the runs give {computed!a}"[:300])
        return
    for value, other, where, known in pairs:
        if known:
            _differences(value, other, where, found, missing)
        else:
            missing.append(where)
