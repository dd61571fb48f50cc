import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config import DataConfig, PhaseConfig
from maxlm.data.batch import Batch
from maxlm.data.loader import DataChanged, DataError, Loader, Skip, check_records
from maxlm.data.store import StoreWriter, TokenStore
from maxlm.data.tokenizers import load_tokenizer
from tests.data.memory_store import MemoryStore, targets_of

SMALL = np.random.default_rng(0).integers(1, 30, 40).tolist()
LARGE = np.random.default_rng(1).integers(1, 30, 90).tolist()
both = pytest.mark.parametrize("packing", ["split", "pack"])


def stores() -> dict[str, MemoryStore]:
    return {"small": MemoryStore(SMALL), "large": MemoryStore(LARGE, first_id=100_000)}


def data(**settings) -> DataConfig:
    return DataConfig(**{"sequence_length": 8, "batch_size": 5} | settings)


def equal(one: Batch, other: Batch) -> bool:
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def rows_of(loader: Loader, steps: range) -> list[Batch]:
    """The rows of some steps as batches of one."""
    out = []
    for step in steps:
        batch = loader.batch(step)
        out += [Batch(*(field[i : i + 1] for field in batch)) for i in range(len(batch.tokens))]
    return out


def several_phases(packing: str = "split") -> DataConfig:
    return data(
        packing=packing,
        mixture=(("small", 1.0),),
        phases={
            "mixed": PhaseConfig(from_step=7, mixture=(("small", 0.3), ("large", 0.7))),
            "long": PhaseConfig(from_step=12, sequence_length=16, batch_size=3),
            "big": PhaseConfig(from_step=20, batch_size=11),
        },
    )


@both
def test_every_epoch_has_every_target_exactly_once_in_another_order(packing: str):
    store = MemoryStore(SMALL)
    loader = Loader({"small": store}, data(packing=packing), seed=0)
    rows = rows_of(loader, range(100))
    epoch = round(len(rows) / loader.epochs(100)["small"])
    first, second = rows[:epoch], rows[epoch : 2 * epoch]
    assert targets_of(first, store.train) == targets_of(second, store.train) == store.train.legitimate
    assert [row.tokens.tolist() for row in first] != [row.tokens.tolist() for row in second]
    assert loader.fill(0)["small"] == pytest.approx(np.mean([row.segments > 0 for row in first]), abs=1 / epoch)


@settings(deadline=None, max_examples=60)
@given(
    cuts=st.lists(st.integers(0, 11), max_size=4), step=st.integers(0, 40), packing=st.sampled_from(["split", "pack"])
)
def test_any_partition_of_the_rows_gives_the_batch(cuts: list[int], step: int, packing: str):
    loader = Loader(stores(), several_phases(packing), seed=3)
    whole = loader.batch(step)
    edges = [0, *sorted(min(cut, len(whole.tokens)) for cut in cuts), len(whole.tokens)]
    parts = [loader.batch(step, slice(a, b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    assert equal(Batch(*map(np.concatenate, zip(*parts, strict=True))), whole)
    assert equal(loader.batch(step, slice(1, None, 2)), Batch(*(field[1::2] for field in whole)))


def test_a_process_reads_only_its_rows(monkeypatch: pytest.MonkeyPatch):
    one = stores()
    loader = Loader(one, data(), seed=0)
    tokens_read: list[int] = []
    for store in one.values():
        read = store.train.read
        monkeypatch.setattr(store.train, "read", lambda a, b, read=read: tokens_read.append(b - a) or read(a, b))
    loader.batch(3, slice(1, 3))
    assert len(tokens_read) == 2 and max(tokens_read) <= 9


@both
def test_batches_do_not_depend_on_what_was_read_before(packing: str):
    """Resuming is nothing else: a fresh loader is asked for a later step, in the middle of an epoch and a phase."""
    config = several_phases(packing)
    onward = [Loader(stores(), config, seed=1).batch(step) for step in range(30)]
    loader = Loader(stores(), config, seed=1)
    for step in (29, 3, 3, 14, 0, 21, 7, 6):
        assert equal(loader.batch(step), onward[step])


def test_long_epochs_are_exact_too():
    """Rows are worked out in blocks (of 1,024) inside: batches lie across their edges, and an epoch has several."""
    store = MemoryStore([50] * 400)
    loader = Loader({"a": store}, data(batch_size=700), seed=0)
    per_epoch = -(-(50 * 400 - 1) // 8)
    rows = rows_of(loader, range(8))
    for start in (0, per_epoch):
        assert targets_of(rows[start : start + per_epoch], store.train) == store.train.legitimate
    whole = loader.batch(1)
    assert equal(loader.batch(1, slice(None, None, -300)), Batch(*(field[::-300] for field in whole)))


def test_seed_store_and_epoch_change_the_order():
    def order(seed: int, lengths: list[int]) -> list[int]:
        loader = Loader({"a": MemoryStore(lengths)}, data(batch_size=40), seed=seed)
        return (loader.batch(0).tokens[:, 0] // 8).tolist()

    lengths = [10] * 40
    assert order(0, lengths) == order(0, lengths)
    assert order(0, lengths) != order(1, lengths)
    assert order(0, lengths) != order(0, [9, 11, *lengths[2:]])


@pytest.mark.parametrize("mixture", [(("small", 3.0), ("large", 1.0)), (("large", 1.0),), ()])
def test_mixtures_are_kept_in_every_batch(mixture: tuple[tuple[str, float], ...]):
    loader = Loader(stores(), data(mixture=mixture, batch_size=16), seed=0)
    weights = dict(mixture)
    if not mixture:  # by size: the number of rows
        sizes = {"small": -(-(sum(SMALL) - 1) // 8), "large": -(-(sum(LARGE) - 1) // 8)}
        weights = {name: float(size) for name, size in sizes.items()}
    share = weights.get("large", 0.0) / sum(weights.values())
    for step in range(20):
        from_large = int((loader.batch(step).tokens[:, 0] >= 100_000).sum())
        assert abs(from_large - 16 * share) <= 1


def test_by_size_all_stores_end_their_epoch_together():
    config = data(batch_size=1)
    loader = Loader(stores(), config, seed=0)
    rows = sum(-(-(sum(lengths) - 1) // 8) for lengths in (SMALL, LARGE))
    epochs = loader.epochs(rows)
    assert epochs == {"small": 1.0, "large": 1.0}
    seen = rows_of(loader, range(rows))
    assert all(targets_of(seen, store.train) == store.train.legitimate for store in stores().values())


def test_a_store_goes_on_where_it_stood_while_rows_keep_their_length():
    """Through a new mixture, a phase in which it is not used, and a new batch size: no row twice, none left out."""
    phases = {
        "mixed": PhaseConfig(from_step=3, mixture=(("small", 0.5), ("large", 0.5))),
        "without": PhaseConfig(from_step=6, mixture=(("large", 1.0),)),
        "back": PhaseConfig(from_step=9, batch_size=4, mixture=(("small", 1.0),)),
    }
    loader = Loader(stores(), data(mixture=(("small", 1.0),), phases=phases), seed=0)
    small = stores()["small"].train
    rows = [row for row in rows_of(loader, range(60)) if row.tokens[0, 0] < 100_000]
    per_epoch = -(-(sum(SMALL) - 1) // 8)
    for start in range(0, len(rows) - per_epoch, per_epoch):
        assert targets_of(rows[start : start + per_epoch], small) == small.legitimate
    assert loader.epochs(60)["small"] == pytest.approx(len(rows) / per_epoch)
    assert loader.shape(8) == (5, 8) and loader.shape(9) == (4, 8)


def test_a_new_length_begins_an_epoch_that_never_was():
    phases = {
        "long": PhaseConfig(from_step=10, sequence_length=16),
        "short": PhaseConfig(from_step=80, sequence_length=8),
    }
    loader = Loader({"small": MemoryStore(SMALL)}, data(phases=phases), seed=0)
    small = MemoryStore(SMALL).train
    long_rows, short_rows = -(-(sum(SMALL) - 1) // 16), -(-(sum(SMALL) - 1) // 8)
    assert loader.shape(9).sequence_length == 8 and loader.shape(10).sequence_length == 16
    after = rows_of(loader, range(10, 80))
    assert targets_of(after[:long_rows], small) == small.legitimate
    again, first = rows_of(loader, range(80, 110))[:short_rows], rows_of(loader, range(10))
    assert targets_of(again, small) == small.legitimate
    assert [row.tokens.tolist() for row in again[: len(first)]] != [row.tokens.tolist() for row in first]
    assert loader.epochs(10)["small"] == 50 / short_rows
    assert loader.epochs(80)["small"] == pytest.approx(50 / short_rows + 350 / long_rows)


def test_skipped_batches_are_passed_over_and_the_rest_moves_up():
    phases = {"big": PhaseConfig(from_step=10, batch_size=7)}
    plain = Loader(stores(), data(), seed=0)
    skipping = Loader(stores(), data(), seed=0, skips=[Skip(at_step=4, batches=3), Skip(at_step=6, batches=1)])
    for step, source in [(0, 0), (3, 3), (4, 7), (5, 8), (6, 10), (20, 24)]:
        assert equal(skipping.batch(step), plain.batch(source))
    # Phases begin at their step all the same, and go on behind the rows that were passed over.
    later = Loader(stores(), data(phases=phases), seed=0, skips=[Skip(at_step=4, batches=3)])
    assert later.shape(9).batch_size == 5 and later.shape(10).batch_size == 7
    assert sum(later.epochs(10).values()) == pytest.approx(sum(plain.epochs(13).values()))
    with pytest.raises(DataError, match="zero and more"):
        Loader(stores(), data(), seed=0, skips=[Skip(at_step=4, batches=-1)])


def history(config: DataConfig, rollbacks: list[tuple[int, int]], end: int) -> list[tuple[Loader, int]]:
    """The loader and step of every batch that a run consumes which goes back (at, to) so often, one after the other."""
    out, position, skips = [], 0, []
    for at, to in [*rollbacks, (end, end)]:
        loader = Loader(stores(), config, seed=0, skips=skips)
        out += [(loader, step) for step in range(position, at)]
        position = to
        skips.append(Skip(to, at - to))
    return out


def test_a_bad_stretch_behind_the_begin_of_a_longer_phase_does_not_come_again():
    longer = data(phases={"long": PhaseConfig(from_step=10, sequence_length=16, batch_size=3)})
    short, plain = Loader(stores(), data(), seed=0), Loader(stores(), longer, seed=0)
    went = history(longer, [(13, 6)], 25)  # the batches of steps 10 to 12 are bad
    in_first = [loader.batch(step) for loader, step in went if step < 10]
    assert all(equal(batch, short.batch(number)) for number, batch in enumerate(in_first))
    in_second = [loader.batch(step) for loader, step in went if step >= 10]
    assert len(in_first) == 14 and len(in_second) == 18
    assert all(equal(batch, plain.batch(10 + number)) for number, batch in enumerate(in_second))
    back, _ = went[-1]
    assert sum(back.epochs(9).values()) == pytest.approx(sum(short.epochs(13).values()))
    assert back.epochs(25)["small"] > plain.epochs(25)["small"]


@st.composite
def ways_back(draw) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(out[-1][1] + 1 if out else 1, 32))
        out.append((at, draw(st.integers(0, min(at, 31)))))
    return out


@settings(max_examples=40, deadline=None)
@given(ways_back())
def test_however_often_a_run_goes_back_no_row_comes_twice_and_none_is_left_out(rollbacks: list[tuple[int, int]]):
    taken: dict[tuple[str, int], list[int]] = {}
    for loader, step in history(several_phases(), rollbacks, 35):
        for name, rows in loader.rows(step).items():
            taken.setdefault((name, loader.shape(step).sequence_length), []).extend(rows.tolist())
    for (name, length), rows in taken.items():
        size = -(-(sum({"small": SMALL, "large": LARGE}[name]) - 1) // length)
        for start in range(0, len(rows), size):
            epoch = rows[start : start + size]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(size)), (name, length, start)


def test_documents_may_be_left_unmasked():
    masked = Loader(stores(), data(packing="pack"), seed=0).batch(5)
    joined = Loader(stores(), data(packing="pack", mask_documents=False), seed=0).batch(5)
    assert masked.segments.max() > 1
    np.testing.assert_array_equal(joined.segments, masked.segments > 0)
    np.testing.assert_array_equal(joined.positions, np.tile(np.arange(8), (5, 1)))
    for field in ("tokens", "targets", "weights"):
        np.testing.assert_array_equal(getattr(joined, field), getattr(masked, field))


def test_it_reads_a_store_on_disk_across_shards(tmp_path: Path):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 40, 50)
    tokens = rng.integers(0, 256, lengths.sum())
    writer = StoreWriter(tmp_path / "store", load_tokenizer("bytes", ""), shard_tokens=64)
    writer.add("train", tokens, lengths=lengths, byte_lengths=lengths)
    writer.finish(heldout_permille=0)
    for packing in ("split", "pack"):
        loader = Loader({"disk": TokenStore.open(tmp_path / "store")}, data(packing=packing), seed=0)
        memory = MemoryStore(lengths.tolist(), first_id=0)
        memory.fingerprint = TokenStore.open(tmp_path / "store").fingerprint
        places = Loader({"disk": memory}, data(packing=packing), seed=0)
        for step in (0, 4, 50):
            batch, where = loader.batch(step), places.batch(step)
            np.testing.assert_array_equal(batch.weights, where.weights)
            filled, counts = where.segments > 0, where.weights > 0
            np.testing.assert_array_equal(batch.tokens[filled], tokens[where.tokens[filled]])
            np.testing.assert_array_equal(batch.targets[counts], tokens[where.targets[counts]])
    assert [file.suffix for file in (tmp_path / "store" / "cache").iterdir()] == [".npz"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mixture": (("large", 1.0), ("larg", 1.0))}, r"'larg'.*the stores are \['large', 'small'\]"),
        ({"mixture": (("large", 1.0), ("large", 2.0))}, "names a store twice"),
        ({"mixture": (("empty", 1.0), ("large", 2.0))}, "'empty' has no tokens to train on"),
    ],
)
def test_mixtures_that_cannot_be_read_are_refused(change: dict, message: str):
    some = stores() | ({"empty": MemoryStore([1])} if "empty" in message else {})
    with pytest.raises(DataError, match=message):
        Loader(some, data(**change), seed=0)


def test_no_tokens_at_all_are_refused_but_an_empty_store_beside_others_gets_no_rows():
    with pytest.raises(DataError, match="no store has tokens to train on"):
        Loader({"empty": MemoryStore([])}, data(), seed=0)
    loader = Loader(stores() | {"empty": MemoryStore([])}, data(), seed=0)
    assert loader.phase(0).mixture.names == ("large", "small")


def test_a_negative_step_is_refused():
    with pytest.raises(IndexError, match="begin at 0"):
        Loader(stores(), data(), seed=0).batch(-1)


class TestRecords:
    base = data(mixture=(("small", 1.0),), phases={"later": PhaseConfig(from_step=50, batch_size=7)})

    def records(self, config: DataConfig | None = None, **options) -> dict:
        options = {"seed": 0} | options
        return Loader(options.pop("stores", stores()), config or self.base, **options).records()

    def test_they_survive_json_and_agree_with_themselves(self):
        records = self.records(several_phases(), skips=[Skip(3, 1)])
        assert json.loads(json.dumps(records)) == records
        check_records(records, records, step=17)

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"seed": 1}, "seed was 0 and is 1"),
            ({"config": dataclasses.replace(base, packing="pack")}, "data.packing was 'split' and is 'pack'"),
            ({"config": dataclasses.replace(base, mask_documents=False)}, "data.mask_documents was True and is False"),
            ({"config": dataclasses.replace(base, batch_size=6)}, "from step 0 on batch_size was 5 and is 6"),
            (
                {"config": dataclasses.replace(base, sequence_length=4)},
                "from step 50 on sequence_length was 8 and is 4",
            ),
            (
                {"config": dataclasses.replace(base, mixture=(("large", 1.0),))},
                r"from step 0 on mixture was \(\('small', 1.0\),\) and is \(\('large', 1.0\),\)",
            ),
            ({"config": dataclasses.replace(base, phases={})}, "the phase that begins at step 50 is gone"),
            (
                {"config": dataclasses.replace(base, phases=base.phases | {"new": PhaseConfig(from_step=29)})},
                "the new phase from step 29 on begins before step 30",
            ),
            ({"stores": {"small": MemoryStore(LARGE)}}, "the store 'small' was [0-9a-f]{12} and is [0-9a-f]{12}"),
            ({"skips": [Skip(29, 1)]}, r"the skipped batches were \[\] and are \[\[29, 1\]\]"),
        ],
    )
    def test_other_data_is_refused(self, change: dict, message: str):
        with pytest.raises(DataChanged, match=message) as error:
            check_records(self.records(), self.records(**change), step=30)
        assert "from_step of 30 or more" in str(error.value)

    @pytest.mark.parametrize("start", [30, 40, 60])
    def test_a_phase_may_be_added_from_now_on_with_a_new_store(self, start: int):
        # What is left open is inherited: a phase put before a recorded one must not change that one's settings.
        new = PhaseConfig(from_step=start, mixture=(("large", 1.0),))
        later = PhaseConfig(from_step=50, batch_size=7, mixture=(("small", 1.0),))
        config = dataclasses.replace(self.base, phases={"later": later, "new": new})
        old, records = self.records(), self.records(config)
        check_records(old, records, step=30)
        before, after = (Loader(stores(), each, seed=0) for each in (self.base, config))
        assert all(equal(before.batch(step), after.batch(step)) for step in range(30))

    def test_skips_may_be_added_from_now_on(self):
        check_records(self.records(skips=[Skip(3, 1)]), self.records(skips=[Skip(3, 1), Skip(30, 2)]), step=30)
        with pytest.raises(DataChanged, match="skipped"):
            check_records(self.records(skips=[Skip(3, 1)]), self.records(), step=30)
        with pytest.raises(DataChanged, match="skipped"):  # in another order, which is another way
            check_records(self.records(skips=[Skip(9, 1), Skip(3, 1)]), self.records(skips=[Skip(3, 1)]), step=2)

    def test_a_store_added_to_a_mixture_by_size_is_refused_until_the_mixture_is_written_out(self):
        one = {"small": MemoryStore(SMALL)}
        old = self.records(data(), stores=one)
        with pytest.raises(DataChanged, match=r"mixture was \(\('small', 1.0\),\) and is"):
            check_records(old, self.records(data()), step=30)
        check_records(old, self.records(data(mixture=(("small", 1.0),))), step=30)

    def test_a_recorded_mixture_can_be_written_into_a_config(self):
        """The error shows shares; writing them down gives the same records, whatever rounding made of them."""
        old = self.records(data())
        (phase,) = old["phases"]
        written = data(mixture=tuple((name, weight) for name, weight in phase["mixture"]))
        check_records(old, self.records(written), step=1)

    def test_a_store_that_is_not_used_does_not_matter(self):
        check_records(self.records(), self.records(stores=stores() | {"unused": MemoryStore([9])}), step=30)
