#!/usr/bin/env bash
# Looks for the compilers, headers and libraries that FFCV, the view kernel and DeepSpeed's extension are built from.
# What is missing is installed if this is root on Debian or Ubuntu; otherwise the command to run is printed.
#
#   scripts/system_packages.sh [PYTHON]
set -euo pipefail
python=${1:-python3}

has() { command -v "$1" >/dev/null; }
# Each line: a Debian package, then the probe that makes it unnecessary. ninja is no part of it: pip installs the one
# that DeepSpeed must find, and a second, older one on PATH makes it compile everything again.
missing() {
    has "$python" || echo python3
    has "$python" && "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    has "$python" && test -e "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ||
        echo python3-dev
    has cc && has c++ || echo build-essential
    has pkg-config || echo pkg-config
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
    pkg-config --exists libjpeg 2>/dev/null || echo libjpeg-dev
}

if [ "$python" != python3 ] && ! has "$python"; then
    echo "PYTHON=$python: no such program" >&2
    exit 1
fi
packages=$(missing | paste -sd ' ')
if [ -z "$packages" ]; then
    echo "system packages: all there"
    exit
fi
if [ "$(id -u)" != 0 ] || ! has apt-get; then
    cat >&2 <<HELP
system packages: missing $packages
  with root:     sudo apt-get update && sudo apt-get install -y --no-install-recommends $packages
  without root:  conda env create -f environment.yml && conda activate featherweight
                 then make again with VENV=\$CONDA_PREFIX
HELP
    exit 1
fi
echo "system packages: installing $packages"
export DEBIAN_FRONTEND=noninteractive
apt-get update
# shellcheck disable=SC2086  # one word a package
apt-get install -y --no-install-recommends $packages
packages=$(missing | paste -sd ' ')
if [ -n "$packages" ]; then
    echo "system packages: installed, but still not found: $packages" >&2
    echo "  is another pkg-config or Python than Debian's first on PATH?" >&2
    exit 1
fi
