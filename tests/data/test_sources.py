"""Every source gives each of its documents once, however it is cut into units, and says why it leaves one out."""

import gzip
import json
import os
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.data import sources
from maxlm.data.sources import Skip, SourceError, list_source, read_unit

DOCUMENTS = ["first", "second\nwith a line", "third é", "", "fourth 🙂"]
WANTED = Counter(text.encode() for text in DOCUMENTS if text)


def read(spec, field="text"):
    """Documents and reasons, each with its count."""
    items = Counter(item for unit in list_source(spec, field).units for item in read_unit(unit))
    documents = Counter({item: count for item, count in items.items() if isinstance(item, bytes)})
    return documents, {item.reason: count for item, count in items.items() if isinstance(item, Skip)}


def json_lines(texts):
    return "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()


def test_stdlib_is_every_py_file_outside_site_packages():
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages"}
    expected = {str(p) for p in root.rglob("*.py") if p.is_file() and not left_out & set(p.relative_to(root).parts)}
    listing = list_source("stdlib", "text")
    listed = [path for unit in listing.units for path in unit.files]
    assert len(listed) == len(set(listed)) == listing.files
    assert set(listed) == expected
    assert sum(unit.size for unit in listing.units) == listing.size == sum(os.path.getsize(path) for path in expected)


def test_text_takes_files_and_folders_but_nothing_hidden(tmp_path):
    for name, content in {
        "a/one.txt": b"one",
        "a/b/two.md": b"two",
        "a/.git/config": b"hidden",
        "a/.hidden": b"hidden",
        "a/empty": b"",
        "a/latin": b"\xe9t\xe9",
        "c.txt": b"three",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert read(f"text:{tmp_path}/a") == ({b"one": 1, b"two": 1}, {"empty": 1, "not_utf8": 1})
    assert read(f"text:{tmp_path}/**/*.txt") == ({b"one": 1, b"three": 1}, {})
    # A file that matches twice is one document.
    assert read(f"text:{tmp_path}/**")[0] == {b"one": 1, b"two": 1, b"three": 1}


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=("Cs",))), min_size=1), unit=st.integers(1, 60))
def test_jsonl_gives_each_line_once_wherever_units_are_cut(tmp_path_factory, texts, unit):
    folder = tmp_path_factory.mktemp("jsonl")
    (folder / "x.jsonl").write_bytes(json_lines(texts).rstrip(b"\n"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_unit_bytes", lambda total: unit)
        listing = list_source(f"jsonl:{folder}", "text")
        documents, skipped = read(f"jsonl:{folder}")
    assert sum(part.size for part in listing.units) == listing.size
    assert documents == Counter(text.encode() for text in texts if text)
    assert skipped.get("empty", 0) == texts.count("")


def test_packed_jsonl_reads_like_plain(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    data = json_lines(DOCUMENTS)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "x.jsonl.zst").write_bytes(zstandard.compress(data))
    for ending in ("gz", "zst"):
        assert read(f"jsonl:{tmp_path}/*.{ending}") == (WANTED, {"empty": 1})
    assert read(f"jsonl:{tmp_path}")[0] == WANTED + WANTED
    for ending in ("gz", "zst"):
        path = tmp_path / f"x.jsonl.{ending}"
        path.write_bytes(b"junk" + path.read_bytes()[:20])
        with pytest.raises(SourceError, match=f"x.jsonl.{ending} cannot be"):
            read(f"jsonl:{path}")


def test_a_cut_or_flipped_packed_file_is_named(tmp_path):
    """Half of the text is not the text; zstandard's own reader gives what there is, and no more than one frame."""
    zstandard = pytest.importorskip("zstandard")
    texts = [os.urandom(3000).hex() for _ in range(100)]
    halves = [json_lines(texts[:50]), json_lines(texts[50:])]
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"  # as parallel packers write between frames
    packer = zstandard.ZstdCompressor(write_checksum=True)  # as the program zstd does
    whole = {"zst": skippable.join(map(packer.compress, halves)), "gz": b"".join(map(gzip.compress, halves))}
    for ending, content in whole.items():
        path = tmp_path / f"x.jsonl.{ending}"
        path.write_bytes(content)
        assert read(f"jsonl:{path}")[0] == Counter(text.encode() for text in texts)
        for kept in (len(content) // 4, len(content) * 3 // 4, len(content) - 1):
            path.write_bytes(content[:kept])
            with pytest.raises(SourceError, match=rf"x.jsonl.{ending} cannot be"):
                read(f"jsonl:{path}")
        damaged = bytearray(content)
        for position in range(len(content) // 4, len(content) // 4 + 400):
            damaged[position] ^= 255
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match=rf"x.jsonl.{ending} cannot be"):
            read(f"jsonl:{path}")


def test_lines_without_text_are_counted_by_reason(tmp_path):
    lines = [
        b'{"text": "good"}',
        b"not json",
        b'{"other": 1}',
        b'{"text": 5}',
        b"[1]",
        b'{"text": "\\ud800"}',
        b"",
        b'"x"',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    assert read(f"jsonl:{tmp_path}/x.jsonl") == ({b"good": 1}, {"not_json": 1, "no_text": 4, "not_utf8": 1})


def test_parquet_reads_every_row_group(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"body": [*DOCUMENTS, None], "id": list(range(6))})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    assert read(f"parquet:{tmp_path}", "body") == (WANTED, {"empty": 1, "no_text": 1})
    monkeypatch.setattr(sources, "_unit_bytes", lambda total: 1)
    assert len(list_source(f"parquet:{tmp_path}", "body").units) == 3
    assert read(f"parquet:{tmp_path}/*.parquet", "body")[0] == WANTED
    with pytest.raises(SourceError, match=r"has no column 'text' but body, id: set the store's text_field"):
        read(f"parquet:{tmp_path}")
    (tmp_path / "y.parquet").write_bytes(b"junk")
    with pytest.raises(SourceError, match=r"y.parquet is no parquet file"):
        read(f"parquet:{tmp_path}", "body")


def test_a_damaged_parquet_file_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path, texts = tmp_path / "x.parquet", [f"number {number}" for number in range(500, 700)]
    parquet.write_table(pyarrow.table({"text": texts}), path, use_dictionary=False, compression="none")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"number 555", b"n\xffmber 555"))  # of the copies one is a statistic
    documents, skipped = read(f"parquet:{path}")
    assert len(documents) == 199 and skipped == {"not_utf8": 1}
    path.write_bytes(whole.replace(b"\x0a\0\0\0number 555", b"\xff\xff\xff\x7fnumber 555"))  # its length
    with pytest.raises(SourceError, match="x.parquet cannot be read"):
        read(f"parquet:{path}")


def test_tfds_reads_a_builder_without_tensorflow(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets", reason="TFDS SOURCE NOT TESTED: pip install -e '.[tfds]'")

    class TinyText(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"body": tfds.features.Text()})
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, text in enumerate(DOCUMENTS):
                yield number, {"body": text}

    builder = TinyText(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    spec = f"tfds:{builder.data_path}/train"
    monkeypatch.setattr(sources, "_unit_bytes", lambda total: 1)
    assert len(list_source(spec, "body").units) == len(DOCUMENTS)
    assert read(spec, "body") == (WANTED, {"empty": 1})
    assert "tensorflow" not in sys.modules
    with pytest.raises(SourceError, match=r"no field 'text' but body"):
        read(spec)
    with pytest.raises(SourceError, match=r"cannot be opened"):
        read(f"tfds:{builder.data_path}/validation", "body")
    with pytest.raises(SourceError, match=r"should read tfds:NAME/SPLIT"):
        read("tfds:tiny_text", "body")


def test_what_tfds_makes_with_beam_is_not_begun_but_its_folder_asked_for():
    tfds = pytest.importorskip("tensorflow_datasets", reason="TFDS SOURCE NOT TESTED: pip install -e '.[tfds]'")

    class TinyBeam(tfds.core.BeamBasedBuilder):
        VERSION = tfds.core.Version("3.1.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            raise AssertionError("it was begun")

        def _build_pcollection(self, pipeline):
            raise AssertionError("it was begun")

    # The recipes' own text comes under a name that TFDS does not know where TensorFlow is not.
    for name, why in (("tiny_beam", "Apache Beam"), ("c4/en", "Apache Beam|TensorFlow"), ("no_such", "no such name")):
        with pytest.raises(SourceError, match=f"is not there, and .*({why})") as error:
            read(f"tfds:{name}/train")
        assert f"tfds build {name} --file_format=array_record" in str(error.value)
        assert f"tfds:/data/{name}/VERSION/train" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(SourceError, match="cannot be opened") as error:
        read("tfds:/data/none/1.0.0/train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "module", "extra"),
    [
        ("parquet:{}/x.parquet", "pyarrow", "data"),
        ("jsonl:{}/x.jsonl.zst", "zstandard", "data"),
        ("tfds:x/y", "tensorflow_datasets", "tfds"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, spec, module, extra):
    for name in ("x.parquet", "x.jsonl.zst"):
        (tmp_path / name).write_bytes(b"x")
    for name in [name for name in sys.modules if name.split(".")[0] == module] + [module]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SourceError, match=rf"needs the package {module}: pip install -e '\.\[{extra}\]'"):
        read(spec.format(tmp_path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("stdib", r"no source 'stdib' \(in 'stdib'\), only stdlib, .*; did you mean stdlib\?"),
        ("parket:*.parquet", r"did you mean parquet\?"),
        ("", r"no source ''"),
        ("text:", r"the source 'text:' should read text:GLOB"),
        ("stdlib:x", r"should read stdlib"),
        ("text:/nowhere/at/all/*.txt", r"the source 'text:/nowhere/at/all/\*.txt' matches no files"),
    ],
)
def test_errors_say_what_to_type(spec, message):
    with pytest.raises(SourceError, match=message):
        list_source(spec, "text")


def test_links_to_folders_are_followed_and_may_lead_in_a_circle(tmp_path):
    for name in ("data/a/one.txt", "data/z/two.txt", "elsewhere/three.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(Path(name).stem)
    for name, target in {"data/more": "elsewhere", "data/a/up": "data", "data/b": "data/z"}.items():
        (tmp_path / name).symlink_to(tmp_path / target)
    assert read(f"text:{tmp_path}/data") == ({b"one": 1, b"two": 1, b"three": 1}, {})


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "data" / "closed").mkdir(parents=True)
    (tmp_path / "data" / "one.txt").write_text("one")
    scandir = os.scandir

    def refuse(path):  # as the system does to everybody but root, who may run this test
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for pattern in ("data", "data/**", "data/**/*.txt", "data/*/*.txt", "d*/closed/*.txt"):
        with pytest.raises(SourceError, match=r"data/closed cannot be read: Permission denied"):
            list_source(f"text:{tmp_path}/{pattern}", "text")
    assert list_source(f"text:{tmp_path}/data/*.txt", "text").files == 1  # which does not look there


@pytest.mark.parametrize("spec", ["text:{}", "text:{}/*.txt", "text:{}/gone.txt"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, spec):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "one.txt").write_text("one")
    (tmp_path / "data" / "gone.txt").symlink_to("../moved/two.txt")
    with pytest.raises(SourceError, match=r"data/gone.txt \(a link to ../moved/two.txt\) cannot be read: No such file"):
        list_source(spec.format(tmp_path / "data"), "text")
    # One that the source would not have read is nothing to it, nor is what holds no text.
    (tmp_path / "data" / "two.jsonl").write_text('{"text": "two"}\n')
    os.mkfifo(tmp_path / "data" / "three.jsonl")
    assert list_source(f"jsonl:{tmp_path}/data", "text").files == 1


def test_an_empty_folder_matches_nothing(tmp_path):
    with pytest.raises(SourceError, match="matches no files"):
        list_source(f"text:{tmp_path}", "text")


def test_the_listing_changes_when_a_file_does(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = list_source(f"text:{tmp_path}", "text").fingerprint
    assert list_source(f"text:{tmp_path}/*.txt", "text").fingerprint == before
    os.utime(path, ns=(1, 1))
    assert list_source(f"text:{tmp_path}", "text").fingerprint != before


def test_a_file_that_vanished_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    (unit,) = list_source(f"text:{path}", "text").units
    path.unlink()
    with pytest.raises(SourceError, match="a.txt cannot be read"):
        list(read_unit(unit))
