"""DeepSeek-V3's layers that predict further tokens: against `transformers`' own, and through files."""

import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from maxlm.convert import model_config
from maxlm.convert.engine import from_hf, open_model, to_hf
from maxlm.convert.errors import ConversionError
from maxlm.convert.folder import open_folder
from maxlm.convert.safetensors import ShardWriter, TensorInfo, read_header
from maxlm.model.decoder import merge, split_model
from maxlm.model.runtime import Runtime
from tests.convert.cases import CASES, SHARED, VOCAB
from tests.tables import to_ours

MISSING = "parity with Hugging Face NOT tested: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=MISSING)
transformers = pytest.importorskip("transformers", reason=MISSING)


def quiet(_line):
    pass


def peer(**settings):
    """A tiny DeepSeek-V3 and its further layers, with matrices of unit gain and scales that are not all alike."""
    modeling = pytest.importorskip("transformers.modeling_layers", reason=MISSING)
    if not hasattr(modeling, "MtpModel"):
        pytest.skip("this transformers has no MtpModel to compare with; install 5.23 or later")
    settings = SHARED | CASES["deepseek_v3"].settings | {"num_hidden_layers": 2, "num_mtp_layers": 1} | settings
    config = transformers.DeepseekV3Config(**settings)
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    more = modeling.MtpModel(model, config.num_mtp_layers).eval().float()
    with torch.no_grad():
        for module in (model, more.layers):
            biases = [value for name, value in module.named_buffers() if name.endswith("e_score_correction_bias")]
            for weight in [*module.parameters(), *biases]:
                if weight.ndim > 1:
                    weight.normal_(0, 1 / math.sqrt(weight.shape[-1]))
                else:
                    weight.add_(0.1 * torch.randn_like(weight))
    return model, more


def write(path, model, more, *, dtype=ml_dtypes.bfloat16, further=True):
    """The folder as DeepSeek publishes it: the further layers numbered on, with copies of embedding and head."""
    tensors = {}
    first = model.config.num_hidden_layers
    states = {"model.layers.": model.model.layers} | ({"+": more.layers} if further else {})
    for stack, layers in states.items():
        for name, value in layers.state_dict().items():
            number, rest = name.split(".", 1)
            where = f"model.layers.{int(number) + (first if stack == '+' else 0)}."
            rest = rest.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.", 1)
            if rest.startswith("post_attention_") or not rest.startswith("mlp.experts."):
                tensors[where + rest] = value
                continue
            for expert, own in enumerate(value):
                if rest == "mlp.experts.gate_up_proj":
                    gate, up = own.chunk(2)
                    tensors[f"{where}mlp.experts.{expert}.gate_proj.weight"] = gate
                    tensors[f"{where}mlp.experts.{expert}.up_proj.weight"] = up
                else:
                    tensors[f"{where}mlp.experts.{expert}.down_proj.weight"] = own
    outer = {"model.embed_tokens.weight": model.model.embed_tokens, "model.norm.weight": model.model.norm}
    tensors |= {name: module.weight for name, module in (outer | {"lm_head.weight": model.lm_head}).items()}
    for i in range(first, first + len(more.layers)) if further else ():
        tensors[f"model.layers.{i}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        tensors[f"model.layers.{i}.shared_head.head.weight"] = tensors["lm_head.weight"]
    arrays = {name: value.detach().numpy().astype(dtype) for name, value in tensors.items()}
    path.mkdir()
    with ShardWriter(path, {k: TensorInfo(v.shape, v.dtype) for k, v in arrays.items()}, shard_bytes=10**9) as writer:
        for name, value in arrays.items():
            writer.write(name, value)
    (path / "config.json").write_text(json.dumps(model.config.to_dict() | {"architectures": ["DeepseekV3ForCausalLM"]}))
    return arrays


def test_each_layer_predicts_what_that_of_transformers_does(tmp_path):
    theirs, more = peer(num_mtp_layers=2)
    tensors = write(tmp_path / "hf", theirs, more, dtype=np.float32)
    _, described = open_model(tmp_path / "hf")
    assert described.model.mtp_layers == 2
    decoder = merge(split_model(described.model).graphdef, to_ours(described.rows, tensors))
    tokens, length = torch.tensor([[1 + 7 * i % (VOCAB - 1) for i in range(26)]]), 24

    with torch.no_grad():
        hidden = theirs.model(tokens[:, :length]).last_hidden_state
        expected = []
        for k in range(2):
            ahead = tokens[:, k + 1 : k + 1 + length]
            # Turned positions count from each other only, so that those of the first token do for the second, too.
            hidden = more.forward_layer(k, hidden, torch.arange(length)[None], None, input_ids=ahead)
            expected.append(theirs.lm_head(hidden).numpy())

    @jax.jit
    def predicted(decoder, tokens):
        rows = {"positions_BS": jnp.arange(length)[None], "segments_BS": None, "runtime": Runtime()}
        out = decoder.hidden(tokens[:, :length], **rows)
        ahead = [tokens[:, k + 1 : k + 1 + length] for k in range(2)]
        return decoder.logits(decoder.further(out.hidden_BSD, ahead, **rows).hidden[:, 0])

    got = predicted(decoder, jnp.asarray(tokens.numpy(), jnp.int32))
    assert np.abs(expected[1]).max() > 1
    np.testing.assert_allclose(np.asarray(got), np.concatenate(expected), atol=1e-4, rtol=0)


def test_files_go_there_and_back_and_transformers_leaves_them_alone(tmp_path):
    theirs, more = peer()
    tensors = write(tmp_path / "hf", theirs, more)
    from_hf(tmp_path / "hf", tmp_path / "ours", log=quiet)
    assert model_config(tmp_path / "ours").mtp_layers == model_config(tmp_path / "hf").mtp_layers == 1
    to_hf(tmp_path / "ours", tmp_path / "back", log=quiet)
    back = open_folder(tmp_path / "back").tensors
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].info.shape == value.shape and back[name].info.dtype == value.dtype, name
        assert back[name].read(slice(None)).tobytes() == value.tobytes(), name
    assert json.loads((tmp_path / "back/config.json").read_text())["num_nextn_predict_layers"] == 1
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    # It ignores these layers by the number that they have after the 61 layers of DeepSeek-V3.
    assert {"model.layers.2.eh_proj.weight", "model.layers.2.hnorm.weight"} < info["unexpected_keys"]
    for name in info["unexpected_keys"]:
        assert name.startswith("model.layers.2.")
        published = name.replace("layers.2.", "layers.61.")
        assert any(re.search(pattern, published) for pattern in type(theirs)._keys_to_ignore_on_load_unexpected)


def test_a_folder_may_be_without_them_and_a_model_may_do_without_them(tmp_path):
    theirs, more = peer()
    tensors = write(tmp_path / "hf", theirs, more, further=False)
    assert model_config(tmp_path / "hf").mtp_layers == 0  # though the config says 1
    from_hf(tmp_path / "hf", tmp_path / "ours", log=quiet)
    to_hf(tmp_path / "ours", tmp_path / "back", log=quiet)
    assert open_folder(tmp_path / "back").tensors.keys() == tensors.keys()
    assert json.loads((tmp_path / "back/config.json").read_text())["num_nextn_predict_layers"] == 0
    shutil.rmtree(tmp_path / "hf")

    tensors = write(tmp_path / "hf", theirs, more)
    _, described = open_model(tmp_path / "hf", further=False)
    assert described.model.mtp_layers == 0 and not any(path.startswith("mtp") for path in described.specs)
    file = tmp_path / "hf/model.safetensors"
    copy = read_header(file)["model.layers.2.shared_head.head.weight"]
    data = bytearray(file.read_bytes())
    data[copy.offset] ^= 1
    file.write_bytes(data)
    with pytest.raises(ConversionError, match=re.escape("model.layers.2.shared_head.head.weight differs from lm_head")):
        open_model(tmp_path / "hf")
