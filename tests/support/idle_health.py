"""The health of an idle engine."""

from serving.engines.base import EngineHealth

IDLE = EngineHealth(
    alive=True,
    speculator="",
    speculating=True,
    draft_depth=0,
    expected_tokens_per_second=(),
    requests_running=0,
    requests_waiting=0,
    verify_steps=0,
    draft_tokens=0,
    accepted_tokens=0,
    output_tokens=0,
)
