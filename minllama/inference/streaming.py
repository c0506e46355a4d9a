"""Text from a model: prompts continued, and shown as soon as no later token can change it."""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from config import Options
from llama import Llama
from minllama.cli.console import human_time
from minllama.model.generation import Sampling, generate_tokens
from minllama.system.signals import StopRequest
from minllama.text.chat import Template
from minllama.text.dialogues import Exchange
from tokenizer import Tokenizer

# Where --temperature is not given: of a text that is continued, and of an answer.
PROMPT_TEMPERATURE, CHAT_TEMPERATURE = 0.8, 0.2
# Beside the former: the least that ends bytes that are no character (benchmarks/README.md).
PROMPT_MIN_P = 0.01
SAMPLE_TOKENS = 120  # of the text shown after a pretraining


class Continuation:
    """The text that grows behind a prompt.

    An unfinished character, and what may be the beginning of a stop text, is held back; the former
    is left out at the end, where the tokens were too few for it.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        tokenizer: Tokenizer,
        stops: Sequence[str],
        *,
        is_answer: bool = False,  # which does not begin with the space behind its label
    ) -> None:
        self.prompt_ids, self.tokenizer, self.stops = prompt_ids, tokenizer, stops
        self.is_answer = is_answer
        self.ids: list[int] = []
        self.prompt_text = tokenizer.decode(prompt_ids)
        self.text = ""  # without the prompt, and without what is held back
        self.ended = False

    def add(self, token: int | None) -> str:
        """Take the next token (None: the row has ended); returns the text to show for it."""
        if token is None:
            self.ended = True
        elif not self.ended:
            self.ids.append(token)
        # Decoded with the prompt: of a text by itself SentencePiece drops the first space.
        text = self.tokenizer.decode(self.prompt_ids + self.ids)[len(self.prompt_text) :]
        text = text.lstrip() if self.is_answer else text
        stop_places = [place for place in map(text.find, self.stops) if place >= 0]
        if stop_places:
            self.ended, text = True, text[: min(stop_places)]
        text = text.rstrip("\ufffd")  # the first bytes of a character
        if not self.ended:
            held_back = max((overlap(text, stop) for stop in self.stops), default=0)
            text = text[: len(text) - held_back]
        new, self.text = text[len(self.text) :], text
        return new


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class Writer:
    """Continues texts with a model and prints them: one as it comes, several when they end."""

    llama: Llama
    tokenizer: Tokenizer
    options: Options
    stop: StopRequest
    step: Callable[..., torch.Tensor] | None = None  # a compiled decode step
    template: Template | None = None  # of a chat model, whose prompts are questions to answer

    def continue_texts(
        self,
        prompts: Sequence[str],
        temperature: float,
        *,
        first: int = 0,
        total: int | None = None,
    ) -> list[str]:
        """Prompt and continuation of each prompt, or its answer, `--num_samples` times.

        The prompts are those from number `first` on, of `total`, by default of these alone.
        """
        options, samples = self.options, self.options.num_samples
        rows = [self.row(text) for text in prompts for _ in range(samples)]
        context = self.llama.config.max_seq_len
        longest = max(len(row.prompt_ids) for row in rows)
        if longest > context:
            print(
                f"note: a prompt has {longest:,} tokens and the model's context is {context:,}: it "
                "continues the last ones that fit",
                file=sys.stderr,
            )
        total = samples * (total or len(prompts))
        streamed = total == 1
        prefixes = [text + "\n" * (self.template is not None) for text in prompts]
        self.write(
            rows,
            temperature,
            # Seeded by the sample's number alone: a prompt gives the same alone and in a batch.
            seeds=[options.seed + number for _ in prompts for number in range(samples)],
            max_new_tokens=options.max_new_tokens,
            prefix=prefixes[0] if streamed else None,
            stop=self.stop,
        )
        texts = [prefixes[i // samples] + row.text for i, row in enumerate(rows)]
        if not streamed:
            for number, text in enumerate(texts, start=first * samples + 1):
                print(f"--- {number} of {total}\n{text}")
        return texts

    def row(self, text: str, history: Sequence[Exchange] = ()) -> Continuation:
        """The text to continue, or for a chat model the question to answer, behind its history."""
        tokenizer, template, stops = self.tokenizer, self.template, self.options.stop
        if template is None:
            return Continuation(tokenizer.encode(text, True, False), tokenizer, stops)
        ids = template.prompt_ids(tokenizer, text, history)
        return Continuation(ids, tokenizer, [*stops, *template.stops], is_answer=True)

    def write(
        self,
        rows: Sequence[Continuation],
        temperature: float,
        *,
        seeds: Sequence[int],
        max_new_tokens: int,
        prefix: str | None,
        stop: StopRequest,
    ) -> None:
        """Extend the rows until they end; with a `prefix`, print it and the first row as it grows.

        Raises Interrupted when asked to stop while it compiles.
        """
        options = self.options
        generate_steps = functools.partial(
            generate_tokens,
            self.llama,
            [row.prompt_ids for row in rows],
            max_new_tokens=max_new_tokens,
            step=self.step,
        )
        if self.step is not None:  # compile now, not in the middle of the text
            started = time.perf_counter()
            for _ in itertools.islice(generate_steps(sampling=Sampling(temperature=0)), 2):
                stop.check()
            seconds = time.perf_counter() - started
            if seconds >= 1:  # else these shapes had been compiled
                print(f"compile      took {human_time(seconds)}", file=sys.stderr)
        penalty, min_p = options.repetition_penalty, options.min_p
        if min_p is None and options.temperature is None and temperature == PROMPT_TEMPERATURE:
            min_p = PROMPT_MIN_P
        steps = generate_steps(
            sampling=Sampling(temperature, options.top_k, options.top_p, min_p, penalty),
            seeds=seeds,
            stop_ids=self.tokenizer.vocabulary.end_ids,
            should_stop=lambda: stop.requested,
        )
        if prefix is not None:
            print(prefix, end="", flush=True)
        for step in steps:
            new = [row.add(token) for row, token in zip(rows, step, strict=True)]
            if prefix is not None:
                print(new[0], end="", flush=True)
            if all(row.ended for row in rows):
                break
        rest = [row.add(None) for row in rows]
        if prefix is not None:
            print(rest[0])


def sample_text(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    tokens: int = SAMPLE_TOKENS,
    should_stop: Callable[[], bool] | None = None,
) -> str:
    """A prompt and its continuation, by default a document from its beginning.

    Always of the same seed, and without touching torch's global generator.
    """
    prompt_ids = tokenizer.encode(prompt, True, False)
    steps = generate_tokens(
        model,
        [prompt_ids],
        max_new_tokens=min(tokens, max(1, model.config.max_seq_len - len(prompt_ids))),
        sampling=Sampling(PROMPT_TEMPERATURE, min_p=PROMPT_MIN_P),
        seeds=[0],
        stop_ids=tokenizer.vocabulary.end_ids,
        should_stop=should_stop,
    )
    ids = [token for (token,) in steps if token is not None]
    return tokenizer.decode([*prompt_ids, *ids])
