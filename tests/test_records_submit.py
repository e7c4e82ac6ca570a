"""submit and replay: what is gathered is what ran, the track's rule decides, and a changed ledger does not verify."""
import json
import os
import random
import shutil
import statistics
from argparse import ArgumentParser
from pathlib import Path

import pytest
from scipy.stats import ttest_1samp

from records import replay, submit, verify
from records.files import RecordError
from records.source import pack_source, sha256, unpack_source
from records.submit import submit as submit_runs
from test_records_verify import mutated
from true_records import PICTURE, SCRIPT, repository, write_run

GOOD = [3.3215, 3.3195, 3.3205, 3.3196]     # that their mean is at most 3.324 has p = 0.002, of the first two 0.09
OTHER = [3.41, 3.40, 3.42]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with runs made one by one: records/wiki-3.324/*_good*, *_other* (other code), *_failed, *_short."""
    folder = tmp_path_factory.mktemp("made")
    code = repository(folder / "code")
    changed = repository(folder / "changed", SCRIPT.replace("0.05", "0.06"))
    for seed, value in enumerate(GOOD):
        write_run(folder / "records", [10.8, 4.0, value], code, name=f"good{seed}", seed=seed)
    for seed, value in enumerate(OTHER):
        write_run(folder / "records", [10.8, 4.1, value], changed, name=f"other{seed}", seed=seed, step_s=0.2)
    write_run(folder / "records", [10.8, 4.0], code, name="failed", seed=9, end="fail")
    write_run(folder / "records", [10.8, 4.0], code, name="killed", seed=9, end=None)
    write_run(folder / "records", [10.8, 3.32], code, name="local", arguments=("--target", "none"))
    return folder


def runs_of(made, kind):
    return f"{made}/records/*/*_{kind}*"


@pytest.fixture(scope="module")
def submitted(made):
    """A record with two arms, which claims nothing."""
    return submit_runs([f"a={runs_of(made, 'good')}", f"b={runs_of(made, 'other')}"], name="lr", root=made / "out",
                       what="A learning rate of 0.06 | not 0.05")


@pytest.fixture
def record(submitted, tmp_path):
    """A copy of it to change."""
    return Path(shutil.copytree(submitted, tmp_path / "wiki-3.324" / submitted.name))


def test_a_record_of_runs_that_were_made_one_by_one(made, submitted):
    assert submitted.parent == made / "out" / "wiki-3.324" and submitted.name.endswith("_lr")
    assert verify.verify(submitted) == []
    ledger = json.loads((submitted / "experiment.json").read_text())
    assert [entry["arm"] for entry in ledger["runs"]] == ["a"] * 4 + ["b"] * 3
    assert ledger["claim"] == {"kind": "experiment"}
    found = sorted(path.relative_to(submitted).as_posix() for path in submitted.rglob("*") if path.is_file())
    sources = [path for path in found if path.startswith("sources/")]
    assert len(sources) == 2        # seven runs, two versions of the code
    assert found == sorted(["README.md", "experiment.json", *sources] + [
        f"{entry['folder']}/{name}" for entry in ledger["runs"] for name in ("log.txt", "record.json")])
    text = (submitted / "README.md").read_text()
    assert text.splitlines()[2].startswith("**An experiment, not a claim.**")
    assert "A learning rate of 0.06 \\| not 0.05" in text
    assert "Against the code of a, b differs in `train\\_gpt.py`." in text
    value = f"{statistics.mean(GOOD):.5f} ± {statistics.stdev(GOOD):.5f}"
    assert f"| a | 4 | {value} | 25.00 ± 0.00 | 250.00 ± 0.00 | 100 |" in text
    assert "gathered afterwards: nothing shows how many were planned" in text
    assert f"python -m records replay records/wiki-3.324/{submitted.name} FOLDER --arm b" in text
    assert str(made) not in text


def test_a_run_of_an_experiment_verifies_and_is_submitted_on_its_own(record, tmp_path):
    assert verify.verify(record / "runs" / "b-4") == []
    folder = submit_runs([f"{record}/runs/a-*", f"b={record}/runs/b-4"], name="some", what="y", root=tmp_path / "out")
    assert len(list((folder / "sources").iterdir())) == 2 and verify.verify(folder) == []
    shutil.rmtree(record / "sources")
    assert any("source.txt is missing" in problem for problem in verify.verify(record / "runs" / "b-4"))


def test_a_record_that_claims_the_target(made):
    folder = submit_runs([runs_of(made, "good")], name="good", what="nothing", claim="target", root=made / "out")
    assert json.loads((folder / "experiment.json").read_text())["claim"] == {"kind": "target", "arm": "good"}
    assert verify.verify(folder) == []
    p = ttest_1samp(GOOD, 3.324, alternative="less").pvalue
    claim = (folder / "README.md").read_text().splitlines()[2]
    assert claim.startswith("**Claims the target.**") and f"p = {p:.2g}" in claim and "n = 4" in claim
    assert f"{statistics.mean(GOOD):.5f}" in claim
    with pytest.raises(RecordError, match="is there already; choose another --name"):
        submit_runs([runs_of(made, "good")], name="good", what="nothing", root=made / "out")


@pytest.mark.parametrize("paths, options, said", [
    (["other"], {}, r"its mean 3\.41000 \(n = 3\) is not beyond 3\.324 at p < 0\.01"),
    (["good0"], {}, "it has 1 runs, the rule of wiki-3.324 needs at least 2"),
    (["good0", "good1"], {}, "is not beyond"),         # below the target, but two runs do not show it
    (["good", "failed"], {}, "1 of its runs failed"),
    (["local"], {}, "the track text-local has no target"),
    (["good", "killed"], {}, "was interrupted and shows nothing"),
    (["good", "other"], {"claim": "experiment"}, "do not make one record: .*arm x has a seed twice"),
    (["good3", "other1"], {"claim": "experiment"}, "the source of arm x changed between its runs: train_gpt.py"),
    (["good"], {"what": " "}, "say in a sentence what changed"),
    (["good"], {"name": "a b"}, "choose another with --name"),
    (["good"], {"name": None}, "--name NAME"),
    (["good", "local"], {}, "several tracks: text-local, wiki-3.324"),
    (["nothing"], {}, "no run in"),
])
def test_what_is_refused(made, tmp_path, paths, options, said):
    options = {"name": "x", "what": "nothing", "claim": "target"} | options
    with pytest.raises(RecordError, match=said):
        submit_runs([runs_of(made, path) for path in paths], root=tmp_path / "out", **options)
    assert not list((tmp_path / "out").rglob("*.json"))


def test_the_arm_that_claims_has_to_be_said(made, tmp_path):
    paths = [f"a={runs_of(made, 'good')}", f"b={runs_of(made, 'other')}"]
    with pytest.raises(RecordError, match="which arm reached it"):
        submit_runs(paths, name="x", what="y", claim="target", root=tmp_path)
    with pytest.raises(RecordError, match="is not beyond 3.324"):
        submit_runs(paths, name="x", what="y", claim="target", arm="b", root=tmp_path)
    folder = submit_runs(paths, name="x", what="y", claim="target", arm="a", root=tmp_path)
    assert "Claims the target.** a: validation loss" in (folder / "README.md").read_text()


def test_a_tampered_run_is_refused(made, tmp_path):
    folder = shutil.copytree(next((made / "records/wiki-3.324").glob("*_good0")), tmp_path / "run")
    log = (folder / "log.txt").read_text()
    (folder / "log.txt").write_text(log.replace("val_loss:3.321500", "val_loss:3.311500"))
    with pytest.raises(RecordError, match=r"does not verify: (log\.txt|record\.json), line \d+"):
        submit_runs([str(folder)], name="x", what="y", root=tmp_path / "out")


def test_pictures_of_profiles_go_along_and_other_files_under_their_name_do_not(made, tmp_path):
    run = shutil.copytree(next((made / "records/wiki-3.324").glob("*_good0")), tmp_path / "run")
    (run / "profile.png").write_bytes(PICTURE)
    first = submit_runs([str(run)], name="x", what="y", root=tmp_path / "out")
    again = submit_runs([str(first)], name="z", what="y", root=tmp_path / "again")      # an experiment, copied
    for folder in (first, again):
        assert (folder / "runs" / "x-0" / "profile.png").read_bytes() == PICTURE and verify.verify(folder) == []
        assert "[runs/x-0/profile.png](runs/x-0/profile.png)" in (folder / "README.md").read_text()
    (tmp_path / "secret").write_bytes(PICTURE)
    for folder, at in ((run, run), (first, first / "runs" / "x-0")):
        (at / "profile.png").unlink()
        (at / "profile.png").symlink_to(tmp_path / "secret")
        with pytest.raises(RecordError, match="profile.png: a link"):
            submit_runs([str(folder)], name="w", what="y", root=tmp_path / "new")
        (at / "profile.png").unlink()
        (at / "profile.png").write_bytes(b"no picture")
        with pytest.raises(RecordError, match="profile.png: no PNG"):
            submit_runs([str(folder)], name="w", what="y", root=tmp_path / "new")
    assert not list((tmp_path / "new").rglob("*.png"))


def test_large_logs_are_compressed(made, tmp_path, monkeypatch):
    monkeypatch.setattr(submit, "COMPRESSED_FROM", 1000)
    folder = submit_runs([runs_of(made, "good0")], name="x", what="y", root=tmp_path)
    assert not list(folder.glob("runs/*/log.txt")) and verify.verify(folder) == []
    again = submit_runs([str(folder)], name="z", what="y", root=tmp_path / "again")
    assert verify.verify(again) == []
    [packed] = folder.glob("runs/*/log.txt.gz")
    packed.write_bytes(packed.read_bytes()[:-1])
    assert "cut off" in verify.verify(folder)[0]


def change(record, edit):
    """Apply `edit` to the ledger (dict) of the record."""
    ledger = json.loads((record / "experiment.json").read_text())
    edit(ledger)
    (record / "experiment.json").write_text(json.dumps(ledger, indent=1))


@pytest.mark.parametrize("edit, said", [
    (lambda ledger: ledger["runs"].pop(1), "were declared and are missing"),
    (lambda ledger: (ledger["runs"].pop(1), ledger["schedule"].pop(1)), "a run was taken out"),
    (lambda ledger: ledger["runs"][0].update(seed=7), "seed 7 was not planned"),
    (lambda ledger: (ledger["runs"][0].update(seed=7), ledger["schedule"][0].update(seed=7)), "seed is 7 here, but 0"),
    (lambda ledger: ledger["schedule"][0].update(seed=1), "has a seed twice"),
    (lambda ledger: ledger["runs"][0].update(arm="b"), 'arm "b" was not planned'),
    (lambda ledger: ledger["runs"][0].update(arm="c"), 'the arm "c" is none of a, b'),
    (lambda ledger: ledger["runs"][0].update(folder="runs/../runs/a-0"), "expected one of its own inside runs/"),
    (lambda ledger: ledger["runs"][0].update(folder="/etc"), "expected one of its own inside runs/"),
    (lambda ledger: ledger["runs"][0].update(folder="runs/a-1"), "expected one of its own inside runs/"),
    (lambda ledger: ledger["runs"][0].update(folder="runs/none"), "is missing"),
    (lambda ledger: ledger["runs"][0].update(record_sha256="0" * 64), "record_sha256 is"),
    (lambda ledger: ledger["runs"][0].update(log_sha256=None), "log_sha256 is null"),
    (lambda ledger: ledger["runs"][0].update(status="interrupted"), "status is interrupted here"),
    (lambda ledger: ledger["arms"][0].update(command=["other.py"]), "the command of arm a"),
    (lambda ledger: ledger["arms"][0].update(label="../a"), "cannot name a folder"),
    (lambda ledger: ledger["arms"][1].update(label="a"), "is there twice"),
    (lambda ledger: ledger["arms"][0].update(patch_sha256="0" * 64), "patches/a.patch"),
    (lambda ledger: ledger["question"].update(runs=5), "declared were 5"),
    (lambda ledger: ledger["question"].update(direction="up"), "not the track's"),
    (lambda ledger: ledger["question"].update(target=3.5), "target is 3.5 here"),
    (lambda ledger: ledger.update(track="text-local"), "track is "),
    (lambda ledger: ledger.update(schema=9), "schema is 9"),
    (lambda ledger: ledger.update(runs={}), "runs is {}"),
    (lambda ledger: ledger.update(runs=[7]), "7 has not index, arm"),
    (lambda ledger: ledger.update(claim={"kind": "target", "arm": "b"}), "it claims the target, but its mean 3.41000"),
    (lambda ledger: ledger.update(claim={"kind": "target", "arm": "z"}), "there is no arm"),
    (lambda ledger: ledger.update(claim="target"), "expected kind target or experiment"),
    (lambda ledger: (ledger.update(claim={"kind": "target", "arm": "a"}),
                     ledger["question"].update(sequential={"alpha": 0.05, "sure_after": 2})), "--until-sure"),
])
def test_a_tampered_ledger_is_noticed(record, edit, said):
    change(record, edit)
    problems = verify.verify(record)
    assert any(said in problem and problem.startswith("experiment.json, line ") for problem in problems), problems


def test_a_dropped_or_added_run_is_noticed(record):
    shutil.copytree(record / "runs" / "a-0", record / "runs" / "a-9")
    assert any("runs/a-9 is not in the ledger" in problem for problem in verify.verify(record))
    shutil.rmtree(record / "runs" / "a-9")
    shutil.rmtree(record / "runs" / "b-5")
    assert any("runs/b-5 is missing" in problem for problem in verify.verify(record))


def test_swapped_runs_and_sources_are_noticed(record, tmp_path):
    first, second = sorted((record / "sources").iterdir())
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    assert any("not what its name" in problem for problem in verify.verify(record))
    first.unlink()
    assert any("nothing shows which code ran" in problem for problem in verify.verify(record))
    first.write_bytes(kept)
    (record / "sources" / "0.txt").symlink_to("/etc/passwd")
    assert any("a link" in problem for problem in verify.verify(record))
    (record / "sources" / "0.txt").unlink()
    assert verify.verify(record) == []
    (record / "runs" / "a-0").rename(record / "runs" / "x")
    (record / "runs" / "a-1").rename(record / "runs" / "a-0")
    (record / "runs" / "x").rename(record / "runs" / "a-1")
    assert any("record_sha256 is" in problem for problem in verify.verify(record))


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"schema": NaN}', b"[" * 10**6, b'{"schema": 1}'])
def test_a_hostile_ledger(record, content):
    (record / "experiment.json").write_bytes(content)
    [problem, *_] = verify.verify(record)
    assert problem.startswith("experiment.json, line ")


def test_mutated_ledgers_neither_crash_verify_nor_change_what_counts(made, tmp_path):
    def counts(content):
        ledger = json.loads(content)
        return json.dumps([ledger["schema"], ledger["track"], ledger["name"], ledger["question"]["metric"],
                           ledger["question"]["target"], (ledger.get("claim") or {}).get("kind") == "target",
                           [[arm["label"], arm["command"]] for arm in ledger["arms"]],
                           [[run["index"], run["arm"], run["seed"]] for run in ledger["schedule"]],
                           [[run[key] for key in ("index", "arm", "seed", "folder", "status", "record_sha256",
                                                  "log_sha256")] for run in ledger["runs"]]])
    folder = submit_runs([runs_of(made, "good0"), runs_of(made, "good1")], name="two", what="y", root=tmp_path)
    ledger, rng = (folder / "experiment.json").read_bytes(), random.Random(5)
    for number in range(int(os.environ.get("FUZZED_LEDGERS", "300"))):
        other = mutated(ledger, rng)
        (folder / "experiment.json").write_bytes(other)
        if not verify.verify(folder) and b'"name": "two"' in other:     # its own name is free
            now, before = counts(other), counts(ledger)
            if now != before:       # a command may say less: it is what all of the arm's runs begin with
                commands = [json.loads(content)["arms"][0]["command"] for content in (other, ledger)]
                assert commands[0] != commands[1] == commands[1][:len(commands[0])] + commands[1][len(commands[0]):]
                assert commands[0] == commands[1][:len(commands[0])], other


def test_a_run_of_other_settings_is_noticed(made, record):
    """A run that is true in itself, put in the place of another with all hashes renewed."""
    other = write_run(record.parent / "else", [10.8, 4.0, 3.32], made / "code", name="good0", seed=0, lr=0.07)
    for name in ("record.json", "log.txt"):
        shutil.copy(other / name, record / "runs" / "a-0" / name)
    change(record, lambda ledger: ledger["runs"][0].update(
        {f"{kind}_sha256": sha256((other / name).read_bytes()) for kind, name in (("record", "record.json"),
                                                                                 ("log", "log.txt"))}))
    problems = verify.verify(record)
    assert any("the settings of arm a changed between its runs: lr" in problem for problem in problems), problems


def test_numbers_of_a_report_are_computed_anew(record):
    from records.compare import compare_experiment
    from records.runs import read_experiment
    content = compare_experiment(read_experiment(record)).as_json()
    (record / "report.json").write_text(json.dumps(content))
    assert verify.verify(record) == []
    content["results"]["b"]["final"]["p"] *= 0.5
    (record / "report.json").write_text(json.dumps(content))
    [problem] = verify.verify(record)
    assert "report.json: results.b.final.p is" in problem
    (record / "report.json").write_bytes(b"[" * 10**5)
    assert "report.json: not read" in verify.verify(record)[0]


# -- experiments of `records ab` -------------------------------------------------------------------------------------

def planned_before(record):
    change(record, lambda ledger: (ledger["question"].update(gathered=False), ledger.pop("claim")))


def test_an_experiment_is_completed_where_it_lies_or_copied(record, tmp_path):
    planned_before(record)
    assert submit_runs([str(record)], name=None, what="y", root=tmp_path) == record
    assert (record / "README.md").is_file() and "declared before the first one" in (record / "README.md").read_text()
    (record / "report.md").write_text("# Report\n")
    (record / "stray").write_text("not to be copied")
    copy = submit_runs([str(record)], name="copy", what="y", root=tmp_path / "other", claim="target", arm="a")
    assert verify.verify(copy) == [] and (copy / "report.md").is_file() and not (copy / "stray").exists()
    assert "[report.md](report.md)" in (copy / "README.md").read_text()


def test_an_unfinished_experiment_is_refused(record, tmp_path):
    planned_before(record)
    change(record, lambda ledger: (ledger["runs"].pop(), ledger.update(status="running")))
    shutil.rmtree(record / "runs" / "b-6")
    assert verify.verify(record) == []      # it says that it is not finished
    with pytest.raises(RecordError, match="is not finished .* records ab --resume"):
        submit_runs([str(record)], name=None, what="y", root=tmp_path)


def test_runs_that_were_killed_and_run_again_stay_in_the_ledger(made, record):
    killed = next((made / "records/wiki-3.324").glob("*_killed"))
    shutil.copytree(killed, record / "runs" / "a-0-1")
    (record / "runs" / "a-0-1" / "loss.png").unlink(missing_ok=True)
    entry = {"index": 0, "arm": "a", "seed": 0, "slot": 0, "folder": "runs/a-0-1", "status": "interrupted",
             "record_sha256": None, "log_sha256": None, "message": None}
    change(record, lambda ledger: ledger["runs"].insert(0, entry))
    assert any("seed is 0 here, but 9" in problem for problem in verify.verify(record))     # it is not that run
    shutil.rmtree(record / "runs" / "a-0-1")
    [report] = verify.inspect(record)
    assert report.problems == [] and any("runs/a-0-1 of a run that was interrupted" in note for note in report.notes)


# -- replay ----------------------------------------------------------------------------------------------------------

def test_replay_rebuilds_the_source(made, submitted, tmp_path, capsys):
    parser = ArgumentParser()
    replay.add_arguments(parser)
    for path, arm, name in ((submitted, ["--arm", "b"], "b"), (submitted / "runs" / "b-4", [], "run"),
                            (next((made / "records/wiki-3.324").glob("*_other0")), [], "single")):
        assert replay.main(parser.parse_args([str(path), str(tmp_path / name), *arm])) == 0
        for file in ("train_gpt.py", "run.sh"):
            assert (tmp_path / name / file).read_bytes() == (made / "changed" / file).read_bytes()
        assert [os.access(tmp_path / name / file, os.X_OK) for file in ("run.sh", "train_gpt.py")] == [True, False]
        lines = capsys.readouterr().out.splitlines()
        assert lines[-2:] == [f"cd {tmp_path / name}", "python train_gpt.py --preset wiki --name other0 --seed 0"]
        assert any("val_000000.bin" in line for line in lines)
    assert replay.main(parser.parse_args([str(submitted), str(tmp_path / "new")])) == 2
    assert "has the arms a, b; say which with --arm" in capsys.readouterr().err
    assert replay.main(parser.parse_args([str(submitted / "runs" / "a-0"), str(tmp_path / "b")])) == 2
    assert "not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["../evil", "/tmp/evil", "a/../../evil"])
def test_replay_writes_nothing_outside_its_folder(made, tmp_path, path):
    folder = shutil.copytree(next((made / "records/wiki-3.324").glob("*_good0")), tmp_path / "deep" / "run")
    (folder / "source.txt").write_bytes(pack_source({path: b"x"}))
    content = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(content | {"source": {path: sha256(b"x")}}))
    with pytest.raises(RecordError, match="leads elsewhere"):
        replay.replay(folder, tmp_path / "deep" / "new")
    assert sorted(tmp_path.rglob("evil")) == [] and not (tmp_path / "deep" / "new").exists()


def test_replay_checks_the_hashes(made, tmp_path):
    folder = shutil.copytree(next((made / "records/wiki-3.324").glob("*_good0")), tmp_path / "run")
    files = unpack_source((folder / "source.txt").read_bytes())
    (folder / "source.txt").write_bytes(pack_source(files | {"train_gpt.py": b"other"}))
    with pytest.raises(RecordError, match="do not have the same 'train_gpt.py'"):
        replay.replay(folder, tmp_path / "new")
    (folder / "source.txt").unlink()
    with pytest.raises(RecordError, match="has no source.txt"):
        replay.replay(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("record, command", [
    ({"command": ["t.py", "--records", "/x", "--a", "b c"], "hardware": {}}, "python t.py --a 'b c'"),
    ({"command": ["t.py", "--records=.../x"], "hardware": {"accelerator_count": 1}}, "python t.py"),
    ({"command": ["t.py"], "hardware": {"accelerator_count": 8}}, "torchrun --standalone --nproc_per_node=8 t.py"),
    ({"command": []}, ""),
])
def test_the_command_of_a_record(record, command):
    assert replay.command_of(record) == command


def test_the_command_line(made, tmp_path, capsys):
    parser = ArgumentParser()
    submit.add_arguments(parser)
    words = [runs_of(made, "good"), "--name", "x", "--what", "y", "--records", str(tmp_path)]
    assert submit.main(parser.parse_args(words)) == 0
    assert "verified; README.md says what it claims" in capsys.readouterr().out
    assert submit.main(parser.parse_args([*words, "--claim", "target"])) == 2
    assert capsys.readouterr().err.startswith("records submit: ")
