"""The schema of a run: nested frozen dataclasses in which every leaf carries its meaning and its unit.

A config file builds a `Config` and hands it over as a locked `ConfigDict` (`as_config_dict`), the command line
overrides leaves of that, and `resolve` turns the result into a checked `Config` again. `resolve` is pure: no JAX,
no environment, no files. It reports every problem at once.

Dims are written as in the einsum letters of the model: D embed, H query heads, K kv heads, h head dim, F mlp,
L layers, V vocab, B batch, S sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

ACTIVATION_NAMES = ("attention_qkv", "attention_out", "attention_proj", "mlp_gate", "mlp_up", "mlp_out")
"""What the backward pass can be left, by train.remat; the model marks these by `checkpoint_name`."""

REMAT_WORDS = ("none", "full", "matmuls")
"""What train.remat is besides names of activations."""

MESH_AXES = ("data", "fsdp", "pipeline", "context", "expert", "tensor")
"""Outermost first: `data` crosses the slowest network, `tensor` the fastest."""


def leaf(default: Any, doc: str, *, unit: str = "", low: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    """Declares one setting: its default, meaning, unit, lowest allowed value and allowed words."""
    metadata = {"doc": doc, "unit": unit, "low": low, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def branch(cls: type) -> Any:
    """Declares a nested section with that section's own defaults."""
    return dataclasses.field(default_factory=cls)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions and how their frequencies are stretched to texts longer than those of pretraining."""

    theta: float = leaf(10_000.0, "base of the frequencies (Su et al. 2021)", unit="positions", low=1.0)
    local_theta: float = leaf(0.0, "base in layers with a window, never stretched; 0: theta, stretched alike", low=0.0)
    fraction: float = leaf(1.0, "part of a head's dims that is turned; 0: no rotary positions", low=0.0)
    interleaved: bool = leaf(False, "neighbouring dims are a pair, instead of i and i + half")
    scaling: str = leaf(
        "none", "how frequencies are stretched", choices=("none", "linear", "dynamic", "llama3", "yarn", "longrope")
    )
    factor: float = leaf(1.0, "how much longer texts may be than original_length", low=1.0)
    original_length: int = leaf(0, "positions of pretraining (all but linear)", unit="tokens", low=0)
    turns: tuple[float, ...] = leaf(
        (1.0, 4.0),
        "pairs with fewer turns in original_length than the first are stretched in full, with more than the second "
        "left alone (llama3, yarn)",
        low=0.0,
    )
    whole_pairs: bool = leaf(True, "the ends of yarn's ramp are rounded outwards to whole pairs")
    attention_factor: float = leaf(0.0, "queries and keys are multiplied by it; 0: as the method advises", low=0.0)
    short_factors: tuple[float, ...] = leaf((), "longrope's divisor of each pair, rows up to original_length", low=0.0)
    long_factors: tuple[float, ...] = leaf((), "longrope's divisor of each pair, longer rows", low=0.0)


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-AI 2024): keys and values are projected from one small vector a token."""

    kv_dim: int = leaf(0, "dim of the vector that keys and values come from; 0: no latent attention", low=0)
    query_dim: int = leaf(0, "dim of the vector that queries come from; 0: straight from the stream", low=0)
    rope_dim: int = leaf(0, "the last dims of head_dim, which are turned; the key's are shared by all heads", low=0)
    value_dim: int = leaf(0, "dim of a head's value", low=0)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Causal self-attention: grouped-query, or latent where `latent.kv_dim` says so."""

    q_heads: int = leaf(8, "query heads H", unit="heads", low=1)
    kv_heads: int = leaf(0, "key and value heads K, a divisor of H; 0: as many as H", unit="heads", low=0)
    head_dim: int = leaf(0, "dim h of a head, even; 0: embed_dim / q_heads", unit="dims", low=0)
    scale: float = leaf(0.0, "scores are multiplied by it; 0: 1 / sqrt(head_dim)", low=0.0)
    qk_norm: str = leaf(
        "none",
        "RMS-normalise queries and keys (Dehghani et al. 2023): each head alone, or all heads together (OLMo 2)",
        choices=("none", "head", "joint"),
    )
    bias: bool = leaf(False, "add biases to the query, key and value projections")
    output_bias: bool = leaf(False, "add a bias to the output projection")
    alibi: bool = leaf(False, "a key's distance lowers its score, by a slope of each head (Press et al. 2022)")
    sinks: bool = leaf(False, "a learned logit a head that takes weight from all keys and adds nothing (gpt-oss)")
    softcap: float = leaf(0.0, "cap scores at c*tanh(score/c); 0: none", unit="logits", low=0.0)
    windows: tuple[int, ...] = leaf(
        (0,),
        "positions a layer sees, itself included, repeated over the layers as a cycle; 0: all that came before",
        unit="tokens",
        low=0,
    )
    latent: LatentConfig = branch(LatentConfig)

    @property
    def value_dim(self) -> int:
        """Dim of a head's value and output."""
        return self.latent.value_dim if self.latent.kv_dim else self.head_dim


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    """The feed-forward half of a block."""

    dim: int = leaf(0, "hidden dim F; 0: 8/3 of embed_dim rounded up to 64 (gated) or 4 times embed_dim", low=0)
    kind: str = leaf(
        "swiglu",
        "activation, gated when its name ends in glu",
        choices=("swiglu", "geglu", "clamped_swiglu", "gelu", "silu", "relu2"),
    )
    bias: bool = leaf(False, "add biases to the feed-forward projections")

    @property
    def gated(self) -> bool:
        """Whether a gate multiplies the hidden dims."""
        return self.kind.endswith("glu")


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts in place of the feed-forward half of the blocks; kind and biases are `mlp`'s."""

    experts: int = leaf(0, "routed experts E of a layer; 0: a dense model", unit="experts", low=0)
    active: int = leaf(2, "experts k that a token is sent to", unit="experts", low=1)
    dim: int = leaf(0, "hidden dim of a routed expert; 0: model.mlp.dim / active", unit="dims", low=0)
    shared_dim: int = leaf(0, "hidden dim of the shared experts, all together; 0: none", unit="dims", low=0)
    shared_gate: bool = leaf(False, "multiply the shared experts' output by a sigmoid of the input (Qwen2-MoE)")
    router: str = leaf("softmax", "how logits become scores", choices=("softmax", "sigmoid"))
    normalise: bool = leaf(True, "scale the scores of the chosen experts so that they add up to 1")
    weight_scale: float = leaf(1.0, "multiplies the weights of the routed experts", low=0.0)
    groups: int = leaf(1, "groups of experts, of which a token uses some; 1: no groups", unit="groups", low=1)
    top_groups: int = leaf(1, "groups that a token uses", unit="groups", low=1)
    balance_loss: float = leaf(0.01, "weight of each layer's balance loss, 1 where load is even; 0: none", low=0.0)
    router_z_loss: float = leaf(0.0, "weight of the squared log normaliser of the router (Zoph et al. 2022)", low=0.0)
    selection_bias: bool = leaf(False, "choose experts by score plus a bias that every step moves towards even load")
    bias_rate: float = leaf(0.001, "what the selection bias moves by in a step; 0: it stays", low=0.0)
    capacity_factor: float = leaf(
        0.0, "tokens of a row that an expert takes in training, over an even share; 0: all (dropless)", low=0.0
    )
    dense_layers: int = leaf(0, "first layers that stay dense", unit="layers", low=0)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder language model."""

    vocab_size: int = leaf(4096, "rows V of the embedding; a tokenizer that is trained gets this many pieces", low=2)
    embed_dim: int = leaf(256, "dim D of the residual stream", unit="dims", low=1)
    num_layers: int = leaf(4, "blocks L of the stack", low=1)
    attention: AttentionConfig = branch(AttentionConfig)
    rope: RopeConfig = branch(RopeConfig)
    mlp: MlpConfig = branch(MlpConfig)
    moe: MoeConfig = branch(MoeConfig)
    mtp_layers: int = leaf(
        0, "layers after the stack that each predict one token further, in training only (DeepSeek-V3)", low=0
    )
    learned_positions: int = leaf(0, "rows of a table of position vectors added to the embedding; 0: none", low=0)
    norm: str = leaf(
        "rms",
        "kind of normalisation; rms_offset keeps what is to be added to a scale of one (Gemma)",
        choices=("rms", "rms_offset", "layer"),
    )
    norm_placement: str = leaf(
        "pre", "normalise a branch's input, its output, or both", choices=("pre", "post", "both")
    )
    norm_epsilon: float = leaf(1e-6, "added to the variance", low=0.0)
    tie_embeddings: bool = leaf(False, "the output head is the transposed embedding")
    normed_head: bool = leaf(False, "each token's column of the output head is divided by its length (Baichuan 2)")
    embed_scale: bool = leaf(False, "multiply embeddings by sqrt(D)")
    logits_softcap: float = leaf(0.0, "cap logits at c*tanh(logit/c); 0: none", unit="logits", low=0.0)
    embed_std: float = leaf(0.02, "standard deviation of the initial embedding", low=0.0)
    head_init: float = leaf(1.0, "standard deviation of the initial head of its own, times sqrt(D)", low=0.0)
    init: str = leaf(
        "depth_scaled",
        "initial matrices: normal with 1/sqrt(fan in), residual outputs further divided by sqrt(2L), left as they "
        "are, or zero",
        choices=("depth_scaled", "fan_in", "zero_output"),
    )

    @property
    def has_dense_layers(self) -> bool:
        """Whether a layer has the feed-forward half of `mlp.dim`, and not experts in its place."""
        return not self.moe.experts or self.moe.dense_layers > 0


@dataclasses.dataclass(frozen=True)
class StoreConfig:
    """One corpus: where its text comes from and where its tokens are kept."""

    source: str = leaf(
        "stdlib",
        "stdlib, text:GLOB, jsonl:GLOB, parquet:GLOB or tfds:NAME/SPLIT; empty: the store at `path` exists already",
    )
    path: str = leaf("", "folder of the token store; empty: made in data.cache_dir, named by its content")
    text_field: str = leaf("text", "field that holds the text (jsonl, parquet, tfds)")
    heldout_permille: int = leaf(25, "documents held out, by hash of their bytes", unit="per thousand", low=0)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens."""

    kind: str = leaf("sentencepiece", "family of tokenizer", choices=("sentencepiece", "huggingface", "bytes"))
    path: str = leaf(
        "", "a .model, a tokenizer.json, or a model's folder that holds one; empty: train on the stores' sources"
    )
    sample_bytes: int = leaf(20_000_000, "text that training reads at most", unit="bytes", low=1)


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """What changes from a given step on; a zero or an empty value keeps what the phase before had."""

    from_step: int = leaf(0, "first step of the phase", unit="steps", low=1)
    sequence_length: int = leaf(0, "positions S in a row", unit="tokens", low=0)
    batch_size: int = leaf(0, "rows B in a step over the whole mesh", unit="rows", low=0)
    mixture: tuple[tuple[str, float], ...] = leaf((), "(store name, weight) pairs")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which tokens a step sees: a pure function of the stores, the seed and the step."""

    stores: Mapping[str, StoreConfig] = dataclasses.field(
        default_factory=dict, metadata={"doc": "corpora by name", "of": StoreConfig}
    )
    tokenizer: TokenizerConfig = branch(TokenizerConfig)
    cache_dir: str = leaf("", "where tokenizers and stores without a path are made; empty: data/ in the workdir")
    mixture: tuple[tuple[str, float], ...] = leaf((), "(store name, weight) pairs; empty: every store, by size")
    sequence_length: int = leaf(512, "positions S in a row", unit="tokens", low=1)
    batch_size: int = leaf(8, "rows B in a step over the whole mesh", unit="rows", low=1)
    packing: str = leaf(
        "split",
        "split: documents joined and cut every S tokens; pack: whole documents put together, cut only when longer",
        choices=("split", "pack"),
    )
    mask_documents: bool = leaf(True, "a token sees only its own document, and positions start anew with each")
    phases: Mapping[str, PhaseConfig] = dataclasses.field(
        default_factory=dict, metadata={"doc": "later phases by name", "of": PhaseConfig}
    )
    prefetch: int = leaf(2, "batches made ready ahead on a thread; 0: none", unit="batches", low=0)
    workers: int = leaf(0, "processes that tokenise; 0: one a core", unit="processes", low=0)


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Which updates are refused (see docs/design.md, decision 7)."""

    window: int = leaf(128, "accepted steps that the median and MAD are taken over", unit="steps", low=4)
    min_history: int = leaf(32, "accepted steps before outliers are judged", unit="steps", low=4)
    threshold: float = leaf(
        12.0, "refuse a loss or gradient norm this many scaled MADs over the median; 0: never", unit="deviations", low=0
    )
    max_rejections: int = leaf(8, "refusals in a row that end the run", unit="steps", low=1)
    rollback: tuple[int, int, int] = leaf(
        (0, 0, 0),
        "(K, M, N): after K refusals in M steps the run goes back to a checkpoint from before the first of them and "
        "passes over the batches between, N times at most; (0, 0, 0): never",
        low=0,
    )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its schedule and the guard."""

    optimizer: str = leaf("adamw", "update rule of the matrices", choices=("adamw", "adafactor", "lion", "muon"))
    peak_lr: float = leaf(3e-4, "learning rate at the end of the warm-up", low=0.0)
    schedule: str = leaf(
        "cosine", "shape after the warm-up", choices=("constant", "cosine", "linear", "inverse_sqrt", "wsd")
    )
    warmup_steps: int = leaf(0, "steps from zero to peak_lr", unit="steps", low=0)
    decay_steps: int = leaf(0, "steps of the wsd cooldown, counted back from the end", unit="steps", low=0)
    final_lr_ratio: float = leaf(0.1, "learning rate at the end over peak_lr (cosine, linear, wsd)", low=0.0)
    b1: float = leaf(0.9, "decay of the first moment", low=0.0)
    b2: float = leaf(0.95, "decay of the second moment", low=0.0)
    epsilon: float = leaf(1e-8, "added to the root of the second moment", low=0.0)
    weight_decay: float = leaf(0.1, "decoupled decay a step, times the learning rate", low=0.0)
    decay_rules: tuple[tuple[str, float], ...] = leaf(
        ((".*(norm|bias).*", 0.0), (".*", 1.0)), "(path regex, multiplier of weight_decay), the first match counts"
    )
    lr_rules: tuple[tuple[str, float], ...] = leaf(
        ((".*", 1.0),), "(path regex, multiplier of the learning rate), the first match counts"
    )
    muon_lr_ratio: float = leaf(1.0, "learning rate of Muon's matrices over that of the rest", low=0.0)
    muon_momentum: float = leaf(0.95, "decay of Muon's momentum", low=0.0)
    moments_dtype: str = leaf("float32", "dtype of the moments", choices=("float32", "bfloat16"))
    clip_norm: float = leaf(1.0, "largest global gradient norm; 0: no clipping", low=0.0)
    ema_decay: float = leaf(0.0, "decay of the weights' moving average, used for evaluation; 0: none", low=0.0)
    guard: GuardConfig = branch(GuardConfig)


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Devices along each mesh axis; at most one may be -1, which takes the devices that are left."""

    data: int = leaf(-1, "replicas of the model (across slices or nodes)", unit="devices", low=-1)
    fsdp: int = leaf(1, "shards of parameters and batch", unit="devices", low=-1)
    pipeline: int = leaf(1, "pipeline stages", unit="devices", low=-1)
    context: int = leaf(1, "shards of the sequence", unit="devices", low=-1)
    expert: int = leaf(1, "shards of the experts", unit="devices", low=-1)
    tensor: int = leaf(1, "shards of heads, hidden dims and vocabulary", unit="devices", low=-1)
    context_method: str = leaf(
        "auto",
        "how keys and values reach queries of another shard of the sequence: round a ring, or gathered; auto: gathered "
        "where all of them take no more bytes than a shard's queries",
        choices=("auto", "ring", "gather"),
    )
    pipeline_schedule: str = leaf(
        "1f1b",
        "order in which stages run their microbatches, of which there are train.accumulation (docs/parallelism.md)",
        choices=("gpipe", "1f1b", "interleaved", "zero_bubble"),
    )
    virtual_stages: int = leaf(1, "parts of the model on each stage, 2 or more for interleaved, else 1", low=1)
    across_slices: str = leaf(
        "data",
        "the one axis that crosses from slice to slice or node to node; any: no care is taken",
        choices=("data", "pipeline", "any"),
    )

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each mesh axis, in the order of `MESH_AXES`."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = leaf(1000, "batches to consume in all", unit="steps", low=1)
    init_from: str = leaf(
        "",
        "where the weights of step 0 are: a Hugging Face folder, a converted model or another run's workdir; empty: "
        "drawn from the seed",
    )
    budget_seconds: float = leaf(
        0.0,
        "time that the steps are to take: the first start times a few and sets how many fit, train.steps at most, so "
        "that it is an estimate; 0: no limit",
        unit="s",
        low=0.0,
    )
    accumulation: int = leaf(1, "microbatches that a step's batch is cut into", low=1)
    precision: str = leaf(
        "bfloat16", "dtype of the compute; parameters stay float32", choices=("float32", "bfloat16", "float16")
    )
    reduce_dtype: str = leaf(
        "float32",
        "dtype in which gradients are added up over the mesh; bfloat16 sends half the bytes and rounds what is added",
        choices=("float32", "bfloat16"),
    )
    remat: str = leaf(
        "none",
        "what the backward pass computes again: none, full (it keeps block inputs only), matmuls (it keeps matrix "
        "products), or all but the activations named here, joined by + (see docs/config.md)",
    )
    loss_chunk: int = leaf(1024, "positions of a device whose float32 logits exist at once", unit="tokens", low=1)
    z_loss: float = leaf(0.0, "weight of the squared log normaliser (Chowdhery et al. 2022)", low=0.0)
    mtp_weight: float = leaf(0.3, "weight of the loss of model.mtp_layers, the mean over them", low=0.0)
    log_every: int = leaf(10, "steps between progress lines", unit="steps", low=1)
    norms_every: int = leaf(100, "steps between per-layer norms; 0: none", unit="steps", low=0)
    profile: tuple[int, ...] = leaf((), "(first step, steps) of a profiler window; SIGUSR1 opens one too", low=1)
    audit_every: int = leaf(
        0,
        "steps between recomputations of a microbatch on other devices, to the same bits; 0: none",
        unit="steps",
        low=0,
    )
    watchdog: tuple[float, float] = leaf(
        (10.0, 60.0),
        "a step that takes this many times the median, and this many seconds at least, has the stacks of all threads "
        "written down; after twice that the run ends with exit code 69 (docs/faults.md); (0, 0): never",
        unit="times, s",
        low=0.0,
    )
    compilation_cache: str = leaf("~/.cache/maxlm/xla", "folder of compiled programs; empty: none")
    wandb_project: str = leaf("", "Weights & Biases project; empty: not used")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept. The newest checkpoint always is."""

    every_steps: int = leaf(500, "steps between checkpoints", unit="steps", low=1)
    every_seconds: float = leaf(0.0, "seconds after which one is due all the same; 0: none", unit="s", low=0.0)
    local_dir: str = leaf("", "folder on each machine's own disk for quick copies between checkpoints; empty: none")
    local_every_steps: int = leaf(50, "steps between those copies", unit="steps", low=1)
    mtbf_hours: float = leaf(
        0.0,
        "mean time between failures of the whole run: with what a save is measured to cost it decides how often to "
        "save, every_steps and local_every_steps at most apart; 0: these stand",
        unit="h",
        low=0.0,
    )
    max_failures: int = leaf(3, "saves in a row that may fail; the last of them ends the run", unit="saves", low=1)
    keep_latest: int = leaf(2, "newest checkpoints kept", low=1)
    keep_best: int = leaf(0, "checkpoints with the lowest held-out bits per byte kept besides", low=0)
    keep_every_steps: int = leaf(
        0, "the first checkpoint at or after each multiple of this is kept for good; 0: none", unit="steps", low=0
    )
    keep_every_hours: float = leaf(0.0, "one checkpoint in this many hours is kept for good; 0: none", unit="h", low=0)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out quality and samples."""

    every_steps: int = leaf(0, "steps between evaluations during training; 0: only at the end", unit="steps", low=0)
    batch_size: int = leaf(8, "rows of an evaluation batch over the whole mesh", unit="rows", low=1)
    sequence_length: int = leaf(0, "positions in an evaluation window; 0: that of training", unit="tokens", low=0)
    overlap: int = leaf(0, "positions a window shares with the one before, as context only", unit="tokens", low=0)
    documents: int = leaf(0, "held-out documents used during training; 0: all", unit="documents", low=0)
    stores: tuple[str, ...] = leaf((), "stores whose held-out documents are evaluated; empty: all that hold some out")
    prompts: tuple[str, ...] = leaf((), "prompts continued at the end of a run of one process, for the report")
    sample_tokens: int = leaf(64, "tokens that a prompt is continued by", unit="tokens", low=1)


@dataclasses.dataclass(frozen=True)
class Config:
    """A run, whole."""

    name: str = leaf("maxlm", "the run's name in reports and trackers")
    seed: int = leaf(0, "of the parameters and of the order of the data", low=0)
    model: ModelConfig = branch(ModelConfig)
    data: DataConfig = branch(DataConfig)
    optim: OptimConfig = branch(OptimConfig)
    parallel: ParallelConfig = branch(ParallelConfig)
    train: TrainConfig = branch(TrainConfig)
    checkpoint: CheckpointConfig = branch(CheckpointConfig)
    eval: EvalConfig = branch(EvalConfig)
