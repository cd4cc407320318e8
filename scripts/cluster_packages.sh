#!/usr/bin/env bash
# Looks for what two hosts on one machine are made with (tests/cluster): an sshd, pdsh, and ip.
# What is missing is installed if this is root on Debian or Ubuntu; otherwise the command to run is printed.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

has() { command -v "$1" >/dev/null; }
missing() {
    has ip || echo iproute2
    has sshd || echo openssh-server
    has ssh || echo openssh-client
    has pdsh || echo pdsh
}

packages=$(missing | paste -sd ' ')
if [ -z "$packages" ]; then
    echo "cluster packages: all there"
    exit
fi
if [ "$(id -u)" != 0 ] || ! has apt-get || [ -d /run/systemd/system ]; then
    # With systemd, Debian's openssh-server opens port 22 of this machine as soon as it is installed.
    cat >&2 <<HELP
cluster packages: missing $packages
  as root:  apt-get update && apt-get install -y --no-install-recommends $packages
  On a machine with systemd, openssh-server starts a server on port 22: that is yours to decide, so nothing is
  installed there. In a container, run as root, make test-cluster installs them itself.
HELP
    exit 1
fi
echo "cluster packages: installing $packages"
export DEBIAN_FRONTEND=noninteractive
apt-get update
# shellcheck disable=SC2086  # one word a package
apt-get install -y --no-install-recommends $packages
