"""What the settings of a run must have been: the defaults and presets in its source, and its command line.

The script is read with `ast`; nothing of it runs. It is understood if it does as train_gpt.py does: a dataclass of
settings, `parse(Settings, argv, presets=PRESETS, default_preset=...)` and `Record(..., seed=s.seed, ...)`.
"""
import ast
import warnings
from dataclasses import dataclass, field
from functools import lru_cache

from records.settings import Field, SettingsError, convert, read_arguments

LARGEST_SCRIPT = 2 * 2**20      # bytes; longer ones are not parsed
TYPES = {"int": int, "float": float, "str": str, "bool": bool}
UNKNOWN = object()              # a value that is no literal


class Undecided(ValueError):
    """The source does not say it in a way that can be read without running it; the message says what."""


@dataclass
class Script:
    """What a script says about its settings.

    fields: dict of setting -> records.settings.Field, `preset` not among them.  has_preset: whether there is a setting
    of that name.  presets: dict of preset -> dict of setting -> value.  default_preset: str or UNKNOWN.
    changed: settings that the dataclass itself assigns.  recorded: dict of an argument of Record(), such as "seed" ->
    the setting that is passed for it.
    """
    fields: dict
    has_preset: bool
    presets: dict
    default_preset: object
    changed: frozenset
    recorded: dict = field(default_factory=dict)


def expected(source, command, preset=None):
    """The settings that a command line gives.

    source: dict of path -> bytes.  command: list of str, the script first.  preset: the preset to take where neither
    command nor source names one (str or None).
    Returns (values, recorded, notes): dict of setting -> value or UNKNOWN; Script.recorded; list of str.
    Raises Undecided where the source cannot say, SettingsError where the command does not fit the source.
    """
    if not command or command[0] not in source:
        raise Undecided(f"source.txt does not have the script {command[0] if command else ''!r} of the command")
    script = read_script(source[command[0]])
    given, _ = read_arguments(command[1:], script.fields)
    notes, chosen = [], given.pop("preset", script.default_preset)
    if chosen is UNKNOWN:
        if not script.has_preset or preset not in script.presets:
            raise Undecided("which preset is the default depends on the machine")
        chosen = preset
        notes.append(f"which preset is the default depends on the machine: taken is {preset!r}, as config says")
    if chosen not in script.presets:
        raise SettingsError(f"--preset {chosen!r} is none of {', '.join(map(str, script.presets))}")
    values = {name: item.default for name, item in script.fields.items()} | script.presets[chosen]
    for name, text in given.items():
        kind = script.fields[name].type
        values[name] = UNKNOWN if kind is None else convert(script.fields[name], text)
    if script.has_preset:
        values["preset"] = chosen
    return {name: UNKNOWN if name in script.changed else value for name, value in values.items()}, \
        script.recorded, notes


@lru_cache(maxsize=8)
def read_script(content):
    """content: a script (bytes).  Returns its Script.  Raises Undecided."""
    if len(content) > LARGEST_SCRIPT:
        raise Undecided(f"the script has {len(content)} bytes, more than {LARGEST_SCRIPT}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # about escapes in the script's strings
            return _script(ast.parse(content.decode()))     # decoded here, so that no codec of the script's choice is
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, Undecided):
            raise
        raise Undecided(f"the script cannot be read ({type(error).__name__}: {str(error)[:200]})") from None


def _script(module):
    constants, classes, parses, records = {}, {}, [], []
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            classes[node.name] = node
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Name):    # assigned twice: not a constant
                constants[target.id] = node.value if target.id not in constants else None
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else None
            if name == "parse" and node.args and any(word.arg == "presets" for word in node.keywords):
                parses.append(node)
            if name == "Record":
                records.append(node)
    if len(parses) != 1 or not isinstance(parses[0].args[0], ast.Name) or parses[0].args[0].id not in classes:
        raise Undecided("the script has no single parse(Settings, ..., presets=...) with a class of its own")
    words = {word.arg: word.value for word in parses[0].keywords}
    settings = classes[parses[0].args[0].id]
    presets = _value(words["presets"], constants)
    if not isinstance(presets, dict) or not all(isinstance(values, dict) for values in presets.values()):
        raise Undecided("the presets are no literal")
    fields, has_preset = _fields(settings, constants)
    recorded = {word.arg: word.value.attr for call in records[:1] for word in call.keywords
                if isinstance(word.value, ast.Attribute) and isinstance(word.value.value, ast.Name)}
    default = _value(words["default_preset"], constants) if "default_preset" in words else UNKNOWN
    default = default if isinstance(default, str) else UNKNOWN
    return Script(fields, has_preset, presets, default, _assigned(settings), recorded if len(records) == 1 else {})


def _fields(settings, constants):
    fields = {}
    for node in settings.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            value = node.value
            if isinstance(value, ast.Call):     # option(default, help, ...)
                words = {word.arg: word.value for word in value.keywords}
                value = value.args[0] if value.args else words.get("default")
            kind, optional = _type(node.annotation)
            default = UNKNOWN if value is None else _value(value, constants)
            fields[node.target.id] = Field(node.target.id, kind, optional, default, "", None, None, None)
    return fields, fields.pop("preset", None) is not None


def _type(annotation):
    """(int, float, str, bool or None where it is another type, whether None is valid too)."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        sides = [annotation.left, annotation.right]
        others = [side for side in sides if not (isinstance(side, ast.Constant) and side.value is None)]
        return (_type(others[0])[0] if len(others) == 1 else None), len(others) == 1
    return (TYPES.get(annotation.id) if isinstance(annotation, ast.Name) else None), False


def _value(node, constants, depth=0):
    """The value of an expression of literals, names of them, dict(...) and + - *; UNKNOWN for anything else."""
    if depth > 20 or node is None:
        return UNKNOWN
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return _value(constants.get(node.id), constants, depth + 1)
    if isinstance(node, ast.Dict):
        if not all(isinstance(key, ast.Constant) for key in node.keys):
            return UNKNOWN
        return {key.value: _value(value, constants, depth + 1) for key, value in zip(node.keys, node.values)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        if not all(word.arg for word in node.keywords):
            return UNKNOWN
        return {word.arg: _value(word.value, constants, depth + 1) for word in node.keywords}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand, constants, depth + 1)
        return -value if type(value) in (int, float) else UNKNOWN
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)):
        left, right = (_value(side, constants, depth + 1) for side in (node.left, node.right))
        if type(left) not in (int, float) or type(right) not in (int, float) or max(abs(left), abs(right)) > 2**53:
            return UNKNOWN
        return left + right if isinstance(node.op, ast.Add) else left - right if isinstance(node.op, ast.Sub) \
            else left * right
    return UNKNOWN


def _assigned(settings):
    """The settings that methods of the dataclass assign: self.name = ..."""
    return frozenset(node.attr for node in ast.walk(settings) if isinstance(node, ast.Attribute)
                     and isinstance(node.ctx, ast.Store))
