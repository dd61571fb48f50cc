"""The cases of `tools/equivalence.py`: meshes, features and models, and the configs that they stand for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from maxlm import config as c
from maxlm.parallel.context import choose_method

AXES = c.MESH_AXES
ROWS, POSITIONS = 32, 32
# What production runs use: hybrid sharding with tensor and context, experts across nodes, pipelines of all of it.
LARGE: dict[int, tuple[dict[str, int], ...]] = {
    16: (
        {"data": 2, "fsdp": 2, "context": 2, "tensor": 2},
        {"data": 2, "fsdp": 2, "expert": 2, "tensor": 2},
        {"data": 2, "fsdp": 2, "pipeline": 2, "tensor": 2},
        {"fsdp": 2, "pipeline": 2, "expert": 2, "tensor": 2},
        {"fsdp": 2, "pipeline": 2, "context": 2, "tensor": 2},
    ),
    32: (
        {"data": 2, "fsdp": 2, "pipeline": 2, "context": 2, "tensor": 2},
        {"data": 2, "fsdp": 2, "pipeline": 2, "expert": 2, "tensor": 2},
        {"data": 2, "fsdp": 2, "context": 2, "expert": 2, "tensor": 2},
    ),
    64: ({axis: 2 for axis in AXES},),
}


KEPT = "attention_qkv+mlp_up"
EXPERTS = c.MoeConfig(experts=8, active=2, dim=16, shared_dim=16, balance_loss=0.02, router_z_loss=0.001)
HEADS = c.AttentionConfig(q_heads=16, kv_heads=8, head_dim=8)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with features that the covering arrays' model has not, and the meshes and features that it is run with.

    settings: of `ModelConfig`, in place of those of the covering arrays' model.
    """

    layers: int
    settings: Mapping[str, Any]
    runs: tuple[tuple[dict[str, int], dict[str, Any]], ...]


def chosen(
    *, packed: bool = True, remat: str = "none", accumulation: int = 2, schedule: str = "", method: str = ""
) -> dict[str, Any]:
    """Those of a case."""
    return {"packed": packed, "remat": remat, "accumulation": accumulation, "schedule": schedule, "method": method}


HYBRID = {"data": 2, "fsdp": 2, "tensor": 2}
LONG = {"fsdp": 2, "context": 2, "tensor": 2}
STAGED = {"fsdp": 2, "pipeline": 2, "tensor": 2}
LONG_STAGED = {"pipeline": 2, "context": 2, "tensor": 2}
SPREAD = {"fsdp": 2, "expert": 2, "tensor": 2}
SPREAD_STAGED = {"fsdp": 2, "pipeline": 2, "expert": 2}
LATENT: dict[str, Any] = {
    "attention": c.AttentionConfig(
        q_heads=16,
        kv_heads=16,
        head_dim=8,
        latent=c.LatentConfig(kv_dim=16, query_dim=16, rope_dim=4, value_dim=6),
    ),
    "rope": c.RopeConfig(interleaved=True, scaling="yarn", factor=4.0, original_length=8, turns=(1.0, 32.0)),
    "moe": dataclasses.replace(
        EXPERTS,
        router="sigmoid",
        groups=4,
        top_groups=2,
        selection_bias=True,
        bias_rate=0.01,
        shared_gate=True,
        weight_scale=2.5,
    ),
}
MODELS: dict[str, Model] = {
    "learned positions": Model(
        2,
        {
            "attention": dataclasses.replace(HEADS, kv_heads=16, bias=True, output_bias=True),
            "mlp": c.MlpConfig(dim=64, kind="gelu", bias=True),
            "rope": c.RopeConfig(fraction=0.0),
            "learned_positions": POSITIONS,
            "norm": "layer",
            "tie_embeddings": True,
        },
        (
            (HYBRID, chosen(remat=KEPT)),
            (LONG, chosen(packed=False)),
            (STAGED, chosen(schedule="zero_bubble", remat=KEPT, accumulation=4)),
            (LONG_STAGED, chosen(schedule="1f1b")),
        ),
    ),
    "latent attention": Model(
        3,
        LATENT | {"moe": dataclasses.replace(LATENT["moe"], dense_layers=1)},
        (
            (HYBRID, chosen(packed=False)),
            (LONG, chosen(remat="full")),
            (SPREAD, chosen(remat=KEPT)),
            ({"context": 2, "expert": 2, "tensor": 2}, chosen(accumulation=1)),
        ),
    ),
    "latent attention without a prefix": Model(
        2,
        LATENT,
        (
            (STAGED, chosen(schedule="zero_bubble")),
            (SPREAD_STAGED, chosen(schedule="1f1b", remat=KEPT, accumulation=4)),
            ({"pipeline": 2, "expert": 2, "tensor": 2}, chosen(schedule="zero_bubble", remat="full")),
        ),
    ),
    "alibi": Model(
        4,
        {
            "attention": dataclasses.replace(HEADS, alibi=True, qk_norm="joint", windows=(12, 0)),
            "rope": c.RopeConfig(fraction=0.0),
            "normed_head": True,
            "norm_placement": "post",
        },
        (
            (HYBRID, chosen()),
            (LONG, chosen(remat="full", method="ring")),
            (STAGED, chosen(schedule="zero_bubble", packed=False)),
            (LONG_STAGED, chosen(schedule="1f1b", remat=KEPT)),
        ),
    ),
    "sinks and longrope": Model(
        4,
        {
            "attention": dataclasses.replace(HEADS, sinks=True, bias=True, output_bias=True, windows=(12, 0)),
            # Between the longest documents of the batch and of some of its four microbatches.
            "rope": c.RopeConfig(
                scaling="longrope",
                factor=4.0,
                original_length=26,
                short_factors=(1.0,) * 4,
                long_factors=(1.5, 2.0, 4.0, 8.0),
            ),
            "mlp": c.MlpConfig(dim=64, kind="clamped_swiglu", bias=True),
            "moe": dataclasses.replace(EXPERTS, shared_dim=0),
            "norm": "rms_offset",
            "norm_placement": "both",
            "embed_scale": True,
            "logits_softcap": 20.0,
        },
        (
            (HYBRID, chosen(accumulation=4)),
            (LONG, chosen(accumulation=1, method="ring")),
            (SPREAD, chosen(packed=False, remat=KEPT)),
            (STAGED, chosen(schedule="zero_bubble", accumulation=4)),
            (LONG_STAGED, chosen(schedule="1f1b", remat="full", accumulation=4)),
        ),
    ),
    "capacity": Model(
        2,
        {"attention": HEADS, "moe": dataclasses.replace(EXPERTS, capacity_factor=1.0)},
        (
            (SPREAD, chosen(remat="matmuls")),
            ({"pipeline": 2, "expert": 2, "tensor": 2}, chosen(schedule="1f1b")),
        ),
    ),
    "further tokens": Model(
        2,
        {"attention": HEADS, "mtp_layers": 1},
        (
            (HYBRID, chosen()),
            (LONG, chosen(remat="matmuls", accumulation=1)),
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One mesh and one value of each feature."""

    mesh: tuple[tuple[str, int], ...]
    moe: bool
    packed: bool
    remat: str
    accumulation: int
    schedule: str = ""  # empty: no pipeline
    model: str = ""  # one of MODELS; empty: the model of the covering arrays
    method: str = ""  # of `parallel.context_method`; empty: auto

    @property
    def kind(self) -> str:
        """Which model: `dense`, `moe`, or one of MODELS."""
        return self.model or ("moe" if self.moe else "dense")

    @property
    def layers(self) -> int:
        """As few as the stages allow: a stage, or a part of one, holds whole cycles of two windows."""
        if self.model:
            return MODELS[self.model].layers
        stages = dict(self.mesh).get("pipeline", 1)
        return max(4, 2 * stages * (2 if self.schedule == "interleaved" else 1))

    @property
    def name(self) -> str:
        """For people and for --case."""
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh) or "one device"
        parts = [
            mesh,
            self.kind,
            "packed" if self.packed else "unpacked",
            f"remat {self.remat}",
            f"accumulation {self.accumulation}",
            self.schedule,
            self.method,
        ]
        return ", ".join(part for part in parts if part)


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every way to spread a power of two of devices over the axes; sizes of one are left out."""
    twos = devices.bit_length() - 1
    for powers in itertools.product(range(twos + 1), repeat=len(AXES)):
        if sum(powers) == twos:
            yield {axis: 2**power for axis, power in zip(AXES, powers, strict=True) if power}


def covering_array(features: dict[str, Sequence[Any]], begun: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Rows in which every pair of values of two features occurs, few of them (greedily; the same every time).

    Args:
      begun: rows that are among them.
    """
    names = list(features)
    rows = [dict(zip(names, values, strict=True)) for values in itertools.product(*features.values())]

    def pairs(row: dict[str, Any]) -> set[tuple]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)}

    missing = set().union(*(pairs(row) for row in rows)).difference(*(pairs(row) for row in begun))
    chosen = list(begun)
    while missing:
        best = max(rows, key=lambda row: len(pairs(row) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def cases(devices: int) -> Iterator[Case]:
    """All cases of a number of devices."""
    for sizes in meshes(devices) if devices == 8 else LARGE[devices]:
        stages = sizes.get("pipeline", 1)
        features: dict[str, Sequence[Any]] = {
            # A dense model has nothing to spread over `expert`: the config is refused.
            "moe": (True,) if sizes.get("expert", 1) > 1 else (False, True),
            "packed": (True, False),
            "remat": ("none", "full"),
            "accumulation": (1, 2) if stages == 1 else (stages, 2 * stages),
            "schedule": ("gpipe", "1f1b", "interleaved", "zero_bubble") if stages > 1 else ("",),
        }
        rows = [{**row, "method": ""} for row in covering_array(features)]
        if sizes.get("context", 1) > 1 and stages == 1:
            rows = covering_array({**features, "method": ("", other_method(sizes["context"]))}, rows)
        rows = rows if devices < 64 else rows[:2]
        for row in rows:
            yield Case(tuple(sizes.items()), **row)
    if devices == 8:
        for name, model in MODELS.items():
            moe = bool(model.settings.get("moe", c.MoeConfig()).experts)
            for sizes, values in model.runs:
                yield Case(tuple(sizes.items()), moe=moe, model=name, **values)


def other_method(context: int) -> str:
    """The way of keys that `auto` does not take for the model of the covering arrays."""
    return "gather" if method_of("", "", context=context, staged=False) == "ring" else "ring"


def method_of(model: str, method: str, *, context: int, staged: bool) -> str:
    """The way by which a case's keys come to queries: ring or gather; empty without a context axis.

    Args:
      model: one of MODELS, or empty. method: of a `Case`.
    """
    heads = MODELS[model].settings["attention"] if model else HEADS
    if context == 1:
        return ""
    asked = "gather" if staged else method or "auto"
    return choose_method(asked, devices=context, q_heads=heads.q_heads, kv_heads=heads.kv_heads)


def config_of(case: Case | None, *, kind: str, packed: bool, layers: int) -> c.Config:
    """The config of a case, or of its reference."""
    parallel: dict[str, Any] = {"data": 1}
    train: dict[str, Any] = {}
    if case is not None:
        parallel |= dict(case.mesh) | ({"context_method": case.method} if case.method else {})
        if case.schedule:
            parallel["pipeline_schedule"] = case.schedule
            parallel["virtual_stages"] = 2 if case.schedule == "interleaved" else 1
        train = {"remat": case.remat, "accumulation": case.accumulation}
    attention = dataclasses.replace(HEADS, qk_norm="head", softcap=20.0, windows=(12, 0))
    usual = {"attention": attention, "moe": EXPERTS if kind == "moe" else c.MoeConfig(), "mlp": c.MlpConfig(dim=64)}
    settings = usual if kind in ("dense", "moe") else {"mlp": c.MlpConfig(dim=64), **MODELS[kind].settings}
    return c.Config(
        name="equivalence",
        model=c.ModelConfig(vocab_size=264, embed_dim=32, num_layers=layers, **settings),
        data=c.DataConfig(
            stores={"none": c.StoreConfig(source="text:none")},
            tokenizer=c.TokenizerConfig(kind="bytes"),
            sequence_length=POSITIONS,
            batch_size=ROWS,
            mask_documents=packed,
        ),
        train=c.TrainConfig(
            steps=10, precision="float32", norms_every=0, loss_chunk=256, compilation_cache="", z_loss=1e-3, **train
        ),
        eval=c.EvalConfig(batch_size=ROWS),
        parallel=c.ParallelConfig(**parallel),
    )
