# Two images: `slim` for router and KV transfer agent, which need no torch, and `engine` for the workers.
#
#   docker build --target slim   --tag relevo:slim .
#   docker build --target engine --tag relevo:engine .
#   docker build --target engine --tag relevo:engine-gpu --build-arg TORCH=cu130 .
#
# For BuildKit and for the classic builder. What changes often comes late: a change of the source installs nothing anew.

FROM python:3.11-slim-bookworm AS base
ENV PATH=/opt/relevo/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 NUMBA_CACHE_DIR=/var/cache/relevo HOME=/home/relevo
RUN groupadd --gid 10001 relevo && useradd --uid 10001 --gid 10001 --create-home relevo \
 && install -d -o 10001 -g 10001 -m 0700 /run/relevo /var/cache/relevo /home/relevo/.cache/huggingface


# Lists of packages. A stage of its own, so that a change of pyproject.toml that names the same ones installs nothing.
FROM base AS lists
WORKDIR /lists
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; e = p['optional-dependencies']; \
  open('slim.txt', 'w').write('\n'.join(p['dependencies'] + e['redis'])); \
  open('engine.txt', 'w').write('\n'.join(e['engine']))" \
 && rm pyproject.toml


FROM base AS package
WORKDIR /source
COPY . .
# Whole seconds: a copy of an image may keep no more, and by its time numba knows what it has compiled a file's code of.
RUN PIP_CONSTRAINT=constraints.txt pip --no-cache-dir install --no-deps --target /app . \
 && find /app -name '*.py' -exec touch --date "@$(date +%s)" {} +


FROM base AS slim-packages
COPY --from=lists /lists/constraints.txt /lists/slim.txt /lists/
# The image's pip installs into an environment that has none. PIP_CONSTRAINT takes the place of one in the base's pip.conf.
RUN python -m venv --without-pip /opt/relevo \
 && PIP_CONSTRAINT=/lists/constraints.txt pip --no-cache-dir --python /opt/relevo/bin/python install -r /lists/slim.txt \
 && find /opt/relevo -type d -name tests -prune -exec rm -r {} + \
 && find /opt/relevo -path '*/transformers/models/*.pyc' -delete
# (That was 58 MB of compiled code of all models' modules, of which a worker imports one or two.)


FROM slim-packages AS slim
COPY --from=package /app /app
USER 10001:10001
WORKDIR /home/relevo


FROM slim-packages AS engine-packages
# cpu, or CUDA's version as PyTorch's index names it: cu126, cu130
ARG TORCH=cpu
RUN PIP_CONSTRAINT=/lists/constraints.txt pip --no-cache-dir --python /opt/relevo/bin/python install \
      --extra-index-url https://download.pytorch.org/whl/${TORCH} torch
COPY --from=lists /lists/engine.txt /lists/
RUN PIP_CONSTRAINT=/lists/constraints.txt pip --no-cache-dir --python /opt/relevo/bin/python install -r /lists/engine.txt \
 && find /opt/relevo -type d -name tests -prune -exec rm -r {} +


FROM engine-packages AS engine
COPY --from=package /app /app
USER 10001:10001
WORKDIR /home/relevo
# The CPU's kernels, compiled for this machine; another one compiles its own, once.
RUN python -c "import torch; from relevo.kernels import load_backend; backend = load_backend('cpu', 'cpu'); \
  [backend.warm_up(dtype) for dtype in (torch.float32, torch.bfloat16)]"
