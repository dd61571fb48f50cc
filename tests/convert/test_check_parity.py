"""The operator's comparison with `transformers`: that it agrees where it should, and notices where it should not."""

import json

import numpy as np
import pytest

from maxlm.convert.engine import from_hf
from maxlm.convert.safetensors import read_header
from tests.convert.cases import peer
from tools import check_parity
from tools.check_parity import agreement, main

MISSING = "parity with Hugging Face NOT tested: pip install -e '.[parity]'"
pytest.importorskip("torch", reason=MISSING)
pytest.importorskip("transformers", reason=MISSING)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Gemma 2: windows that are shorter than the prompts, soft-caps, norms on both sides."""
    path = tmp_path_factory.mktemp("parity") / "hf"
    peer("gemma2").save_pretrained(path)
    return path


def test_all_ways_agree_and_a_damaged_weight_shows(folder, tmp_path, capsys, monkeypatch):
    from_hf(folder, tmp_path / "ours", pad_vocab=16, log=lambda _: None)
    arguments = [str(tmp_path / "ours"), f"--against={folder}", "--tolerance=1e-4"]
    assert main([*arguments, "--long=24", f"--json={tmp_path / 'figures.json'}"]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.keys() == {"alone", "padded", "packed", "cached"}
    for found in figures.values():
        assert found["positions"] == 1 + 6 + 7 + 24
        assert found["max_difference"] < 1e-4 and found["max_kl"] < 1e-6
        assert found["top1"] == found["top5"] == 1.0
    assert "packed" in capsys.readouterr().out

    # Weights that differ show, and decide how the program ends.
    tensor = read_header(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    data = bytearray((folder / "model.safetensors").read_bytes())
    np.frombuffer(data, np.float32, 40, tensor.offset)[:] *= -1
    (folder / "model.safetensors").write_bytes(data)
    prompt = list(range(1, 24))
    found = agreement(
        check_parity.theirs(folder)(prompt), check_parity.Ours(tmp_path / "ours").alone([prompt])[0][:, :83]
    )
    assert found.max_difference > 1e-2 and found.max_kl > 1e-6
    monkeypatch.setattr(check_parity, "compare", lambda *_: {"alone": found})
    assert main(arguments) == 1


@pytest.mark.parametrize("bad", [0, 1], ids=["first", "last"])
def test_logits_that_are_no_numbers_do_not_pass(folder, monkeypatch, capsys, bad):
    logits = np.zeros((3, 8))
    good = agreement(logits, logits)
    broken = agreement(logits, np.where(np.arange(8) == 5, np.nan, logits))
    ways = [broken, good] if bad == 0 else [good, broken]
    monkeypatch.setattr(check_parity, "compare", lambda *_: dict(zip(("alone", "cached"), ways, strict=True)))
    assert main([str(folder)]) == 1
    assert "the largest difference is nan" in capsys.readouterr().out


def test_agreement_is_what_it_says():
    theirs = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    ours = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]])) + 3.0  # a constant changes no distribution
    found = agreement(theirs, ours)
    assert found.max_difference == pytest.approx(3 + np.log(2))
    assert found.max_kl == pytest.approx(0.25 * np.log(2)) and found.mean_kl == pytest.approx(found.max_kl / 2)
    assert (found.positions, found.top1, found.top5) == (2, 0.5, 1.0)
