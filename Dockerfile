# Two images. `base`: producers, gateway, janitor, courier; no torch. `worker`: decodes.
#
#   docker build --target base   -t latentq .
#   docker build --target worker -t latentq-worker .
ARG PYTHON_VERSION=3.12

# Dependencies come before the sources, so that a change of the code installs no torch again.
FROM python:${PYTHON_VERSION}-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/latentq/bin:$PATH
RUN python -m venv /opt/latentq
WORKDIR /build
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir broker_config producer worker \
    && pip install -c constraints.txt '.[s3]'

FROM build AS build-base
COPY broker_config broker_config
COPY producer producer
COPY worker worker
RUN pip install --no-deps --force-reinstall .

FROM build AS build-worker
# Another index to look for torch in, e.g. one with CPU builds. It stays in this stage.
ARG PIP_EXTRA_INDEX_URL=""
RUN pip install -c constraints.txt '.[worker,s3]'
COPY broker_config broker_config
COPY producer producer
COPY worker worker
RUN pip install --no-deps --force-reinstall .

FROM python:${PYTHON_VERSION}-slim AS runtime
RUN groupadd --system --gid 10001 latentq \
    && useradd --system --uid 10001 --gid latentq --create-home --home-dir /home/latentq latentq
ENV PATH=/opt/latentq/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /home/latentq

FROM runtime AS base
COPY --from=build-base /opt/latentq /opt/latentq
USER latentq
CMD ["latentq", "--help"]

FROM runtime AS worker
COPY --from=build-worker /opt/latentq /opt/latentq
COPY deploy/worker_healthy.py /usr/local/lib/latentq/worker_healthy.py
# A named volume mounted here takes over the owner.
RUN install --directory --owner=latentq --group=latentq /cache/huggingface
ENV HF_HOME=/cache/huggingface NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER latentq
# The first start may fetch weights.
HEALTHCHECK --interval=30s --timeout=10s --start-period=15m --retries=3 \
    CMD ["python", "/usr/local/lib/latentq/worker_healthy.py"]
CMD ["latentq", "worker"]
