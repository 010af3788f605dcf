"""Sequences, splits and windows: nothing leaks, nothing is lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from karma_fast.data import DataError, build_sequences, split_by_time, split_leave_one_out, training_windows

USERS, ITEMS = 3, 6
rows_of_clicks = st.lists(st.tuples(st.integers(0, USERS - 1), st.integers(0, ITEMS - 1), st.integers(0, 8),
                                    st.booleans()),
                          min_size=1, max_size=60)


def build(rows, timed=True, min_user_events=1, seed=0):
    users, items, times, clicked = (np.array(column) for column in zip(*rows, strict=True))
    names = np.array([f"user {u}" for u in range(USERS)], dtype=object)
    return build_sequences(names, users, items, times if timed else None, clicked,
                           min_user_events=min_user_events, seed=seed)


def naive(rows, min_user_events):
    """Per kept user: sorted list of (time, item) clicks, and the exposures between clicks as sets of (time, item)."""
    result = {}
    for user in range(USERS):
        clicks = {(t, i) for u, i, t, c in rows if u == user and c}
        shown = {(t, i) for u, i, t, c in rows if u == user and not c} - clicks
        if len(clicks) >= max(1, min_user_events):
            result[f"user {user}"] = sorted(clicks), shown
    return result


@settings(deadline=None, max_examples=150)
@given(rows=rows_of_clicks, min_user_events=st.integers(1, 4), seed=st.integers(0, 3))
def test_sequences_match_a_naive_build(rows, min_user_events, seed):
    sequences, counts = build(rows, min_user_events=min_user_events, seed=seed)
    expected = naive(rows, min_user_events)
    assert list(sequences.user_ids) == sorted(expected)
    negatives, used = 0, 0
    for user, name in enumerate(sequences.user_ids):
        first, last = sequences.indptr[user:user + 2]
        clicks, shown = expected[name]
        times, items = sequences.times[first:last], sequences.items[first:last]
        assert (np.diff(times) >= 0).all()
        assert sorted(zip(times.tolist(), items.tolist(), strict=True)) == clicks
        if sequences.negatives is None:
            assert not shown
            continue
        before = -1  # exposures at the time of the previous click belong to it, or to one of its ties
        for event in range(first, last):
            now = sequences.times[event]
            part = sequences.negatives[sequences.negatives_indptr[event]:sequences.negatives_indptr[event + 1]]
            allowed = {i for t, i in shown if before < t <= now} - {int(sequences.items[event])}
            assert set(part.tolist()) == allowed
            used += len([1 for t, _ in shown if before < t <= now])
            negatives, before = negatives + len(part), now
        assert len([1 for t, _ in shown if t > before]) <= counts.trailing_exposures
    if sequences.negatives is not None:
        assert negatives == len(sequences.negatives) == used - counts.own_exposures
    assert counts.duplicates == len(rows) - len({row[:3] for row in rows})
    assert counts.dropped_clicks == len({r[:3] for r in rows if r[3]}) - len(sequences.items)


def test_exposures_become_negatives_of_the_next_click():
    rows = [(0, 1, 0, True), (0, 2, 3, False), (0, 3, 3, True),  # shown and clicked at one time: goes to that click
            (0, 4, 4, False), (0, 5, 5, False), (0, 4, 6, True),  # item 4 was clicked in the end: no negative
            (0, 2, 7, False), (1, 3, 1, True), (1, 5, 9, False)]  # no click of user 0, 1 follows
    sequences, counts = build(rows)
    assert sequences.items.tolist() == [1, 3, 4, 3]
    assert sequences.negatives_indptr.tolist() == [0, 0, 1, 2, 2]
    assert sequences.negatives.tolist() == [2, 5]
    assert (counts.trailing_exposures, counts.own_exposures, counts.duplicates) == (2, 1, 0)


@settings(deadline=None, max_examples=60)
@given(rows=rows_of_clicks)
def test_same_seed_same_order_and_two_key_sort_agrees(rows):
    first, again = build(rows)[0], build(rows)[0]
    np.testing.assert_array_equal(first.items, again.items)
    floats = build([(u, i, t + 0.5, c) for u, i, t, c in rows])[0]  # floating times take the other way to sort
    np.testing.assert_array_equal(first.items, floats.items)
    np.testing.assert_array_equal(first.indptr, floats.indptr)


@settings(deadline=None, max_examples=60)
@given(rows=rows_of_clicks)
def test_without_times_rows_keep_their_order(rows):
    sequences, _ = build(rows, timed=False)
    for user, name in enumerate(sequences.user_ids):
        clicks = [i for u, i, _, c in rows if f"user {u}" == name and c]
        assert sequences.items[sequences.indptr[user]:sequences.indptr[user + 1]].tolist() == clicks


def tied_rows(users=300, length=60, items=500):
    """As in MovieLens: many ratings at one time, which the file lists by item id."""
    rng = np.random.default_rng(5)
    user = np.repeat(np.arange(users), length)
    item = np.concatenate([rng.choice(items, length, replace=False) for _ in range(users)])
    time = user * 1000 + np.tile(np.arange(length) // 6, users)
    order = np.lexsort((item, time, user))
    return np.array([str(u) for u in range(users)], dtype=object), user[order], item[order], time[order]


def test_equal_times_do_not_leak_the_item_id():
    names, user, item, time = tied_rows()
    orders = [build_sequences(names, user, item, time, seed=seed)[0].items for seed in range(3)]
    assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[1], orders[2])
    tied = (time[1:] == time[:-1]) & (user[1:] == user[:-1])
    assert (np.diff(item)[tied] > 0).all()  # the file is sorted by item
    for order in orders:
        ascending = (np.diff(order)[tied] > 0).mean()
        assert abs(ascending - 0.5) < 0.02  # 15000 pairs: 5 standard deviations
    place = np.argsort(np.argsort(orders[0].reshape(-1, 6), axis=1), axis=1)[:, -1]
    assert np.bincount(place, minlength=6).min() > 0.8 * len(place) / 6  # the last of a tie is any of the six


@settings(deadline=None, max_examples=150)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6), cut=st.integers(0, 4),
       max_history=st.integers(1, 12), min_history=st.integers(1, 3))
def test_windows(lengths, cut, max_history, min_history):
    min_history = min(min_history, max_history)
    user = np.repeat(np.arange(len(lengths)), lengths)
    sequences, _ = build_sequences(np.arange(len(lengths)).astype(str), user, np.arange(len(user)), min_user_events=1)
    split = split_leave_one_out(sequences)
    split.train_end = np.maximum(sequences.indptr[:-1], split.train_end - cut)
    later = {p for u in range(len(lengths)) for p in range(split.train_end[u], sequences.indptr[u + 1])}
    position = np.concatenate([np.arange(n) for n in lengths])  # of an event within its user
    for positions in ("last", "all"):
        starts, ends = training_windows(sequences, split, max_history, positions, min_history)
        assert starts.dtype == ends.dtype == np.int64
        targets = []
        for start, end in zip(starts, ends, strict=True):
            assert min_history + 1 <= end - start <= max_history + 1
            assert len(set(user[start:end])) == 1
            assert not later & set(range(start, end))
            targets += [end - 1] if positions == "last" else range(start + 1, end)
        assert len(targets) == len(set(targets))
        if positions == "last" or min_history == 1:
            assert sorted(targets) == [p for p in range(len(user)) if p not in later and position[p] >= min_history]
        for u in range(len(lengths) if min_history == 1 else 0):  # a user's last window is as long as it can be
            trained = split.train_end[u] - sequences.indptr[u]
            if trained > 1:
                last = np.flatnonzero(ends == split.train_end[u])
                assert (ends - starts)[last].tolist() == [min(trained, max_history + 1)]


def test_windows_refuse_bad_settings():
    sequences, _ = build_sequences(np.array(["u"]), np.zeros(4, int), np.arange(4))
    with pytest.raises(ValueError, match="positions: got 'first'; allowed: 'last', 'all'"):
        training_windows(sequences, split_leave_one_out(sequences), 3, "first")
    with pytest.raises(ValueError, match="max_history 0"):
        training_windows(sequences, split_leave_one_out(sequences), 0, "all")


@settings(deadline=None, max_examples=60)
@given(rows=rows_of_clicks, bounds=st.tuples(st.integers(0, 4), st.integers(5, 9)))
def test_splits_cover_each_event_once(rows, bounds):
    sequences, _ = build([(*row[:3], True) for row in rows])
    events = np.arange(len(sequences.items))
    split = split_leave_one_out(sequences)
    users = sequences.user_of(events)
    trained = events < split.train_end[users]
    np.testing.assert_array_equal(np.sort(np.concatenate([events[trained], split.valid, split.test])), events)
    np.testing.assert_array_equal(split.valid + 1, split.test)
    assert set(split.test + 1) <= set(sequences.indptr)
    if (sequences.times < bounds[0]).any():
        split = split_by_time(sequences, *bounds)
        np.testing.assert_array_equal(events < split.train_end[users], sequences.times < bounds[0])
        first = np.isin(events, sequences.indptr[:-1])
        valid = (sequences.times >= bounds[0]) & (sequences.times < bounds[1]) & ~first
        np.testing.assert_array_equal(split.valid, events[valid])
        np.testing.assert_array_equal(split.test, events[(sequences.times >= bounds[1]) & ~first])
    else:
        with pytest.raises(DataError, match="data.valid_time: no event lies before"):
            split_by_time(sequences, *bounds)


@settings(deadline=None, max_examples=60)
@given(rows=rows_of_clicks, later=st.lists(st.integers(0, USERS - 1), max_size=4), least=st.integers(1, 4))
def test_later_events_do_not_decide_who_trains(rows, later, least):
    """Users below the minimum in all are dropped first, as `load_dataset` does."""
    found = []
    for more in ([], [(user, 0, 9, True) for user in later]):
        sequences, _ = build([(*row[:3], True) for row in rows] + more, min_user_events=least)
        try:
            split = split_by_time(sequences, 5, 9, least)
        except DataError:
            found.append(np.zeros(ITEMS))
            continue
        found.append(split.training_counts(sequences, ITEMS))
        events = np.arange(len(sequences.items))
        wanted = (sequences.times >= 5) & ~np.isin(events, sequences.indptr[:-1])  # those who do not train ask too
        np.testing.assert_array_equal(np.sort(np.concatenate([split.valid, split.test])), events[wanted])
    np.testing.assert_array_equal(*found)


def test_split_by_time_needs_times():
    sequences, _ = build_sequences(np.array(["u"]), np.zeros(4, int), np.arange(4))
    with pytest.raises(DataError, match="by_time needs a time column; set data.time_column"):
        split_by_time(sequences, 1, 2)


def test_history_and_user_of():
    sequences, _ = build_sequences(np.array(["u", "v"]), np.array([0, 0, 0, 1, 1, 1]), np.arange(6))
    assert sequences.history(2, 5).tolist() == [0, 1] and sequences.history(5, 1).tolist() == [4]
    assert sequences.history(3, 5).tolist() == []
    assert sequences.user_of([0, 2, 3, 5]).tolist() == [0, 0, 1, 1]
    for position in (-1, 6):
        with pytest.raises(IndexError, match="events 0..5"):
            sequences.user_of(position)


def test_two_million_rows_take_few_bytes():
    rng = np.random.default_rng(0)
    rows, users = 2_000_000, 50_000
    names = np.arange(users).astype(str).astype(object)
    user, item = rng.integers(0, users, rows), rng.integers(0, 100_000, rows)
    sequences, _ = build_sequences(names, user, item, rng.integers(0, 10**9, rows), clicked=rng.random(rows) < 0.5)
    assert abs(len(sequences.items) - rows / 2) < 5000 and len(sequences.negatives) > 0.9 * rows / 2
    assert sequences.nbytes / rows < 13  # a click 12 + 8, an exposure 4, and the users
    assert sequences.items.dtype == sequences.negatives.dtype == np.int32
    assert (np.diff(sequences.times)[np.diff(sequences.user_of(np.arange(len(sequences.items)))) == 0] >= 0).all()
    starts, ends = training_windows(sequences, split_leave_one_out(sequences), 20, "all")
    assert (ends - starts - 1).sum() == (split_leave_one_out(sequences).train_end - sequences.indptr[:-1] - 1).sum()
