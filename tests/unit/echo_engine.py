"""An engine that answers with the prompt, a few tokens a round, and keeps to the engine's protocol."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from schemas.speculator.network import EagleDraft
from serving.engine import EngineFullError, Figures, Finish, Health, Output, Request, Swapped

EOS = "<eos>"


class EchoEngine:
    """Every request runs on a thread of its own; ``gate`` holds all of them after their first round."""

    target = "echo"
    line = "echo-line"

    def __init__(self, max_tokens: int = 200, per_round: int = 2) -> None:
        self.max_tokens = max_tokens
        self.per_round = per_round
        self.gate = threading.Event()
        self.gate.set()
        self.full = self.dead = False
        self.dies_with: str | None = None
        self.requests: list[Request] = []
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
        if self.full:
            raise EngineFullError("256 requests wait already")
        self.requests.append(request)
        self._threads.append(threading.Thread(target=self._answer, args=(request, on_output), daemon=True))
        self._threads[-1].start()

    def cancel(self, request_id: str) -> None:
        self._cancelled.add(request_id)
        self.gate.set()

    def check(self, draft: EagleDraft) -> None:
        pass

    def swap(self, draft: EagleDraft, version: str) -> Swapped:
        return Swapped(version, 0, 0.0)

    def health(self) -> Health:
        return Health(not self.dead, "random-0", 0, 0, 4, 12, 6, 10, error="it broke" if self.dead else None)

    def _answer(self, request: Request, on_output: Callable[[Output], None]) -> None:
        answer = request.prompt[: request.max_tokens]
        whole = len(answer) == len(request.prompt)
        rounds = 0
        for start in range(0, len(answer), self.per_round):
            on_output(Output(answer[start : start + self.per_round]))
            rounds += 1
            self.gate.wait(10)
            if request.id in self._cancelled:
                self._end(request, on_output, "cancelled", rounds)
                return
            if self.dies_with:
                on_output(Output((), "error", error=self.dies_with))
                return
        self._end(request, on_output, "stop" if whole else "length", rounds)

    def _end(self, request: Request, on_output: Callable[[Output], None], finish: Finish, rounds: int) -> None:
        self.ended[request.id] = finish
        drafted = 3 * rounds if request.speculate else 0
        versions = ("random-0",) if request.speculate else ()
        on_output(Output((), finish, figures=Figures(rounds, drafted, drafted // 3, versions)))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that most characters take several; the chat template is the bare contents."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, EOS])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)
    fast.chat_template = (
        "{% for m in messages %}{% if m.content == 'refuse me' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    return fast


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Sequence[int]:
    """Token ids of a text, without the chat template."""
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids
