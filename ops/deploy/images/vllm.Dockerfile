# vLLM's server and the node beside it, on vLLM's image: its packages keep their versions, missing ones are added.
FROM vllm/vllm-openai:v0.32.0
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY schemas schemas
COPY serving serving
COPY pipeline pipeline
COPY trainer trainer
COPY ops ops
# The image's package versions are constraints: the build fails if one of them would have to change.
RUN python3 -m pip list --format=freeze > /tmp/constraints.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/constraints.txt ".[vllm-node]" \
    && rm -rf /build /tmp/constraints.txt
RUN useradd --uid 10001 --no-create-home aurora && install -d -o 10001 /var/lib/aurora
ENV PYTHONUNBUFFERED=1
USER 10001
WORKDIR /var/lib/aurora
ENTRYPOINT ["aurora"]
