"""Conversations that the target generates: prompts from its chat template alone, and answers to any prompt.

Given the template up to the place of the first user message, a target that was tuned on conversations writes the user's
turn (Magpie, arXiv 2406.08464). A small one writes of everyday life alone, so most turns begin with an opener: a few
words of a common task, which the target continues. A conversation becomes a sample of the form that a served request
has: its prompt is context, the target's own or not, and the answer has features and the target's distributions, from
the forwards that generated it.

Shapes: B conversations, T tokens, F feature width, V target vocabulary, k teacher width.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path

import torch
from torch import Tensor

from schemas.hash_sampling import prompt_key
from schemas.speculator.acceptance import MIN_TEMPERATURE
from trainer.data.samples import RequestSampling, Sample, Teacher
from trainer.data.target import GeneratingTarget, TargetOutput

MAX_USER_TOKENS = 64
"""Longest user turn that the target writes; a longer one ends there."""
USER_TEMPERATURE = 1.0
ANSWER_TEMPERATURES = (0.0, 0.8)
"""Of answers to prompts that the target wrote, in turn: nodes serve greedy and sampled requests."""
MAX_ANSWER_TOKENS = 128
MAX_PROMPT_TOKENS = 512
"""Longest past prompt that is answered again."""
_PLACE = "user-message"

OPENERS: Mapping[str, Sequence[str]] = {
    kind: text.split(" | ")
    for kind, text in {
        "any": "",
        "code": "Write a Python function that | Write a function in Python to | Write a Python program that | "
        "Implement a class in Python for | Write a JavaScript function that | Write a program in Java that | "
        "Write a C++ function to | Write unit tests for a function that | Write a shell script that | "
        "Complete the code:\n\ndef | Fix the error in this code:\n\ndef | Explain this code:\n\ndef | "
        "Add types to this function:\n\ndef | Refactor this code:\n\nclass | How do I use Python to",
        "sql": "Write a SQL query that | Write an SQL query to find | Write a query to count | Given the tables | "
        "Write a SELECT statement for | How do I join two tables | Which SQL query returns the | Select the average | "
        "Write a SQL query to list all | Write a query with GROUP BY that | Use SQL to find the number of",
        "mathematics": "A store sells | If a train travels | There are | Anna has | John bought | A farmer has | "
        "Tom is | Maria earns | A box contains | In a class of | Each day, | Solve the equation | Calculate | "
        "What is the sum of | How many | Find the value of | A rectangle has | Simplify | What percentage of",
        "text": "Explain | What is the difference between | Why do | How does | Summarize this text: | Who was | "
        "Rewrite this sentence: | Translate to Spanish: | Write an email to | Write a short story about | I feel | "
        "Can you recommend | I think that | Do you like | What should I do if | Give me advice on | Tell me about | "
        "Reply in JSON with | Extract the names and dates from this text: | Convert this to JSON: | List five | "
        "Make a table of | Classify the sentiment of this review: | Write a YAML file for | Sort these words:",
    }.items()
}
"""Beginnings of user turns, by kind of task; "" leaves the whole turn to the target."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The tokens of a conversation around its first user message."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    """Up to the answer. The first of them ends the user's turn."""
    openers: tuple[tuple[tuple[int, ...], ...], ...] = (((),),)
    """Beginnings of the user's turn, by kind of task."""


@dataclass(frozen=True, slots=True)
class Opening:
    """Where a conversation begins."""

    tokens: tuple[int, ...]
    temperature: float
    """Of the answer."""
    template: ChatTemplate | None = None
    """The target writes the user's turn by this template first; None if ``tokens`` are the whole prompt."""
    opener: tuple[int, ...] = ()
    """The first tokens of that turn."""
    label: str | None = None


def read_chat_template(folder: Path) -> ChatTemplate:
    """Return the target's chat template around a first user message, with its default system prompt if it has one.

    Its openers are tokenized.

    Raises:
        OSError: the folder holds no tokenizer.
        ValueError: the tokenizer has no chat template, or one without a user message.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    messages = [{"role": "user", "content": _PLACE}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def tokenize(part: str) -> tuple[int, ...]:
        return tuple(tokenizer(part, add_special_tokens=False)["input_ids"])

    before, _, after = text.partition(_PLACE)
    if not (tokenize(before) and tokenize(after)):
        raise ValueError(f"{folder}: the chat template has nothing before or after the user message")
    openers = tuple(tuple(map(tokenize, kind)) for kind in OPENERS.values())
    return ChatTemplate(tokenize(before), tokenize(after), openers)


def draw_openings(template: ChatTemplate, number: int, chooser: random.Random) -> list[Opening]:
    """Return openings whose user turns the target writes: all kinds of tasks at all answer temperatures in turn."""
    turns = islice(cycle(product(ANSWER_TEMPERATURES, template.openers)), number)
    return [Opening(template.before, temperature, template, chooser.choice(kind)) for temperature, kind in turns]


def find_past_prompts(samples: Iterable[Sample], temperature: float) -> list[Opening]:
    """Return the different prompts of samples up to ``MAX_PROMPT_TOKENS``, where a sample holds its request's start."""
    found: dict[tuple[int, ...], Opening] = {}
    for sample in samples:
        if len(sample.preceding) == sample.position and bool(sample.known.any()):
            end = int(sample.known.nonzero()[0]) + 1
            tokens = (*sample.preceding.tolist(), *sample.tokens[:end].tolist())
            if len(tokens) <= MAX_PROMPT_TOKENS:
                found[tokens] = Opening(tokens, temperature, label=sample.label)
    return list(found.values())


def generate(
    target: GeneratingTarget, openings: Sequence[Opening], top_k: int, generator: torch.Generator, name: str
) -> Iterator[list[Sample]]:
    """Generate conversations together. After every forward, yield those that have ended.

    Args:
        target: The target; a batch that it continued before is lost.
        openings: Where each conversation begins.
        top_k: Width of the teacher.
        generator: Draws the tokens.
        name: The beginning of the samples' request ids.
    """
    running = [_Conversation(f"{name}-{i}", opening, target) for i, opening in enumerate(openings)]
    output = target.start([one.tokens for one in running])
    while running:
        for one, states_TF in zip(running, output.states_BTF, strict=True):
            one.states.append(states_TF[-(len(one.tokens) - one.fed) :])
            one.fed = len(one.tokens)
        is_ended = _continue(running, output, top_k, generator)
        rows = [row for row, ended in enumerate(is_ended) if not ended]
        if len(rows) < len(openings) // 4 and all(running[row].is_answered for row in rows):
            # A forward takes nearly as long for few conversations as for many.
            rows = []
        yield [one.sample() for row, one in enumerate(running) if row not in rows]
        if 0 < len(rows) < len(running):
            target.keep(rows)
        running = [running[row] for row in rows]
        if running:
            output = target.feed([one.tokens[-1] for one in running])


def _continue(
    running: Sequence[_Conversation], output: TargetOutput, top_k: int, generator: torch.Generator
) -> list[bool]:
    """Append the next token to each conversation; return which of them end with it."""
    logits_BV = output.logits_BV
    chosen = choose_tokens(logits_BV, [one.temperature for one in running], generator)
    top = logits_BV.topk(min(top_k, logits_BV.shape[-1]), dim=-1)
    ids_Bk = top.indices.cpu()
    logprobs_Bk = (top.values - logits_BV.logsumexp(dim=-1, keepdim=True)).cpu()
    return [
        one.append(token, Teacher(ids_Bk[row], logprobs_Bk[row]))
        for row, (one, token) in enumerate(zip(running, chosen, strict=True))
    ]


def choose_tokens(logits_BV: Tensor, temperatures: Sequence[float], generator: torch.Generator) -> list[int]:
    """Return a token for each row: the likeliest at temperature 0, otherwise a drawn one."""
    chosen_B = logits_BV.argmax(dim=-1)
    sampled = [row for row, temperature in enumerate(temperatures) if temperature >= MIN_TEMPERATURE]
    if sampled:
        temperature_S = logits_BV.new_tensor([temperatures[row] for row in sampled])
        # The inverse of the cumulative distribution needs one random number per row, not one per token.
        cumulative_SV = (logits_BV[sampled] / temperature_S[:, None]).softmax(dim=-1).cumsum(dim=-1)
        uniform_S = torch.rand(len(sampled), generator=generator, device=logits_BV.device)
        drawn_S1 = torch.searchsorted(cumulative_SV, (uniform_S * cumulative_SV[:, -1])[:, None], right=True)
        chosen_B[sampled] = drawn_S1[:, 0].clamp_max(logits_BV.shape[-1] - 1)
    chosen: list[int] = chosen_B.tolist()
    return chosen


class _Conversation:
    """A conversation that is generated token by token."""

    def __init__(self, request: str, opening: Opening, target: GeneratingTarget) -> None:
        self.tokens = list(opening.tokens)
        self.fed = 0
        """Tokens that the target has read."""
        self.states: list[Tensor] = []
        """[.., F] after each token that was read."""
        self.prompt = 0 if opening.template else len(self.tokens)
        """Tokens of the prompt; 0 while the user's turn is written."""
        self._request, self._opening, self._target = request, opening, target
        self._forced, self._is_turn_over = deque(opening.opener), False
        self._teachers: list[Teacher] = []

    @property
    def is_answered(self) -> bool:
        """Whether the answer has begun."""
        return bool(self._teachers)

    @property
    def temperature(self) -> float:
        """Temperature of the next token."""
        return self._opening.temperature if self.prompt else USER_TEMPERATURE

    def append(self, token: int, teacher: Teacher) -> bool:
        """Append a token, or the one that the template has there; return whether the conversation ends.

        Args:
            token: The token that the target chose.
            teacher: [k] the distribution that it was chosen from.
        """
        if self._opening.template and not self.prompt:
            self._continue_turn(token, self._opening.template)
            return False
        self._teachers.append(teacher)
        self.tokens.append(token)
        is_long = len(self._teachers) >= MAX_ANSWER_TOKENS or len(self.tokens) >= self._target.max_length
        return token in self._target.eos_ids or is_long

    def _continue_turn(self, token: int, template: ChatTemplate) -> None:
        if not self._forced and self._ends_turn(token, template):
            self._forced, self._is_turn_over = deque(template.after), True
        self.tokens.append(self._forced.popleft() if self._forced else token)
        if self._is_turn_over and not self._forced:
            self.prompt = len(self.tokens)

    def _ends_turn(self, token: int, template: ChatTemplate) -> bool:
        written = len(self.tokens) - len(self._opening.tokens)
        return token == template.after[0] or token in self._target.eos_ids or written >= MAX_USER_TOKENS

    def sample(self) -> Sample:
        """Return the sample of a conversation whose answer has begun."""
        *tokens, next_token = self.tokens
        return Sample(
            request=self._request,
            tokens=torch.tensor(tokens),
            next_token=next_token,
            features=torch.cat(self.states),
            known=torch.arange(len(tokens)) >= self.prompt - 1,
            teacher=Teacher(
                torch.stack([one.ids for one in self._teachers]),
                torch.stack([one.logprobs for one in self._teachers]),
            ),
            label=self._opening.label,
            sampling=RequestSampling(self._opening.temperature, 1.0, 0),
            prompt_key=prompt_key(self.tokens[: self.prompt]),
        )
