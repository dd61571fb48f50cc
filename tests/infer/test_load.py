"""Models from folders and checkpoints, over eight devices and one; tokenizers and chat templates that come along."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from maxlm.config import MoeConfig, ParallelConfig
from maxlm.convert import model_config
from maxlm.convert.engine import from_hf
from maxlm.data.tokenizers import TokenizerError, train_sentencepiece
from maxlm.errors import UserError
from maxlm.infer import load
from maxlm.infer.generate import RunnableModel, generate
from maxlm.infer.load import Asked, generate_from, generation_mesh, generation_runtime, load_model
from maxlm.infer.pretrained import PretrainedText
from maxlm.infer.sampling import Sampling
from maxlm.model.runtime import Runtime
from maxlm.parallel.mesh import make_mesh
from maxlm.resolve import resolve
from maxlm.train.compare import drawn_params
from maxlm.train.setup import make_setup
from tests.convert.folders import CONFIG, write_folder
from tests.data.test_tokenizers import of_bytes
from tests.tiny import MODEL, tiny_config

GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 84,
    "n_positions": 64,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def quiet(_line):
    pass


def tokenizer_json():
    """Words of one letter, four special tokens, and a begin token that is put in front of every text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    specials = ["<s>", "</s>", "<user>", "<assistant>"]
    vocabulary = {token: i for i, token in enumerate([*specials, "?", *"abcdefghijklmnopqrstuvwxyz "])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer.to_str()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("load")
    write_folder(path / "hf", config=CONFIG | {"vocab_size": 84})
    (path / "hf" / "tokenizer.json").write_text(tokenizer_json())
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE}
    (path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "hf" / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    from_hf(path / "hf", path / "ours", log=quiet)
    return path


def test_eight_devices_generate_what_one_does(place):
    mesh = generation_mesh(model_config(place / "hf"), jax.devices())
    assert (mesh.shape["tensor"], mesh.shape["fsdp"]) == (2, 4)  # two kv heads; 24 dims
    prompts = [[1, 5, 9], [1], [1, *range(30)]]

    def run(source, devices, **sampling):
        model = load_model(place / source, dtype="float32", log=quiet, devices=devices)
        cut = {len(x.sharding.device_set) for x in jax.tree.leaves(model.params)}
        assert cut == {len(devices)}
        return generate(model, prompts, max_new_tokens=12, sampling=Sampling(**sampling), key=jax.random.key(0))

    one = run("hf", jax.devices()[:1], temperature=0.0)
    assert run("ours", jax.devices(), temperature=0.0) == one
    assert len(set(one[0])) > 3
    many = run("hf", jax.devices(), temperature=1.0, top_k=5)
    assert run("ours", jax.devices()[:1], temperature=1.0, top_k=5) == many


@pytest.mark.parametrize(
    "sizes", [{"context": 2, "tensor": 2, "fsdp": 2}, {"pipeline": 2, "expert": 2, "data": 2}], ids=str
)
def test_a_run_samples_where_its_parameters_lie(sizes):
    """Experts on any mesh give what one device gives."""
    config = tiny_config(
        "unused",
        model=dataclasses.replace(MODEL, vocab_size=272, moe=MoeConfig(experts=4, active=2, dim=48)),
        parallel=ParallelConfig(**{"data": 1} | sizes),
        train__accumulation=2,
    )
    config = resolve(config, devices=8)
    setup = make_setup(config, make_mesh(config.parallel))
    params = drawn_params(setup.parts.specs, 0)
    spread = generation_runtime(setup.mesh, jnp.dtype("float32"))
    prompts = [[1, 5, 9], [1], [1, *range(30)]]

    def run(params, runtime):
        model = RunnableModel(config.model, setup.parts.graphdef, params, runtime)
        sampling = Sampling(temperature=1.0, top_k=20)
        return generate(model, prompts, max_new_tokens=12, sampling=sampling, key=jax.random.key(0))

    expected = run(params, Runtime())
    assert len(set(expected[0])) > 3
    assert run(jax.device_put(params, setup.shardings.params), spread) == expected


@pytest.mark.parametrize("source", ["hf", "ours"])
def test_prompts_and_chats_are_continued_as_the_files_say(place, source):
    text = PretrainedText(place / "hf")
    assert text.encode("ab") == [0, 5, 6] and text.stop_ids == [1, 3]
    chat = text.encode_chat([{"role": "user", "content": "hi"}])
    assert chat == [0, 2, *(5 + ord(c) - ord("a") for c in "hi"), 3]
    told = []
    asked = Asked(["hi"], max_tokens=8, sampling=Sampling(temperature=0.0), seed=0, chat=True)
    generate_from(place / source, asked, log=quiet, write=told.append)
    model = load_model(place / source, dtype="float32", log=quiet)
    ids = generate(
        model, [chat], max_new_tokens=8, sampling=asked.sampling, key=jax.random.key(0), stop_ids=[1, 3],
        vocab_size=text.vocab_size,
    )  # fmt: skip
    assert "".join(told) == text.decode(ids[0]) + "\n"
    told.clear()
    generate_from(place / source, asked._replace(chat=False, prompts=["hi", "a"]), log=quiet, write=told.append)
    assert told[0].startswith('--- "hi"\nhi') and told[1].startswith('--- "a"\na')


def test_a_stop_that_is_a_special_token_ends_a_text(place, tmp_path):
    """Which would never be found in the text: special tokens are left out there."""
    from tokenizers import AddedToken, Tokenizer

    text, greedy = PretrainedText(place / "hf"), Sampling(temperature=0.0)
    assert text.special_id("<user>") == 2 and text.special_id("a") is None and text.special_id("<us") is None
    model = load_model(place / "hf", dtype="float32", log=quiet)
    free = generate(
        model, [text.encode("hi")], max_new_tokens=8, sampling=greedy, key=jax.random.key(0), stop_ids=[1, 3],
        vocab_size=text.vocab_size,
    )[0]  # fmt: skip
    at = next(i for i in range(1, len(free)) if free[i] > 4 and free[i] not in free[:i])
    letter = text.decode(free[at : at + 1])
    shutil.copytree(place / "hf", tmp_path / "hf")
    tokenizer = Tokenizer.from_str(tokenizer_json())
    tokenizer.add_special_tokens([AddedToken(letter, special=True)])
    (tmp_path / "hf" / "tokenizer.json").write_text(tokenizer.to_str())
    told = []
    asked = Asked(["hi"], max_tokens=8, sampling=greedy, seed=0, stop=["never", letter])
    generate_from(tmp_path / "hf", asked, log=quiet, write=told.append)
    assert "".join(told) == f"hi{text.decode(free[:at])}\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "not safe|unsafe"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{% for %}", "fails"),
        ("{{ messages[0].role + 1 }}", "fails"),
        (None, "no chat template"),
    ],
)
def test_a_template_reaches_nothing_but_the_messages(place, tmp_path, template, message):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(TokenizerError, match=message):
        PretrainedText(tmp_path).encode_chat([{"role": "user", "content": "hi"}])


def test_templates_have_what_those_of_transformers_have(tmp_path):
    """gpt-oss and Mistral Small ask for the date, others mark what the model says, or write tools as JSON."""
    transformers = pytest.importorskip(
        "transformers", reason="NOT tested with transformers: pip install -e '.[parity]'"
    )
    template = (
        "{{ strftime_now('%Y') }}|{% for m in messages %}{% set t = m.content %}\n"
        "{% generation %}<{{ m.role }}>{{ m | tojson(indent=2, sort_keys=True) }}{% endgeneration %}{{ t }}"
        "{{ {'ü': '<1>'} | tojson(ensure_ascii=True, separators=(',', ':')) }}{% endfor %}"
    )
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template})
    )
    messages = [{"role": "user", "content": "hü<&>"}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert PretrainedText(tmp_path).render(messages) == expected
    assert expected.startswith("20") and r'{"\u00fc":"<1>"}' in expected


def test_what_texts_begin_with_is_known_or_refused(tmp_path):
    """A tokenizer with code of its own, as ChatGLM's: [gMASK] and sop come first, if the file tells of them."""
    lines = [f"the cat sees a dog and the dog takes {n} houses" for n in range(100)]
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(lines, 300))
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(TokenizerError, match=r"program of its own \(Own\).*add_bos_token"):
        PretrainedText(tmp_path).encode("the dog")
    added = {"301": {"content": "[gMASK]"}, "303": {"content": "sop"}}
    file.write_text(json.dumps(settings | {"added_tokens_decoder": added}))
    ids = PretrainedText(tmp_path).encode("the dog")
    assert ids[:2] == [301, 303]
    for said, first in (({"add_bos_token": False}, []), ({"bos_token": "<s>"}, [1])):
        file.write_text(json.dumps(settings | said))
        assert PretrainedText(tmp_path).encode("the dog") == [*first, *ids[2:]]


def test_prompts_begin_as_the_settings_say(tmp_path):
    """`transformers` 5 looks at tokenizer.json alone, which gives DeepSeek's models no begin token; 4 gave it."""
    transformers = pytest.importorskip("transformers", reason="NOT tested with transformers: pip install maxlm[parity]")
    from tokenizers import processors

    begin = "<｜begin▁of▁sentence｜>"
    settings = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": {"__type": "AddedToken", "content": begin}}
    for template in (False, True):
        pipeline = of_bytes(begin)
        if template:
            pipeline.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 256)])
        for said in ({}, {"add_bos_token": False}, {"add_bos_token": True}):
            place = tmp_path / f"{template} {said}"
            place.mkdir()
            pipeline.save(str(place / "tokenizer.json"))
            (place / "tokenizer_config.json").write_text(json.dumps(settings | said))
            theirs = transformers.AutoTokenizer.from_pretrained(place)("a b")["input_ids"]
            plain = [64, 220, 65]
            assert theirs[-3:] == plain
            ids = PretrainedText(place).encode("a b")
            assert ids == ([256, *plain] if said.get("add_bos_token") else theirs), (template, said)


def test_a_tiktoken_file_is_named_as_what_cannot_be_read(tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(TokenizerError, match=r"tokenizer.model is no sentencepiece model.*put a tokenizer.json there"):
        PretrainedText(tmp_path)


def test_a_sentencepiece_model_is_read_as_well(tmp_path):
    words = ["the", "cat", "sees", "a", "dog", "and", "the", "dog", "takes", "a", "house"]
    lines = [" ".join(words[i % 10 :] + words[: i % 7]) for i in range(300)]
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(lines, 300))
    added = {"300": {"content": "<turn>"}}
    settings = {"chat_template": "{{ bos_token }}<turn>{{ messages[0].content }}", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": added}))
    text = PretrainedText(tmp_path)
    ids = text.encode("the dog")
    assert ids[0] == 1 and text.decode(ids) == "the dog" and text.vocab_size == 301
    assert text.encode_chat([{"role": "user", "content": "the dog"}]) == [1, 300, *ids[1:]]


def test_what_a_model_cannot_do_is_said_before_it_is_loaded(place, tmp_path, monkeypatch):
    def loaded(*_args, **_kwargs):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(load, "load_model", loaded)
    asked = Asked(["hi"], max_tokens=90, sampling=Sampling(temperature=0.0), seed=0)
    shutil.copytree(place / "hf", tmp_path / "few")
    (tmp_path / "few" / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 8}))
    with pytest.raises(UserError, match=r"has ids from 0 to 13, but the model has 0 to 7; encode it with"):
        generate_from(tmp_path / "few", asked, log=quiet, write=quiet)
    (tmp_path / "gpt2").mkdir()
    shutil.copy(place / "hf" / "tokenizer.json", tmp_path / "gpt2")
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(GPT2))
    with pytest.raises(UserError, match=r"prompt 0 has 3 tokens and 90 more .* 64 learned positions; .*max_tokens=62,"):
        generate_from(tmp_path / "gpt2", asked, log=quiet, write=quiet)


def test_what_is_missing_is_said(place, tmp_path):
    asked = Asked(["hi"], max_tokens=1, sampling=Sampling(temperature=0.0), seed=0)
    with pytest.raises(UserError, match="holds no model"):
        generate_from(tmp_path, asked, log=quiet, write=quiet)
    with pytest.raises(UserError, match="a stop is empty"):  # before it is looked for
        generate_from(tmp_path, asked._replace(stop=["x", ""]), log=quiet, write=quiet)
    write_folder(tmp_path / "hf")
    with pytest.raises(TokenizerError, match="has no tokenizer.json"):
        generate_from(tmp_path / "hf", asked, log=quiet, write=quiet)
