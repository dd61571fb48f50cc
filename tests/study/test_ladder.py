"""Rules by one dial, and the coordinate check that tells the transfer rule from the standard one."""

import dataclasses
import math
from pathlib import Path

import pytest

from maxlm.config import AttentionConfig, LatentConfig, MlpConfig, MoeConfig, PhaseConfig
from maxlm.errors import UserError
from maxlm.model.decoder import split_model
from maxlm.optim.optimizers import assign
from maxlm.study import coordinates
from maxlm.study.coordinates import check_coordinates
from maxlm.study.identity import run_name
from maxlm.study.ladder import Rules, Shape, configure, shape_by_depth, shape_by_flops, shape_by_params, size_of
from maxlm.study.plan import plan
from maxlm.study.spec import Isoflops, Machine, StudyError, Sweep, load_study
from tests.study.fake import RULES, base_config, isoflop_study

BASE = base_config(Path("/nowhere"))
STANDARD = dataclasses.replace(RULES, rule="standard", base_rate=0.0)


def test_each_dial_sets_the_shape():
    assert shape_by_depth(Rules(aspect=64, head_dim=64), BASE, 12) == Shape(12, 768)
    for params in (1e5, 1e6, 1e7):
        found = size_of(RULES, BASE, shape_by_params(RULES, BASE, params)).besides_embeddings
        assert abs(math.log(found / params)) < 0.35
    # With experts a shape has several times 12 L D^2.
    mixture = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, moe=MoeConfig(experts=8, active=2)))
    for params in (1e6, 1e7):
        found = size_of(RULES, mixture, shape_by_params(RULES, mixture, params)).besides_embeddings
        assert abs(math.log(found / params)) < 0.35
    shape = shape_by_flops(RULES, BASE, 1e14)
    size = size_of(RULES, BASE, shape)
    assert 0.6 < size.flops * RULES.tokens_per_param * size.besides_embeddings / 1e14 < 1.7


def test_the_budget_is_spent_and_the_rest_follows():
    config = configure(BASE, Shape(2, 64), STANDARD, flops=1e13)
    size = size_of(STANDARD, BASE, Shape(2, 64))
    tokens = config.train.steps * config.data.batch_size * config.data.sequence_length
    assert tokens * size.flops == pytest.approx(1e13, rel=0.01)
    assert config.optim.peak_lr == pytest.approx(0.3118 * 1e13**-0.125)
    assert config.data.batch_size * config.data.sequence_length == pytest.approx(0.2920 * 1e13**0.3271, rel=0.25)
    given = dataclasses.replace(STANDARD, base_rate=0.006, batch_tokens=512)
    config = configure(BASE, Shape(2, 64), given, flops=1e13)
    assert config.optim.peak_lr == 0.006 and config.data.batch_size * config.data.sequence_length == 512
    tokens = config.train.steps * config.data.batch_size * config.data.sequence_length
    assert tokens * size.flops == pytest.approx(1e13, rel=0.01)


def test_batches_are_cut_over_the_devices_of_a_run():
    given = dataclasses.replace(STANDARD, base_rate=0.006, batch_tokens=256)  # 4 rows
    assert configure(BASE, Shape(2, 64), given, flops=1e13).data.batch_size == 4
    wide = configure(BASE, Shape(2, 64), given, devices=8, flops=1e13)
    assert wide.data.batch_size == 8 and wide.parallel.data == -1
    size = size_of(given, BASE, Shape(2, 64))
    tokens = wide.train.steps * wide.data.batch_size * wide.data.sequence_length
    assert tokens * size.flops == pytest.approx(1e13, rel=0.01)  # the budget is spent all the same
    cut = dataclasses.replace(BASE, train=dataclasses.replace(BASE.train, accumulation=2))
    assert configure(cut, Shape(2, 64), given, devices=8, flops=1e13).data.batch_size == 16
    tensor = dataclasses.replace(BASE, parallel=dataclasses.replace(BASE.parallel, tensor=4))
    assert configure(tensor, Shape(2, 64), given, devices=8, flops=1e13).data.batch_size == 4  # two shards of rows


def test_a_mesh_that_does_not_fit_the_devices_is_refused_when_the_study_is_planned(tmp_path):
    study = isoflop_study(tmp_path, budgets=(1e13,))
    spread = dataclasses.replace(study.base, parallel=dataclasses.replace(study.base.parallel, fsdp=2))
    with pytest.raises(StudyError, match="cannot run on 1 devices, as many as .* Machine.devices says: the mesh"):
        plan(dataclasses.replace(study, base=spread))
    assert plan(dataclasses.replace(study, base=spread, machine=Machine(devices=2)))
    design = Sweep(shapes=(Shape(2, 32),), tokens=1e5, settings={"data.batch_size": (4, 8)})
    with pytest.raises(StudyError, match="data.batch_size is 4, which does not divide .* 8 shards"):
        plan(dataclasses.replace(study, design=design, machine=Machine(devices=8)))


def test_a_slip_in_a_study_file_is_said_in_a_sentence(tmp_path):
    file = tmp_path / "study.py"
    file.write_text("def get_study():\n    return undefined\n")
    with pytest.raises(UserError, match=r"study.py cannot be loaded \(line 2: NameError: name 'undefined' "):
        load_study(file)
    folder = Path(__file__).parent.parent.parent / "configs" / "scaling"
    file.write_text(
        "from __future__ import annotations\nimport dataclasses\nfrom typing import ClassVar\n"
        "@dataclasses.dataclass\nclass Mine:\n    known: ClassVar[int] = 1\n    depth: int = 2\n"
        f"import importlib.util as u\nspec = u.spec_from_file_location('x', {str(folder / 'transfer_sweep.py')!r})\n"
        "module = u.module_from_spec(spec)\nspec.loader.exec_module(module)\nget_study = module.get_study\n"
    )
    assert load_study(file).name == "transfer_sweep"


def test_the_transfer_rule_sets_rates_decays_and_init_by_path():
    config = configure(BASE, Shape(2, 128), RULES, flops=1e13)
    found = assign(config.optim, split_model(config.model).specs)
    wide = {path: item for path, item in found.items() if item.lr != 1}
    attention = [f"layers/attention/{name}" for name in ("query", "key", "value", "output")]
    assert set(wide) == {"head/kernel", *attention, "layers/mlp/up", "layers/mlp/down"}
    for item in wide.values():
        assert item.lr == 32 / 128
        assert item.lr * item.decay == pytest.approx(config.optim.weight_decay)
    assert found["final_norm/scale"].decay == 0
    assert config.model.head_init == 0.5 and config.optim.peak_lr == RULES.base_rate  # 1 over the root of 128 / 32
    same = configure(BASE, Shape(2, 32), RULES, flops=1e13)
    assert {item.lr for item in assign(same.optim, split_model(same.model).specs).values()} == {1.0}
    assert same.model.head_init == 1
    drawn = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, head_init=0.1))
    assert configure(drawn, Shape(2, 128), RULES, flops=1e13).model.head_init == 0.05


def test_the_coordinate_check_is_of_one_device_wherever_the_study_runs():
    spread = dataclasses.replace(BASE.parallel, pipeline=2, pipeline_schedule="interleaved", virtual_stages=2)
    base = dataclasses.replace(BASE, parallel=spread, train=dataclasses.replace(BASE.train, accumulation=6))
    config = coordinates._config(base, RULES, Shape(2, 32), steps=1, rate=0.1)  # 6 does not divide its 8 rows
    assert set(config.parallel.sizes.values()) == {1}
    assert config.parallel.virtual_stages == config.train.accumulation == 1


ATTENTION = {f"attention/{name}" for name in ("query", "key", "value", "output")}
MLP = {"mlp/gate", "mlp/up", "mlp/down"}
ROUTED = {"mlp/router", "mlp/gate", "mlp/up"}
SHARED = {"mlp/shared_gate", "mlp/shared/gate", "mlp/shared/up"}
LATENT = {"attention/latent", "attention/shared_key", "attention/query", "attention/output"}


def within(room, names):
    return {f"{room}/{name}" for name in names}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({}, within("layers", ATTENTION | MLP)),
        # A dim of their own: what comes out of the experts has the same fan-in at every width.
        ({"moe": MoeConfig(experts=4, dim=16)}, within("layers", ATTENTION | ROUTED)),
        (
            {"moe": MoeConfig(experts=4, shared_dim=16, shared_gate=True, dense_layers=1, selection_bias=True)},
            within("prefix", ATTENTION | MLP) | within("layers", ATTENTION | ROUTED | SHARED | {"mlp/down"}),
        ),
        (
            {"attention": AttentionConfig(latent=LatentConfig(kv_dim=16, rope_dim=8, value_dim=16))},
            within("layers", LATENT | MLP),
        ),
        (
            {"attention": AttentionConfig(latent=LatentConfig(kv_dim=16, query_dim=12, rope_dim=8, value_dim=16))},
            within("layers", LATENT - {"attention/query"} | {"attention/query_down"} | MLP),
        ),
        (
            {"mtp_layers": 1},
            within("layers", ATTENTION | MLP) | within("mtp/block", ATTENTION | MLP) | {"mtp/projection"},
        ),
    ],
    ids=["dense", "experts", "shared experts", "latent", "latent queries", "mtp"],
)
def test_what_learns_slower_in_a_wide_model_is_read_off_its_declarations(model, expected):
    base = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, mlp=MlpConfig(kind="swiglu"), **model))
    config = configure(base, Shape(2, 128), RULES, flops=1e13)
    found = assign(config.optim, split_model(config.model).specs)
    slower = {path for path, item in found.items() if item.lr != 1}
    assert slower == expected | {"head/kernel"}
    assert {(found[path].lr, found[path].decay / config.optim.weight_decay) for path in slower} == {(1 / 4, 4.0)}
    assert {item.decay for path, item in found.items() if path.endswith(("scale", "bias"))} == {0.0}


def test_what_the_transfer_rule_cannot_do_is_refused():
    tied = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, tie_embeddings=True))
    with pytest.raises(UserError, match="tie_embeddings=False"):
        configure(tied, Shape(2, 64), RULES)
    for setting in ("embed_scale", "normed_head"):
        changed = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, **{setting: True}))
        with pytest.raises(UserError, match=f"{setting}=False"):
            configure(changed, Shape(2, 64), RULES)
        assert getattr(configure(changed, Shape(2, 64), STANDARD).model, setting)
    with pytest.raises(UserError, match="no multiple of the rules' head_dim 16"):
        configure(BASE, Shape(2, 40), RULES)
    with pytest.raises(UserError, match="standard or transfer"):
        Rules(rule="mup")


def test_what_would_make_a_run_of_another_compute_than_planned_is_refused():
    timed = dataclasses.replace(BASE, train=dataclasses.replace(BASE.train, budget_seconds=60.0))
    phased = dataclasses.replace(
        BASE, data=dataclasses.replace(BASE.data, phases={"long": PhaseConfig(from_step=5, sequence_length=128)})
    )
    for base in (timed, phased):
        with pytest.raises(UserError, match="leave both out of its base"):
            configure(base, Shape(2, 64), RULES)


def test_grouped_queries_stay_grouped():
    attention = AttentionConfig(q_heads=8, kv_heads=2)
    base = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, attention=attention))
    heads = configure(base, Shape(2, 128), RULES).model.attention
    assert (heads.q_heads, heads.kv_heads) == (8, 2)
    with pytest.raises(UserError, match="makes 6 heads, but the base has 4 query heads .* multiple of 64"):
        configure(base, Shape(2, 96), RULES)
    shapes = [shape_by_params(RULES, base, params) for params in (3e4, 1e5, 1e6)]
    shapes += [shape_by_depth(RULES, base, 3), shape_by_flops(RULES, base, 1e13)]
    assert all(shape.width % 64 == 0 for shape in shapes)
    whole = size_of(RULES, BASE, Shape(2, 128)).besides_embeddings
    assert size_of(RULES, base, Shape(2, 128)).besides_embeddings == whole - 2 * 2 * 128 * 6 * 16  # 6 heads of 8, twice
    slower = {path for path, item in assign(configure(base, Shape(2, 128), RULES).optim,
              split_model(configure(base, Shape(2, 128), RULES).model).specs).items() if item.lr != 1}  # fmt: skip
    assert slower == within("layers", ATTENTION | {"mlp/up", "mlp/down"}) | {"head/kernel"}
    odd = dataclasses.replace(base, model=dataclasses.replace(base.model, attention=AttentionConfig(kv_heads=3)))
    with pytest.raises(UserError, match="3, which does not divide model.attention.q_heads 8"):
        configure(odd, Shape(2, 128), RULES)


def sweep(tmp_path, settings, **changes):
    design = Sweep(shapes=(Shape(2, 64),), tokens=1e5, settings=settings, rules=("transfer",))
    return [item.config for item in plan(isoflop_study(tmp_path, design=design, **changes))]


def test_a_sweeps_settings_are_seen_by_the_rules(tmp_path):
    with pytest.raises(UserError, match="optim.optimizer=adamw"):
        sweep(tmp_path, {"optim.optimizer": ("adamw", "lion")})
    with pytest.raises(UserError, match="tie_embeddings=False"):
        sweep(tmp_path, {"model.tie_embeddings": (False, True)})
    for path, values in (("optim.lr_rules", ((), ())), ("train.steps", (5, 6)), ("model.embed_dim", (32, 64))):
        with pytest.raises(UserError, match=f"the sweep sets '{path}', which the transfer rule sets"):
            sweep(tmp_path, {path: values})
    with pytest.raises(UserError, match="'optim.nothing', which is no setting"):
        sweep(tmp_path, {"optim.nothing": (1, 2)})
    with pytest.raises(UserError, match="'optim.guard', which is a section"):
        sweep(tmp_path, {"optim.guard": (1, 2)})
    small, large = sweep(tmp_path, {"optim.epsilon": (1e-8, 1e-6), "data.batch_size": (16,), "optim.peak_lr": (0.01,)})
    assert (small.optim.epsilon, large.optim.epsilon) == pytest.approx((1e-8 / 2, 1e-6 / 2))  # m is 64 over 32
    assert small.data.batch_size == 16 and small.optim.peak_lr == 0.01
    assert small.train.steps == round(1e5 / 16 / 64)


NAMES = {"c1.50e12-2x48": "6703a46c9f6b6756", "c1.50e12-2x64": "72cc277980327039", "c1.50e12-2x80": "694a74f937a649f4"}
SWEPT = {
    "standard-2x32-batch_size16-peak_lr0.011-seed1": "3d92f67bce0246bd",
    "standard-2x256-batch_size16-peak_lr0.011-seed1": "1495a0de1cfbd422",
    "transfer-2x32-batch_size16-peak_lr0.011-seed1": "92e296142839c505",
    "transfer-2x256-batch_size16-peak_lr0.011-seed1": "1873fcb8b76fa4b9",
}


def test_the_shipped_studies_runs_keep_their_names():
    """Runs that were made before are not run again, as long as their configs come out the same to the bit."""
    folder = Path(__file__).parent.parent.parent / "configs" / "scaling"
    ladder = load_study(folder / "stdlib_ladder.py")
    ladder = dataclasses.replace(ladder, design=Isoflops(budgets=(1.5e12,), sizes=(0.6, 1.0, 1.5)))
    swept = load_study(folder / "transfer_sweep.py")
    settings = {"data.batch_size": (16,), "optim.peak_lr": (2**-6.5,), "seed": (1,)}
    shapes = (Shape(2, 32), Shape(2, 256))
    design = dataclasses.replace(swept.design, shapes=shapes, tokens=450_000, settings=settings)
    swept = dataclasses.replace(swept, design=design)
    for study, names in ((ladder, NAMES), (swept, SWEPT)):
        assert {item.label: run_name(item.config, "d9f21647e60a53c9beea40d7ffa0f18e") for item in plan(study)} == names


@pytest.mark.parametrize("name", ["stdlib_ladder", "transfer_sweep"])
def test_the_shipped_studies_have_a_checkpoint_to_fall_back_to(name):
    folder = Path(__file__).parent.parent.parent / "configs" / "scaling"
    assert load_study(folder / f"{name}.py").base.checkpoint.keep_latest >= 2


def test_the_coordinate_check_tells_the_rules_apart():
    found = {
        rules.rule: check_coordinates(BASE, rules, widths=(32, 128), layers=1, seeds=(0,))
        for rules in (RULES, STANDARD)
    }
    assert found["transfer"].passed, found["transfer"].sentence()
    assert not found["standard"].passed, found["standard"].sentence()
    assert max(item.slope for item in found["standard"].coordinates) > 0.6
