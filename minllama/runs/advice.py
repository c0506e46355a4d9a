"""What the figures of a finished pretraining say, and what would help its model most."""

from __future__ import annotations

from dataclasses import dataclass

from tqdm import tqdm

GAP = 0.15  # of the validation loss: by so much less the training loss shows learning by heart
FEW, MANY = 10, 100  # tokens per parameter
REREAD = 4  # epochs up to which a text read again is worth about as much as new text


@dataclass(frozen=True)
class Outcome:
    """A pretraining's figures at its end; losses in nats per token."""

    parameters: int
    tokens: int  # trained on
    distinct: int  # of them different: the text's
    train_loss: float  # of the last steps
    val_loss: float | None

    @property
    def epochs(self) -> float:
        """Times that it has seen the text."""
        return self.tokens / self.distinct

    @property
    def by_heart(self) -> bool:
        """Whether it knows the text better than others of its kind."""
        return self.val_loss is not None and self.train_loss < (1 - GAP) * self.val_loss


def advise(outcome: Outcome, *, rose: bool) -> list[str]:
    """Lines about what was learnt and what would help most; `rose`: the validation loss did."""
    per_parameter = outcome.tokens / outcome.parameters
    tokens, distinct = map(tqdm.format_sizeof, (outcome.tokens, outcome.distinct))
    losses = f"training loss {outcome.train_loss:.2f}"
    if outcome.val_loss is not None:
        losses += f", validation loss {outcome.val_loss:.2f}"
    lines = [
        f"it read {tokens} tokens, {outcome.epochs:.3g} times a text of {distinct}: "
        f"{per_parameter:.3g} for each of its parameters; {losses} at the end",
    ]
    if rose:
        help_ = "more text; else fewer epochs, a smaller model or --dropout 0.2"
    elif outcome.by_heart and outcome.epochs > 2:
        help_ = "more text: it knows its own much better than other text; then --dropout 0.2"
    elif outcome.epochs > REREAD:
        help_ = f"more text: it has read its own {outcome.epochs:.0f} times"
    elif per_parameter < FEW:
        help_ = "more training (--minutes, --epochs): it has seen little for its size"
    elif per_parameter > MANY:
        help_ = "a larger model (--dim, --n_layers): this one has read much for its size"
    else:
        help_ = "more text and more training together"
    lines.append(f"what would help most: {help_}")
    lines.append(
        "where it repeats itself or makes no sense: --temperature and --top_p (lower: safer, "
        "higher: more varied), --repetition_penalty 1.1"
    )
    return lines
