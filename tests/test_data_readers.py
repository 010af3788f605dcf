"""Every format reads the same, and bad data is refused with file, line, column and what to do."""

import json
from datetime import date, timedelta
from datetime import time as clock

import numpy as np
import polars as pl
import pytest

from karma_fast.config import DataConfig
from karma_fast.data import DataError, load_dataset
from karma_fast.data import lines as lines_module
from karma_fast.data.tables import collect, open_table

ROWS = [("u1", "b", 30), ("u1", "a", 10), ("u1", "c", 20), ("u2", "c", 5), ("u2", "a", 7), ("u2", "b", 6)]
ITEMS = [("a", "Alpha", "Red"), ("b", "Beta", None), ("c", "Gamma", "Blue sky")]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def write_rows(folder, suffix):
    """The rows above in one format: (interactions, items)."""
    inter, items = folder / f"clicks{suffix}", folder / f"items{suffix}"
    if suffix == ".parquet":
        pl.DataFrame(ROWS, schema=["user_id", "item_id", "timestamp"], orient="row").write_parquet(inter)
        pl.DataFrame(ITEMS, schema=["item_id", "title", "colour"], orient="row").write_parquet(items)
    elif suffix == ".jsonl":
        write(inter, "\n".join(json.dumps(dict(zip(("user", "item", "ts"), row, strict=True))) for row in ROWS))
        write(items, "\n\n".join(json.dumps(dict(zip(("id", "title", "colour"), row, strict=True))) for row in ITEMS))
    elif suffix == ".inter":
        items = folder / "clicks.item"
        write(inter, "user_id:token\titem_id:token\ttimestamp:float\n"
              + "".join("\t".join(map(str, r)) + "\n" for r in ROWS))
        write(items, "item_id:token\ttitle:token_seq\tcolour:token\n"
              + "".join("\t".join(cell or "" for cell in r) + "\n" for r in ITEMS))
    else:
        sep = "," if suffix == ".csv" else "\t"
        write(inter, "User-ID,iid,time\r\n".replace(",", sep) + "".join(sep.join(map(str, r)) + "\r\n" for r in ROWS))
        write(items, "item,title,colour\n".replace(",", sep)
              + "".join(sep.join(c or "" for c in r) + "\n" for r in ITEMS))
    return str(inter), str(items)


@pytest.mark.parametrize("suffix", [".inter", ".csv", ".tsv", ".jsonl", ".parquet"])
def test_formats_read_the_same(tmp_path, suffix):
    interactions, items = write_rows(tmp_path, suffix)
    data = load_dataset(DataConfig(interactions=interactions, items=items, name="x"))
    assert data.name == "x"
    assert list(data.items.ids) == ["a", "b", "c"]
    assert data.items.texts == ["Alpha | Red", "Beta", "Gamma | Blue sky"]
    assert data.items.titles == ["Alpha", "Beta", "Gamma"]
    assert list(data.sequences.user_ids) == ["u1", "u2"]
    assert data.sequences.items.dtype == np.int32
    assert data.sequences.items.tolist() == [0, 2, 1, 2, 1, 0]
    assert data.sequences.times.tolist() == [10, 20, 30, 5, 6, 7]
    assert data.split.test.tolist() == [2, 5]


BAD = [
    ("a.csv", "user,item,time\nu,a,1\n,b,2\n", "a.csv, line 3, column user: blank"),
    ("a.csv", "user,item,time\nu,a,1\nu, ,2\n", "a.csv, line 3, column item: blank"),
    ("a.csv", "user,item,time\nu,a,1\nu,b,soon\nu,c,later\n", "a.csv, line 3, column time: got 'soon'.*2 such rows"),
    ("a.csv", "user,item,time\nu,a,1.5\nu,b,inf\n", "a.csv, line 3, column time: got 'inf', a finite number"),
    ("a.csv", "user,item,time\nu,a,1.5\nu,b,\n", "a.csv, line 3, column time: blank"),
    ("a.csv", "user,item,time,click\nu,a,1,1\nu,b,2,maybe\n",
     "line 3, column click: got 'maybe', 0, 1, true or false"),
    ("a.csv", "user,item,time\nu,a,1\nu,b\n", "a.csv, line 3: 2 cells, the header has 3"),
    ("a.csv", "user,item,time\nu,a,1\n\nu,b,2,9\n", "a.csv, line 4: 4 cells, the header has 3"),
    ("a.csv", 'user,item,time\nu,"a\nb",1\nu,b\n', "a.csv, line 4: 2 cells, the header has 3"),
    ("a.csv", 'user,item,time\nu,"a\nb",1\nu,b,x\n', "a.csv, line 4, column time: got 'x'"),
    ("a.csv", 'user,item,time\nu,"a,1\nu,b,x\n', "a.csv, line 2: .*close the quotes"),
    ("a.csv", "user,item,time\nu,a,1\nu,\n,1\n", "a.csv, line 3: 2 cells"),
    ("a.csv", 'user,item,time,note\nu,a,1,12" pan\nu,b,2,ok\nu,c,3,9" pan\n',
     "a.csv, line 2: a quote inside a cell that is not quoted; quote the cell and double the quotes in it"),
    ("a.csv", 'user,item,time,note\nu,a,1,"x\n\n"\nu,b,2, "ok"\n', "a.csv, line 5: a quote inside a cell that is not"),
    ("a.csv", 'user,item,time\nu,a\nu,b"c,2\n', "a.csv, line 2: 2 cells"),
    ("a.csv", 'user,item,time\nu,"a\nb" c,1\n', "a.csv, line 2: text follows the closing quote of a cell; close the"),
    ("a.csv", 'user,item,"time\nu,a,1\n', "a.csv, line 1: the quotes of a cell are never closed; close the quotes"),
    ("a.csv", "user,item,time\ru,a,1\ru,a,2\r", "a.csv, line 1: the lines end in CR alone; save the file with"),
    ("a.csv", b"user,item,time\nu,a,1\nu,caf\xe9,2\n", "a.csv, line 3: the byte 0xe9 is not UTF-8; save"),
    ("a.csv", b"us\xe9r,item,time\nu,a,1\n", "a.csv, line 1: the byte 0xe9 is not UTF-8"),
    ("a.csv", "", "a.csv: the file is empty"),
    ("a.csv", "user,item,time\n", "a.csv: no rows below the header"),
    ("a.csv", "user,thing,time\nu,a,1\n", r"a.csv: no item column \(found: user, thing, time\); set data.item_column"),
    ("a.csv", "user,uid,item,time\nu,u,a,1\n",
     "columns user and uid could both be the user column; set data.user_column"),
    ("a.csv", "user;item;time\nu;a;1\n", "line 1: the columns seem to be separated by ';'"),
    ("a.csv", "user,item,item,time\nu,a,b,1\n", "line 1, column item: the header names it twice"),
    ("a.tsv", "user\titem\ttime\nu\ta\t1\nu\ta\n", "a.tsv, line 3: 2 cells"),
    ("a.tsv", 'user\titem\ttime\nu\t"a\tb"\t1\n', "a.tsv, line 2: 4 cells.*remove tabs and line breaks from cells "
     r"\(tab-separated files have no quoting\), or save it as .csv"),
    ("a.inter", "user_id\titem_id:token\nu\ta\n", "line 1, column user_id: needs a type, as in"),
    ("a.jsonl", '{"user":1,"item":2,"ts":3}\n\n  \n{"user":1,"item":\n',
     "a.jsonl, line 4: .*each line must be one JSON"),
    ("a.jsonl", '{"user":1,"item":2,"ts":3}\n[1]\n', "a.jsonl, line 2: list, not an object"),
    ("a.jsonl", '{"user":1,"item":2,"ts":3}\n\n  \n{"user":1,"ts":3}\n', "a.jsonl, line 4, column item: blank"),
    ("a.jsonl", '{"user":1,"item":2,"ts":3}\n{"user":1,"item":2,"ts":NaN}\n', "a.jsonl, line 2: NaN is not JSON"),
    ("a.jsonl", b'{"user":1,"item":2,"ts":3}\n{"user":1,"item":"\xff","ts":4}\n', "a.jsonl, line 2: the byte 0xff"),
    ("a.jsonl", b'\xef\xbb\xbf{"user":1,"item":2,"ts":3}\n', "a.jsonl, line 1: begins with a byte order mark"),
    ("a.jsonl", '{"user":1,"item":"[2","ts":3}\n\n{"user":1,"item":[2],"ts":3}\n',
     r"a.jsonl, line 3, column item: got \[2\], a list or an object; .*, or set data.item_column to another one"),
    ("a.jsonl", '{"user":{"id":1},"item":2,"ts":3}\n' * 2,
     'line 1, column user: got {"id": 1}, a list or an object; .*set data.user_column.*2 such rows'),
    ("a.jsonl", '{"user":1,"item":2,"query":["x", "y"]}\n',
     r'column query: got \["x", "y"\], a list .*set data.query_column to another one or to false'),
    ("a.parquet", "not parquet", "a.parquet: not a Parquet file"),
    ("a.xlsx", "x", "a.xlsx: files ending in .xlsx are not read; allowed: .csv"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_bad_interactions_are_refused(tmp_path, name, text, message):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError, match=message) as error:
        load_dataset(DataConfig(interactions=path, min_user_events=1))
    assert str(error.value).startswith(path)
    assert "; " in str(error.value)  # what to do


BAD_ITEMS = [
    ("id,title\na,A\nb,B\na,C\n", {}, r"items.csv, line 4, column id: item 'a' is there already \(line 2\)"),
    ("id,title\na,A\n,B\nb,\n", {}, "items.csv, line 3, column id: blank"),
    ("id,title\na,A\n", {}, r"clicks.csv, line 3, column item: item 'b' is not in .*items.csv; add it there"),
    ("key,title\na,A\nb,B\n", {}, r"no item id column \(found: key, title\); set data.item_id_column"),
    ("id,title\na,A\nb,B\n", {"text_columns": ["name"]}, "no column 'name'.*set data.text_columns"),
    ("id,title\na,A\nb,B\n", {"image_column": "picture"}, "no column 'picture'.*set data.image_column"),
    ("id,title\na,A\nb,B\n", {"image_column": "title"}, "items.csv, column title: holds String, not vectors"),
    ("id,title\na,A\nb,B\n", {"image_column": "none.npy"}, "none.npy: cannot be read"),
]


@pytest.mark.parametrize(("text", "settings", "message"), BAD_ITEMS)
def test_bad_items_are_refused(tmp_path, text, settings, message):
    clicks = write(tmp_path / "clicks.csv", "user,item,time\nu,a,1\nu,b,2\n")
    items = write(tmp_path / "items.csv", text)
    with pytest.raises(DataError, match=message):
        load_dataset(DataConfig(interactions=clicks, items=items, min_user_events=1, **settings))


LATE = '{"id":"a","title":"A"}\n' + "".join(f'{{"id":"i{k}","v":[1.0]}}\n' for k in range(1499))
BAD_JSON_ITEMS = [
    (b'\xef\xbb\xbf{"id":"a"}\n', "items.jsonl, line 1: begins with a byte order mark.*; save the file as"),
    (LATE + '{"id":\n', "items.jsonl, line 1501: .*each line must be one JSON object"),
    (LATE + "[1]\n", "items.jsonl, line 1501: list, not an object"),
    (LATE + '{"id":"b","v":[NaN, 1.0]}\n', "items.jsonl, line 1501: NaN is not JSON, null is"),
    (LATE + '{"id":"b","v":{"x":1}}\n', "items.jsonl, column v: a list in line 2 and an object in line 1501; make"),
    ('{"id":["a"]}\n{"id":["b"]}\n', "items.jsonl, column id: holds List.*; text and numbers are allowed for the "
     "item id column; convert it, or set data.item_id_column to another one$"),
    ('{"id":"[a"}\n{"id":["b"]}\n', r'items.jsonl, line 2, column id: got \["b"\], a list or an object'),
]


@pytest.mark.parametrize(("text", "message"), BAD_JSON_ITEMS)
def test_bad_items_in_jsonl_are_refused(tmp_path, text, message):
    clicks = write(tmp_path / "clicks.csv", "user,item,time\nu,a,1\nu,b,2\n")
    items = write(tmp_path / "items.jsonl", text)
    with pytest.raises(DataError, match=message):
        load_dataset(DataConfig(interactions=clicks, items=items, min_user_events=1))


@pytest.mark.parametrize("odd", ["", '\n{"user":"u","item":1,"odd":{"a":1}}'])  # an object beside lists
def test_keys_that_come_late_in_jsonl(tmp_path, odd):
    rows = [{"user": f"u{k // 4}", "item": k % 7} for k in range(1200)]
    rows += [{"user": "late", "item": k, "query": "red shoe", "odd": [1]} for k in range(3)]
    items = [{"id": k} for k in range(1200)] + [{"id": 1200, "title": "Alpha"}]
    clicks = write(tmp_path / "clicks.jsonl", "\n".join(map(json.dumps, rows)) + odd)
    items = write(tmp_path / "items.jsonl", "\n".join(map(json.dumps, items)))
    data = load_dataset(DataConfig(interactions=clicks, items=items))
    assert data.sequences.query_texts == ["red shoe"] and data.items.titles[-1] == "Alpha"
    write(tmp_path / "clicks.jsonl", "\n".join(map(json.dumps, [*rows, rows[0] | {"clicked": 0}])) + odd)
    with pytest.raises(DataError, match="line 1, column clicked: blank, 0, 1, true or false is needed"):
        load_dataset(DataConfig(interactions=clicks))


def load_vectors(tmp_path, vectors, **settings):
    clicks = write(tmp_path / "clicks.csv", "user,item,time\nu,a,1\nu,b,2\n")
    rows = [{"id": name, "title": name, "vec": vector} for name, vector in zip("abc", vectors, strict=True)]
    items = write(tmp_path / "items.jsonl", "\n".join(json.dumps(row) for row in rows))
    settings = settings or {"image_column": "vec"}
    return load_dataset(DataConfig(interactions=clicks, items=items, min_user_events=1, **settings)).items


def test_vectors_from_a_column(tmp_path):
    items = load_vectors(tmp_path, [[1, 2.5], None, [3, 4]])
    assert items.image_vectors.dtype == np.float32
    np.testing.assert_array_equal(items.image_vectors, [[1, 2.5], [np.nan, np.nan], [3, 4]])
    assert items.texts == ["a", "b", "c"]


def test_vectors_of_nulls_or_nan_are_missing(tmp_path):
    items = load_vectors(tmp_path, [[None], [1, 2.5], [None, None]])
    np.testing.assert_array_equal(items.image_vectors, [[np.nan, np.nan], [1, 2.5], [np.nan, np.nan]])
    vectors = pl.Series([[np.nan, np.nan], [3.0, 4.0], [np.nan, None]], dtype=pl.Array(pl.Float32, 2))
    pl.DataFrame({"id": ["a", "b", "c"], "vec": vectors}).write_parquet(tmp_path / "items.parquet")
    config = DataConfig(str(tmp_path / "clicks.csv"), str(tmp_path / "items.parquet"), min_user_events=1,
                        id_vector_column="vec")
    missing = [np.nan, np.nan]
    np.testing.assert_array_equal(load_dataset(config).items.id_vectors, [missing, [3, 4], missing])


def test_vectors_from_a_float_seq_column(tmp_path):
    clicks = write(tmp_path / "c.inter", "user_id:token\titem_id:token\nu\ta\nu\tb\nu\ta\n")
    items = write(tmp_path / "c.item", "item_id:token\tv:float_seq\na\t1 2\nb\t\n")
    data = load_dataset(DataConfig(interactions=clicks, items=items, id_vector_column="v"))
    np.testing.assert_array_equal(data.items.id_vectors, [[1, 2], [np.nan, np.nan]])


@pytest.mark.parametrize(("vectors", "message"), [
    ([[1, 2], [1, 2, 3], None], "items.jsonl, line 2, column vec: 3 numbers, the vectors before have 2"),
    ([[1, 2], [1, None], None], "items.jsonl, line 2, column vec: the vector holds a value that is not finite"),
    ([[1, 2], ["x", "y"], None], "items.jsonl, line 2, column vec: the vector holds a value that is not finite"),
    ([[1, 2], [1, 1e99], None], "items.jsonl, line 2, column vec: the vector holds a value that is not finite"),
    ([None, None, None], "column vec: holds Null, not vectors"),
    ([None, None, []], "column vec: no item has a vector; unset data.image_column"),
])
def test_bad_vectors_are_refused(tmp_path, vectors, message):
    with pytest.raises(DataError, match=message):
        load_vectors(tmp_path, vectors)


def test_vectors_from_a_numpy_file(tmp_path):
    np.save(tmp_path / "v.npy", np.array([[1, 2], [np.nan, np.nan], [3, 4]]))
    items = load_vectors(tmp_path, [None] * 3, id_vector_column="v.npy")  # beside the item file
    np.testing.assert_array_equal(items.id_vectors, [[1, 2], [np.nan, np.nan], [3, 4]])
    np.save(tmp_path / "v.npy", np.full((3, 2), np.nan))
    with pytest.raises(DataError, match="no item has a vector; unset data.id_vector_column"):
        load_vectors(tmp_path, [None] * 3, id_vector_column=str(tmp_path / "v.npy"))
    np.save(tmp_path / "v.npy", np.ones((2, 2)))
    with pytest.raises(DataError, match=r"shape \(2, 2\) of float64; numbers of shape \(3, width\) are needed"):
        load_vectors(tmp_path, [None] * 3, id_vector_column=str(tmp_path / "v.npy"))


def test_title_comes_first_and_numbers_are_no_text(tmp_path):
    clicks = write(tmp_path / "clicks.csv", "user,item\nu,1\nu,2\nu,1\n")
    items = write(tmp_path / "items.csv", 'item,brand,price,Name\n1,"Acme,  Inc",9.99,"Big ""A"""\n2,,3,1984\n')
    config = DataConfig(interactions=clicks, items=items)
    assert load_dataset(config).items.texts == ['Big "A" | Acme, Inc', "1984"]
    config.text_columns = ["price", "brand"]
    assert load_dataset(config).items.texts == ["9.99 | Acme, Inc", "3"]
    assert load_dataset(config).items.titles == ["9.99", "3"]
    config.text_columns = ["brand", "Name"]  # the order is that of the text, the title the one that is named so
    assert load_dataset(config).items.texts == ['Acme, Inc | Big "A"', "1984"]
    assert load_dataset(config).items.titles == ['Big "A"', "1984"]


@pytest.mark.parametrize(("title", "expected"), [
    (pl.Series(["Alpha", None], dtype=pl.Categorical), ["Alpha", ""]),
    (pl.Series(["1984", "1917"], dtype=pl.Enum(["1917", "1984"])), ["1984", "1917"]),
    (pl.Series([300, 1917]), ["300", "1917"]),
    (pl.Series([300.0, float("nan")]), ["300", ""]),
    (pl.Series([8.5, None]), ["8.5", ""]),
    (pl.Series([date(2001, 9, 1), None]), ["2001-09-01", ""]),
])
def test_a_title_is_text_whatever_its_type(tmp_path, title, expected):
    clicks = write(tmp_path / "clicks.csv", "user,item\nu,1\nu,2\nu,1\n")
    brand = pl.Series(["Acme", "Beta"], dtype=pl.Categorical)
    frame = pl.DataFrame({"item": [1, 2], "brand": brand, "price": [9.5, 3.0], "title": title, "tags": [["a"], ["b"]]})
    frame.write_parquet(tmp_path / "items.parquet")
    config = DataConfig(interactions=clicks, items=str(tmp_path / "items.parquet"))
    data = load_dataset(config)
    assert data.items.titles == expected
    assert data.items.texts == [f"{name} | {b}" if name else b for name, b in zip(expected, brand, strict=True)]
    assert any("items.parquet: not taken for text: price, tags; data.text_columns" in note for note in data.notes)
    config.text_columns = ["title", "price", "tags"]
    data = load_dataset(config)
    assert data.items.titles == expected and data.items.texts[0] == f"{expected[0]} | 9.5 | a"
    assert not any("not taken for text" in note for note in data.notes)


def test_a_title_of_numbers_in_jsonl(tmp_path):
    clicks = write(tmp_path / "clicks.csv", "user,item\nu,1\nu,2\nu,1\n")
    items = write(tmp_path / "items.jsonl", '{"id":1,"title":300,"brand":"x"}\n{"id":2,"title":1917,"brand":"y"}\n')
    assert load_dataset(DataConfig(interactions=clicks, items=items)).items.texts == ["300 | x", "1917 | y"]


def test_a_column_that_cannot_be_text_is_refused(tmp_path):
    clicks = write(tmp_path / "clicks.csv", "user,item\nu,1\nu,2\nu,1\n")
    pl.DataFrame({"item": [1, 2], "length": [timedelta(hours=2)] * 2}).write_parquet(tmp_path / "items.parquet")
    config = DataConfig(interactions=clicks, items=str(tmp_path / "items.parquet"), text_columns=["length"])
    with pytest.raises(DataError, match="column length: holds Duration.* cannot be read as text; convert it, or name"):
        load_dataset(config)


def test_queries_clicks_and_labels(tmp_path):
    path = write(tmp_path / "a.csv", "user,item,ts,query,clicked\nu,a,1,red  shoe,1\nu,b,2,,1\nu,c,3,red shoe,False\n"
                                     "u,a,4,hat,true\nu,c,5,,0\n")
    data = load_dataset(DataConfig(interactions=path))
    sequences = data.sequences
    assert [sequences.query_texts[q] if q >= 0 else None for q in sequences.queries] == ["red shoe", None, "hat"]
    assert sequences.negatives.tolist() == [2]
    assert sequences.negatives_indptr.tolist() == [0, 0, 0, 1]
    assert any("1 rows shown but not clicked have no later click" in note for note in data.notes)
    path = write(tmp_path / "b.csv", "user,item,ts,label\nu,a,1,5\nu,b,2,3\nu,c,3,1\n")
    data = load_dataset(DataConfig(interactions=path))
    assert len(data.sequences.items) == 3 and any("column label" in note for note in data.notes)
    with pytest.raises(DataError, match="line 2, column label: got '5'"):
        load_dataset(DataConfig(interactions=path, clicked_column="label"))


def test_without_times_the_order_of_the_file_counts(tmp_path):
    path = write(tmp_path / "a.csv", "user,item\nu,z\nu,a\nu,m\nu,a\n")
    data = load_dataset(DataConfig(interactions=path))
    assert data.items.ids[data.sequences.items].tolist() == ["z", "a", "m", "a"]
    assert data.sequences.times is None
    assert any("order of the rows" in note for note in data.notes)


def test_ids_are_text_whatever_their_type(tmp_path):
    clicks = tmp_path / "c.parquet"
    frame = pl.DataFrame({"user_id": [1.0, 1.0, 1.0], "item_id": [7, 8, 7], "timestamp": [1.5, 2.5, 3.5]})
    frame.write_parquet(clicks)
    items = write(tmp_path / "i.csv", "item_id,title\n7,A\n8,B\n")
    data = load_dataset(DataConfig(interactions=str(clicks), items=items))
    assert data.sequences.user_ids.tolist() == ["1"] and data.sequences.items.tolist() == [0, 1, 0]
    assert data.sequences.times.tolist() == [1.5, 2.5, 3.5]


def test_decimal_ids_lose_the_zeros_of_their_scale(tmp_path):
    clicks = tmp_path / "c.parquet"
    ids = pl.Series(["1.00", "100.00", "7.50", "9007199254740993.00"]).cast(pl.Decimal(20, 2))
    pl.DataFrame({"user_id": pl.Series([10] * 4).cast(pl.Decimal(20, 0)), "item_id": ids}).write_parquet(clicks)
    items = write(tmp_path / "i.csv", "item_id,title\n1,A\n100,B\n7.5,C\n9007199254740993,D\n")
    data = load_dataset(DataConfig(interactions=str(clicks), items=items))
    assert data.sequences.user_ids.tolist() == ["10"] and data.sequences.items.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("clicked", "listed"), [("1.0", "1"), ("1", "1.0")])
def test_text_ids_that_differ_by_a_zero(tmp_path, clicked, listed):
    clicks = write(tmp_path / "c.csv", f"user,item\nu,{clicked}\n")
    items = write(tmp_path / "i.csv", f"item,title\n{listed},A\n")
    with pytest.raises(DataError, match=f"item '{clicked}' is not in .*; write it as there, '{listed}' \\(1 rows"):
        load_dataset(DataConfig(interactions=clicks, items=items, min_user_events=1))


@pytest.mark.parametrize(("column", "value", "setting"), [
    ("item", [1], "data.item_column to another one$"), ("user", {"a": 1}, "data.user_column to another one$"),
    ("query", ["x"], "data.query_column to another one or to false"),
    ("clicked", [1], "data.clicked_column to another one or to false"),
])
def test_lists_are_no_ids_queries_or_clicks(tmp_path, column, value, setting):
    row = {"user": 1, "item": 1, "query": "x", "clicked": 1} | {column: value}
    pl.DataFrame([row] * 4).write_parquet(tmp_path / "c.parquet")
    with pytest.raises(DataError, match=f"c.parquet, column {column}: holds .*text and numbers are allowed for the "
                                        f"{column} column; convert it, or set {setting}"):
        load_dataset(DataConfig(interactions=str(tmp_path / "c.parquet")))


def test_a_column_that_is_recognised_can_be_switched_off(tmp_path):
    path = write(tmp_path / "a.csv", "user,item,date,query,clicked\nu,c,5/1/24,x,2\nu,b,4/1/24,,0\nu,a,3/1/24,,5\n")
    with pytest.raises(DataError, match="date: got '5/1/24', .*set data.time_column to another one or to false"):
        load_dataset(DataConfig(interactions=path))
    with pytest.raises(DataError, match="clicked: got '2', .*set data.clicked_column to another one or to false"):
        load_dataset(DataConfig(interactions=path, time_column=False))
    config = DataConfig.from_dict(dict.fromkeys(("time_column", "query_column", "clicked_column"), "false")
                                  | {"interactions": path})
    data = load_dataset(config).sequences
    assert data.items.tolist() == [2, 1, 0] and data.times is data.queries is data.negatives is None
    write(tmp_path / "a.csv", "user,item,keywords,keyword\n" + "u,a,x,y\n" * 3)
    with pytest.raises(DataError, match="could both be .*; set data.query_column to the right one or to false"):
        load_dataset(DataConfig(interactions=path))


@pytest.mark.parametrize(("column", "ids"), [("user_id", [1.0, 1.0]), ("item_id", [7.0, 8.5])])
def test_missing_ids_of_a_float_column_are_refused(tmp_path, column, ids):
    clicks = tmp_path / "c.parquet"
    frame = pl.DataFrame({"user_id": [1, 1, 1], "item_id": [7, 8, 7]})
    frame.with_columns(pl.Series(column, [*ids, float("nan")])).write_parquet(clicks)
    with pytest.raises(DataError, match=f"c.parquet, row 3, column {column}: got nan, an id is needed"):
        load_dataset(DataConfig(interactions=str(clicks), min_user_events=1))


def test_a_missing_item_id_of_a_float_column_is_refused(tmp_path):
    clicks = write(tmp_path / "c.csv", "user,item\nu,1\nu,2\nu,1\n")
    pl.DataFrame({"item_id": [1.0, 2.0, float("nan")]}).write_parquet(tmp_path / "i.parquet")
    with pytest.raises(DataError, match="i.parquet, row 3, column item_id: blank, an id is needed"):
        load_dataset(DataConfig(interactions=clicks, items=str(tmp_path / "i.parquet")))


def test_large_whole_times_stay_exact(tmp_path):
    times = [1_600_000_000_123_456_789, 1_600_000_000_123_456_788, 1_600_000_000_123_456_790]
    path = write(tmp_path / "a.csv", "user,item,ts\n" + "".join(f"u,{k},{t}\n" for k, t in enumerate(times)))
    assert load_dataset(DataConfig(interactions=path)).sequences.times.tolist() == sorted(times)


@pytest.mark.parametrize(("value", "kind"), [(clock(9, 30), "Time"), (timedelta(hours=2), "Duration"), ([1], "List")])
def test_times_that_are_no_points_in_time_are_refused(tmp_path, value, kind):
    path = tmp_path / "c.parquet"
    pl.DataFrame({"user": [1, 1, 1], "item": [1, 2, 1], "ts": [value] * 3}).write_parquet(path)
    with pytest.raises(DataError, match=f"column ts: holds {kind}.*, not times; numbers, dates and datetimes are"):
        load_dataset(DataConfig(interactions=str(path)))


@pytest.mark.parametrize("kind", [pl.Date, pl.Datetime("ms"), pl.Datetime("us", "Europe/Berlin")])
def test_dates_become_seconds(tmp_path, kind):
    path = tmp_path / "c.parquet"
    days = pl.Series([date(1970, 1, day) for day in (2, 3, 4)]).cast(kind)
    pl.DataFrame({"user": [1, 1, 1], "item": [1, 2, 1], "ts": days}).write_parquet(path)
    assert load_dataset(DataConfig(interactions=str(path))).sequences.times.tolist() == [86400, 172800, 259200]


@pytest.mark.parametrize("block", [1, 7, 64])
def test_line_numbers_do_not_depend_on_the_block(tmp_path, monkeypatch, block):
    monkeypatch.setattr(lines_module, "BLOCK", block)
    path = write(tmp_path / "a.csv", "user,item,time\n" + "u,a,1\n" * 20 + "\nu,b\n" + "u,c,2\n" * 5)
    with pytest.raises(DataError, match="line 23: 2 cells"):
        load_dataset(DataConfig(interactions=path))
    path = write(tmp_path / "b.jsonl", '\n{"user":1,"item":2,"ts":3}\n\n' * 9 + '{"user":1,"item":2,"ts":"x"}')
    with pytest.raises(DataError, match="line 28, column ts: got 'x'"):
        load_dataset(DataConfig(interactions=path))


def test_long_cells_blank_first_lines_and_quotes_at_the_edge_of_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(lines_module, "BLOCK", 1000)
    text = '\r\n\nuser,"item",time,note\r\nu,"a ""b""",1,"LONG\n"\r\n\r\nu,b,2,"""\n,"\r\nu,c,3,""\n'
    path = write(tmp_path / "a.csv", text.replace("LONG", "x" * 140_000))
    assert load_dataset(DataConfig(interactions=path)).items.ids.tolist() == ['a "b"', "b", "c"]
    write(tmp_path / "a.csv", (tmp_path / "a.csv").read_bytes() + b"u,d,x,\n")
    with pytest.raises(DataError, match="line 10, column time: got 'x'"):
        load_dataset(DataConfig(interactions=path))


def test_rows_that_the_parser_leaves_out_are_noticed(tmp_path):
    table = open_table(write(tmp_path / "a.csv", "user,item\nu,a\n\nu,b\n"), "data.interactions")
    assert collect(table, table.frame).height == 2
    with pytest.raises(DataError, match="a.csv: 1 rows were read, but the file has 2; write it again"):
        collect(table, table.frame.head(1))


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(DataError, match="a folder, not a file; give one file as data.interactions"):
        load_dataset(DataConfig(interactions=str(tmp_path)))


def test_unknown_id_names_near_ones(tmp_path):
    interactions, items = write_rows(tmp_path, ".csv")
    catalogue = load_dataset(DataConfig(interactions=interactions, items=items)).items
    assert catalogue.index(["c", "a"]).tolist() == [2, 0]
    with pytest.raises(KeyError, match=r"no item has the id 'gamm'; near: c \(Gamma\)"):
        catalogue.index(["gamm"])
