#!/bin/sh
# Installs what some tests need and Python cannot bring, where that is quick and nobody is asked:
# as root, with apt. Without it these tests are left out, so nothing here fails a run.
set -u
command -v redis-server >/dev/null && exit 0 # tests/cluster/test_head_restart.py
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && command -v timeout >/dev/null || exit 0
export DEBIAN_FRONTEND=noninteractive
apt() {
    timeout --kill-after=10 60 apt-get -qq -o DPkg::Lock::Timeout=20 "$@" </dev/null >/dev/null 2>&1
}
install() { apt install -y --no-install-recommends redis-server; }
# Lists of packages may be there, and need not be fetched then.
install || { apt update && install; } || echo "redis-server could not be installed" >&2
exit 0
