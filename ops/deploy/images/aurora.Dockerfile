# ROLE=learning builds the image of stream, trainer and promoter; ROLE=serving builds the image of the node.
# .dockerignore excludes benchmarks, tests and docs.
FROM python:3.11.14-slim-bookworm AS build
WORKDIR /build
COPY requirements/uv.txt requirements/build.txt requirements/
RUN pip install --no-cache-dir --require-hashes -r requirements/uv.txt -r requirements/build.txt
ARG ROLE
COPY requirements/${ROLE}.txt requirements/
RUN uv venv /opt/aurora \
    && uv pip install --python /opt/aurora/bin/python --no-cache --compile-bytecode --require-hashes -r requirements/${ROLE}.txt
COPY pyproject.toml README.md LICENSE ./
COPY schemas schemas
COPY serving serving
COPY pipeline pipeline
COPY trainer trainer
COPY ops ops
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir wheels . \
    && uv pip install --python /opt/aurora/bin/python --no-cache --compile-bytecode --no-deps wheels/*.whl

FROM python:3.11.14-slim-bookworm
RUN useradd --uid 10001 --no-create-home aurora && install -d -o 10001 /var/lib/aurora
COPY --from=build /opt/aurora /opt/aurora
ENV PATH=/opt/aurora/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /var/lib/aurora
ENTRYPOINT ["aurora"]
