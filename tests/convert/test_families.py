"""Every family against `transformers`: the same weights give the same logits, and go there and back bit for bit."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from maxlm.model.decoder import merge, split_model
from maxlm.model.family import families, family_of, hf_config, unlike
from maxlm.model.runtime import Runtime
from maxlm.model.table import bind, to_ours, to_theirs
from tests.convert.cases import CASES, VOCAB, peer

MISSING = "parity with Hugging Face NOT tested: pip install maxlm[parity]"
torch = pytest.importorskip("torch", reason=MISSING)
pytest.importorskip("transformers", reason=MISSING)

PROMPTS = [[1, 5, 9], [1], [1, *(7 * i % VOCAB for i in range(47))]]  # the last is longer than every window


@functools.lru_cache(maxsize=1)
def converted(name):
    """The peer, our config and structure, and the bound table."""
    model = peer(name)
    hf = model.config.to_dict() | {"architectures": [type(model).__name__]}
    family = family_of(hf)
    config = family.from_hf(hf)
    parts = split_model(config)
    return model, family, config, parts, bind(family.table(config), parts.specs)


def saved_tensors(model):
    """What `save_pretrained` would write: a tied head is not written twice."""
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    return {name: value.detach().numpy() for name, value in model.state_dict().items() if name not in tied}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name):
    model, _, _, parts, rows = converted(name)
    params = to_ours(rows, saved_tensors(model))

    @jax.jit
    def forward(params, tokens, length):
        decoder = merge(parts.graphdef, params)
        positions = jnp.minimum(jnp.arange(tokens.shape[1]), length - 1)[None]
        out = decoder.hidden(tokens, positions_BS=positions, segments_BS=None, runtime=Runtime())
        return decoder.logits(out.hidden_BSD)

    for prompt in PROMPTS:
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits.numpy()
        row = np.zeros((1, 48), np.int32)  # one program for all prompts: what follows a prompt does not reach it
        row[0, : len(prompt)] = prompt
        got = np.asarray(forward(params, row, len(prompt)))[:, : len(prompt)]
        assert np.abs(expected).max() > 1  # so that the tolerance has a meaning
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_bit_equal(name, dtype):
    model, _, _, _, rows = converted(name)
    tensors = {key: value.astype(dtype) for key, value in saved_tensors(model).items()}
    back = to_theirs(rows, to_ours(rows, tensors))
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert back[key].dtype == dtype and back[key].shape == value.shape
        assert back[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize("name", CASES)
def test_the_config_goes_there_and_back(name):
    model, family, config, _, _ = converted(name)
    written = hf_config(family, config)
    assert family_of(written) is family
    again = type(model.config)(**{key: value for key, value in written.items() if key != "architectures"})
    assert family.from_hf(again.to_dict() | {"architectures": written["architectures"]}) == config


def test_presets_are_expressed_by_their_family():
    for family in families().values():
        for name, model in family.presets.items():
            content = hf_config(family, model)
            assert family_of(content) is family, name
            bind(family.table(model), split_model(model).specs)
            assert not unlike(model, family.from_hf(content)), name
