"""The config: every problem at once, each in one sentence; and nothing in the schema that no code reads."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from maxlm import config as schema
from maxlm.config import (
    AttentionConfig,
    Config,
    DataConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    ParallelConfig,
    PhaseConfig,
    StoreConfig,
)
from maxlm.configfile import known, record, source
from maxlm.plan.candidates import meshes
from maxlm.resolve import ConfigError, as_config_dict, differences, leaves, resolve

ROOT = Path(__file__).parent.parent
STORES = {"stdlib": StoreConfig()}
NARROW = dataclasses.asdict(schema.TrainConfig(precision="float16", reduce_dtype="bfloat16"))


def config(**sections) -> Config:
    return Config(**{"data": DataConfig(stores=STORES), **sections})


def problems(given, **kwargs) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(given, **kwargs)
    return caught.value.problems


def changed(**leaf_values):
    """The ConfigDict of a sound config with some leaves changed, by dotted path with __ for the dots."""
    given = as_config_dict(config()).to_dict()
    for path, value in leaf_values.items():
        *parents, last = path.split("__")
        section = given
        for parent in parents:
            section = section[parent]
        section[last] = value
    return given


def test_a_phase_of_short_rows_has_tokens_as_far_as_the_layers_predict():
    given = changed(model__mtp_layers=64, data__phases={"warm": {"from_step": 10, "sequence_length": 64}})
    expected = "no token of a row of data.phases.warm.sequence_length 64 is that far from the next; use less"
    assert any(expected in problem for problem in problems(given))


def test_round_trip():
    resolved = resolve(as_config_dict(config()), devices=8)
    assert resolve(resolved, devices=8) == resolved
    assert resolved.parallel.data == 8
    assert resolved.model.attention.kv_heads == resolved.model.attention.q_heads
    assert resolved.model.attention.head_dim == resolved.model.embed_dim // resolved.model.attention.q_heads
    assert resolved.model.mlp.dim == 704  # 8/3 * 256 rounded up to a multiple of 64


def test_config_dict_is_locked_and_typed():
    given = as_config_dict(config())
    with pytest.raises((AttributeError, KeyError)):
        given.optim.peak_lrr = 1.0
    with pytest.raises(TypeError):
        given.train.steps = "many"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("optim__peak_lrr", 1.0, "optim.peak_lrr is not a setting; did you mean optim.peak_lr?"),
        ("train__steps", "many", "train.steps is 'many' (str), but int was expected"),
        ("train__steps", True, "train.steps is True (bool), but int was expected"),
        ("model__embed_dim", -3, "model.embed_dim is -3, but it has to be at least 1"),
        ("optim__schedule", "cosin", "did you mean 'cosine'?"),
        ("model__attention__kv_heads", 3, "does not divide model.attention.q_heads 8; use one of 1, 2, 4, 8"),
        (
            "model__attention__head_dim",
            33,
            "head_dim is 33 with model.rope.fraction 1, but rotary",
        ),
        ("model__rope__scaling", "yarn", "goes by the positions of pretraining; set model.rope.original_length"),
        ("model__rope__long_factors", (1.0,), "long_factors has 1 entries, but with model.rope.scaling 'none' there"),
        ("model__attention__latent__value_dim", 8, "kv_dim is 0, which means no latent attention"),
        ("model__attention__latent__kv_dim", 8, "use an even number between 2 and 31"),
        ("model__rope__turns", (4.0, 1.0), "model.rope.turns is (4.0, 1.0), but has to be two, rising"),
        ("model__rope", {"scaling": "yarn", "original_length": 64, "turns": (0.0, 32.0)}, "use turns above 0, such as"),
        ("model__rope", {"scaling": "yarn", "original_length": 64, "theta": 1.0}, "and theta above 1"),
        (
            "model__rope",
            {"scaling": "dynamic", "original_length": 64, "fraction": 0.0625},
            "but 2 dims of a head do (model.attention.head_dim 32 with model.rope.fraction 0.0625); use 4 or more",
        ),
        (
            "model__rope",
            {"scaling": "longrope", "original_length": 64, "short_factors": (0.0,) * 16, "long_factors": (1.0,) * 16},
            "model.rope.short_factors has 0, but positions are divided by them; use numbers above 0",
        ),
        ("train__profile", (3,), "train.profile is (3,), but it is (first step, steps)"),
        ("train__profile", (1000, 3), "train.profile is (1000, 3), but the last step is 999, counted from 0"),
        ("model__learned_positions", 100, "rows have up to 512 positions (data.sequence_length)"),
        ("optim__warmup_steps", 1000, "the warm-up would never end; use at most 999"),
        ("parallel__tensor", 3, "parallel.tensor is 3, which does not divide model.attention.q_heads"),
        ("parallel__tensor", 16, "does not divide 8 devices"),
        (
            "parallel__pipeline",
            8,
            "layers do not divide into parallel.pipeline 8 x parallel.virtual_stages 1 parts; use two"
            " whose product is one of 1, 2, 4",
        ),
        ("parallel__virtual_stages", 2, "parallel.virtual_stages is 2, but parallel.pipeline is 1"),
        ("parallel__expert", 2, "the model has no experts to spread; type parallel.expert=1"),
        ("model__moe__dense_layers", 1, "every layer of a model without experts is dense"),
        ("model__mtp_layers", 512, "no token of a row of data.sequence_length 512 is that far from the next; use less"),
        ("data__batch_size", 12, "use a multiple of 8"),
        ("data__mixture", (("pile", 1.0),), "names 'pile', which is not in data.stores (stdlib)"),
        ("data__mixture", (("stdlib", 1.0, 2),), "entries are (str, float)"),
        ("data__mixture", "stdlib", "but a tuple of tuples was expected; type data.mixture=\"(('stdlib', 1.0),)\""),
        ("data__mixture", ("stdlib", 0.5), "a tuple of tuples was expected; type data.mixture=\"(('stdlib', 1.0),)\""),
        ("data__mixture", (("stdlib", 0.5), "b"), "type data.mixture=\"(('stdlib', 0.5), ('b', 1.0))\""),
        ("eval__stores", "stdlib", "but a tuple was expected; type eval.stores=\"('stdlib',)\""),
        ("train__watchdog", 5.0, 'type train.watchdog="(5.0, 1.0)"'),
        ("data__stores", {}, "data.stores is empty"),
        (
            "data__stores",
            {"a": {"source": "foo:bar"}},
            "data.stores.a: there is no source 'foo' (in 'foo:bar'), only stdlib, ",
        ),
        ("data__stores", {"a": {"source": "text"}}, "data.stores.a: the source 'text' should read text:GLOB"),
        ("optim__decay_rules", (("(", 1.0),), "is not a regular expression"),
        ("train__remat", "custom", "train.remat has 'custom'; it is one of none, full, matmuls, or names joined by +"),
        ("train__remat", "ful", "train.remat has 'ful'; did you mean 'full'?"),
        ("train__remat", "mlp_up+mlp_gat", "did you mean 'mlp_gate'?"),
        ("train__remat", "mlp_up+ful", "train.remat has 'ful'; it is one of none, full, matmuls, or names joined by +"),
        ("train__remat", "none+mlp_up", "is 'none+mlp_up', but none, full, matmuls stand alone; type train.remat=none"),
        ("train__remat", "mlp_up, mlp_gate", "names are joined by +; type train.remat=mlp_up+mlp_gate"),
        ("train", NARROW, "type train.reduce_dtype=float32"),
        ("eval__overlap", 512, "use at most 511"),
        ("checkpoint__keep_best", 1, "set eval.every_steps"),
        ("train__watchdog", (0.0, 60.0), "type (10.0, 60.0), or (0.0, 0.0) for none"),
        ("train__watchdog", (10.0, 0.0), "type (10.0, 60.0), or (0.0, 0.0) for none"),
        ("optim__epsilon", 0.0, "optim.epsilon is 0, but adamw divides by a root that is 0"),
        ("optim__epsilon", 1e-50, "type optim.epsilon=1e-8"),
        ("optim__muon_momentum", 1.0, "optim.muon_momentum is 1.0, but a decay has to be below 1"),
        ("optim__lr_rules", ((".*", -1.0),), "gives '.*' the multiplier -1, but it has to be at least 0"),
        ("optim__decay_rules", ((".*", float("nan")),), "optim.decay_rules is nan, but a finite number was expected"),
        ("optim__peak_lr", float("inf"), "optim.peak_lr is inf, but a finite number was expected"),
        (
            "optim__guard__rollback",
            (9, 64, 3),
            "rollback waits for 9 refusals, but optim.guard.max_rejections 8 in a row end the run before",
        ),
        ("data__stores", ["stdlib"], "data.stores is ['stdlib'], but sections by name were expected"),
        ("data__phases", 3, "data.phases is 3, but sections by name were expected; type data.phases={'NAME': {}}"),
        ("model", 3, "model is 3, but it is a section"),
    ],
)
def test_each_problem_is_one_clear_sentence(path, value, expected):
    found = problems(changed(**{path: value}), devices=8)
    assert any(expected in problem for problem in found), found
    assert all("\n" not in problem for problem in found)


@pytest.mark.parametrize(("remat", "instead"), [("mlp_gate", "full"), ("mlp_gate+mlp_up", "mlp_up")])
@pytest.mark.parametrize("experts", [0, 4])
def test_a_gate_that_the_model_does_not_have_is_not_kept(remat, instead, experts):
    given = {"train__remat": remat, "model__moe__experts": experts}
    (found,) = problems(changed(model__mlp__kind="relu2", **given))
    assert "model.mlp.kind 'relu2' has no gate" in found and found.endswith(f"type train.remat={instead}")
    assert resolve(changed(model__mlp__kind="geglu", **given)).train.remat == remat
    assert resolve(changed(model__mlp__kind="relu2", **given | {"train__remat": instead})).train.remat == instead


def test_learned_positions_hold_the_rows_of_evaluations_and_phases():
    given = changed(model__learned_positions=512, eval__sequence_length=2048)
    assert any("512, but rows have up to 2048 positions (eval.sequence_length)" in item for item in problems(given))
    given = changed(model__learned_positions=512, data__phases={"long": {"from_step": 5, "sequence_length": 1024}})
    assert any("1024 positions (data.phases.long.sequence_length)" in item for item in problems(given))
    assert resolve(changed(model__learned_positions=512)).model.learned_positions == 512


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        ({"experts": 6}, "parallel.expert is 4, which does not divide model.moe.experts 6; use one of 1, 2, 3, 6"),
        ({"experts": 4, "active": 5}, "model.moe.active is 5, but there are 4 experts"),
        ({"experts": 4, "dense_layers": 4}, "leaves none of 4 layers to the experts; use at most 3"),
        ({"experts": 4, "dim": 33}, "which does not divide model.moe.dim 33"),
        ({"experts": 4, "shared_gate": True}, "there are no shared experts; set model.moe.shared_dim"),
        ({"experts": 4, "capacity_factor": 1.5}, "in the order of positions, which context parallelism changes"),
        ({"experts": 4, "dense_layers": 2}, "a pipeline spreads layers of one structure; type parallel.pipeline=1"),
        ({"experts": 8, "groups": 3}, "model.moe.groups is 3, which does not divide model.moe.experts 8"),
        ({"experts": 8, "groups": 2, "top_groups": 3}, "model.moe.top_groups is 3, but model.moe.groups is 2"),
        ({"experts": 8, "groups": 4, "active": 3}, "of 2 experts have only 2; raise top_groups"),
        (
            {"experts": 8, "groups": 8, "active": 1, "router": "sigmoid"},
            "but groups have one each; type model.moe.groups=4",
        ),
    ],
)
def test_problems_of_experts(moe, expected):
    sizes = {"parallel__expert": 4, "parallel__tensor": 2, "parallel__context": 2, "parallel__pipeline": 2}
    found = problems(changed(**{f"model__moe__{name}": value for name, value in moe.items()}, **sizes), devices=32)
    assert any(expected in problem for problem in found), found


def test_a_mixture_fills_its_dim():
    moe = MoeConfig(experts=8, active=4)
    resolved = resolve(config(model=ModelConfig(moe=moe), parallel=ParallelConfig(expert=4)), devices=8)
    assert resolved.model.moe.dim == 176 and resolved.parallel.data == 2  # 704 / 4
    with pytest.raises(ConfigError, match="use a multiple of 8"):  # rows are spread over expert too
        resolve(
            config(
                data=DataConfig(stores=STORES, batch_size=12),
                model=ModelConfig(moe=moe),
                parallel=ParallelConfig(expert=4),
            ),
            devices=8,
        )


def test_tensor_has_to_divide_the_hidden_dim_of_dense_layers_alone():
    """A model of experts only has no parameter of `mlp.dim`, whatever stands there."""
    experts = {"model__moe__experts": 4, "model__moe__dim": 32}
    settings = {"model__mlp__dim": 75, "parallel__tensor": 2}
    refused = "parallel.tensor is 2, which does not divide model.mlp.dim 75; use one of 1, 3, 5, 15, 25, 75"
    assert problems(changed(**settings), devices=8) == [refused]
    assert problems(changed(**settings, **experts, model__moe__dense_layers=1), devices=8) == [refused]
    resolved = resolve(changed(**settings, **experts), devices=8)
    assert not resolved.model.has_dense_layers
    assert {"tensor": 2, "data": 4} in [{k: n for k, n in mesh.items() if n > 1} for mesh in meshes(resolved, 8)]


def test_all_problems_are_reported_at_once():
    found = problems(changed(model__embed_dim=-1, optim__schedule="x", train__steps=1.5, seeed=1))
    assert len(found) == 4
    found = problems(changed(optim__warmup_steps=5000, parallel__tensor=3, eval__overlap=600), devices=6)
    assert {"optim.warmup_steps", "parallel.tensor", "eval.overlap"} <= {problem.split()[0] for problem in found}


def test_latent_attention_is_refused_for_what_it_does_not_have_alone():
    latent = {"kv_dim": 8, "rope_dim": 8, "value_dim": 16}
    settings = {f"model__attention__latent__{name}": dim for name, dim in latent.items()}
    assert resolve(changed(**settings)).model.attention.latent.kv_dim == 8
    (found,) = problems(changed(model__attention__qk_norm="head", **settings))
    assert "qk_norm is 'head', but latent attention has none; type model.attention.qk_norm=none" in found
    (found,) = problems(changed(model__attention__sinks=True, **settings))
    assert "sinks is True, but latent attention has none; type model.attention.sinks=False" in found


def test_mesh_that_does_not_fit_the_devices():
    (found,) = problems(changed(parallel__data=2, parallel__fsdp=2), devices=8)
    assert "the mesh data=2 x fsdp=2 has 4 devices, but there are 8" in found
    found = problems(changed(parallel__fsdp=-1))
    assert "parallel.data and parallel.fsdp are both -1" in found[0]


@pytest.mark.parametrize(
    ("optimizer", "leaves", "refused"),
    [
        ("adamw", {"b2": 0.999}, "b2"),
        ("muon", {"b2": 0.999}, "b2"),  # of its embeddings and norms
        ("muon", {"muon_momentum": 0.999}, "muon_momentum"),
        ("adamw", {"muon_momentum": 0.999}, None),
        ("lion", {"b1": 0.999}, None),  # has one moment, with b2
        ("adafactor", {"b2": 0.999}, None),  # its second moment is float32
    ],
)
def test_decays_that_bfloat16_cannot_follow_are_refused_where_they_are_kept(optimizer, leaves, refused):
    # The limit is real: v * 0.999 rounds back to v.
    assert jnp.bfloat16(1.0) * jnp.bfloat16(1.0) == jnp.float32(0.999).astype(jnp.bfloat16)
    optim = {"optimizer": optimizer, "moments_dtype": "bfloat16", "b2": 0.95, **leaves}
    given = changed(**{f"optim__{name}": value for name, value in optim.items()})
    if refused is None:
        resolve(given)
    else:
        assert [f"optim.{refused} is 0.999" in problem for problem in problems(given)] == [True]


@pytest.mark.parametrize(
    ("leaves", "expected"),
    [
        ({"parallel__pipeline_schedule": "interleaved"}, "interleaved takes 2 or more, every other schedule 1"),
        ({"parallel__virtual_stages": 2}, "virtual_stages is 2 with parallel.pipeline_schedule '1f1b'"),
        (
            {"train__accumulation": 3, "parallel__pipeline_schedule": "interleaved", "parallel__virtual_stages": 2},
            "train.accumulation is 3, but interleaved takes microbatches in groups of parallel.pipeline 2",
        ),
        (
            {"model__num_layers": 6, "model__attention__windows": (8, 0)},
            "3 cycles of model.attention.windows do not divide into parallel.pipeline 2 x parallel.virtual_stages 1 "
            "parts; use two whose product is one of 1, 3",
        ),
        ({"model__mtp_layers": 1}, "but no stage of a pipeline has layers that predict further tokens"),
        (
            {"model__num_layers": 5, "model__attention__windows": (8, 0)},
            "which 2 entries of model.attention.windows do",
        ),
    ],
)
def test_pipeline_that_does_not_come_out_even(leaves, expected):
    found = problems(changed(parallel__pipeline=2, **leaves))
    assert any(expected in problem for problem in found), found


def test_phases_by_name():
    phases = {"long": PhaseConfig(from_step=500, sequence_length=1024)}
    resolved = resolve(config(data=DataConfig(stores=STORES, phases=phases)))
    assert resolved.data.phases["long"].sequence_length == 1024
    given = as_config_dict(resolved)
    given.data.phases.long.from_step = 5000
    assert "train.steps is 1000" in problems(given)[0]


def test_differences_name_only_what_was_changed():
    found = differences(config(optim=OptimConfig(peak_lr=1e-2)))
    assert found["optim.peak_lr"] == (3e-4, 1e-2)
    assert set(found) == {"optim.peak_lr"}


@pytest.mark.parametrize(
    ("saves", "evaluations", "mtbf", "expected"),
    [
        (500, 1000, 0.0, None),
        (1000, 500, 0.0, None),
        (600, 900, 0.0, "checkpoint.every_steps 600 and eval.every_steps 900 do not divide one another"),
        (500, 2000, 0.0, "eval.every_steps is 2000 and train.steps 1000: there would be none before the end"),
        (500, 500, 6.0, "type checkpoint.mtbf_hours=0 or checkpoint.keep_best=0"),
    ],
)
def test_the_best_are_kept_where_states_that_are_saved_are_evaluated(saves, evaluations, mtbf, expected):
    given = changed(
        checkpoint__every_steps=saves,
        eval__every_steps=evaluations,
        checkpoint__mtbf_hours=mtbf,
        checkpoint__keep_best=2,
    )
    if expected is None:
        assert resolve(given).checkpoint.keep_best == 2
    else:
        (found,) = problems(given)
        assert expected in found


def test_every_leaf_is_documented_and_there_are_few():
    everything = config(data=DataConfig(stores=STORES, phases={"a": PhaseConfig(from_step=1)}))
    found = list(leaves(everything))
    assert len(found) < 150
    for path, field, _ in found:
        assert len(field.metadata["doc"]) > 10, path


def test_every_leaf_is_read_by_some_code():
    """An attribute access of the leaf's name outside the schema and its checks; a knob without one does nothing."""
    read = set()
    for path in [*ROOT.glob("maxlm/**/*.py"), *ROOT.glob("tools/*.py")]:
        if path.name in ("config.py", "resolve.py") or path.parent.name == "checks":
            continue
        tree = ast.parse(path.read_text())
        read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    read |= {"data", "fsdp", "pipeline", "context", "expert", "tensor"}  # read by name, in ParallelConfig.sizes
    everything = config(data=DataConfig(stores=STORES, phases={"a": PhaseConfig(from_step=1)}))
    unread = {path for path, field, _ in leaves(everything) if field.name not in read}
    assert not unread


def test_saved_config_runs_again(tmp_path):
    given = resolve(
        config(
            model=ModelConfig(attention=AttentionConfig(windows=(8, 0))),
            data=DataConfig(stores=STORES, mixture=(("stdlib", 2.0),), phases={"a": PhaseConfig(from_step=7)}),
        )
    )
    namespace: dict = {}
    exec(source(given), namespace)
    assert resolve(namespace["get_config"]()) == given

    lines: list[str] = []
    record(given, tmp_path, log=lines.append)
    record(given, tmp_path, log=lines.append)
    assert not lines
    record(dataclasses.replace(given, seed=5), tmp_path, log=lines.append)
    assert lines == ["config: seed was 0, now 5"]
    assert "seed=0" in (tmp_path / "config.1.py").read_text()
    assert "seed=5" in (tmp_path / "config.py").read_text()


def test_a_record_of_an_older_schema_is_compared_by_its_values_and_loses_nothing_to_a_kill(tmp_path):
    lines: list[str] = []
    first = resolve(config())
    record(first, tmp_path, log=lines.append)
    older = json.loads((tmp_path / "config.json").read_text())
    older["optim"]["gone"] = [3]  # a setting that was
    del older["optim"]["b2"]  # and one that was not yet
    (tmp_path / "config.json").write_text(json.dumps(older))
    changed = dataclasses.replace(first, seed=5)
    record(changed, tmp_path, log=lines.append)
    assert lines == ["config: optim.gone was (3,), and is no setting now", "config: seed was 0, now 5"]
    assert "seed=0" in (tmp_path / "config.1.py").read_text()
    # Killed after config.py was written and before config.json was: the new one is not kept as if it were the old one.
    (tmp_path / "config.json").write_text(json.dumps(older))
    record(changed, tmp_path, log=lines.append)
    assert [path.name for path in tmp_path.glob("config.*.py")] == ["config.1.py"]
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 5

    older["data"]["stores"]["stdlib"]["gone"] = 1
    found = known(older)
    assert found.dropped == ["data.stores.stdlib.gone", "optim.gone"]
    assert resolve(found.given) == first
    with pytest.raises(ConfigError, match="optim.gone is not a setting"):
        resolve(older)
    older["train"] |= {"remat": "custom", "remat_names": ["attention_out", "mlp_up"]}
    assert resolve(known(older).given).train.remat == "attention_out+mlp_up"


def test_schema_imports_nothing_of_ours_nor_jax():
    text = (ROOT / "maxlm" / "config.py").read_text()
    assert not re.search(r"^\s*(from|import) (maxlm|jax)", text, re.MULTILINE)
    code = "import sys, maxlm.resolve; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert schema.ACTIVATION_NAMES
