"""Settings of the demo."""

from ops.demo.run import draft_always
from schemas.settings import load


def test_the_demo_drafts_in_every_verify_step_by_default() -> None:
    serve = draft_always(load(environ={}, flags={"serve.max_num_seqs": 4})).serve
    assert (serve.adaptive_drafting, serve.num_speculative_tokens, serve.max_num_seqs) == (False, 3, 4)


def test_the_demo_keeps_the_draft_settings_of_the_user() -> None:
    for flag, value in (("serve.adaptive_drafting", True), ("serve.num_speculative_tokens", 5)):
        settings = load(environ={}, flags={flag: value})
        assert draft_always(settings) == settings
