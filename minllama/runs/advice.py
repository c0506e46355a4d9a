"""What the figures of a finished pretraining say, and what would help its model most."""

from __future__ import annotations

from dataclasses import dataclass

from tqdm import tqdm

from minllama.text.copies import Copies

GAP = 0.15  # overfitted: a training loss below the validation loss by this share of it
FEW, MANY = 10, 100  # tokens per parameter; compute-optimal is about 20 (Hoffmann et al., 2022)
DROPOUT = 0.2  # against overfitting
REREAD = 4  # epochs up to which repeated text is worth about as much as new (Muennighoff, 2023)


@dataclass(frozen=True)
class Outcome:
    """A pretraining's figures at its end; losses in nats per token."""

    parameters: int
    tokens: int  # trained on
    distinct: int  # tokens of the text
    train_loss: float  # mean of the last steps
    val_loss: float | None
    dropout: float = 0.0  # that it was trained with
    is_timed: bool = False  # --minutes chose its steps
    copies: Copies | None = None  # of its text in what it writes

    @property
    def epochs(self) -> float:
        """How often it has read the text."""
        return self.tokens / self.distinct

    @property
    def is_overfitted(self) -> bool:
        """Whether it predicts its own text much better than held-out text."""
        return self.val_loss is not None and self.train_loss < (1 - GAP) * self.val_loss


def advise(outcome: Outcome, *, rose: bool) -> list[str]:
    """What was learnt and what would help most, in lines; `rose`: the validation loss did."""
    per_parameter = outcome.tokens / outcome.parameters
    tokens, distinct = map(tqdm.format_sizeof, (outcome.tokens, outcome.distinct))
    losses = f"training loss {outcome.train_loss:.2f}"
    if outcome.val_loss is not None:
        losses += f", validation loss {outcome.val_loss:.2f}"
    training = "more --minutes" if outcome.is_timed else "more training (--epochs or --minutes)"
    drops_enough = outcome.dropout >= DROPOUT
    if rose:
        fewer = "" if outcome.is_timed else "fewer epochs or "
        dropout = "" if drops_enough else f", or --dropout {DROPOUT}"
        help_ = f"more text; else {fewer}a smaller model{dropout}"
    elif outcome.is_overfitted and outcome.epochs > 2:
        dropout = "" if drops_enough else f"; then --dropout {DROPOUT}"
        help_ = f"more text: the model is overfitted to its own{dropout}"
    elif outcome.copies is not None and outcome.copies.is_recited:
        help_ = "more text: what it writes is in large part its own, word for word"
    elif outcome.epochs > REREAD:
        help_ = f"more text: it has read its own {outcome.epochs:.0f} times"
    elif per_parameter < FEW:
        help_ = f"{training}: it has seen little for its size"
    elif per_parameter > MANY:
        help_ = "a larger model (--dim, --n_layers): this one has read much for its size"
    else:
        help_ = "more text and more training together"
    copies = []
    if outcome.copies is not None:
        after = " after held-out openings" if outcome.copies.held_out else ""
        copies = outcome.copies.lines(f"20 texts that it wrote{after}")
    return [
        *copies,
        f"it read {tokens} tokens, {outcome.epochs:.3g} times a text of {distinct}: "
        f"{per_parameter:.3g} for each of its parameters; {losses} at the end",
        f"what would help most: {help_}",
        "where it repeats itself or makes no sense: --temperature and --top_p (lower: safer, "
        "higher: more varied), --repetition_penalty 1.1",
    ]
