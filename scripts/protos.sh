#!/usr/bin/env bash
# Compiles protos/ into services/pb (or the folder given as $1): messages, gRPC code and type stubs.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${1:-.}
PATH="$(dirname "$(realpath -s "$python")"):$PATH" "$python" -m grpc_tools.protoc -I protos \
  --python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out" \
  protos/services/pb/*.proto
