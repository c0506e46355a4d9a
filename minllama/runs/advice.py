"""What the figures of a finished pretraining say, and what would help its model most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from config import DATA_DIR
from minllama.text.copies import Copies
from minllama.text.corpus import EMBEDDED_TEXTS

if TYPE_CHECKING:
    from minllama.runs.plan import TrainingPlan

GAP = 0.15  # overfitted: a training loss below the validation loss by this share of it
FEW, MANY = 10, 100  # tokens per parameter; compute-optimal is about 20 (Hoffmann et al., 2022)
DROPOUT = 0.2  # against overfitting
MORE_TEXT = "MORE.txt"  # in a command: what its reader has to add
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
    is_cut: bool = False  # --max_steps ended it before its schedule
    is_rate_typed: bool = False  # AdamW from scratch for that alone: Muon is the better one
    copies: Copies | None = None  # of its text in what it writes

    @property
    def epochs(self) -> float:
        """How often it has read the text."""
        return self.tokens / self.distinct

    @property
    def is_overfitted(self) -> bool:
        """Whether it predicts its own text much better than held-out text."""
        return self.val_loss is not None and self.train_loss < (1 - GAP) * self.val_loss


# What there should be more of, or in place of AdamW.
Remedy = Literal["text", "training", "both", "model", "muon"]


def find_remedy(outcome: Outcome, *, rose: bool) -> tuple[Remedy, str]:
    """What would help most, and why; `rose`: the validation loss did, or did not fall for long."""
    per_parameter = outcome.tokens / outcome.parameters
    drops_enough = outcome.dropout >= DROPOUT
    if rose:
        fewer = "" if outcome.is_timed else "fewer epochs or "
        dropout = "" if drops_enough else f", or --dropout {DROPOUT}"
        return "text", f"more text; else {fewer}a smaller model{dropout}"
    if outcome.is_overfitted and outcome.epochs > 2:
        dropout = "" if drops_enough else f"; then --dropout {DROPOUT}"
        return "text", f"more text: the model is overfitted to its own{dropout}"
    if outcome.copies is not None and outcome.copies.is_recited:
        return "text", "more text: what it writes is in large part its own, word for word"
    if outcome.epochs > REREAD:
        return "text", f"more text: it has read its own {outcome.epochs:.0f} times"
    if outcome.is_rate_typed:
        muon = "leave --pretrain_lr out, or add --optimizer muon with a rate of its own"
        return "muon", f"Muon, which learns more in as many steps than AdamW: {muon}"
    if per_parameter < FEW:
        if outcome.is_cut:
            training = "more --max_steps"
        elif outcome.is_timed:
            training = "more --minutes"
        else:
            training = "more training (--epochs or --minutes)"
        return "training", f"{training}: it has seen little for its size"
    if per_parameter > MANY:
        larger = "a larger model (--dim, --n_layers)"
        return "model", f"{larger}: this one has read much for its size"
    return "both", "more text and more training together"


def advise(outcome: Outcome, *, rose: bool) -> list[str]:
    """What was learnt and what would help most, in lines of `name: text`."""
    tokens, distinct = map(tqdm.format_sizeof, (outcome.tokens, outcome.distinct))
    losses = f"training loss {outcome.train_loss:.2f}"
    if outcome.val_loss is not None:
        losses += f", validation loss {outcome.val_loss:.2f}"
    return [
        f"it read {tokens} tokens, {outcome.epochs:.3g} times a text of {distinct}: "
        f"{outcome.tokens / outcome.parameters:.3g} for each of its parameters; "
        f"{losses} at the end",
        f"what would help most: {find_remedy(outcome, rose=rose)[1]}",
        "where it makes no sense: --temperature and --top_p (lower: safer, higher: more varied)",
    ]


def remedied(remedy: Remedy, plan: TrainingPlan) -> dict[str, Any]:
    """The options that the run of this plan, again with the remedy, should have, by their names."""
    options, config = plan.options, plan.config
    changes: dict[str, Any] = {}
    if remedy in ("text", "both"):
        text = options.pretrain_data or [str(DATA_DIR / name) for name in EMBEDDED_TEXTS]
        changes["pretrain_data"] = [*text, MORE_TEXT]
        if options.data_weights:
            changes["data_weights"] = [*options.data_weights, 1.0]
    if remedy in ("training", "both"):
        length = "schedule_steps" if options.schedule_steps else "epochs"
        steps = 2 * plan.last_step  # where --max_steps ended it, of a schedule that may suffice
        if options.minutes:
            changes["minutes"] = 2 * options.minutes
        elif steps > plan.schedule_steps:
            changes[length] = 2 * getattr(options, length)
        if options.max_steps and options.max_steps < steps:
            changes["max_steps"] = steps
    if remedy == "muon":
        changes |= {"optimizer": "muon", "pretrain_lr": None}
    if remedy == "model" and options.pretrained_model_path is None:  # else it keeps its shape
        shape = {name: getattr(config, name) for name in ("dim", "n_heads", "n_kv_heads")}
        changes |= shape | {"n_layers": 2 * config.n_layers}
    return changes
