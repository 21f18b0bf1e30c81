# MLflow with its clients for PostgreSQL and an S3 store, and the health probe.
FROM python:3.11.14-slim-bookworm AS build
WORKDIR /build
COPY requirements/uv.txt requirements/registry.txt requirements/
RUN pip install --no-cache-dir --require-hashes -r requirements/uv.txt \
    && uv venv /opt/mlflow \
    && uv pip install --python /opt/mlflow/bin/python --no-cache --compile-bytecode --require-hashes -r requirements/registry.txt

FROM python:3.11.14-slim-bookworm
RUN useradd --uid 10001 --no-create-home mlflow
COPY --from=build /opt/mlflow /opt/mlflow
COPY ops/__init__.py /opt/probe/ops/
COPY ops/deploy/__init__.py ops/deploy/probe.py /opt/probe/ops/deploy/
ENV PATH=/opt/mlflow/bin:$PATH PYTHONPATH=/opt/probe PYTHONUNBUFFERED=1
USER 10001
WORKDIR /tmp
