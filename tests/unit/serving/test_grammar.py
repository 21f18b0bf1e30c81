"""A grammar allows exactly the tokens that continue one of its texts, and forces a token that is the only one."""

import json
import signal
from collections.abc import Sequence
from threading import Timer

import pytest
import torch
from echo_engine import BYTES, byte_tokenizer, encode
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from schemas.trace.record import ROOT, DraftSource
from serving.engines.builtin.drafter import EMPTY_TREE, DraftNode, DraftTree
from serving.engines.builtin.grammar import GrammarCompiler, GrammarMatcher
from serving.engines.builtin.grammar_check import _MAX_CPU_S, MAX_GRAMMAR_BYTES, GrammarChecker, GrammarError
from serving.http.tools import json_grammar

TOKENIZER = byte_tokenizer()
EOS_ID = BYTES
COMPILER = GrammarCompiler(TOKENIZER, BYTES + 1, {EOS_ID})

texts = st.lists(st.text(st.sampled_from("ab{é"), min_size=1, max_size=6), min_size=1, max_size=4)


def choices(options: Sequence[str]) -> str:
    return "start: " + " | ".join(map(json.dumps, options))


def allowed(matcher: GrammarMatcher, output: Sequence[int]) -> set[int]:
    logits_V = matcher.process(torch.zeros(BYTES + 1), output)
    return set(torch.nonzero(logits_V == 0).flatten().tolist())


def continuations(options: Sequence[str], output: Sequence[int]) -> set[int]:
    """The slow reference: next tokens by comparing with every text."""
    whole = [[*encode(TOKENIZER, option), EOS_ID] for option in options]
    return {ids[len(output)] for ids in whole if ids[: len(output)] == list(output) and len(ids) > len(output)}


@given(texts, st.data())
def test_the_allowed_tokens_are_those_that_continue_a_text(options: list[str], data: st.DataObject) -> None:
    matcher, output = COMPILER.compile(choices(options)).create_matcher(), list[int]()
    while output[-1:] != [EOS_ID]:
        expected = continuations(options, output)
        tree = random_tree(data, sorted(expected))
        constrained = matcher.constrain(tree, output, 8)
        for i in range(len(constrained.nodes)):
            *before, token = constrained.path_to(i)
            follows = continuations(options, [*output, *before])
            assert token in follows
            assert (follows == {token}) >= (constrained.nodes[i].source == DraftSource.GRAMMAR)
        assert allowed(matcher, output) == expected
        output.append(data.draw(st.sampled_from(sorted(expected))))
    assert allowed(matcher, output) == {EOS_ID}


def random_tree(data: st.DataObject, likely: list[int]) -> DraftTree:
    nodes: list[DraftNode] = []
    for i in range(data.draw(st.integers(0, 5))):
        token = data.draw(st.sampled_from([*likely, *encode(TOKENIZER, "ab{"), EOS_ID]))
        parent = data.draw(st.integers(ROOT, i - 1))
        depth = 1 if parent == ROOT else nodes[parent].depth + 1
        nodes.append(DraftNode(token, parent, depth, -0.5, 0.6, 0.5**depth))
    return DraftTree(tuple(nodes), "v1" if nodes else "")


def test_forbidden_draft_tokens_are_left_out_and_forced_ones_added() -> None:
    matcher = COMPILER.compile('start: "x" /[ab]/ "yz"').create_matcher()
    x, a, y, z, q = encode(TOKENIZER, "xayzq")
    drafted = DraftTree(
        (
            DraftNode(q, ROOT, 1, -0.1, 0.9, 0.9),
            DraftNode(x, ROOT, 1, -0.1, 0.9, 0.5),
            DraftNode(a, 1, 2, -0.1, 0.9, 0.25),
        ),
        "v1",
    )
    tree = matcher.constrain(drafted, [], 8)
    assert (tree.tokens, tree.parents, tree.version) == ([x, a, y, z], [-1, 0, 1, 2], "v1")
    assert [node.chance for node in tree.nodes] == [1.0, 0.5, 0.5, 0.5]
    grammar, speculator = DraftSource.GRAMMAR, DraftSource.SPECULATOR
    assert [node.source for node in tree.nodes] == [grammar, speculator, grammar, grammar]
    assert matcher.constrain(EMPTY_TREE, [x, a], 1).tokens == [y]


def test_a_forced_token_counts_for_no_version() -> None:
    matcher = COMPILER.compile('start: "xy"').create_matcher()
    (x,) = encode(TOKENIZER, "x")
    tree = matcher.constrain(DraftTree((DraftNode(x, ROOT, 1, -0.1, 0.9, 0.5),), "v1"), [], 8)
    assert (tree.version, tree.needs_sources) == ("", True)


@pytest.mark.parametrize(
    "text",
    [
        "start: (",
        "start: /(/",
        json.dumps({"grammars": [{"json_schema": {"type": "strin"}}]}),
        "start: /a/" + " " * MAX_GRAMMAR_BYTES,
        # These overflow the stack, and take long.
        "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1}' for i in range(3000)) + '\nr3000: "a"',
        json.dumps({"grammars": [{"json_schema": {"type": "integer", "multipleOf": 999983}}]}),
    ],
)
def test_a_grammar_that_cannot_be_compiled_is_rejected_and_the_next_one_is_not(text: str) -> None:
    with pytest.raises(GrammarError):
        COMPILER.compile(text)
    assert COMPILER.compile('start: "a"') is COMPILER.compile('start: "a"')


def test_a_grammar_that_no_token_can_begin_is_rejected_before_a_request_runs() -> None:
    vocabulary = {"a": 0, "b": 1, "<end>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[])), eos_token="<end>"
    )
    compiler = GrammarCompiler(tokenizer, len(vocabulary), {2})
    with pytest.raises(GrammarError, match="no token of the target begins it"):
        compiler.compile('start: "x"')
    matcher = compiler.compile('start: "b" | "x"').create_matcher()
    assert torch.nonzero(matcher.process(torch.zeros(3), []) == 0).flatten().tolist() == [1]


def test_a_checker_starts_again_after_its_process_ended() -> None:
    checker = GrammarChecker()
    checker.check('start: "a"')
    assert checker._child is not None
    checker._child.kill()
    checker._child.wait()
    checker.check('start: "a"')


def test_a_checker_that_the_machine_stops_for_a_while_rejects_nothing() -> None:
    checker = GrammarChecker()
    checker.check('start: "a"')
    assert checker._child is not None
    checker._child.send_signal(signal.SIGSTOP)
    Timer(_MAX_CPU_S + 1, checker._child.send_signal, (signal.SIGCONT,)).start()
    checker.check('start: "b"')


def test_a_grammar_without_end_fails_its_matcher_alone() -> None:
    schema = {"$defs": {"n": {"type": "object", "properties": {"c": {"$ref": "#/$defs/n"}}, "required": ["c"]}}}
    grammars = [{"json_schema": json_grammar(schema | {"$ref": "#/$defs/n"})}]
    grammar = COMPILER.compile(json.dumps({"grammars": grammars}))
    for _ in range(2):
        matcher = grammar.create_matcher()
        with pytest.raises(GrammarError):
            matcher.constrain(EMPTY_TREE, [], 8)
    assert allowed(COMPILER.compile('start: "a"').create_matcher(), []) == set(encode(TOKENIZER, "a"))
