"""Zero-shot classification: a template filled in, and each label scored as its continuation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from llama import LlamaZeroShotClassifier, common_prefix
from minllama.system.errors import UsageError
from minllama.text.labelled import LabelledExample
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompts:
    """Turns a sentence into the token ids of prompt and label, one sequence per label."""

    tokenizer: Tokenizer
    template: str
    label_names: list[str]
    context: int  # tokens that prompt and label may have together
    max_sentence_len: int | None = None
    shots: str = ""  # solved examples, put before the prompt
    cut: set[str] = field(default_factory=set)  # sentences that did not fit

    def with_shots(self, examples: Sequence[LabelledExample], count: int, seed: int) -> Prompts:
        """These prompts with `count` of the examples, drawn by `seed`, solved before each."""
        solved = [
            f"{self.text(example.sentence)} {self.label_names[example.label]}\n"
            for example in random.Random(seed).sample(examples, count)
        ]
        return replace(self, shots="".join(solved))

    def text(self, sentence: str) -> str:
        """The prompt without shots: the template filled in."""
        *others, last = self.label_names
        labels = f"{others[0]} or {last}" if len(others) == 1 else f"{', '.join(others)}, or {last}"
        return self.template.replace("{labels}", labels).replace("{sentence}", sentence).strip()

    def sequences(self, sentence: str) -> tuple[list[list[int]], int]:
        """Prompt and label as ids, a sequence per label, and where the labels begin in them.

        The sentence is cut until all fits into the context; the question never is. Raises
        UsageError where the question alone does not fit.
        """
        ids = self.tokenizer.encode(sentence, bos=False, eos=False)
        kept = min(len(ids), self.max_sentence_len or len(ids))
        while True:  # a cut sentence may have more ids than were kept of it
            cut = sentence
            if kept < len(ids):  # perhaps inside a character
                cut = self.tokenizer.decode(ids[:kept]).rstrip("\ufffd")
            prompt = self.shots + self.text(cut)
            texts = [prompt, *(f"{prompt} {name}" for name in self.label_names)]
            encoded = [self.tokenizer.encode_opening(text) for text in texts]
            over = max(map(len, encoded)) - self.context
            if over <= 0:
                if kept < len(ids):
                    self.cut.add(sentence)
                return encoded[1:], common_prefix(encoded)
            kept -= over
            if kept < min(1, len(ids)):
                raise UsageError(
                    f"--prompt_template and --shots take more than the model's context of "
                    f"{self.context} tokens without a sentence: shorten them"
                )


def score_labels(
    model: LlamaZeroShotClassifier, prompts: Prompts, sentences: Sequence[str], norm: str
) -> torch.Tensor:
    """Log-probabilities (B, n_labels) of the labels: the sum, or per "token" or "byte", as `norm`.

    "pmi" (Holtzman et al. 2021) takes the sum, from which the caller subtracts that of the labels
    after an empty sentence.
    """
    sequences, starts = zip(*(prompts.sequences(sentence) for sentence in sentences), strict=True)
    scores, counts = model.score(sequences, starts)
    if norm == "token":
        return scores / counts.to(scores.device)
    if norm == "byte":
        sizes = [len(f" {name}".encode()) for name in prompts.label_names]
        return scores / torch.tensor(sizes, device=scores.device)
    return scores
