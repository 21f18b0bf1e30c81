# SGLang's own server with the node beside it, in SGLang's own image: what is there stays as it is, what is missing is added.
FROM lmsysorg/sglang:v0.5.21
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY schemas schemas
COPY serving serving
COPY pipeline pipeline
COPY trainer trainer
COPY ops ops
# The versions of the image are the constraint: where one of them would have to change, the build fails.
RUN python3 -m pip list --format=freeze > /tmp/there.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/there.txt ".[sglang-node]" \
    && rm -rf /build /tmp/there.txt
RUN useradd --uid 10001 --no-create-home aurora && install -d -o 10001 /var/lib/aurora
ENV PYTHONUNBUFFERED=1
USER 10001
WORKDIR /var/lib/aurora
ENTRYPOINT ["aurora"]
