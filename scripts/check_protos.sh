#!/usr/bin/env bash
# Fails if services/pb is not what protos/ compile to.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
./scripts/protos.sh "$fresh"
if ! diff -r --exclude=__pycache__ --exclude=__init__.py "$fresh/services/pb" services/pb; then
  echo "check_protos: generated code is out of date: run 'make protos' and commit" >&2
  exit 1
fi
