"""The table of accelerators."""

import json

import pytest

from maxlm.chips import CHIPS, chip_of_kind, load_chips
from maxlm.errors import UserError


def test_every_figure_of_an_accelerator_is_there_and_has_a_source():
    figures = ("flops", "hbm_bytes", "usable_bytes", "hbm_bandwidth", "link_bandwidth", "network_bandwidth")
    for chip in CHIPS.values():
        if chip.platform == "cpu":
            continue
        sourced = {name.strip() for names in chip.sources for name in names.split(",")}
        for name in figures:
            value = getattr(chip, name)
            assert (min(value.values()) if isinstance(value, dict) else value) > 0, (chip.name, name)
            assert name in sourced, (chip.name, name)
        assert (chip.platform == "tpu") == (chip.slice_chips > 0) == ("slice_chips" in sourced), chip.name
        assert 0.9 < chip.usable_bytes / chip.hbm_bytes < 1, chip.name
        # Links inside a slice or node are faster than the network between them, and memory is faster than both.
        assert chip.hbm_bandwidth > chip.link_bandwidth > chip.network_bandwidth, chip.name
    assert len({kind for chip in CHIPS.values() for kind in chip.kinds}) == sum(len(c.kinds) for c in CHIPS.values())


def test_a_cycle_of_a_tpu_is_that_of_its_matrix_units():
    # Multiply-adds a cycle of a device: two TensorCores of four units of 128 x 128 (v4, v5p), or one (v5e). Of v6e the
    # count of units and the clock are told differently; XLA's own cycles of a large product need over 3 x 256 x 256.
    for name, macs in (("v4", 8 * 128**2), ("v5p", 8 * 128**2), ("v5e", 4 * 128**2), ("v6e", 4 * 256**2)):
        chip = CHIPS[name]
        assert chip.clock * 2 * macs == pytest.approx(chip.flops["bfloat16"], rel=2e-3)


def test_chips_of_a_file_are_added_to_the_table(tmp_path):
    path = tmp_path / "chips.json"
    path.write_text(json.dumps({"Mine": {"like": "h100", "hbm_bandwidth": 4e12, "flops": {"bfloat16": 1e15}}}))
    mine = load_chips(path)["mine"]
    assert (mine.hbm_bandwidth, mine.peak("float16")) == (4e12, 1e15)
    assert mine.peak("float8") == CHIPS["h100"].peak("float8")
    assert mine.sources["hbm_bandwidth"] == str(path)
    assert (mine.name, mine.kind, CHIPS["h100"].kind) == ("mine", "h100", "h100")
    assert chip_of_kind("NVIDIA H100 80GB HBM3") is CHIPS["h100"]  # a copy does not take its model's device kinds


def test_memory_of_a_files_chip_is_used_as_far_as_its_models(tmp_path):
    path = tmp_path / "chips.json"
    path.write_text(json.dumps({"big": {"like": "v5p", "hbm_bytes": 2 * CHIPS["v5p"].hbm_bytes}, "v5p": {"price": 1}}))
    table = load_chips(path)
    assert table["big"].usable_bytes == pytest.approx(2 * CHIPS["v5p"].usable_bytes)
    assert table["v5p"].usable_bytes == CHIPS["v5p"].usable_bytes and table["v5p"].kind == "v5p"
    path.write_text(json.dumps({"big": {"like": "v5p", "hbm_bytes": 1e12, "usable_bytes": 9e11}}))
    assert load_chips(path)["big"].usable_bytes == 9e11


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read"),
        ("[]", "holds no chips by name"),
        ('{"v4": 3}', "holds no chips by name"),
        ('{"x": {}}', '"like": one of v4'),
        ('{"x": {"like": ["v4"]}}', '"like": one of v4'),
        ('{"v4": {"speed": 1}}', "has speed; known figures"),
        ('{"v4": {"price": "3"}}', "v4 has price='3'; write it as it is of v4: "),
        ('{"v4": {"flops": 1e12}}', "v4 has flops="),
        ('{"v4": {"flops": {"int8": "fast"}}}', "v4 has flops="),
        (
            '{"v4": {"flops": {"bfloat61": 1e15}}}',
            "v4 has flops of 'bfloat61', which is no dtype .* type 'bfloat16' .there are",
        ),
        ('{"v4": {"flops": {"bf16": 1e15, "int8": 1e15}}}', "type 'bfloat16'"),
        ('{"x": {"like": "cpu", "flops": {"fp32": 1e11}}}', "type 'float32'"),
        ('{"v4": {"kinds": "TPU v4"}}', "v4 has kinds='TPU v4'"),
    ],
)
def test_a_wrong_file_of_chips_is_refused_in_words(tmp_path, content, says):
    path = tmp_path / "chips.json"
    path.write_text(content)
    with pytest.raises(UserError, match=says):
        load_chips(path)
