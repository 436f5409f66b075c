# The project with everything it needs, for a CPU or for CUDA; neither data nor results go into the image.
#   docker build -t ithn .                                           torch for the CPU
#   docker build -t ithn --build-arg TORCH=cuda .                    torch with CUDA (--build-arg SETUP=--v100: V100)
#   docker run --rm --network none -v ithn_results:/app/results ithn            the demo
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm

# cpu, cuda (what requirements.txt gives by itself), or a build such as cu126
ARG TORCH=cpu
# flags of setup.sh
ARG SETUP=""
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
    && .venv/bin/python -m pip install --no-cache-dir -r requirements/dicom.txt

COPY --chown=ithn:ithn . .
ENV PATH=/app/.venv/bin:$PATH
VOLUME ["/app/data", "/app/results", "/app/records"]
CMD ["bash", "run_demo.sh"]
