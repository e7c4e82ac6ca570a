"""The code of a record, rebuilt so that it can be run again:  python -m records replay PATH FOLDER

Every file of its source.txt is written into FOLDER, byte for byte, after each has been checked against the hashes in
record.json, and the command that runs it is printed. Nothing is run.
"""
import shlex
import sys
from pathlib import Path

from records import safe
from records.checked_log import parse_json
from records.files import RecordError
from records.source import sha256, unpack_source

LARGEST = 16 * 2**20    # bytes of a file of a record


def read_record(folder):
    """The record.json in `folder` (Path): dict.  Raises RecordError."""
    try:
        content = safe.read(folder, "record.json", LARGEST)
        record = None if content is None else parse_json(content)
    except ValueError as error:
        raise RecordError(f"cannot read {folder / 'record.json'}: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("source"), dict) \
            or not isinstance(record.get("command"), list):
        raise RecordError(f"no record in {folder}: expected a folder with record.json, or the folder of an experiment "
                          "and --arm LABEL")
    return record


def source_of(folder, record):
    """The packed source of a run: its own source.txt, or the one in sources/ of its experiment that has its hashes.

    folder: Path.  record: its record.json (dict).  Returns bytes, or None where there is none.  Raises RecordError
    where one is damaged.
    """
    folder = folder.absolute()
    try:
        own = safe.read(folder, "source.txt", LARGEST)
        if own is not None:
            return own
        experiment = folder.parent.parent
        for name in safe.folders(experiment / "sources") if folder.parent.name == "runs" else []:
            content = safe.read(experiment, f"sources/{name}", LARGEST)
            if {path: sha256(file) for path, file in unpack_source(content).items()} == record["source"]:
                return content
    except ValueError as error:
        raise RecordError(f"{folder}: {error}") from None
    return None


def replay(folder, destination):
    """Write the source of a run into a folder.

    folder: of the run (Path).  destination: Path, a folder that is empty or not there yet.
    Returns (command, remarks): the command line to run in it (str), and what to know before (list of str).
    Raises RecordError where the source is missing or not the one that record.json names, or cannot be written.
    """
    record = read_record(folder)
    packed = source_of(folder, record)
    if packed is None:
        raise RecordError(f"{folder} has no source.txt" + ("; the log it was imported from had no source"
                                                           if record.get("imported") else ""))
    try:
        files = unpack_source(packed)
    except ValueError as error:
        raise RecordError(f"{folder}: {error}") from None
    for path in sorted(files.keys() | record["source"].keys()):
        if path not in files or sha256(files[path]) != record["source"].get(path):
            raise RecordError(f"{folder}: source.txt and record.json do not have the same {path!a}; "
                              f"python -m records verify {folder} says more")
    if destination.is_symlink() or destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise RecordError(f"{destination} is there already and not an empty folder; give another")
    for path, content in files.items():
        file = destination / path
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            if content.startswith(b"#!"):
                file.chmod(0o755)
        except OSError as error:
            raise RecordError(f"cannot write {file}: {error.strerror}; give another FOLDER") from error
    return command_of(record), _remarks(record)


def command_of(record):
    """The command line of a record (dict) as one would type it: str. --records is left out, and torchrun is there where
    there were several processes."""
    words, kept = [str(word) for word in record["command"]], []
    while words:
        word = words.pop(0)
        if word == "--records":
            words = words[1:]
        elif not word.startswith("--records="):
            kept.append(word)
    hardware = record.get("hardware") if isinstance(record.get("hardware"), dict) else {}
    count = hardware.get("accelerator_count")
    several = isinstance(count, int) and count > 1
    return shlex.join((["torchrun", "--standalone", f"--nproc_per_node={count}"] if several else ["python"]) + kept) \
        if kept else ""


def _remarks(record):
    remarks = []
    if not record["command"]:
        remarks.append("the record does not say which command ran: it was imported from a log")
    if ".../" in command_of(record):
        remarks.append("the record keeps only the end of absolute paths (.../): put yours in")
    if isinstance(record.get("data"), dict) and record["data"]:
        remarks += ["it read these files, by SHA-256:"]
        remarks += [f"  {value}  {name}" for name, value in record["data"].items()]
    versions = record.get("versions") if isinstance(record.get("versions"), dict) else {}
    said = [f"{key} {value}" for key, value in versions.items() if value]
    if said:
        remarks.append(f"it ran with {', '.join(said)}")
    return remarks


def run_of(path, arm=None):
    """The run that stands for `path` (Path): itself, or the first complete run of an experiment's arm (label, or None
    for the only one).  Raises RecordError."""
    if not (path / "experiment.json").is_file():
        return path
    from records.runs import read_experiment
    arms = read_experiment(path).arms
    if arm is None and len(arms) > 1 or arm is not None and arm not in arms:
        raise RecordError(f"{path} has the arms {', '.join(arms)}; say which with --arm")
    runs = arms[arm if arm is not None else next(iter(arms))]
    found = next((run for run in runs if run.status == "complete"), runs[0] if runs else None)
    if found is None:
        raise RecordError(f"{path}: no run of the arm {arm} left a record")
    return found.folder


def add_arguments(parser):
    """Give the argparse parser of `python -m records replay` its arguments."""
    parser.add_argument("path", type=Path, metavar="PATH", help="a run or an experiment")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to; new or empty")
    parser.add_argument("--arm", metavar="LABEL", help="which arm of an experiment")


def main(options):
    """Run the command. options: Namespace of add_arguments.  Returns 0, or 2 with one line on stderr."""
    try:
        command, remarks = replay(run_of(options.path, options.arm), options.folder)
    except RecordError as error:
        print(f"records replay: {error}", file=sys.stderr)
        return 2
    lines = [*remarks, f"cd {shlex.quote(str(options.folder))}", command]
    print("\n".join("".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
                    for line in lines if line))
    return 0
