"""What runs that began from nothing are written as: the family is found, and what means nothing is no hindrance."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm import tree
from maxlm.config import (
    AttentionConfig,
    LatentConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    StoreConfig,
    TokenizerConfig,
)
from maxlm.convert import model_config
from maxlm.convert.engine import from_hf, open_model, to_hf
from maxlm.convert.errors import ConversionError
from maxlm.convert.folder import carry
from maxlm.convert.stored import CARRIED
from maxlm.data.prepare import prepare_data
from maxlm.infer.pretrained import PretrainedText
from maxlm.model.decoder import merge, split_model
from maxlm.model.family import FamilyError, families, hf_config, unlike
from maxlm.model.runtime import Runtime
from maxlm.resolve import as_config_dict
from maxlm.study.ladder import Rules, Shape, configure
from tests.convert.folders import CONFIG, write_folder, write_run
from tests.data.test_tokenizers import of_bytes
from tests.tables import to_ours
from tests.tiny import tiny_config


def quiet(_line):
    pass


def tiny(**settings):
    attention = AttentionConfig(**{"q_heads": 4, "kv_heads": 2, "head_dim": 8} | settings.pop("attention", {}))
    return ModelConfig(vocab_size=83, embed_dim=24, num_layers=2, **{"attention": attention} | settings)


def exported(path, model, **kwargs):
    """The tensors of the export, read back as our parameters by path, and its family's name."""
    values = write_run(path / "run", model)
    to_hf(path / "run", path / "hf", log=quiet, **kwargs)
    folder, described = open_model(path / "hf")
    tensors = {name: np.asarray(tensor.read(slice(None))) for name, tensor in folder.tensors.items()}
    for name, value in tree.paths(to_ours(described.rows, tensors)).items():
        np.testing.assert_array_equal(value, values[name], err_msg=name)
    return described


@pytest.mark.parametrize(
    ("model", "family"),
    [
        (tiny(attention={"qk_norm": "head"}), "qwen3"),  # norms of queries and keys, as in configs/quickstart.py
        (tiny(attention={"bias": True}), "qwen2"),
        (tiny(moe=MoeConfig(experts=4)), "mixtral"),  # with model.mlp.dim filled in, which no layer has
    ],
    ids=["qwen3", "qwen2", "mixtral"],
)
def test_the_only_family_that_can_express_a_run_is_found(tmp_path, model, family):
    assert exported(tmp_path, model).family.name == family


def test_where_several_families_can_or_none_all_are_named(tmp_path):
    write_run(tmp_path / "plain", tiny())
    with pytest.raises(FamilyError, match="any of internlm2, llama, mistral, phi3: choose one with --family"):
        to_hf(tmp_path / "plain", tmp_path / "hf", log=quiet)
    write_run(tmp_path / "odd", tiny(mlp=MlpConfig(kind="relu2")))
    with pytest.raises(FamilyError, match="no family can express this model") as raised:
        to_hf(tmp_path / "odd", tmp_path / "hf", log=quiet)
    for name in families():
        assert f"\n  {name}: " in str(raised.value)
    with pytest.raises(FamilyError, match="mlp.kind is 'relu2'"):
        to_hf(tmp_path / "odd", tmp_path / "hf", family="llama", log=quiet)
    assert not (tmp_path / "hf").exists()


def test_what_transformers_does_not_go_by_is_refused():
    """Though its classes take the words without complaint."""
    half, known = tiny(rope=RopeConfig(fraction=0.5)), families()
    for name in ("llama", "mistral", "internlm2"):
        with pytest.raises(FamilyError, match="rope.fraction is 0.5"):
            hf_config(known[name], half)
    assert not unlike(half, known["phi3"].from_hf(hf_config(known["phi3"], half)))
    gemma = next(iter(known["gemma3"].presets.values()))
    alike = dataclasses.replace(gemma, rope=RopeConfig(theta=1e6))  # of windows as well
    assert hf_config(known["gemma3"], alike)["rope_local_base_freq"] == 1e6
    capped = dataclasses.replace(gemma, attention=dataclasses.replace(gemma.attention, softcap=50.0))
    with pytest.raises(FamilyError, match="attention.softcap is 50.0"):
        hf_config(known["gemma3"], capped)


def test_a_rung_of_the_transfer_rule_can_be_handed_over(tmp_path):
    """Its head begins smaller, and the scale of its scores is written out, where it is the usual one."""
    rules = Rules(rule="transfer", aspect=16, head_dim=16, base_head_dim=16, base_width=32, base_rate=4e-3)
    model = configure(tiny_config(tmp_path, model__mlp__dim=0), Shape(2, 128), rules, flops=1e13).model
    assert model.head_init == 0.5 and model.attention.scale == 0.25
    assert exported(tmp_path, model).family.name == "qwen3"
    other = dataclasses.replace(model, attention=dataclasses.replace(model.attention, scale=0.125))
    with pytest.raises(FamilyError, match="attention.scale is 0.125, read back as 0.0"):
        hf_config(families()["qwen3"], other)


def test_positions_that_are_stretched_by_one_are_written_and_read_back():
    for name in ("deepseek_v2", "deepseek_v3"):
        preset = next(iter(families()[name].presets.values()))
        rope = dataclasses.replace(preset.rope, factor=1.0)
        model = dataclasses.replace(preset, rope=rope, attention=dataclasses.replace(preset.attention, scale=0.0))
        assert not unlike(model, families()[name].from_hf(hf_config(families()[name], model)))
        with pytest.raises(FamilyError, match="attention.scale"):
            hf_config(families()[name], dataclasses.replace(model, attention=preset.attention))


SAME = {
    "scale": ({"attention": {"scale": 1 / math.sqrt(8)}}, {}),
    "windows": ({"attention": {"windows": (3, 0)}}, {"attention": {"windows": (3, 0, 3)}}),
    "no windows": ({"rope": RopeConfig(local_theta=7.0)}, {}),
    "one base": (
        {"attention": {"windows": (3, 0)}, "rope": RopeConfig(local_theta=1e4)},
        {"attention": {"windows": (3, 0)}},
    ),
    "not stretched": ({"rope": RopeConfig(factor=4.0, original_length=3, turns=(2.0, 9.0))}, {}),
    "not turned": ({"rope": RopeConfig(fraction=0.0, theta=9.0)}, {"rope": RopeConfig(fraction=0.0)}),
    "growth": (
        {"rope": RopeConfig(scaling="yarn", factor=4.0, original_length=8, attention_factor=0.1 * math.log(4.0) + 1)},
        {"rope": RopeConfig(scaling="yarn", factor=4.0, original_length=8)},
    ),
    "no latent": ({"attention": {"latent": LatentConfig(rope_dim=4, value_dim=3)}}, {}),
    "no experts": ({"moe": MoeConfig(active=5, shared_dim=7, groups=2)}, {}),
    "experts only": (
        {"mlp": MlpConfig(dim=99), "moe": MoeConfig(experts=4, dim=10)},
        {"mlp": MlpConfig(dim=40), "moe": MoeConfig(experts=4, dim=10)},
    ),
    "drawn": ({"head_init": 0.0, "embed_std": 3.0, "init": "zero_output"}, {}),
}
OTHER = {
    "scale": {"attention": {"scale": 0.3}},
    "growth": {"rope": RopeConfig(attention_factor=0.7)},
    "base of windows": {"attention": {"windows": (3, 0)}, "rope": RopeConfig(local_theta=7.0)},
    "dense layers": {"mlp": MlpConfig(dim=99), "moe": MoeConfig(experts=4, dim=10, dense_layers=1)},
}


def logits(model):
    parts, draws = split_model(model), np.random.default_rng(0)
    params = tree.map_paths(lambda _, spec: draws.normal(0, 0.3, spec.shape).astype(np.float32), parts.specs)

    @jax.jit
    def forward(params):
        decoder, tokens = merge(parts.graphdef, params), jnp.asarray([[1, 5, 9, 70, 2, 5, 8, 11]])
        places = jnp.arange(8)[None]
        out = decoder.hidden(tokens, positions_BS=places, segments_BS=None, runtime=Runtime())
        return decoder.logits(out.hidden_BSD)

    return np.asarray(forward(params))


@pytest.mark.parametrize("name", SAME)
def test_what_is_said_in_two_ways_is_the_same_model(name):
    one, other = (tiny(**{"mlp": MlpConfig(dim=40)} | settings) for settings in SAME[name])
    assert not unlike(one, other) and not unlike(other, one)
    if name in ("scale", "growth"):  # where both are computed with, and not left aside
        np.testing.assert_array_equal(logits(one), logits(other))


@pytest.mark.parametrize("settings", OTHER.values(), ids=OTHER)
def test_what_counts_is_a_difference(settings):
    base = tiny(**{"mlp": MlpConfig(dim=40)} | {key: value for key, value in settings.items() if key == "moe"})
    if "attention" in settings and "windows" in settings["attention"]:
        base = tiny(mlp=MlpConfig(dim=40), attention={"windows": (3, 0)})
    assert len(unlike(base, tiny(**{"mlp": MlpConfig(dim=40)} | settings))) == 1


def test_older_models_of_the_same_name_are_not_taken_for_the_newer(tmp_path):
    """Baichuan 13B has a plain head; ChatGLM's first way of turning is not that of ChatGLM 3."""
    family = families()["baichuan"]
    newer = hf_config(family, family.presets["baichuan2-13b"])
    assert family.from_hf(newer).normed_head
    older = family.from_hf(newer | {"vocab_size": 64_000})
    assert older.attention.alibi and not older.normed_head
    assert family.from_hf(hf_config(family, older)) == older
    with pytest.raises(FamilyError, match="normed_head is False, read back as True"):
        hf_config(family, dataclasses.replace(older, vocab_size=64_128))
    glm = families()["chatglm"]
    content = hf_config(glm, glm.presets["chatglm3-6b"])
    with pytest.raises(FamilyError, match="original_rope is false, but only true is supported"):
        glm.from_hf(content | {"original_rope": False})


def test_windows_that_the_peer_would_place_elsewhere_are_refused():
    three, two = families()["qwen3_moe"], families()["qwen2_moe"]
    model = next(iter(three.presets.values()))
    windows = {"windows": (128, 0)}
    with pytest.raises(FamilyError, match="attention.windows"):
        hf_config(three, dataclasses.replace(model, attention=dataclasses.replace(model.attention, **windows)))
    model = next(iter(two.presets.values()))
    content = hf_config(two, dataclasses.replace(model, attention=dataclasses.replace(model.attention, **windows)))
    assert two.from_hf(content).attention.windows == (128, 0)
    with pytest.raises(FamilyError, match="use_sliding_window is true, but only false"):
        two.from_hf({word: value for word, value in content.items() if word != "layer_types"})


def test_a_run_that_began_from_nothing_says_how_long_its_texts_were(tmp_path):
    data = {"sequence_length": 64, "phases": {"late": {"sequence_length": 256}}}
    write_run(tmp_path / "run", tiny(attention={"qk_norm": "head"}), data=data)
    to_hf(tmp_path / "run", tmp_path / "hf", log=quiet)
    assert json.loads((tmp_path / "hf/config.json").read_text())["max_position_embeddings"] == 256
    stretched = RopeConfig(scaling="yarn", factor=4.0, original_length=128, turns=(1.0, 32.0))
    write_run(tmp_path / "far", tiny(attention={"qk_norm": "head"}, rope=stretched), data=data)
    to_hf(tmp_path / "far", tmp_path / "hf far", log=quiet)
    assert json.loads((tmp_path / "hf far/config.json").read_text())["max_position_embeddings"] == 512
    # Where the word would mean another model, it is left out: a Baichuan that has it has rotary positions.
    alibi = tiny(attention={"kv_heads": 4, "alibi": True}, rope=RopeConfig(fraction=0.0), normed_head=True)
    write_run(tmp_path / "alibi", alibi, data=data)
    to_hf(tmp_path / "alibi", tmp_path / "hf alibi", log=quiet)
    assert "max_position_embeddings" not in json.loads((tmp_path / "hf alibi/config.json").read_text())


OLD = {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}, "own_word": 2, "max_position_embeddings": 777}


def test_another_familys_words_and_code_stay_behind(tmp_path):
    """Else `transformers` would load the old class, with weights of its own drawing."""
    write_folder(tmp_path / "hf", config=CONFIG | OLD | {"eos_token_id": [2, 3]})
    for name in ("modeling_own.py", "configuration_own.py", "tokenization_own.py"):
        (tmp_path / "hf" / name).write_text("raise SystemExit")
    own = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps(own))
    from_hf(tmp_path / "hf", tmp_path / "ours", log=quiet)
    to_hf(tmp_path / "ours", tmp_path / "mistral", family="mistral", log=quiet)
    family = families()["mistral"]
    written = json.loads((tmp_path / "mistral/config.json").read_text())
    taken = {"bos_token_id": 1, "eos_token_id": [2, 3], "torch_dtype": "bfloat16", "max_position_embeddings": 777}
    assert written == hf_config(family, model_config(tmp_path / "ours")) | taken
    assert written["architectures"] == ["MistralForCausalLM"]
    assert [file.name for file in (tmp_path / "mistral").glob("*.py")] == ["tokenization_own.py"]
    to_hf(tmp_path / "ours", tmp_path / "same", family="llama", log=quiet)
    assert json.loads((tmp_path / "same/config.json").read_text()) == CONFIG | OLD | {"eos_token_id": [2, 3]}
    assert len(list((tmp_path / "same").glob("*.py"))) == 3


def test_a_grown_tokenizer_keeps_the_ends_of_a_chat(tmp_path):
    """Llama 3's: a chat ends with <|eot_id|>, of which the run, on documents, knows nothing."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    write_folder(tmp_path / "hf", config=CONFIG | {"vocab_size": 270, "eos_token_id": [257, 258]})
    of_bytes(*specials).save(str(tmp_path / "hf/tokenizer.json"))
    named = {"bos_token": specials[0], "eos_token": specials[2], "chat_template": "T"}
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps(named))
    (tmp_path / "more").mkdir()
    of_bytes(*specials, "<turn>").save(str(tmp_path / "more/tokenizer.json"))  # with nothing beside it
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/0.txt").write_text("a document")
    config = tiny_config(
        tmp_path / "corpus",
        model=dataclasses.replace(model_config(tmp_path / "hf"), vocab_size=270),
        data__tokenizer=TokenizerConfig(kind="huggingface", path=str(tmp_path / "more")),
        data__stores={"tiny": StoreConfig(source=f"text:{tmp_path}/corpus/*.txt", heldout_permille=0)},
    )
    tokenizer = prepare_data(config, tmp_path / "run").tokenizer
    assert tokenizer.eos_id == 257
    told = as_config_dict(config).to_dict()
    write_run(tmp_path / "run", config.model, data=told["data"], tokenizer=tokenizer.fingerprint)
    carry(tmp_path / "hf", tmp_path / "run" / CARRIED)
    lines = []
    to_hf(tmp_path / "run", tmp_path / "back", log=lines.append)
    assert not any("no tokenizer" in line or "came along" in line for line in lines), lines
    content = json.loads((tmp_path / "back/config.json").read_text())
    assert (content["bos_token_id"], content["eos_token_id"]) == (256, [257, 258])
    said = json.loads((tmp_path / "back/tokenizer_config.json").read_text())
    assert named.items() <= said.items() and said["add_bos_token"] is True
    assert json.loads((tmp_path / "back/generation_config.json").read_text()) == {"eos_token_id": [2, 3]}
    text = PretrainedText(tmp_path / "back")
    assert text.encode("a") == [256, 64] and text.special_id("<turn>") == 259


@pytest.mark.parametrize(
    ("family", "word", "value"),
    [
        ("deepseek_v2", "scoring_func", "sigmoid"),
        ("deepseek_v2", "topk_method", "noaux_tc"),
        ("deepseek_v3", "scoring_func", "softmax"),
        ("deepseek_v3", "topk_method", "group_limited_greedy"),
    ],
)
def test_another_way_of_choosing_experts_is_refused(family, word, value):
    content = hf_config(families()[family], next(iter(families()[family].presets.values())))
    assert families()[family].from_hf(content)
    with pytest.raises(FamilyError, match=f'{word} is "{value}", but only'):
        families()[family].from_hf(content | {word: value})


def test_a_word_that_is_missing_is_named_with_its_file(tmp_path):
    write_folder(tmp_path / "hf")
    for key, value, message in [
        ("num_attention_heads", None, "has no 'num_attention_heads'"),
        ("hidden_size", "wide", "holds a value that cannot be read"),
    ]:
        content = {**CONFIG, key: value} if value else {k: v for k, v in CONFIG.items() if k != key}
        content.pop("head_dim")
        (tmp_path / "hf" / "config.json").write_text(json.dumps(content))
        for read in (open_model, model_config):
            with pytest.raises((ConversionError, FamilyError), match=f"config.json.*LlamaForCausalLM.*{message}"):
                read(tmp_path / "hf")
