"""source.txt: rebuilt byte for byte, holding what ran and nothing of a virtual environment."""
import importlib
import sys

import pytest

from records.source import local_source, pack_source, sha256, unpack_source

AWKWARD = {
    "plain.py": b"print(1)\n",
    "no newline.py": b"x = 1",
    "empty.py": b"",
    "windows.py": b"a = 1\r\nb = 2\r\n",
    "binary.so": bytes(range(256)),
    "packed.txt": pack_source({"inner.py": b"==== {}\n"}),      # text that looks like a header
    "blank.py": b"\n\n\n",
    'quote"d/ünï.py': "ü\u2028".encode(),
}


def test_round_trip():
    packed = pack_source(AWKWARD)
    assert unpack_source(packed) == AWKWARD
    assert list(unpack_source(packed)) == list(AWKWARD)
    assert unpack_source(b"") == {}
    assert packed.startswith(b'==== {"path": "plain.py", "bytes": 9, "sha256": "' + sha256(b"print(1)\n").encode())


@pytest.mark.parametrize("damage", [
    lambda packed: packed.replace(b"print(1)", b"print(2)"),
    lambda packed: packed[:-1],
    lambda packed: packed + b"more",
    lambda packed: packed.replace(b"\r\n", b"\n"),
    lambda packed: packed.replace(b'"bytes": 9', b'"bytes": 8'),
])
def test_damage_is_noticed(damage):
    with pytest.raises(ValueError, match="source.txt is damaged"):
        unpack_source(damage(pack_source(AWKWARD)))


def test_local_source(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    for name in ("train.py", "used_here.py", "unused_here.py", "run.sh", "requirements.txt", "env/pyvenv.cfg",
                 "env/lib/in_environment.py", "vendor/site-packages/in_packages.py"):
        path = repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"# {name}\n".encode())
    (tmp_path / "outside.py").write_bytes(b"")
    modules = {"used_here": repository, "in_environment": repository / "env/lib", "outside": tmp_path,
               "in_packages": repository / "vendor/site-packages"}
    for name, folder in modules.items():
        monkeypatch.syspath_prepend(str(folder))
        importlib.import_module(name)
    try:
        found = local_source(repository, repository / "train.py")
    finally:
        for name in modules:
            del sys.modules[name]
    assert found == {name: f"# {name}\n".encode() for name in
                     ("requirements.txt", "run.sh", "train.py", "used_here.py")}


def test_modules_behind_links_are_found_as_the_repository_names_them(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    (repository / "package").mkdir(parents=True)
    for name in ("train.py", "package/behind_a_folder.py", "package/behind_a_link.py"):
        (repository / name).write_bytes(f"# {name}\n".encode())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "folder").symlink_to(repository / "package")
    (tmp_path / "elsewhere" / "behind_a_link.py").symlink_to(repository / "package" / "behind_a_link.py")
    for name, folder in {"behind_a_folder": "folder", "behind_a_link": "elsewhere"}.items():
        monkeypatch.syspath_prepend(str(tmp_path / folder))
        monkeypatch.setitem(sys.modules, name, importlib.import_module(name))
    (tmp_path / "link").symlink_to(repository)
    for spelling in (repository, tmp_path / "link"):
        assert local_source(spelling, spelling / "train.py").keys() == {
            "train.py", "package/behind_a_folder.py", "package/behind_a_link.py"}
