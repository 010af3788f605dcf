"""The quality experiment's data: Amazon Beauty from its public files, simulated queries, synthetic vectors."""

import csv
import hashlib
import json
import random

import numpy as np
import pytest

from benchmarks.quality import beauty
from benchmarks.quality.beauty import Counts, convert
from benchmarks.quality.queries import query_for, simulate_queries, words_of
from benchmarks.quality.synthetic import attribute_words, image_vectors
from karma_fast.config import DataConfig
from karma_fast.data import DataError, Items, load_dataset

BRANDS = {1: "L&#39;Oreal", 3: "Body Shop"}  # of items; the second has a word of its category
PATHS = [["Makeup", "Nails", "Nail Polish"], ["Skin Care", "Body"], ["Hair Care", "Shampoos &amp; Sets"]]
SEQUENCES = {7: [3, 1, 2], 2: [6, 4, 3, 5, 1], 9: [2, 6, 5]}  # neither users nor items ascend
EXPECTED = Counts(3, 6, 11)


def attributes_of(item: int) -> list[str]:
    path = PATHS[item % 3 - 1] if item != 3 else PATHS[1]
    return [BRANDS[item], *path] if item in BRANDS else path


def write_originals(folder, drop: str = "") -> None:
    """The five public files, small: attribute 2 of datamaps.json is rare and has no number of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["Rare"] + [n for path in PATHS for n in path] + list(BRANDS.values())
    names[0], names[1] = names[1], names[0]  # the rare one stands second
    counts = {str(n): 1 if name == "Rare" else 5 + n for n, name in enumerate(names, start=1)}
    kept = [name for name in names if name != "Rare"]
    attributes = {str(i): [kept.index(n) + 1 for n in attributes_of(i)] for i in range(1, 7)}
    asins = {i: f"B00{90 - i}" for i in range(1, 7)}
    numbers = {asin: 10 * i for i, asin in asins.items()}
    lines = [" ".join(map(str, [user, *chosen])) for user, chosen in SEQUENCES.items()]
    (folder / "sequential_data.txt").write_text("\n".join(lines) + "\n")
    (folder / "datamaps.json").write_text(json.dumps({
        "id2item": {str(i): asin for i, asin in asins.items()}, "attributeid2num": counts,
        "id2attribute": {str(n): name for n, name in enumerate(names, start=1)}}))
    (folder / "item_id_to_int.json").write_text(json.dumps(numbers))
    (folder / "Beauty_item2attributes.json").write_text(json.dumps(attributes))
    with open(folder / "products_lookup.csv", "w", newline="") as file:
        csv.writer(file).writerows([("", "global_product_id", "name"),
                                    *((i - 1, numbers[asins[i]], f'Title  {i}, 5" size') for i in asins)])
    if drop:
        (folder / drop).unlink()


def table(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_order_text_and_split_survive_the_conversion(tmp_path):
    write_originals(tmp_path / "in")
    assert convert(tmp_path / "in", tmp_path / "out", expected=EXPECTED) == EXPECTED
    rows = table(tmp_path / "out" / "items.csv")
    assert rows[0] == {"item_id": "b1", "title": 'Title 1, 5" size', "brand": "L'Oreal",
                       "categories": "Makeup, Nails, Nail Polish"}
    assert rows[2]["brand"] == "Body Shop" and rows[2]["categories"] == "Skin Care, Body"
    assert rows[5] == {"item_id": "b6", "title": 'Title 6, 5" size', "brand": "",
                       "categories": "Hair Care, Shampoos & Sets"}
    data = load_dataset(DataConfig(interactions=str(tmp_path / "out" / "interactions.csv"),
                                   items=str(tmp_path / "out" / "items.csv"),
                                   text_columns=["title", "brand", "categories"]))
    read = {user: [int(i[1:]) for i in data.items.ids[data.sequences.items[a:b]]] for user, a, b in
            zip(data.sequences.user_ids, data.sequences.indptr[:-1], data.sequences.indptr[1:], strict=True)}
    assert read == {f"u{user}": chosen for user, chosen in SEQUENCES.items()}
    assert not any("tie" in note or "equal times" in note for note in data.notes)
    # neither ids nor ASINs are text
    assert not any("B00" in text or "b1" in text for text in data.items.texts)


def test_tidy_files_give_the_same_tables(tmp_path):
    write_originals(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", expected=EXPECTED)
    (tmp_path / "tidy").mkdir()
    (tmp_path / "tidy" / "sequential_data.txt").write_text((tmp_path / "in" / "sequential_data.txt").read_text())
    lines = ["item_id\tasin\ttitle\tattributes"] + [
        f'{i}\tB\tTitle  {i}, 5" size\t' + " | ".join(attributes_of(i)) for i in range(1, 7)]
    (tmp_path / "tidy" / "items.tsv").write_text("\n".join(lines) + "\n")
    convert(tmp_path / "tidy", tmp_path / "again", expected=EXPECTED)
    for name in ("items.csv", "interactions.csv", "about.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("drop", beauty.ORIGINALS)
def test_a_missing_file_is_named(tmp_path, drop):
    write_originals(tmp_path / "in", drop)
    with pytest.raises(DataError, match=drop):
        convert(tmp_path / "in", tmp_path / "out", expected=EXPECTED)
    assert not (tmp_path / "out").exists()


def test_other_counts_are_refused(tmp_path):
    write_originals(tmp_path / "in")
    with pytest.raises(DataError, match="3 users, 22,363 are expected"):
        convert(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match="11 events, 12 are expected"):
        convert(tmp_path / "in", tmp_path / "out", expected=Counts(3, 6, 12))
    path = tmp_path / "in" / "sequential_data.txt"
    path.write_text(path.read_text().replace("2 6 4", "2 6 44"))
    with pytest.raises(DataError, match="item 44"):
        convert(tmp_path / "in", tmp_path / "out", expected=EXPECTED)
    path.write_text("1 2 x\n")
    with pytest.raises(DataError, match="line 1"):
        convert(tmp_path / "in", tmp_path / "out", expected=EXPECTED)
    assert not (tmp_path / "out").exists()


def test_attributes_of_another_file_are_refused(tmp_path):
    write_originals(tmp_path / "in")
    path = tmp_path / "in" / "Beauty_item2attributes.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"1": [99]}))
    with pytest.raises(DataError, match="do not belong together"):
        convert(tmp_path / "in", tmp_path / "out", expected=EXPECTED)


def test_the_command_says_what_it_wrote_and_refuses(tmp_path, capsys, monkeypatch):
    write_originals(tmp_path / "in")
    with pytest.raises(SystemExit):
        beauty.main([str(tmp_path / "in"), str(tmp_path / "out")])
    assert "are expected" in capsys.readouterr().err
    monkeypatch.setattr(beauty.convert, "__kwdefaults__", beauty.convert.__kwdefaults__ | {"expected": EXPECTED})
    assert beauty.main([str(tmp_path / "in"), str(tmp_path / "out"), "--queries"]) == 0
    assert "3 users, 6 items, 11 events" in capsys.readouterr().out


def test_queries_come_from_the_target_and_never_name_the_brand(tmp_path):
    write_originals(tmp_path / "in")
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        convert(tmp_path / "in", tmp_path / out, queries=True, seed=seed, expected=EXPECTED)
    events = table(tmp_path / "a" / "interactions.csv")
    items = {row["item_id"]: row for row in table(tmp_path / "a" / "items.csv")}
    for event in events:
        item = items[event["item"]]
        words = event["simulated_query"].split()
        assert words and len(set(words)) == len(words)
        assert set(words) <= set(words_of(item["categories"])) - set(words_of(item["brand"])) - {"and", "of"}
    same = [(tmp_path / name / "interactions.csv").read_bytes() for name in "abc"]
    assert same[0] == same[1] != same[2]
    assert "simulated" in json.loads((tmp_path / "a" / "about.json").read_text())["queries"]


def test_queries_for_one_item_differ_and_the_brand_may_leave_none():
    path = ["Makeup", "Face", "Concealers & Neutralizers"]
    found = simulate_queries([(path, "Face Shop")] * 200)
    assert len(set(found)) > 5 and not any({"face", "shop", "&"} & set(query.split()) for query in found)
    assert all(query for query in found)
    assert query_for(["Body"], "The Body Shop", random.Random(0)) == ""


def test_synthetic_vectors_tell_attributes_apart_and_are_fixed():
    kinds = ["red wine", "green tea", ""]
    titles = [f"name{n}" for n in range(30)]
    items = Items(np.array(titles, dtype=object), [f"{t} | {kinds[n % 3]}" for n, t in enumerate(titles)], titles)
    assert attribute_words(items)[:3] == [["red", "wine"], ["green", "tea"], []]
    vectors = image_vectors(items)
    assert vectors.dtype == np.float32 and np.isnan(vectors[2::3]).all() and np.isfinite(vectors[0::3]).all()
    np.testing.assert_array_equal(vectors, image_vectors(items))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    same, other = (unit[0::3] @ unit[0::3].T), (unit[0::3] @ unit[1::3].T)
    assert same[~np.eye(10, dtype=bool)].mean() > other.mean() + 0.4
    assert same[~np.eye(10, dtype=bool)].max() < 0.999  # noise


def publish(folder, monkeypatch) -> None:
    """The small originals as what --download fetches."""
    write_originals(folder)
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in beauty.ORIGINALS}
    monkeypatch.setattr(beauty, "RAW", folder.parent.as_uri())
    monkeypatch.setattr(beauty, "SOURCES", {name: (folder.name, found) for name, found in sums.items()})


def test_missing_files_are_fetched_and_checked(tmp_path, monkeypatch, capsys):
    there, here = tmp_path / "there", tmp_path / "here"
    publish(there, monkeypatch)
    here.mkdir()
    (here / "datamaps.json").write_bytes((there / "datamaps.json").read_bytes())
    beauty.download(here)
    assert capsys.readouterr().out.count("fetching") == len(beauty.ORIGINALS) - 1
    assert convert(here, tmp_path / "out", expected=EXPECTED) == EXPECTED
    assert beauty.other_files(here) == []
    (here / "datamaps.json").write_text((here / "datamaps.json").read_text() + " ")
    assert beauty.other_files(here) == ["datamaps.json"]


def test_what_is_not_the_file_is_not_kept(tmp_path, monkeypatch):
    publish(tmp_path / "there", monkeypatch)
    (tmp_path / "there" / "products_lookup.csv").write_text("moved")
    with pytest.raises(DataError, match="products_lookup.csv: SHA-256 is .* is needed .5 bytes came"):
        beauty.download(tmp_path / "here")
    (tmp_path / "there" / "products_lookup.csv").unlink()
    with pytest.raises(DataError, match="cannot be fetched.*by hand"):
        beauty.download(tmp_path / "here")
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == ["datamaps.json", "sequential_data.txt"]


def test_other_originals_are_told_of(tmp_path, monkeypatch, capsys):
    write_originals(tmp_path / "source")
    monkeypatch.setattr(beauty, "convert", lambda *args, **options: EXPECTED)
    assert beauty.main([str(tmp_path / "source"), str(tmp_path / "out")]) == 0
    assert "note: sequential_data.txt, datamaps.json" in capsys.readouterr().err
