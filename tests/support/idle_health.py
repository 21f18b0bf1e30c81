"""The health of an engine that nobody has asked anything yet."""

from serving.engines.base import Health

IDLE = Health(
    alive=True,
    speculator="",
    speculating=True,
    draft_depth=0,
    expected_rates=(),
    running=0,
    waiting=0,
    verify_steps=0,
    drafted=0,
    accepted=0,
    output_tokens=0,
)
