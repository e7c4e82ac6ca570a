#!/usr/bin/env bash
# Set up once, then run.
#
#   ./run.sh                            the main job at the size that fits this machine:
#                                       GPUs -> the FineWeb run on all of them; none, or no way to the data -> local text
#   ./run.sh test [pytest options]      the tests
#   ./run.sh ab --help                  is a change better, by how much, how sure: interleaved runs of it and of what is
#   ./run.sh train_gpt.py --help        any script of this repository, on every GPU there is
#   ./run.sh python -m data.fineweb 5   any command, inside the environment
#
# PYTHON=python3.12 ./run.sh picks the interpreter of a new environment. Works from any directory; safe to call again.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$root"

set_up() {
    local venv="$root/.venv" stamp="$root/.venv/requirements.installed"
    if [ ! -x "$venv/bin/python" ]; then
        echo "run.sh: making a virtual environment in .venv"
        "${PYTHON:-python3}" -m venv "$venv"
    fi
    if ! cmp -s requirements.txt "$stamp"; then
        echo "run.sh: installing requirements.txt"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
        cp requirements.txt "$stamp"
    fi
    export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
}

gpus() {
    python -c 'import torch; print(torch.cuda.device_count())'
}

launch() { # COUNT SCRIPT [OPTIONS]: one process for each of COUNT GPUs, or a plain process without GPUs
    local count=$1 processes=1
    shift
    if [ "$count" -gt 0 ]; then
        while [ $((2 * processes)) -le "$count" ]; do # batches divide by 1, 2, 4, 8
            processes=$((2 * processes))
        done
        [ "$processes" -eq "$count" ] || echo "run.sh: using $processes of $count GPUs: a batch must divide" >&2
        exec torchrun --standalone --nproc_per_node="$processes" "$@"
    fi
    exec python "$@"
}

set_up
case "${1:-}" in
    "")
        count=$(gpus)
        if [ "$count" -gt 0 ]; then
            if python -m data.fineweb 5; then
                launch "$count" train_gpt.py --preset record
            fi
            echo "run.sh: no FineWeb shards (see above): training on the embedded local text instead" >&2
        fi
        exec python train_gpt.py --preset local
        ;;
    test)
        shift
        exec env OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal "$@" # a core for each of two processes
        ;;
    ab)
        exec python -m records "$@"
        ;;
    *.py)
        launch "$(gpus)" "$@"
        ;;
    *)
        exec "$@"
        ;;
esac
