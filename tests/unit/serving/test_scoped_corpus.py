"""A request is drafted from the answers of its scope and from no others."""

from __future__ import annotations

import pytest

from schemas.settings.sections import SuffixScope
from serving.engines.builtin.scoped_corpus import ScopedCorpus
from serving.engines.builtin.suffix_corpus import BYTES_PER_TOKEN

MAX_BYTES = 1000 * BYTES_PER_TOKEN
ANSWER = [5, 6, 7]


@pytest.mark.parametrize(
    ("scope", "of", "found_by"),
    [
        ("request", "a", set()),
        ("request", None, set()),
        ("label", "a", {"a"}),
        ("label", "", {""}),
        ("label", None, set()),
        ("node", "a", {"a", "b", "", None}),
        ("fleet", None, {"a", "b", "", None}),
    ],
)
def test_a_scope_shares_an_answer_with_the_requests_it_names(
    scope: SuffixScope, of: str | None, found_by: set[str | None]
) -> None:
    corpus = ScopedCorpus(scope, MAX_BYTES)
    corpus.insert(of, ANSWER)
    assert {label for label in ("a", "b", "", None) if corpus.find(label, ANSWER[:2], 1).length} == found_by
