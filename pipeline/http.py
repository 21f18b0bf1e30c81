"""What a stream worker answers over HTTP: ``/live``, ``/ready``, ``/status`` and ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import faust
from faust.web import Response
from prometheus_client import CONTENT_TYPE_LATEST

from pipeline.metrics import exposition
from schemas.status import StreamStatus


def add(app: faust.App, status: Callable[[], StreamStatus]) -> None:
    """Add the pages to the app's web server."""

    def verdict(why: Sequence[str]) -> Response:
        return app.web.json({"why": list(why)}, status=503 if why else 200)

    async def live(*_: object) -> Response:
        return verdict(status().not_live)

    async def ready(*_: object) -> Response:
        return verdict(status().not_ready)

    async def as_json(*_: object) -> Response:
        return app.web.bytes(status().model_dump_json().encode(), content_type="application/json")

    async def metrics(*_: object) -> Response:
        return app.web.bytes(exposition(status()), headers={"Content-Type": CONTENT_TYPE_LATEST})

    for path, page in (("/live", live), ("/ready", ready), ("/status", as_json), ("/metrics", metrics)):
        app.page(path)(page)
