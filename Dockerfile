# The service and its scripts in one image; docker-compose.yml brings it up beside PostgreSQL.
# PYTHON_IMAGE may be any image with python3 (3.11 or newer) and its venv module.
ARG PYTHON_IMAGE=python:3.11-slim
FROM ${PYTHON_IMAGE}

# PIP_EXTRA_INDEX_URL: a second package index, for instance PyTorch's own with the CPU builds. PIP_NO_INDEX=1: no network,
# only the wheels in wheelhouse/ (`pip download -r requirements.txt -d wheelhouse`).
ARG PIP_EXTRA_INDEX_URL=
ARG PIP_NO_INDEX=

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 MPLCONFIGDIR=/tmp/matplotlib

WORKDIR /app
# Before the code, so that a change of code does not install everything again.
COPY requirements.txt wheelhouse* /tmp/wheelhouse/
RUN pip install --no-cache-dir --disable-pip-version-check --find-links /tmp/wheelhouse -r /tmp/wheelhouse/requirements.txt \
    && rm -rf /tmp/wheelhouse

# A volume mounted on an empty folder takes over its owner.
RUN useradd --uid 10001 --create-home styletower \
    && mkdir .data saved_models \
    && chown styletower .data saved_models
COPY *.py lexicon.json ./
COPY api_controller api_controller
COPY datasets datasets
COPY store store
# The service's user may not write here, and would compile all of it at each start.
RUN python -m compileall -q .
USER styletower

EXPOSE 8000
CMD ["uvicorn", "api_controller.app:app", "--host", "0.0.0.0", "--port", "8000"]
