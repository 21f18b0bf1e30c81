"""What the demo sets by itself, and what it leaves to its user."""

from ops.demo.run import drafting_always
from schemas.settings import load


def test_a_demo_drafts_in_every_verify_step() -> None:
    serve = drafting_always(load(environ={}, flags={"serve.max_num_seqs": 4})).serve
    assert (serve.adaptive_drafting, serve.num_speculative_tokens, serve.max_num_seqs) == (False, 3, 4)


def test_a_demo_drafts_as_its_user_says() -> None:
    for flag, value in (("serve.adaptive_drafting", True), ("serve.num_speculative_tokens", 5)):
        settings = load(environ={}, flags={flag: value})
        assert drafting_always(settings) == settings
