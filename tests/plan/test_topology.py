"""Names of hardware."""

import json

import pytest

from maxlm.chips import load_chips
from maxlm.plan.topology import TopologyError, parse_topology


@pytest.mark.parametrize(
    ("name", "chips", "devices", "slices", "shape", "hosts"),
    [
        ("v5p-128", 64, 64, 1, (4, 4, 4), 16),  # the number counts TensorCores
        ("v5p-256", 128, 128, 1, (4, 4, 8), 32),
        ("v5p-8", 4, 4, 1, (2, 2, 1), 1),
        ("v5p-2048", 1024, 1024, 1, (8, 8, 16), 256),
        ("v5p-12288", 6144, 6144, 1, (16, 16, 24), 1536),
        ("v5p:4x4x12", 192, 192, 1, (4, 4, 12), 48),
        ("v4-16", 8, 8, 1, (2, 2, 2), 2),
        ("v6e-256", 256, 256, 1, (16, 16), 64),  # the number counts chips
        ("v5litepod-16", 16, 16, 1, (4, 4), 4),
        ("2*v5p-128", 128, 128, 2, (4, 4, 4), 32),
        ("v4-8192", 4096, 4096, 1, (16, 16, 16), 1024),  # the largest of its chip
        ("tpu7x-18432", 9216, 18432, 1, (16, 24, 24), 2304),
        ("v5e:2x4", 8, 8, 1, (2, 4), 2),
        ("tpu7x-128", 64, 128, 1, (4, 4, 4), 16),  # two devices a chip
        ("tpu7x:2x2x1", 4, 8, 1, (2, 2, 1), 1),
        ("h100x8", 8, 8, 1, (8,), 1),
        ("H100x8x16", 128, 128, 16, (8,), 16),
        ("2*b200x8", 16, 16, 2, (8,), 2),
        ("a100-40gbx8", 8, 8, 1, (8,), 1),
        ("cpu-8", 8, 8, 1, (8,), 1),
    ],
)
def test_names_and_what_they_stand_for(name, chips, devices, slices, shape, hosts):
    found = parse_topology(name)
    assert (found.chips, found.devices, found.slices, found.shape, found.hosts) == (
        chips,
        devices,
        slices,
        shape,
        hosts,
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v9-128", "type v5p-128"),
        ("", "type v5p-128"),
        ("v5p", "type v5p-128"),
        ("v5p-127", "two a chip.*v5p-128"),
        ("v6e-100", "counts chips.*v6e-128"),
        ("v5p:4x4", "has 2 sides; a v5p slice has 3"),
        ("v6e:64x64", r"4096 chips, and the largest of v6e has 256 \(v6e-256\); for several slices type 2\*v6e-256"),
        ("v5e:16x32", r"the largest of v5e has 256 .*type 2\*v5e-256"),
        ("v4-16384", r"8192 chips, and the largest of v4 has 4096 \(v4-8192\)"),
        ("2*v5p-16384", r"the largest of v5p has 6144 \(v5p-12288\)"),
        ("v5p:3x5x7", "with sides of 1, 2 or multiples of 4"),
        ("v6e:4x16", "those of v6e are 1x1, 2x2, 2x4, 4x4,.*, 16x16"),
        ("v4-8190", "the nearest are v4-2048, v4-4096, v4-8192"),
        ("h100x0", "h100x8, or h100x8x16 for 16 nodes"),
        ("2*h100x8x2", "nodes twice"),
        ("h100x64", "64 GPUs in a node, and a node of h100 holds 8; type h100x8x8"),
        ("a100x16x4", "type a100x8x8"),
    ],
)
def test_a_name_that_stands_for_nothing_is_answered_with_one_that_does(name, says):
    with pytest.raises(TopologyError, match=says):
        parse_topology(name)


def test_a_file_of_chips_may_say_how_large_slices_are(tmp_path):
    path = tmp_path / "chips.json"
    path.write_text(json.dumps({"v5p": {"slice_chips": 8960}, "small": {"like": "v5p", "slice_chips": 64}}))
    table = load_chips(path)
    assert parse_topology("v5p-16384", table).chips == 8192
    with pytest.raises(TopologyError, match=r"128 chips, and the largest of small has 64 \(small-128\)"):
        parse_topology("small-256", table)


def test_only_whole_cubes_and_sides_of_sixteen_are_rings():
    assert parse_topology("v5p-128").wrapped == (True, True, True)
    assert parse_topology("v5p-16").wrapped == (False, False, False)
    assert parse_topology("v6e-128").wrapped == (False, True)
