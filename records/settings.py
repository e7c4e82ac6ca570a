"""A dataclass of settings as a command line: `--key value` for every field, `--preset NAME` for a set of them.

    @dataclass
    class Settings:
        steps: int = option(3250, "optimizer steps")
        device: str = option("cuda", "where to train", choices=("cuda", "cpu"))

    settings = parse(Settings, sys.argv[1:], presets={"record": {}, "quick": {"steps": 20}},
                     program="train_gpt.py", description="Train a GPT.", default_preset="record")
"""
import dataclasses
import difflib
import math
import os
import sys
import textwrap
import types
import typing

TYPE_NAMES = {int: "int", float: "float", str: "str", bool: "true|false"}


class SettingsError(ValueError):
    """A setting is unknown or has a value it cannot have; the message says which, what is valid, and what mends it."""


def option(default, help, choices=None, least=None, most=None):
    """A dataclass field with a help text and, where only some values are valid, which.

    default: its value when neither the command line nor the preset gives one (int, float, str, bool or None).
    help: one sentence, with the unit where there is one.  choices: sequence of the valid values, or None for any.
    least, most: the bounds of a number, themselves valid, or None. A bounded number is finite.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "least": least, "most": most})


def parse(cls, argv, *, presets, program, description, default_preset):
    """Build the dataclass `cls` from command-line arguments.

    An option on the command line overrides the preset, which overrides the field's default; of an option given twice
    the last counts. `--key value` and `--key=value`, dashes or underscores. A field named `preset` receives the name
    of the chosen preset. `cls.__post_init__` may call `check` and raise SettingsError for combinations of values.

    cls: dataclass whose fields are int, float, str, bool, or one of these or None (given as "none").
    argv: list of str, without the program's name.  presets: dict of preset name -> dict of field name -> value.
    program: name shown in messages.  description: shown by --help.  default_preset: a key of `presets`.

    Exits with status 0 after --help, and 2 after one line on stderr when an argument is wrong. In a run of several
    processes (environment variable RANK) only rank 0 prints.
    Raises SettingsError when `cls` or `presets` are themselves wrong, which is a mistake in the program.
    """
    fields = _fields(cls)
    _check_presets(fields, presets, default_preset)
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        given, wants_help = read_arguments(argv, fields)
        preset = given.pop("preset", default_preset)
        if preset not in presets:
            raise SettingsError(f"unknown preset {preset!r}{_nearest(preset, presets)}")
        defaults = {name: field.default for name, field in fields.items()} | presets[preset]
        if wants_help:
            if speaks:
                print(_help(fields, defaults, presets, preset, program, description))
            sys.exit(0)
        values = defaults | {name: convert(fields[name], text) for name, text in given.items()}
        if any(field.name == "preset" for field in dataclasses.fields(cls)):
            values["preset"] = preset
        return cls(**values)
    except SettingsError as error:
        if speaks:
            print(f"{program}: {error}; see {program} --help", file=sys.stderr)
        sys.exit(2)


def check(settings):
    """Raise SettingsError unless every field of the dataclass instance is one of its choices and within its bounds."""
    for name, field in _fields(type(settings)).items():
        value = getattr(settings, name)
        if value is not None or not field.optional:
            _check_value(field, value)


@dataclasses.dataclass
class Field:
    """A setting. type: int, float, str or bool.  optional: whether it may be None.  The rest as in `option`."""
    name: str
    type: type
    optional: bool
    default: object
    help: str
    choices: tuple | None
    least: float | None
    most: float | None

    @property
    def flag(self):
        return "--" + self.name.replace("_", "-")

    @property
    def type_name(self):
        name = "|".join(map(str, self.choices)) if self.choices else TYPE_NAMES[self.type]
        return name + "|none" if self.optional else name


def _fields(cls):
    """The settings of the dataclass: dict of name -> Field, `preset` left out (it has an option of its own)."""
    hints = typing.get_type_hints(cls)
    fields = {}
    for field in dataclasses.fields(cls):
        if field.name == "preset" or not field.init:
            continue
        kind, optional = hints[field.name], False
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kinds = [member for member in typing.get_args(kind) if member is not type(None)]
            optional = len(kinds) < len(typing.get_args(kind))
            kind = kinds[0] if len(kinds) == 1 else kind
        if kind not in TYPE_NAMES:
            raise SettingsError(f"{cls.__name__}.{field.name} has the type {kind}; expected int, float, str or bool, "
                                "or one of these or None")
        if field.default is dataclasses.MISSING:
            raise SettingsError(f"{cls.__name__}.{field.name} has no default; give it one with option(default, help)")
        choices = field.metadata.get("choices")
        fields[field.name] = Field(field.name, kind, optional, field.default, field.metadata.get("help", ""),
                                    tuple(choices) if choices is not None else None, field.metadata.get("least"),
                                    field.metadata.get("most"))
    return fields


def _check_presets(fields, presets, default_preset):
    if default_preset not in presets:
        raise SettingsError(f"the default preset {default_preset!r} is not one of {', '.join(presets)}")
    for preset, overrides in presets.items():
        for name, value in overrides.items():
            if name not in fields:
                raise SettingsError(f"preset {preset!r} sets {name!r}, which is no setting{_nearest(name, fields)}")
            if value is not None or not fields[name].optional:
                _check_value(fields[name], value)


def read_arguments(argv, fields):
    """Split `argv` (list of str) into settings of `fields` (dict of name -> Field): (dict of field name, or "preset",
    -> text, whether help is asked for).  Raises SettingsError for what is no setting."""
    names = {"preset", *fields}
    given, wants_help = {}, False
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        if argument in ("-h", "--help"):
            wants_help = True
            continue
        if not argument.startswith("--"):
            raise SettingsError(f"unexpected argument {argument!r}: options are written --key value")
        key, equals, text = argument[2:].partition("=")
        name = key.replace("-", "_")
        if name not in names:
            raise SettingsError(f"unknown option --{key}{_nearest(name, names, flags=True)}")
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                kind = fields[name].type_name if name in fields else "NAME"
                raise SettingsError(f"--{key} has no value: expected --{key} {kind}")
            text = remaining.pop(0)
        given[name] = text
    return given, wants_help


def convert(field, text):
    """The value of `field` that `text` stands for. Raises SettingsError where it stands for none."""
    if field.optional and text.lower() == "none":
        return None
    expected = SettingsError(f"{field.flag} expects {field.type_name}, got {text!r}")
    if field.type is bool:
        if text.lower() not in ("true", "false"):
            raise expected
        return text.lower() == "true"
    try:
        value = field.type(text)
    except ValueError:
        raise expected from None
    if field.type is float and math.isnan(value):
        raise expected
    _check_value(field, value)
    return value


def _check_value(field, value):
    if field.least is not None and not field.least <= value < math.inf:
        raise SettingsError(f"{field.flag} {value} must be at least {field.least}")
    if field.most is not None and not -math.inf < value <= field.most:
        raise SettingsError(f"{field.flag} {value} must be at most {field.most}")
    if field.choices is not None and value not in field.choices:
        raise SettingsError(f"{field.flag} expects one of {', '.join(map(str, field.choices))}, got {value!r}"
                            f"{_nearest(value, field.choices)}")


def _nearest(value, valid, flags=False):
    """The end of a message: the valid names nearest to `value`, or all of them where they are few, or nothing."""
    valid = sorted(map(str, valid))
    found = difflib.get_close_matches(str(value), valid, n=3, cutoff=0.5) or (valid if len(valid) <= 12 else [])
    shown = ["--" + name.replace("_", "-") for name in found] if flags else found
    return f" (nearest: {', '.join(shown)})" if shown else ""


def _help(fields, defaults, presets, preset, program, description):
    lines = [f"usage: {program} [--preset NAME] [--key value ...]", "", *textwrap.wrap(description, 100)]
    lines += ["", "presets:"]
    width = max(map(len, presets))
    for name, overrides in presets.items():
        changes = ", ".join(f"{key}={_show(value)}" for key, value in overrides.items()) or "the defaults"
        lines += textwrap.wrap(changes, 118, initial_indent=f"  {name:{width}}  ",
                               subsequent_indent=" " * (width + 4))
    lines += ["", f"options, with the values of preset {preset!r}:"]
    for name, field in fields.items():
        lines.append(f"  {field.flag} {field.type_name} = {_show(defaults[name])}")
        lines += textwrap.wrap(field.help, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _show(value):
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
