"""The compared variants: named ways to learn, each the base with a few other settings.

The base is written out, so that its curves stay those of the same experiment when a default of the settings changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from schemas.errors import UserError
from schemas.settings import Settings

SettingValue = float | int | str
Order = Literal["mixed", "ordered", "recorded"]
"""All domains mixed; one domain after the other; or as the requests were sent, so that the branches of a request come
from a draft that had learned from the requests before it."""

_RATE = 1.5e-3
_REPLAY = 3
"""Replayed samples of the base per new one."""

BASE: Mapping[str, SettingValue] = {
    "speculator.draft_vocab_size": 8192,
    "speculator.init": "random",
    "speculator.intermediate_size": 0,
    "speculator.num_key_value_heads": 0,
    "speculator.variant": "eagle3.1",
    "train.dtype": "float32",
    "train.optimizer": "muon",
    "train.learning_rate": _RATE,
    "train.muon_learning_rate": 0.0,
    "train.newton_schulz_steps": 3,
    "train.adamw_beta1": 0.9,
    "train.adamw_beta2": 0.999,
    "train.weight_decay": 0.01,
    "train.ema_decay": 0.98,
    "train.warmup_steps": 20,
    "train.max_grad_norm": 1.0,
    "train.ttt_steps": 4,
    "train.ttt_decay": 0.8,
    "train.objective": "kl",
    "train.rejected_weight": 0.1,
    "train.rejected_objective": "kl",
    "train.rejected_min_prob": 0.1,
    "train.rejection_weight": 0.0,
    "train.policy_weight": 0.0,
    "train.suffix_predicted_weight": 1.0,
    "train.batch_size": 1 + _REPLAY,
    "train.replay_batch_size": _REPLAY,
    "train.replay_buffer_size": 2048,
    "train.replay_half_life": 0.0,
    "train.label_balance": 0.0,
    "train.max_epochs": 8,
    "train.max_sample_tokens": 512,
    "train.context_tokens": 1024,
}

LOOKAHEAD = 4
"""Length of the chains that are simulated, unless a variant sets another."""

_IRRELEVANT = (
    *("host", "port", "checkpoint_dir", "poll_interval", "num_threads", "seed", "registration_interval"),
    *("checkpoint_interval", "held_out_ratio", "held_out_samples", "held_out_bytes"),
    *("staleness_half_life", "warm_start_learning_rate"),
    *("gradient_accumulation_steps", "parallel", "catch_up_steps", "join_timeout", "join_bytes", "max_lag"),
    *("replay_buffer_bytes", "replay_memory_bytes", "spill_dir", "self_generation", "self_generation_idle"),
    *("self_generation_share", "self_generation_target_bytes"),
)
"""Settings of the trainer without effect here: nothing is held out or generated, and no version is registered."""

_REPLAYED = "which samples are replayed"
_REJECTED = "weight of rejected branches"
_SUFFIX = "weight of positions that the suffix drafter predicts"


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to learn."""

    name: str
    question: str
    """The decision that the variant helps; variants of one question share a chart."""
    changes: tuple[tuple[str, SettingValue], ...] = ()
    """Settings by their dotted names, over those of the base."""
    lookahead: int = LOOKAHEAD
    branch_nodes: int | None = None
    """Rejected branches are cut to this length, as if no more had been drafted; None leaves them whole."""
    against: str = "base"
    """The variant that it is compared with."""
    orders: tuple[Order, ...] = ("mixed",)


@dataclass(frozen=True, slots=True)
class LearningTrial:
    """One run of a variant."""

    variant: Variant
    order: Order
    seed: int


def _replay(ratio: int) -> Variant:
    changes = ("train.batch_size", 1 + ratio), ("train.replay_batch_size", ratio)
    return Variant(f"replay-{ratio}", "replayed samples per new one", changes, orders=("mixed", "ordered"))


def _step(new: int) -> Variant:
    changes = ("train.batch_size", (1 + _REPLAY) * new), ("train.replay_batch_size", _REPLAY * new)
    return Variant(f"step-{new}", "new samples in a batch, each with as many replayed ones as in the base", changes)


def _lookahead(nodes: int, *, rejected: bool) -> Variant:
    return Variant(
        f"lookahead-{nodes}-{'both' if rejected else 'accepted'}",
        f"accepted only, or rejected branches too, {nodes} draft tokens",
        (("train.ttt_steps", nodes), *(() if rejected else (("train.rejected_weight", 0.0),))),
        lookahead=nodes,
        branch_nodes=nodes,
        against=f"lookahead-{nodes}-accepted",
    )


def _one(name: str, question: str, setting: str, value: SettingValue) -> Variant:
    return Variant(name, question, ((setting, value),))


PLAN = (
    Variant("base", "the base", orders=("mixed", "ordered")),
    *map(_replay, (0, 1, 2, 5)),
    *map(_step, (2, 4)),
    replace(_one("replay-recent", _REPLAYED, "train.replay_half_life", 200.0), orders=("mixed", "ordered")),
    replace(_one("replay-balanced", _REPLAYED, "train.label_balance", 1.0), orders=("mixed", "ordered")),
    *(_one(f"rate-x{x:g}", "learning rate", "train.learning_rate", _RATE * x) for x in (0.5, 1.5, 2.5)),
    _one("adamw", "optimizer", "train.optimizer", "adamw"),
    Variant("adamw-x0.5", "optimizer", (("train.optimizer", "adamw"), ("train.learning_rate", _RATE * 0.5))),
    _one("newton-schulz-5", "optimizer", "train.newton_schulz_steps", 5),
    _one("beta2-0.95", "decay of AdamW's mean squared gradient", "train.adamw_beta2", 0.95),
    *(_one(f"average-{x:g}", "average of the weights", "train.ema_decay", x) for x in (0.0, 0.9, 0.95)),
    _one("accepted-only", _REJECTED, "train.rejected_weight", 0.0),
    *(_one(f"lambda-{x:g}", _REJECTED, "train.rejected_weight", x) for x in (0.3, 1.0)),
    *(_lookahead(nodes, rejected=rejected) for nodes in (3, 5, 8) for rejected in (False, True)),
    *(_one(f"objective-{x}", "objective", "train.objective", x) for x in ("reverse-kl", "tv", "lk")),
    *(
        _one(f"rejected-{x}", "objective of rejected branches", "train.rejected_objective", x)
        for x in ("reverse-kl", "tv", "lk")
    ),
    _one("rejection-weight-1", "choices of the served draft", "train.rejection_weight", 1.0),
    _one("policy-weight-0.1", "choices of the served draft", "train.policy_weight", 0.1),
    *(_one(f"suffix-weight-{x:g}", _SUFFIX, "train.suffix_predicted_weight", x) for x in (0.5, 0.25, 0.0)),
    *(_one(f"vocabulary-{x}", "draft vocabulary", "speculator.draft_vocab_size", x) for x in (4096, 16384)),
    *(_one(f"width-{x}", "width of the draft", "speculator.intermediate_size", x) for x in (768, 3072)),
    replace(_one("init-head", "initial weights of the draft", "speculator.init", "head"), orders=("mixed", "ordered")),
    _one("eagle-3", "variant of the draft", "speculator.variant", "eagle3"),
)

QUICK_VARIANTS = ("base", "replay-0", "accepted-only")


def select_variants(prefixes: Sequence[str]) -> list[Variant]:
    """Return the variants whose names begin with a prefix, or all, and the variants of their comparisons."""
    names = [variant.name for variant in PLAN]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            raise UserError(f"--only {prefix}: no such variant; there are {', '.join(names)}")
    selected = [v for v in PLAN if not prefixes or v.name.startswith(tuple(prefixes))]
    needed = {"base", *(v.name for v in selected), *(v.against for v in selected)}
    return [v for v in PLAN if v.name in needed]


def variant_values(settings: Settings, variant: Variant) -> dict[str, SettingValue]:
    """Return every setting of a variant: the base, over it the user's settings, over them the changes."""
    own = {
        f"{section}.{name}": value
        for section in ("speculator", "train")
        for name, value in getattr(settings, section).model_dump(exclude_defaults=True).items()
        if name not in _IRRELEVANT
    }
    return {**BASE, **own, **dict(variant.changes)}


def trial_settings(settings: Settings, trial: LearningTrial) -> Settings:
    """Return the settings of a trial.

    Raises:
        ValidationError: a variant changes a setting that does not exist.
    """
    tree = settings.model_dump(exclude={"serve", "kafka", "tables", "traces"})
    for name, value in variant_values(settings, trial.variant).items():
        section, _, key = name.partition(".")
        tree[section][key] = value
    tree["speculator"]["seed"] = tree["train"]["seed"] = trial.seed
    return Settings.model_validate(tree)
