"""Raw logs to batches, against a slow reading line by line, and every bad log that a user may have."""

import collections
import errno
import gzip
import json
import math
import zlib

import numpy as np
import pytest
from conftest import criteo_line
from dlrm_xla_data import layout, lines, prepare, prepared, raw_columns
from dlrm_xla_data.loader import Loader
from dlrm_xla_data.synthetic import synthesize

from dlrm_xla.errors import UserError

CRITEO = (layout.criteo(), prepare.Options())


def slow_reading(path, num_train):
    """Labels, dense and ids of a log, line by line."""
    rows = [line.rstrip("\n").split("\t") for line in path.read_text().splitlines()]
    labels = [int(r[0]) for r in rows]
    dense = [[math.log(max(int(v or 0), 0) + 1) for v in r[1:14]] for r in rows]
    ids = np.zeros((len(rows), 26), int)
    for c in range(26):
        counts = collections.Counter(int(r[14 + c], 16) for r in rows[:num_train] if r[14 + c])
        order = sorted(counts, key=lambda v: (-counts[v], v))
        rank = {v: k for k, v in enumerate(order, 1)}
        ids[:, c] = [rank.get(int(r[14 + c], 16), 0) if r[14 + c] else 0 for r in rows]
    return np.array(labels), np.array(dense), ids


def test_preparing_equals_the_slow_reading(small_log, tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 8192)  # many blocks
    data = prepare.open_log(small_log, tmp_path / "cache")
    labels, dense, ids = slow_reading(small_log, 600)
    np.testing.assert_array_equal(data.labels, labels)
    np.testing.assert_allclose(data.dense, dense, rtol=1e-6)
    np.testing.assert_array_equal(data.ids, ids)
    assert data.splits == {"train": (0, 600), "test": (600, 650), "validation": (650, 700)}
    assert isinstance(data.ids, np.memmap)


def test_gzip_and_plain_are_the_same_and_the_copy_is_used_again(small_log, tmp_path, monkeypatch):
    packed = tmp_path / "small.tsv.gz"
    packed.write_bytes(gzip.compress(small_log.read_bytes()))
    first = prepare.open_log(packed, None)
    assert (tmp_path / "small.tsv.gz.prepared" / "meta.json").is_file()
    np.testing.assert_array_equal(first.ids, prepare.open_log(small_log, None).ids)
    monkeypatch.setattr(prepare, "prepare", lambda *a: pytest.fail("prepared twice"))
    np.testing.assert_array_equal(prepare.open_log(packed, None).ids, first.ids)


def test_a_changed_log_is_prepared_again(small_log, tmp_path):
    assert len(prepare.open_log(small_log, tmp_path / "c").labels) == 700
    small_log.write_text(small_log.read_text() + criteo_line(np.random.default_rng(9)) + "\n")
    assert len(prepare.open_log(small_log, tmp_path / "c").labels) == 701


def test_windows_line_ends_and_short_categories(small_log, tmp_path):
    text = small_log.read_text()
    other = tmp_path / "crlf.tsv"
    other.write_bytes(text.replace("\n", "\r\n").encode())
    np.testing.assert_array_equal(prepare.open_log(other, None).ids, prepare.open_log(small_log, None).ids)


def test_day_split_of_the_reference():
    assert prepared.day_split(137139) == {
        "train": (0, 117548),
        "test": (117548, 127344),
        "validation": (127344, 137139),
    }
    with pytest.raises(UserError, match="too few"):
        prepared.day_split(13)


def replaced(line_number, column, value):
    def edit(lines):
        fields = lines[line_number].split("\t")
        fields[column] = value
        lines[line_number] = "\t".join(fields)

    return edit


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (replaced(20, 0, "2"), r"line 21: the label is '2', expected 0 or 1"),
        (replaced(20, 0, ""), r"line 21: the label is ''"),
        (replaced(20, 0, "x"), r"line 21: the label is 'x'"),
        (replaced(3, 5, "1.5"), r"line 4: column I5 is '1.5', expected an integer"),
        (replaced(3, 14, "xyz"), r"line 4: column C1 is 'xyz', expected up to 8 hex"),
        (replaced(699, 39, "0123456789"), r"line 700: column C26 is '0123456789'"),
        (replaced(30, 14, "é"), r"line 31: column C1 is 'é'"),
        (lambda lines: lines.__setitem__(10, lines[10] + "\tx"), r"line 11: 41 tab-separated columns, expected 40"),
        (lambda lines: lines.__setitem__(10, "\t".join(lines[10].split("\t")[:30])), r"line 11: 30 tab-separated"),
        (lambda lines: lines.__setitem__(0, lines[0].split("\t", 1)[1]), r"line 1: 39 columns.*unlabelled test form"),
        (lambda lines: lines.__setitem__(slice(None), [x.split("\t", 1)[1] for x in lines]), "unlabelled test form"),
    ],
)
def test_bad_lines_are_named(small_log, tmp_path, edit, match):
    lines = small_log.read_text().splitlines()
    edit(lines)
    small_log.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=match):
        prepare.open_log(small_log, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir()), "nothing half-written stays"


def test_missing_empty_and_truncated_logs(small_log, tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        prepare.open_log(tmp_path / "nothing.tsv", None)
    empty = tmp_path / "empty.tsv"
    empty.touch()
    with pytest.raises(UserError, match="is empty"):
        prepare.open_log(empty, None)
    packed = tmp_path / "cut.tsv.gz"
    whole = gzip.compress(small_log.read_bytes())
    for end in (b"\n", b"\r\n"):
        whole = gzip.compress(small_log.read_bytes().replace(b"\n", end))
        packed.write_bytes(whole[: len(whole) // 2])
        text = zlib.decompressobj(31).decompress(packed.read_bytes())
        last = text.count(b"\n") + text.endswith(b"\r")
        assert 100 < last < 700
        with pytest.raises(UserError, match=rf"truncated gzip file: it ends after line {last}\."):
            prepare.open_log(packed, None)
    packed.write_bytes(whole[:500] + b"\0" * 40 + whole[540:])
    with pytest.raises(UserError, match=r"cut.tsv.gz"):
        prepare.open_log(packed, None)
    packed.write_bytes(gzip.compress(b""))
    with pytest.raises(UserError, match="no lines"):
        prepare.open_log(packed, None)
    assert not list(tmp_path.glob("*.prepared*"))


def test_a_full_disk_is_told_and_leaves_nothing(small_log, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(raw_columns.RawColumns, "append", full)
    with pytest.raises(UserError, match=r"disk is full.*--data-cache"):
        prepare.open_log(small_log, None)
    assert not list(tmp_path.glob("*.prepared*"))


def test_preparation_interrupted_anywhere_goes_on_to_the_same_dataset(small_log, tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 8192)
    monkeypatch.setattr(prepare, "MARK_BYTES", 20_000)
    whole = prepare.open_log(small_log, tmp_path / "whole")
    spots = {
        (raw_columns.RawColumns, "append"): (1, 5, 12),
        (raw_columns.RawColumns, "mark"): (1, 3),
        (prepare, "_write_ids"): (1, 20),
        (prepare, "assemble"): (1,),
        (prepare, "save_meta"): (1,),
    }
    log = tmp_path / "again" / small_log.name
    log.parent.mkdir()
    log.write_bytes(small_log.read_bytes())
    interruptions = 0
    for (owner, name), calls in spots.items():
        real = getattr(owner, name)
        for call in calls:
            count = 0

            def counting(*given, real=real, call=call):
                nonlocal count
                count += 1
                if count == call:
                    raise KeyboardInterrupt
                return real(*given)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, counting)
                with pytest.raises(KeyboardInterrupt):
                    prepare.open_log(log, None)
            interruptions += 1
            assert not (log.parent / "small.tsv.prepared").exists()
            with pytest.raises(UserError, match="no meta"):
                prepared.open_prepared(log.parent / "small.tsv.prepared.unfinished")
    again = prepare.open_log(log, None)
    assert interruptions == 9
    for name in ("labels", "dense", "ids"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    first, second = (
        prepared.read_meta(f) for f in (tmp_path / "whole" / "small.tsv.prepared", log.parent / "small.tsv.prepared")
    )
    assert {k: v for k, v in first.items() if k != "key"} == {k: v for k, v in second.items() if k != "key"}
    assert sorted(f.name for f in log.parent.iterdir()) == ["small.tsv", "small.tsv.prepared"]


def test_prepared_folders_that_are_not_whole_are_refused(small_log, tmp_path):
    folder = tmp_path / "p"
    prepare.prepare([small_log], folder, *CRITEO)
    meta = (folder / "meta.json").read_text()
    (folder / "meta.json").write_text(json.dumps(json.loads(meta) | {"format": "dlrm_xla prepared 0"}))
    with pytest.raises(UserError, match=r"prepared 0.*this version reads"):
        prepared.open_prepared(folder)
    (folder / "meta.json").write_text(meta[:-20])
    with pytest.raises(UserError, match="damaged"):
        prepared.open_prepared(folder)
    (folder / "meta.json").write_text(meta)
    ids = (folder / "ids.npy").read_bytes()
    (folder / "ids.npy").write_bytes(ids[:-1000])
    with pytest.raises(UserError, match="not a whole prepared dataset"):
        prepared.open_prepared(folder)
    (folder / "meta.json").unlink()
    with pytest.raises(UserError, match=r"no meta.json.*python -m dlrm_xla_data prepare"):
        prepared.open_prepared(folder)


def test_batches_hold_every_row_once_and_pad_the_last(small_log):
    data = prepare.open_log(small_log, None)
    loader = Loader(data, 64, seed=5)
    batches = list(loader.batches("train", 0))
    assert len(batches) == loader.num_batches("train") == 10
    assert {tuple(b.ids_BS.shape) for b in batches} == {(64, 26)}
    labels = np.concatenate([b.labels_B.numpy() for b in batches])
    assert (labels == -1).sum() == 40
    seen = np.concatenate([b.dense_BI.numpy() for b in batches])[labels >= 0]
    np.testing.assert_array_equal(np.sort(seen.sum(1)), np.sort(data.dense[:600].sum(1)))


def test_order_depends_on_seed_and_epoch_alone(small_log):
    data = prepare.open_log(small_log, None)

    def first(seed, epoch):
        return next(Loader(data, 64, seed=seed).batches("train", epoch)).ids_BS.numpy()

    np.testing.assert_array_equal(first(1, 0), first(1, 0))
    assert (first(1, 0) != first(1, 1)).any()
    assert (first(1, 0) != first(2, 0)).any()
    test = np.concatenate([b.ids_BS.numpy() for b in Loader(data, 64).batches("test")])
    np.testing.assert_array_equal(test[:50], data.ids[600:650])


def test_minimum_count_folds_rare_ids_into_the_row_of_missing_ones(small_log):
    data = prepare.open_log(small_log, None)
    loader = Loader(data, 700, min_count=3)
    for f in range(26):
        assert loader.num_rows[f] == 1 + (data.counts[f] >= 3).sum()
    ids = np.concatenate([b.ids_BS.numpy() for b in loader.batches("test")])[:50]
    expected = np.where(data.ids[600:650] >= loader.num_rows, 0, data.ids[600:650])
    np.testing.assert_array_equal(ids, expected)
    assert (ids != data.ids[600:650]).any()


def test_synthetic_rows_keep_the_contract_of_ids():
    data, best = synthesize(7000, [3, 50, 20000], [1, 4, 2], seed=1)
    assert data.ids.shape == (7000, 7)
    assert 0.6 < best < 0.95
    assert [len(c) + 1 for c in data.counts] == [3, 50, 20000]
    start = 0
    for bag, counts in zip(data.bag_lengths, data.counts, strict=True):
        part = data.ids[:, start : start + bag]
        start += bag
        train, later = part[:6000], part[6000:]
        assert (np.diff(counts) <= 0).all(), "ids fall in frequency"
        np.testing.assert_array_equal(np.bincount(train.ravel(), minlength=len(counts) + 1)[1:], counts)
        assert set(later.ravel()) - {0} <= set(train.ravel()), "ids unseen in training are 0"
    again, _ = synthesize(7000, [3, 50, 20000], [1, 4, 2], seed=1)
    np.testing.assert_array_equal(again.ids, data.ids)


def test_the_planted_signal_is_the_best_there_is():
    """Other scores, among them the labels' own smoothed rates per id, stay below the stated best."""
    from sklearn.metrics import roc_auc_score

    data, best = synthesize(70_000, [20] * 6, seed=0)
    start, stop = data.splits["test"]
    train = data.splits["train"][1]
    scores = np.zeros(stop - start)
    for f in range(6):
        clicks = np.bincount(data.ids[:train, f], data.labels[:train], 20) + 2.5
        shown = np.bincount(data.ids[:train, f], minlength=20) + 10
        rate = clicks / shown
        scores += np.log(rate / (1 - rate))[data.ids[start:stop, f]]
    reached = roc_auc_score(data.labels[start:stop], scores)
    assert 0.55 < reached < best


@pytest.mark.parametrize("value", [2**30, -1])
def test_a_damaged_id_in_prepared_data_is_named(value):
    dataset, _ = synthesize(200, [30, 50])
    dataset.ids[17, 1] = value
    with pytest.raises(UserError, match=f"row 17 of the data: feature C2 has the id {value}, .* damaged"):
        list(Loader(dataset, 32, min_count=2).batches("train"))


def test_commas_instead_of_tabs_are_recognised(tmp_path):
    log = tmp_path / "avazu.csv"
    log.write_text("id,click,hour\n1,0,14102100\n" * 20)
    with pytest.raises(UserError, match=r"line 1: 1 tab-separated columns, .*Commas separate"):
        prepare.open_log(log, tmp_path)
