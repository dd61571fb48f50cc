"""Published models: as many parameters as published, and a step that lowers over a mesh."""

import jax
import jax.numpy as jnp
import pytest

from maxlm import tree
from maxlm.config import Config, DataConfig, ParallelConfig, StoreConfig, TrainConfig
from maxlm.model.decoder import merge, split_model
from maxlm.model.family import families, family_of, hf_config, preset, unlike
from maxlm.model.flops import count_matmul_flops
from maxlm.model.runtime import Runtime
from maxlm.model.table import bind
from maxlm.parallel.mesh import make_mesh
from maxlm.resolve import resolve
from maxlm.train.setup import make_setup
from tests.model.test_flops import as_computed

# What the safetensors headers of these repositories on huggingface.co add up to.
PUBLISHED = {
    # GPT-2: the tensors of openai-community/gpt2*, without masks
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    # meta-llama/*
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    # mistralai/*
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "ministral-8b": 8_019_808_256,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-22b": 22_247_282_688,
    "mistral-small-24b": 23_572_403_200,
    "mistral-large-123b": 122_610_069_504,
    # Qwen/*, without the copy of a tied head
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    # google/gemma-*; of Gemma 3 from 4B on, what remains of the whole without the 416,866,032 parameters of the vision
    # tower and its projection (1152 x D + 1152): 4,300,079,472, 12,187,325,040 and 27,432,406,640
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
    # zai-org/*
    "glm-4-9b": 9_399_951_360,
    "glm-4-9b-chat": 9_399_951_360,
    "glm-4-9b-chat-1m": 9_399_951_360,
    "glm-4-9b-0414": 9_400_279_040,
    "glm-4-32b-0414": 32_566_081_536,
    "chatglm3-6b": 6_243_584_000,
    "chatglm3-6b-32k": 6_243_584_000,
    "chatglm3-6b-128k": 6_243_584_000,
    # allenai/OLMo-2-*
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
    "olmo-2-32b": 32_234_279_936,
    # microsoft/*
    "phi-3-mini-4k": 3_821_079_552,
    "phi-3-medium-4k": 13_960_238_080,
    "phi-3.5-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
    # baidu/ERNIE-4.5-*-PT
    "ernie-4.5-0.3b": 360_748_032,
    # internlm/*
    "internlm2-1.8b": 1_889_110_016,
    "internlm2-7b": 7_737_708_544,
    "internlm2-20b": 19_861_149_696,
    "internlm2.5-1.8b": 1_889_110_016,
    "internlm2.5-7b": 7_737_708_544,
    "internlm2.5-20b": 19_861_149_696,
    # baichuan-inc/*
    "baichuan2-7b": 7_505_973_248,
    "baichuan2-13b": 13_896_668_160,
    # mistralai/Mixtral-*, Qwen/*, deepseek-ai/*, openai/gpt-oss-*, baidu/ERNIE-4.5-*-PT; gpt-oss with four-bit weights
    # counted one by one. DeepSeek-V3 has 684,531,386,000 scalars there, of which 41,540,496 are scales of FP8 blocks
    # and 1,853,358,080 the second copies of embedding and head
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 682_636_487_424,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "ernie-4.5-21b-a3b": 21_825_437_888,
}

# What a model has besides for predicting further tokens: "11.5B unique parameters", says DeepSeek-V3's README_WEIGHTS.
FURTHER = {"deepseek-v3": 11_610_068_224}

# Published in round numbers only, on the model cards of Qwen/Qwen2-57B-A14B and baidu/ERNIE-4.5-300B-A47B-PT.
ROUND = {"qwen2-57b-a14b": 57.4e9, "ernie-4.5-300b-a47b": 300e9}

BY_FAMILY = {family.name: list(family.presets) for family in families().values()}
FOREIGN = ("internlm2", "chatglm", "baichuan")  # families that transformers does not have


def one_each():
    """A preset of every family; the rest are for tools/full_check.py."""
    for names in BY_FAMILY.values():
        for name in names:
            yield name if name == names[0] else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("family", BY_FAMILY)
def test_presets_have_as_many_parameters_as_published_and_are_expressed_by_their_family(family):
    for name in BY_FAMILY[family]:
        model = preset(name)
        specs = split_model(model).specs
        count = sum(spec.size for spec in tree.paths(specs).values())
        if name in ROUND:
            assert count == pytest.approx(ROUND[name], rel=2e-3)
        else:
            assert count == PUBLISHED[name], name
        further = sum(spec.size for path, spec in tree.paths(specs).items() if path.startswith("mtp/"))
        assert further == FURTHER.get(name, 0)
        found = families()[family]
        content = hf_config(found, model)
        assert family_of(content) is found
        assert not unlike(model, found.from_hf(content)), name
        bind(found.table(model), specs)


def test_what_is_published_has_a_preset():
    assert {*PUBLISHED, *ROUND} == {name for names in BY_FAMILY.values() for name in names}


@pytest.mark.parametrize("name", one_each())
def test_transformers_counts_the_same(name):
    torch = pytest.importorskip("torch", reason="parity with Hugging Face NOT tested: pip install -e '.[parity]'")
    transformers = pytest.importorskip(
        "transformers", reason="parity with Hugging Face NOT tested: pip install -e '.[parity]'"
    )
    family = next(family for family in families().values() if name in family.presets)
    if family.name in FOREIGN:
        pytest.skip(f"transformers has no {family.name}; its layout is tested in tests/convert/test_families.py")
    content = hf_config(family, preset(name))
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**content)
        peer = transformers.AutoModelForCausalLM.from_config(config)
    biases = [value for key, value in peer.named_buffers() if key.endswith("e_score_correction_bias")]
    ours = sum(spec.size for spec in tree.paths(split_model(preset(name)).specs).values())
    assert sum(weight.numel() for weight in [*peer.parameters(), *biases]) == ours - FURTHER.get(name, 0)


@pytest.mark.parametrize("name", one_each())
def test_the_ledger_counts_the_products_of_the_traced_program(name):
    """At the published size: shapes are traced, and no array is made."""
    model, length = preset(name), 32
    parts = split_model(model)

    def forward(params, tokens):
        decoder = merge(parts.graphdef, params)
        rows = {"positions_BS": jnp.arange(length)[None], "segments_BS": None, "runtime": Runtime()}
        hidden = decoder.hidden(tokens, **rows).hidden_BSD
        ahead = decoder.further(hidden, [tokens] * model.mtp_layers, **rows).hidden if model.mtp_layers else []
        return [decoder.logits(x) for x in (hidden, *ahead)]

    params = tree.map_paths(lambda _, spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), parts.specs)
    traced = count_matmul_flops(jax.make_jaxpr(forward)(params, jax.ShapeDtypeStruct((1, length), jnp.int32)))
    assert traced == pytest.approx(length * as_computed(model, length), rel=1e-3)


@pytest.mark.parametrize("name", one_each())
def test_a_step_lowers_over_eight_devices(name):
    """Sharded over rows, weights and, where the heads and the vocabulary come out even, tensors."""
    model = preset(name)
    even = not (model.attention.kv_heads % 2 or model.vocab_size % 2)
    config = Config(
        model=model,
        data=DataConfig(stores={"none": StoreConfig()}, sequence_length=64, batch_size=8),
        parallel=ParallelConfig(data=2, fsdp=2 if even else 4, tensor=2 if even else 1),
        train=TrainConfig(remat="full", loss_chunk=64),
    )
    config = resolve(config, devices=8)
    lowered = make_setup(config, make_mesh(config.parallel)).lower(8, 64)
    assert "sharding" in lowered.as_text()
