# syntax=docker/dockerfile:1.7
# Images for a Ray cluster (helm/xloom) or for one machine:
#   docker build --target cpu  -t xloom:0.1.0-cpu .
#   docker build --target cuda -t xloom:0.1.0-cuda .
#   docker run --rm --shm-size 1g -p 8000:8000 -e XLOOM_API_KEY=... xloom:0.1.0-cpu
# What changes least comes first: a change of xloom's own code makes only the last layers anew.

FROM python:3.11-slim-bookworm AS base
ENV DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# g++: torch compiles with it at run time, and needs Python's headers, which are in this image.
# wget: the health check below asks with it.
RUN apt-get update \
    && apt-get install -y --no-install-recommends bash ca-certificates g++ libgomp1 libnuma1 procps tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 xloom \
    && useradd --uid 1000 --gid 1000 --create-home --home-dir /home/xloom xloom \
    && mkdir -p /var/cache/xloom /var/lib/xloom /opt/xloom \
    && chown xloom:xloom /var/cache/xloom /var/lib/xloom

# The package's outline, without its code: what installing depends on.
FROM base AS outline
WORKDIR /opt/xloom/src
COPY pyproject.toml README.md LICENSE ./
COPY requirements requirements
COPY deployments/xloom/__init__.py deployments/xloom/__init__.py
COPY dashboards/xloom_dashboards/__init__.py dashboards/xloom_dashboards/__init__.py

FROM outline AS install-cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    python requirements/install.py --venv /opt/xloom/venv cpu isq

# No lock for CUDA yet: vLLM's own pins hold, and xloom's for vLLM, Ray and PEFT.
FROM outline AS install-cuda
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/xloom/venv \
    && /opt/xloom/venv/bin/pip install setuptools \
    && /opt/xloom/venv/bin/pip install --no-build-isolation -e '.[cuda]' \
    && /opt/xloom/venv/bin/pip install --no-deps --target /opt/xloom/venv/share/xloom/isq -r requirements/isq.lock

FROM base AS final
ENV PATH=/opt/xloom/venv/bin:$PATH HOME=/home/xloom \
    HF_HOME=/var/cache/xloom/hub VLLM_CACHE_ROOT=/var/cache/xloom/vllm \
    RAY_worker_niceness=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1
# The sample's place in the image, which examples name.
RUN ln -s /opt/xloom/src/deployments/xloom/sample /opt/xloom/sample \
    && printf '%s\n' \
       'model: {source: /opt/xloom/sample/base}' \
       'router: {host: 0.0.0.0}' \
       'store: {path: /var/lib/xloom/store, cache: /var/cache/xloom/adapters}' \
       'xlora: [{name: blend, source: /opt/xloom/sample/blend}]' > /opt/xloom/settings.yaml
WORKDIR /home/xloom
EXPOSE 8000
# For `docker run`; Kubernetes has the chart's probes. A large model takes minutes to load.
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --retries=3 \
    CMD wget -q -T 4 -O /dev/null http://127.0.0.1:8000/ready || exit 1
ENTRYPOINT ["tini", "-g", "--"]
# Your own settings: docker run -v ./settings.yaml:/opt/xloom/settings.yaml:ro ...
CMD ["xloom", "serve", "/opt/xloom/settings.yaml"]

FROM final AS cpu
COPY --from=install-cpu /opt/xloom /opt/xloom
COPY deployments /opt/xloom/src/deployments
COPY dashboards /opt/xloom/src/dashboards
USER 1000:1000

FROM final AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=install-cuda /opt/xloom /opt/xloom
COPY deployments /opt/xloom/src/deployments
COPY dashboards /opt/xloom/src/dashboards
USER 1000:1000
