"""python -m records COMMAND: everything that is done with records."""
import argparse
import difflib
import importlib
import sys

from records.files import RecordError

# command -> (module with add_arguments(parser) and main(options) -> exit status, what it does)
COMMANDS = {
    "ab": ("records.ab", "run arms against each other, interleaved, until the ledger's runs are there"),
    "compare": ("records.compare", "the same comparison of records that exist"),
    "plan": ("records.plan", "how many runs an effect takes"),
    "verify": ("records.verify", "recompute every claim of a record from its log and source"),
    "submit": ("records.submit", "gather runs of a track into a record, verified and described"),
    "replay": ("records.replay", "unpack the source of a record so that it can be run again"),
    "import": ("records.import_log", "make a record of a log in the community's format"),
    "table": ("records.table", "leaderboards as Markdown, computed from the records"),
    "plot": ("records.plot", "curves as PNG and SVG"),
}


def main(words):
    """Run one command.  words: list of str, without the program's name.  Returns the exit status."""
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    name = words[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        print(f"records: no command {name!r}{f' (nearest: {near[0]})' if near else ''}; "
              f"expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[name][0])     # the others may need what is not installed
    parser = argparse.ArgumentParser(prog=f"python -m records {name}", description=module.__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_arguments(parser)
    own, common = words[1:], []
    if name == "ab" and "--" in own:    # the rest belongs to the scripts that it runs
        own, common = own[:own.index("--")], own[own.index("--") + 1:]
    options = parser.parse_args(own)
    if name == "ab":
        options.common, options.words = common, words
    try:
        return module.main(options)
    except RecordError as error:
        print(f"records {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:     # piped into head
        sys.stderr.close()
        return 1


def usage():
    width = max(map(len, COMMANDS))
    return "\n".join(["usage: python -m records COMMAND ... (COMMAND --help shows its options)", "",
                      *(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
