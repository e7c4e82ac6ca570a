"""Another revision of this repository, or a patch on top of it, beside the working tree: git worktrees that see the
data of the main one and disappear again."""
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from records.files import RecordError

PREFIX = "turborun-ab-"        # of the temporary folders that worktrees lie in
NOT_LINKED = {"__pycache__", ".pytest_cache", "records", "wandb"}     # ignored, but nothing that a run reads


def git(repository, *arguments, message, input=None):
    """What `git arguments...` prints in the folder `repository` (Path): str.

    input: bytes for its standard input.  message: what a RecordError begins with where git fails or is missing.
    """
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}    # set inside git hooks
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], env=clean, input=input, capture_output=True)
    except OSError as error:
        raise RecordError(f"{message}: git cannot be run ({error.strerror})") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"git ended with {done.returncode}"]
        raise RecordError(f"{message}: {lines[-1]}")
    return done.stdout.decode(errors="replace")


def commit_of(repository, rev):
    """The commit that `rev` (str) names: 40 hexadecimal digits.  Raises RecordError where it names none."""
    message = f"no revision {rev!r} in {repository}: expected a commit, tag or branch (git log --oneline lists them)"
    return git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}",
               message=message).strip()


def is_dirty(repository):
    """Whether tracked files differ from the last commit."""
    return bool(git(repository, "status", "--porcelain", "--untracked-files=no",
                    message=f"{repository} is no git checkout").strip())


def add(repository, label, commit, patch=None):
    """A worktree of `commit` in the folder for temporary files, `patch` (bytes or None) applied to it.

    Returns its Path, which ends in `label`.  Raises RecordError where git refuses; a patch that does not apply leaves
    no worktree behind.
    """
    folder = Path(tempfile.mkdtemp(prefix=PREFIX)) / label
    git(repository, "worktree", "add", "--detach", str(folder), commit, message=f"no worktree for arm {label}")
    if patch is not None:
        try:
            git(folder, "apply", "--index", "--whitespace=nowarn", "-", input=patch,
                message=f"the patch of arm {label} does not apply to {commit[:12]}")
        except RecordError:
            remove(repository, folder)
            raise
    return folder


def link_ignored(repository, folder):
    """Let the worktree `folder` see what git ignores in the repository (data that was downloaded or built, mostly)
    by symbolic links; what it has already stays."""
    listed = git(repository, "ls-files", "--others", "--ignored", "--exclude-standard", "--directory", "-z",
                 message=f"{repository} is no git checkout")
    for name in filter(None, listed.split("\0")):
        source = repository / name
        if NOT_LINKED & set(Path(name).parts) or name.endswith(".pyc") or (source / "pyvenv.cfg").exists():
            continue
        link(repository, folder, name)


def link(repository, folder, name):
    """Make `name` (relative path, str) of the repository reachable under the same name in the worktree `folder`."""
    target = folder / name
    if not os.path.lexists(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to((repository / name).absolute())


def remove(repository, folder):
    """Remove a worktree that `add` made (Path), whether it is still there or not."""
    if not folder.parent.name.startswith(PREFIX):
        raise RecordError(f"{folder} is no worktree of an experiment: expected a folder {PREFIX}...")
    if folder.exists():     # symbolic links in it are removed, not what they lead to
        git(repository, "worktree", "remove", "--force", str(folder), message=f"cannot remove the worktree {folder}")
    shutil.rmtree(folder.parent, ignore_errors=True)
    git(repository, "worktree", "prune", message="git keeps a worktree that is gone")
