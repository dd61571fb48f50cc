"""The same weights give the same logits as Hugging Face's Llama."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with Hugging Face NOT tested: pip install maxlm[parity]")
transformers = pytest.importorskip(
    "transformers", reason="parity with Hugging Face NOT tested: pip install maxlm[parity]"
)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_equal_llama(tiny, tied):
    config = tiny.config(tie_embeddings=tied, norm_epsilon=1e-5, attention={"rope_theta": 500_000.0})
    built = tiny.build(config, noise=0.1)
    attention = config.attention
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.embed_dim,
            intermediate_size=config.mlp.dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=attention.q_heads,
            num_key_value_heads=attention.kv_heads,
            head_dim=attention.head_dim,
            rms_norm_eps=config.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": attention.rope_theta},
            tie_word_embeddings=tied,
            max_position_embeddings=64,
            attn_implementation="eager",
        )
    ).eval()
    peer.load_state_dict(_state(built.params, config), strict=not tied)
    tokens = np.array(tiny.tokens(2, 32))
    with torch.no_grad():
        expected = peer(torch.from_numpy(tokens).long()).logits.numpy()
    got = jax.jit(lambda t: built.model.logits(tiny.hidden(built.model, t).hidden_BSD))(jnp.asarray(tokens))
    assert np.abs(expected).max() > 1  # logits of order one and more, so that the tolerance has a meaning
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


def _state(params, config):
    """Hugging Face's names and (out, in) layout."""
    layers, d = params["layers"], config.embed_dim
    state = {
        "model.embed_tokens.weight": params["embedding"]["table"],
        "model.norm.weight": params["final_norm"]["scale"],
    }
    if not config.tie_embeddings:
        state["lm_head.weight"] = params["head"]["kernel"].T
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}."
        state[prefix + "input_layernorm.weight"] = layers["attention_norm"]["scale"][i]
        state[prefix + "post_attention_layernorm.weight"] = layers["mlp_norm"]["scale"][i]
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            state[f"{prefix}self_attn.{theirs}.weight"] = layers["attention"][ours][i].reshape(d, -1).T
        state[prefix + "self_attn.o_proj.weight"] = layers["attention"]["output"][i].reshape(-1, d).T
        for name in ("gate", "up", "down"):
            state[f"{prefix}mlp.{name}_proj.weight"] = layers["mlp"][name][i].T
    return {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
