"""The settings of one run that a study may fix or search: their names, units, bounds and defaults."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST = 10**9
"""No count in a study is larger: databases keep counts in 32 bits."""
DEFAULT_SHARE = 0.1
"""Of a run's time, for its validation losses."""
Scalar = bool | int | float | str


class Strict(BaseModel):
    """A frozen model that refuses unknown keys and never turns text into numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSettings(Strict):
    """What the network looks like. Sizes are in units of the architecture's own configuration."""

    architecture: str | None = Field(
        None, description="An architecture of transformers; by default gpt2, marian or bert, as the task needs."
    )
    pretrained: str | None = Field(
        None, description="Start from these weights and this tokenizer: a folder, or the id of a model on the hub."
    )
    revision: str | None = Field(None, description="Commit or tag of the hub model.")
    num_layers: int | None = Field(
        None,
        ge=0,
        le=MOST,
        description="Transformer blocks; of an encoder-decoder, in each of its halves. By default 2; of a pretrained "
        "model all, or the first n.",
    )
    num_encoder_layers: int | None = Field(None, ge=0, le=MOST, description="Blocks of an encoder-decoder's encoder.")
    num_decoder_layers: int | None = Field(None, ge=0, le=MOST, description="Blocks of an encoder-decoder's decoder.")
    hidden_size: int = Field(128, ge=1, le=MOST, description="Width of the residual stream.")
    num_heads: int | None = Field(None, ge=1, le=MOST, description="Attention heads; by default one per 32 of width.")
    dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Dropout probability, wherever the architecture has one; by default 0, or the pretrained model's.",
    )
    init_std: float | None = Field(None, gt=0, description="Standard deviation of initial weights.")
    context_length: int = Field(
        128, ge=2, le=MOST, description="Tokens in a sequence; longer examples are cut, and counted."
    )
    freeze_embeddings: bool = Field(False, description="Leave a pretrained model's embeddings as they are.")
    freeze_layers: int = Field(
        0,
        ge=0,
        le=MOST,
        description="Leave n of a pretrained model's first blocks as they are (at most all of them).",
    )
    lora_rank: int = Field(
        0,
        ge=0,
        le=MOST,
        description="Train low-rank adapters of this rank and a new head in place of the pretrained weights.",
    )
    lora_alpha: float = Field(16.0, gt=0, description="Scale of the adapters: their output times alpha / rank.")
    config: dict[str, Scalar] = Field(
        default_factory=dict, description="Further keys of the architecture's transformers configuration."
    )


class TrainingSettings(Strict):
    """How it is trained. Losses are in nats per token; times in seconds."""

    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    batch_size: int = Field(
        16, ge=1, le=MOST, description="Sequences per optimizer step; never changed by memory trouble."
    )
    num_epochs: int = Field(4, ge=1, le=MOST, description="Passes over the training split.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled; on weight matrices only.")
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="Part of all steps with a rising learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Learning rate after warm-up.")
    final_lr_fraction: float = Field(0.1, ge=0, le=1, description="Part of the peak that the schedule decays to.")
    gradient_clip: float = Field(1.0, ge=0, description="Largest gradient norm; 0 turns clipping off.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Of training losses (not of causal_lm); validation losses have none."
    )
    optimizer: Literal["muon", "adamw"] | None = Field(
        None,
        description="muon takes Muon for the matrices of the transformer blocks and AdamW for all other weights. By "
        "default muon for a model from scratch, adamw for a pretrained one.",
    )
    weight_average: float | None = Field(
        None,
        ge=0,
        le=0.25,
        description="What is judged and kept is an average of the weights over about this part of the steps so far; 0 "
        "takes the last ones. By default 0.1 for a model from scratch, 0 for a pretrained one.",
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)


class RunSettings(TrainingSettings):
    """Training settings plus what a study fixes for all its runs, and never searches."""

    evaluations_per_epoch: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="Validation losses taken per epoch; by default some 40 in the longest run of the study, fewer "
        "where the text is too short for so many.",
    )
    evaluation_share: float = Field(
        DEFAULT_SHARE,
        gt=0,
        le=1,
        description="Part of a run's time that its validation losses may take: they are of a part of the validation "
        "split, the same for all trials. The best checkpoint is confirmed on all of it. 1 looks at all each time.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast on GPUs that have it, float32 elsewhere."
    )
    compile: bool = Field(False, description="torch.compile the model (minutes of compile time on a CPU).")
    micro_batch_size: int | None = Field(
        None, ge=1, le=MOST, description="Sequences in memory at once; halved by itself when memory runs out."
    )


NOT_SEARCHABLE = frozenset({"context_length", "config", "pretrained", "revision"})
"""Model settings that decide what a perplexity means, or that are containers."""

FIXED_BY_PRETRAINED = (
    "architecture",
    "num_encoder_layers",
    "num_decoder_layers",
    "hidden_size",
    "num_heads",
    "init_std",
)
"""Model settings that a pretrained model brings along."""
FOR_PRETRAINED = ("revision", "freeze_embeddings", "freeze_layers", "lora_rank", "lora_alpha")
"""Model settings that mean nothing without a pretrained model."""

SEARCHABLE: dict[str, type[Strict]] = {
    **{name: ModelSettings for name in ModelSettings.model_fields if name not in NOT_SEARCHABLE},
    **dict.fromkeys(TrainingSettings.model_fields, TrainingSettings),
}
"""Name of every setting that `search:` may hold, and the model that owns it. `config.KEY` is searchable, too."""

SYNONYMS = {
    "lr": "learning_rate",
    "epochs": "num_epochs",
    "n_epochs": "num_epochs",
    "num_train_epochs": "num_epochs",
    "layers": "num_layers",
    "n_layer": "num_layers",
    "n_layers": "num_layers",
    "num_hidden_layers": "num_layers",
    "per_device_train_batch_size": "batch_size",
    "bs": "batch_size",
    "wd": "weight_decay",
    "warmup_ratio": "warmup_fraction",
    "lr_scheduler_type": "schedule",
    "optim": "optimizer",
    "max_grad_norm": "gradient_clip",
    "clip": "gradient_clip",
    "d_model": "hidden_size",
    "n_embd": "hidden_size",
    "n_head": "num_heads",
    "n_heads": "num_heads",
    "initializer_range": "init_std",
}
"""What people call our settings elsewhere; used to suggest the right name."""


def split_settings(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sampled values parted into those of the model and those of training; `config.KEY` goes to the model."""
    model: dict[str, Any] = {}
    training: dict[str, Any] = {}
    for name, value in values.items():
        if name.startswith("config."):
            model.setdefault("config", {})[name.removeprefix("config.")] = value
        elif SEARCHABLE[name] is ModelSettings:
            model[name] = value
        else:
            training[name] = value
    return model, training
