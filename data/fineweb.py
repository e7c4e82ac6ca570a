"""Downloads FineWeb-10B as GPT-2 tokens: `python -m data.fineweb N` fetches the validation shard and N train shards.

A shard holds 100M tokens in 200 MB; 11 suffice for the record run. The files are those of every modded-nanogpt
record: dataset kjj0/fineweb10B-gpt2 on the Hugging Face Hub, at a pinned revision. They arrive in `<folder>/.download`,
where a broken download is resumed next time; a shard gets its name only after its header, size, token ids and SHA-256
have been checked.
"""
from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

from data.files import one_builder
from data.shards import DataError, open_shard, sha256

FOLDER = "data/fineweb10B"
REPO = dict(repo_id="kjj0/fineweb10B-gpt2", repo_type="dataset", revision="889765ea1f903759787add96995d81171b632d0c")
VAL_SHA256 = "5b95c8e0966f0861685b307b23dc5ae42b228ef74b28cb499784ae021f201640"
TRAIN_SHARDS = 103
VOCAB_SIZE = 50257  # GPT-2's byte-pair encoding; 50256 starts a document


def command(folder, train_shards: int) -> str:
    """The command line that fetches them: what error messages tell the user to run."""
    return f"python -m data.fineweb {train_shards}" + ("" if str(folder) == FOLDER else f" --folder {folder}")


def file_names(train_shards: int) -> list[str]:
    """The validation shard's name and those of the first `train_shards` train shards; DataError if not 1 to 103."""
    if not 1 <= train_shards <= TRAIN_SHARDS:
        raise DataError(f"FineWeb-10B has train shards 1 to {TRAIN_SHARDS}, asked for {train_shards}; "
                        f"run for example: python -m data.fineweb 5")
    return ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, train_shards + 1)]


def ensure(folder=FOLDER, train_shards: int = 11) -> list[Path]:
    """The paths of the validation shard and of `train_shards` train shards, fetched if any is missing.

    If all are there nothing is touched, no network, no lock. Otherwise of many ranks one downloads, the others wait.
    """
    paths = [Path(folder) / name for name in file_names(train_shards)]
    return paths if all(path.is_file() for path in paths) else download(folder, train_shards)


def download(folder=FOLDER, train_shards: int = 11) -> list[Path]:
    """Fetches what is missing, checks header, size and token ids of what is there; returns the paths.

    DataError if the folder holds another data set, if a shard is damaged, or if the Hub does not deliver; the latter
    keeps the part that arrived.
    """
    folder = Path(folder)
    names = file_names(train_shards)
    with one_builder(folder):
        others = [path.name for path in sorted(folder.glob("*.bin")) if not path.name.startswith("fineweb_")]
        if others:
            raise DataError(f"{folder}: holds shards of another data set ({others[0]}); keep them apart: "
                            f"python -m data.fineweb {train_shards} --folder ANOTHER_FOLDER")
        for name in names:
            if (folder / name).is_file():
                open_shard(folder / name, VOCAB_SIZE, hint=command(folder, train_shards))
            else:
                _fetch(folder, name, command(folder, train_shards))
        shutil.rmtree(folder / ".download", ignore_errors=True)  # bookkeeping of finished downloads
    return [folder / name for name in names]


def _fetch(folder: Path, name: str, again: str) -> None:
    print(f"{folder / name}: downloading (200 MB)", file=sys.stderr, flush=True)
    try:
        expected = VAL_SHA256 if "_val_" in name else get_hf_file_metadata(hf_hub_url(filename=name, **REPO)).etag
        arrived = Path(hf_hub_download(filename=name, local_dir=folder / ".download", **REPO))
    except Exception as error:  # HTTP libraries and their exceptions differ between versions of huggingface_hub
        raise DataError(
            f"{folder / name}: the Hugging Face Hub did not deliver {name} of {REPO['repo_id']} "
            f"({type(error).__name__}: {error}). Try again, it resumes: {again}; or copy the shard into {folder} by "
            f"hand; or train on local text, without network: ./run.sh train_gpt.py --preset local") from error
    if not re.fullmatch("[0-9a-f]{64}", expected or ""):
        raise DataError(f"{folder / name}: the Hub gave no SHA-256 to check it against (its etag is {expected!r}). "
                        f"Try again: {again}; or copy the shard into {folder} by hand")
    try:
        found = sha256(arrived)
        if found != expected:
            raise DataError(f"{folder / name}: what arrived has SHA-256 {found}, expected {expected} "
                            f"({arrived.stat().st_size} bytes); it was removed. Try again: {again}")
        open_shard(arrived, VOCAB_SIZE, hint=again)
    except DataError:
        arrived.unlink()
        raise
    with open(arrived, "rb") as file:
        os.fsync(file.fileno())
    os.replace(arrived, folder / name)


def main(arguments=None) -> None:
    """The command line; exits with the message of a DataError."""
    parser = argparse.ArgumentParser(prog="python -m data.fineweb", description=__doc__.split("\n\n")[0])
    parser.add_argument("train_shards", metavar="N", type=int, help=f"train shards to have, 1 to {TRAIN_SHARDS}")
    parser.add_argument("--folder", default=FOLDER, help="where to (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        paths = download(options.folder, options.train_shards)
    except DataError as error:
        sys.exit(f"error: {error}")
    print(f"{options.folder}: {len(paths) - 1} train shards and the validation shard are in place")


if __name__ == "__main__":
    main()
