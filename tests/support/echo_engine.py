"""An engine that outputs the prompt, a few tokens per verify step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from schemas.speculator.network import EagleDraft
from serving.engines.base import (
    EngineFullError,
    EngineHealth,
    Finish,
    Output,
    Request,
    RequestStats,
    SwapResult,
    TokenLogprobs,
)

EOS = "<eos>"
BYTES = 256


class EchoEngine:
    """Every request runs on its own thread; ``gate`` holds all of them after their first verify step.

    With ``eos`` set, that token ends every complete output.
    """

    target = "echo"
    line = "echo-line"
    vocabulary = BYTES + 1
    eos_ids: frozenset[int] = frozenset()

    def __init__(self, max_tokens: int = 200, per_verify_step: int = 2) -> None:
        self.max_tokens = max_tokens
        self.per_verify_step = per_verify_step
        self.gate = threading.Event()
        self.gate.set()
        self.full = self.dead = False
        self.error: str | None = None
        self.room = 1000
        self.eos: int | None = None
        self.speculating = True
        self.version = "day-0-head-0"
        self.dies_with: str | None = None
        self.requests: list[Request] = []
        self.cached_tokens: list[int] = []
        """Prompt tokens from the prefix cache, by request; 0 for further ones."""
        self.ended: dict[str, Finish] = {}
        self._cancelled: set[str] = set()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        pass

    def stop(self) -> None:
        self._cancelled.update(r.id for r in self.requests)
        self.gate.set()
        for thread in self._threads:
            thread.join()

    def submit(self, request: Request, on_output: Callable[[Output], None]) -> None:
        if self.full or len(self.requests) >= self.room:
            raise EngineFullError("256 requests wait already")
        self.requests.append(request)
        self._threads.append(threading.Thread(target=self._generate, args=(request, on_output), daemon=True))
        self._threads[-1].start()

    def cancel(self, request_id: str) -> None:
        self._cancelled.add(request_id)
        self.gate.set()

    def check(self, draft: EagleDraft) -> None:
        pass

    def swap(self, draft: EagleDraft, version: str) -> SwapResult:
        self.version = version
        return SwapResult(version, 0, 0.0)

    def speculate(self, *, on: bool) -> None:
        self.speculating = on

    def health(self) -> EngineHealth:
        alive, rates = not self.dead and self.error is None, (50.0, 60.0, 66.0, 64.0)
        counts = (0, 0, 4, 12, 6, 10)
        return EngineHealth(alive, self.version, self.speculating, 3, rates, *counts, speedup=1.2, error=self.error)

    def _generate(self, request: Request, on_output: Callable[[Output], None]) -> None:
        output, whole = self._echo(request)
        stop_ids = request.stop_ids if self.eos is None else {*request.stop_ids, self.eos}
        # As in an engine, a token that ends the output comes with the end.
        output, end = (output[:-1], output[-1:]) if whole and output[-1] in stop_ids else (output, ())
        verify_steps = 0
        if request.prompt_logprobs is not None:
            # In two parts, as the prefill of a long prompt.
            for part in (request.prompt[1:3], request.prompt[3:]):
                on_output(Output((), prompt_logprobs=scores(part, request.prompt_logprobs)))
        for start in range(0, len(output), self.per_verify_step):
            tokens = output[start : start + self.per_verify_step]
            on_output(Output(tokens, logprobs=_scores_for(request, tokens)))
            verify_steps += 1
            self.gate.wait(10)
            if request.id in self._cancelled:
                self._end(request, on_output, "cancelled", verify_steps)
                return
            if self.dies_with:
                on_output(Output((), finish="error", error=self.dies_with))
                return
        self._end(request, on_output, "stop" if whole else "length", verify_steps, end)

    def _echo(self, request: Request) -> tuple[tuple[int, ...], bool]:
        """Return the output, and whether it is complete."""
        whole = request.prompt if self.eos is None or request.ignore_eos else (*request.prompt, self.eos)
        stop = next((i for i, token in enumerate(whole) if token in request.stop_ids), len(whole) - 1)
        output = whole[: stop + 1][: request.max_tokens]
        return output, len(output) == stop + 1

    def _end(
        self,
        request: Request,
        on_output: Callable[[Output], None],
        finish: Finish,
        verify_steps: int,
        tokens: tuple[int, ...] = (),
    ) -> None:
        self.ended[request.id] = finish
        drafted = 3 * verify_steps if request.speculate else 0
        versions = ("day-0-head-0",) if request.speculate else ()
        cached = dict(zip((one.id for one in self.requests), self.cached_tokens, strict=False)).get(request.id, 0)
        stats = RequestStats(verify_steps, drafted, drafted // 3, versions, cached_tokens=cached, queue_s=0.0)
        on_output(Output(tokens, _scores_for(request, tokens), finish=finish, stats=stats))


def _scores_for(request: Request, tokens: Sequence[int]) -> tuple[TokenLogprobs, ...]:
    return () if request.logprobs is None else scores(tokens, request.logprobs)


def scores(tokens: Sequence[int], alternatives: int) -> tuple[TokenLogprobs, ...]:
    """Return log-probability -0.5 for every token; its alternatives are the next token ids, each 1 lower."""
    return tuple(
        TokenLogprobs(-0.5, tuple(((token + i) % BYTES, -0.5 - i) for i in range(alternatives))) for token in tokens
    )


def byte_tokenizer(extra: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token a byte, so that most characters take several; the chat template is the bare contents,
    the calls of functions with their argument ``zone``, and the variable ``closing``.

    ``extra`` entries of the vocabulary are never encoded to, but can be decoded.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, EOS, *extra])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)
    fast.chat_template = (
        "{% for m in messages %}{% if m.content == 'refuse me' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments.zone }}"
        "{% endfor %}{% endfor %}{{ closing }}"
    )
    return fast


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Sequence[int]:
    """Token ids of a text, without the chat template."""
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids
