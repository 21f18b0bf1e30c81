"""Others that serve the same weights: transformers' ``generate``, plain and with prompt lookup, and llama.cpp."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ops.bench import gguf_file
from ops.bench.paired import interleaved

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
LOOKUP_TOKENS = 10
"""Drafted tokens of prompt lookup: what its authors recommend (transformers' documentation of ``generate``)."""

_TRIED_TOKENS = 8
_TRIES = 2
_CONTEXT = 2048


class PeerAbsentError(RuntimeError):
    """This peer cannot run here; the message says why."""


class Generate:
    """transformers' ``generate`` on the target, greedy, one prompt at a time."""

    def __init__(self, folder: Path, dtype: str, device: torch.device) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.dtype, self._device = dtype, device
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
        self._model = model.to(device).eval()

    @classmethod
    def fastest(cls, folder: Path, prompt: tuple[int, ...], device: torch.device) -> tuple[Generate, dict[str, float]]:
        """The one in the dtype that is fastest on this machine, and tokens a second in each."""
        tried = {dtype: cls(folder, dtype, device) for dtype in DTYPES}
        arms = {dtype: partial(_tokens_of, model, prompt) for dtype, model in tried.items()}
        for arm in arms.values():
            arm(0)
        rates = {dtype: max(rate.clock.values) for dtype, rate in interleaved(arms, _TRIES).items()}
        return tried[max(rates, key=lambda dtype: rates[dtype])], rates

    def answer(self, prompt: tuple[int, ...], max_tokens: int, *, lookup: bool = False) -> tuple[int, ...]:
        """Answer one prompt, with prompt lookup or without."""
        import torch

        ids = torch.tensor([prompt], device=self._device)
        arguments: dict[str, Any] = {"prompt_lookup_num_tokens": LOOKUP_TOKENS} if lookup else {}
        with torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, **arguments
            )
        return tuple(out[0, len(prompt) :].tolist())


def _tokens_of(model: Generate, prompt: tuple[int, ...], _trial: int) -> int:
    return len(model.answer(prompt, _TRIED_TOKENS))


class LlamaCpp:
    """llama.cpp on the same weights in fp16, greedy, one prompt at a time."""

    def __init__(self, folder: Path, cache: Path, threads: int, eos: Iterable[int]) -> None:
        """Load the model, written as GGUF the first time.

        Raises:
            PeerAbsentError: llama-cpp-python is not installed, or the target is no Llama.
        """
        try:
            import llama_cpp
        except ImportError as error:
            raise PeerAbsentError(f"{error}; `make peers` builds llama-cpp-python") from error
        try:
            file = gguf_file.ensure(folder, cache)
        except gguf_file.UnsupportedError as error:
            raise PeerAbsentError(str(error)) from error
        self._eos = frozenset(eos)
        self.version = str(llama_cpp.__version__)
        self._llama = llama_cpp.Llama(
            str(file), n_ctx=_CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def answer(self, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
        """Answer one prompt."""
        self._llama.reset()
        tokens: list[int] = []
        for token in self._llama.generate(list(prompt), temp=0.0, top_k=1):
            tokens.append(token)
            if token in self._eos or len(tokens) >= max_tokens:
                break
        return tuple(tokens)
