#!/usr/bin/env bash
# Creates the virtual environment unless it exists, and installs the package into it, in place, with the tools of `dev`.
#
#   scripts/environment.sh VENV [PYTHON]
set -euo pipefail
venv=$1
python=${2:-python3}

must_be_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && return
    echo "Python 3.11 or newer is wanted, $1 is $("$1" -V); name another: make setup PYTHON=python3.11" >&2
    exit 1
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    if [ -d "$venv/conda-meta" ]; then
        echo "$venv is a conda environment without Python and pip: conda install -p $venv python=3.11 pip" >&2
        exit 1
    fi
    must_be_new_enough "$python"
    echo "environment: creating $venv with $("$python" -V)"
    "$python" -m venv "$venv"
fi
must_be_new_enough "$venv/bin/python"
echo "environment: installing into $venv; the first time this takes some minutes and some 6 GB"
"$venv/bin/python" -m pip install --progress-bar off --disable-pip-version-check -e '.[dev]' |
    sed -u '/^Requirement already satisfied/d'
