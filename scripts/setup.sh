#!/usr/bin/env bash
# Makes .venv with Relevo (editable), its engine and its development tools. Needs Python 3.11 or newer, nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."

die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

find_python() {
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    [ -n "$candidate" ] || continue
    command -v "$candidate" >/dev/null || continue
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && { printf '%s' "$candidate"; return; }
  done
  die "Python 3.11 or newer was not found; on Debian or Ubuntu: sudo apt-get install python3 python3-venv"
}

make_venv() {
  # A plain Debian python3 has no ensurepip: that is in python3-venv.
  if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    version=$("$python" -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
    package="python$version-venv"
    command -v apt-get >/dev/null || die "$python has no ensurepip: install its venv package"
    as_root=
    [ "$(id -u)" = 0 ] || as_root=sudo
    echo "setup: installing $package, which this Python needs to make a virtual environment"
    $as_root apt-get update -qq && $as_root apt-get install -y -qq "$package" >/dev/null \
      || die "could not install $package; install it by hand and run this again"
  fi
  "$python" -m venv .venv
}

python=$(find_python)
[ -x .venv/bin/python ] || make_venv
echo "setup: installing Relevo and what it needs into .venv (a few minutes the first time)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[engine,dev]'
echo "setup: compiling the CPU kernels (once)"
.venv/bin/python - <<'PYTHON'
import torch
from relevo.kernels import load_backend

for dtype in (torch.float32, torch.bfloat16):
    load_backend("cpu", "cpu").warm_up(dtype)
PYTHON
touch .venv/.complete
echo "setup: done"
