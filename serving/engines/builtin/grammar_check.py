"""Checks grammars in a child process: one that exhausts stack, memory or time ends the child, not the node.

The library that compiles grammars limits most of its work, but not its recursion: a chain of some thousand rules
overflows the stack, which ends a process.
"""

from __future__ import annotations

import json
import math
import resource
import selectors
import subprocess
import sys
import threading
import weakref
from contextlib import suppress

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=25_000,
    max_lexer_states=50_000,
    verbose_errors=False,
)
"""Limits of compilation and of each step of a matcher. The default limits let one step take twice as long."""
MAX_GRAMMAR_BYTES = 128 << 10
_MAX_CPU_S = 3
"""Processor time for one grammar; other programs of a busy machine do not count."""
_MAX_WAIT_S = 60.0
"""Time for the child's start, and for its answer: one that computes for so long ends itself earlier."""
_MAX_MEMORY_BYTES = 1 << 30
"""Of the child's address space."""
_STACK_BYTES = 2 << 20
"""Of the child's thread; threads of the node have 8 MiB."""


class GrammarError(ValueError):
    """A grammar is invalid, or too complex to be compiled or followed."""


class GrammarChecker:
    """Owns the child process, which ends with the node. Not thread-safe."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None

    def check(self, text: str) -> None:
        """Check that a grammar compiles.

        Raises:
            GrammarError: it does not, or not within the limits.
        """
        child = self._child
        if child is None or child.poll() is not None:
            child = self._child = _start()
            weakref.finalize(self, _end, child)
        assert child.stdin is not None
        with suppress(BrokenPipeError):
            child.stdin.write(json.dumps(text) + "\n")
            child.stdin.flush()
        answer = _read_line(child)
        if not answer:
            _end(child)
            raise GrammarError("it is too complex to be compiled")
        if error := json.loads(answer):
            raise GrammarError(error)


def _start() -> subprocess.Popen[str]:
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    child = subprocess.Popen([sys.executable, "-m", __name__], stdin=pipe, stdout=pipe, stderr=nowhere, text=True)
    if not _read_line(child):
        _end(child)
        raise GrammarError("the process that checks grammars does not start")
    return child


def _end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate()


def _read_line(child: subprocess.Popen[str]) -> str:
    """Return the next line of a child; empty if it ended or takes too long."""
    assert child.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        return child.stdout.readline() if selector.select(_MAX_WAIT_S) else ""


class _Bytes:
    """A vocabulary of single bytes and an end token."""

    eos_token_id, bos_token_id = 256, None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<eos>")
    special_token_ids = (256,)

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def _answer() -> None:
    """Compile each grammar of standard input, take a first step, and write its error; empty for none."""
    tokens = LLTokenizer(TokenizerWrapper(_Bytes()))
    _write("ready")
    for line in sys.stdin:
        _limit_processor_time()
        matcher = LLMatcher(tokens, json.loads(line), limits=LIMITS, log_level=0)
        if not matcher.is_error():
            matcher.compute_ff_tokens()
            matcher.compute_bitmask()
        _write(json.dumps(matcher.get_error().partition("\n")[0]))


def _limit_processor_time() -> None:
    """Let the system end this process when it has computed for ``_MAX_CPU_S`` more, rounded up to a whole second."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used.ru_utime + used.ru_stime) + _MAX_CPU_S, hard))


def _write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_answer)
    thread.start()
    thread.join()


if __name__ == "__main__":
    _main()
