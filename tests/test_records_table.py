"""records table: what a row is, the order of rows, and the tables of README, which must be what the records say."""
import json
import subprocess

import pytest
from made_runs import HARDWARE, falling, make_run
from test_train_gpt import ROOT

from records.__main__ import main
from records.table import BEGIN, as_markdown, filled, rows


def cells(root, track="somebody-3.3", **options):
    """The table as a list of dict of column -> cell."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in
             as_markdown(root, track, **options).splitlines()]
    assert set(lines[1]) == {"-"}
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


@pytest.fixture
def root(tmp_path):
    """records/ with seven single runs, and one experiment of two arms."""
    track = tmp_path / "records" / "somebody-3.3"
    for seed, final in enumerate((3.40, 3.42)):
        make_run(track / f"2026_muon-seed{seed}", falling(final), name=f"muon-seed{seed}", seed=seed,
                 config={"optimizer": "muon", "seed": seed, "name": f"muon-seed{seed}", "records": f"somewhere{seed}"})
    make_run(track / "2026_muon-seed2", falling(3.0), name="muon-seed2", seed=2, status="interrupted",
             config={"optimizer": "muon"})
    make_run(track / "2026_lr", falling(3.35), name="lr", config={"optimizer": "muon", "lr": 0.1})
    make_run(track / "2026_code", falling(3.36), name="code", source={"train.py": "11"})
    make_run(track / "2026_two", falling(3.37), name="two", hardware=HARDWARE | {"accelerator_count": 2})
    make_run(track / "2026_cpu", falling(3.38), name="cpu", hardware={"cpu": "EPYC", "cpu_count": 2})
    folder = track / "2026_a-vs-b"
    entries = []
    ends = (("a", 3.29, 0.5), ("b", 3.10, 0.7), ("b", 3.12, 0.7), ("a", 3.28, 0.5))
    for index, (arm, final, step_s) in enumerate(ends):
        make_run(folder / "runs" / f"{arm}-{index}", falling(final), step_s=step_s, seed=index // 2)
        entries.append({"arm": arm, "index": index, "folder": f"runs/{arm}-{index}", "status": "complete"})
    (folder / "experiment.json").write_text(json.dumps({
        "schema": 1, "track": "somebody-3.3", "arms": [{"label": "a"}, {"label": "b"}], "runs": entries}))
    return tmp_path / "records"


def test_rows_are_arms_and_runs_that_differ_in_their_seed_only(root):
    table = cells(root)
    assert [(row["recipe"], row["n"]) for row in table] == \
        [("a", "2"), ("b", "2"), ("lr", "1"), ("code", "1"), ("two", "1"), ("cpu", "1"), ("muon", "2 + 1 interrupted")]
    muon = table[-1]
    assert muon["validation loss"] == "3.4100 ± 0.0141" and muon["steps"] == "100" and muon["to 3.3"] == "–"
    assert muon["train time"] == "25.0 ± 0.0 s" and muon["a step"] == "250.0 ± 0.0 ms"
    assert muon["records"] == "seed " + ", ".join(
        f"[{seed}](records/somebody-3.3/2026_muon-seed{seed})" for seed in range(3))
    assert [row["hardware"] for row in table[-3:-1]] == ["2 × NVIDIA H200", "EPYC, 2 cores"]
    assert table[2]["validation loss"] == "3.3500" and table[2]["records"] == "[2026_lr](records/somebody-3.3/2026_lr)"
    assert table[0]["records"] == "[2026_a-vs-b](records/somebody-3.3/2026_a-vs-b)"


def test_at_the_target_the_faster_one_is_first(root):
    a, b = cells(root)[:2]
    assert a["recipe"] == "a" and a["to 3.3"] == "50.0 ± 0.0 s"     # gets there with its last step only, 0.5 s each
    assert b["recipe"] == "b" and b["to 3.3"] == "56.0 ± 0.0 s"     # at step 80, has the better loss in the end
    assert float(a["validation loss"][:6]) > float(b["validation loss"][:6])


def test_of_accuracies_the_highest_is_first(tmp_path):
    for name, last in (("low", 0.93), ("high", 0.939), ("there", 0.941)):
        make_run(tmp_path / "records" / "cifar10-94" / name, [(0, 0.1), (100, last)], metric="accuracy", name=name,
                 track="cifar10-94", target=0.94, config={"which": name})
    table = cells(tmp_path / "records", "cifar10-94")
    assert [row["recipe"] for row in table] == ["there", "high", "low"] and table[0]["accuracy"] == "0.9410"


def test_a_track_without_records(tmp_path, capsys):
    assert as_markdown(tmp_path, "text-local") == "no records yet"
    assert main(["table", "nothing", "--records", str(tmp_path)]) == 2
    assert "no records of a track 'nothing'" in capsys.readouterr().err


def test_print_write_check(root, tmp_path, capsys):
    assert main(["table", "--records", str(root)]) == 0
    assert "## somebody-3.3\n\n| recipe | n |" in capsys.readouterr().out
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n\n<!-- table: somebody-3.3 -->\nold | row\n<!-- end -->\n\nmore\n")
    assert main(["table", "--records", str(root), "--check", str(readme)]) == 1
    error = capsys.readouterr().err
    assert "is stale: python -m records table --write" in error and "old | row" in error
    assert main(["table", "--records", str(root), "--write", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n\n<!-- table: somebody-3.3 -->\n| recipe |")
    assert text.endswith("\n<!-- end -->\n\nmore\n")
    assert as_markdown(root, "somebody-3.3") in text
    assert main(["table", "--records", str(root), "--check", str(readme)]) == 0
    make_run(root / "somebody-3.3" / "2026_new", falling(3.0), name="new", config={"new": 1})
    assert main(["table", "--records", str(root), "--check", str(readme)]) == 1


@pytest.mark.parametrize("text, message", [
    ("nothing here", "has no table"), ("<!-- table: somebody-3.3 -->\n| a |", "has no line '<!-- end -->' after it"),
    ("<!-- table: somebody-3.3 -->\n<!-- table: text-local -->\n\n<!-- end -->", "has no line"),
    ("<!-- table: unknown -->\n<!-- end -->", "no such track; expected one of fineweb-3.28")])
def test_markers_that_cannot_be_filled(root, tmp_path, capsys, text, message):
    (tmp_path / "README.md").write_text(text)
    assert main(["table", "--records", str(root), "--write", str(tmp_path / "README.md")]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == text


def test_a_written_table_has_only_what_git_has(root, tmp_path):
    git = ["git", "-C", tmp_path]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "records/somebody-3.3/2026_lr", "records/somebody-3.3/2026_a-vs-b"], check=True)
    assert [row["label"] for row in rows(root, "somebody-3.3", tracked=True)] == ["a", "b", "lr"]
    text = filled("<!-- table: somebody-3.3 -->\n<!-- end -->\n", root, tmp_path)
    assert text.count("\n| ") == 4 and "2026_code" not in text
    assert len(rows(root, "somebody-3.3")) == 7


def test_the_tables_of_readme_are_what_the_records_say():
    text = (ROOT / "README.md").read_text()
    assert {match[1] for match in BEGIN.finditer(text)} >= {"wiki-3.324", "text-local"}
    assert filled(text, ROOT / "records", ROOT) == text, "python -m records table --write README.md"
