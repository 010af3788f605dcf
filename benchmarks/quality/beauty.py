"""Amazon Beauty 2014 (5-core) from its public files to our tables: ``python -m benchmarks.quality.beauty FOLDER``.

FOLDER holds either the originals, under their own names (``--download`` gets those that are missing):

=========================  ============================================================================================
sequential_data.txt        github.com/Wenyueh/LLM-RecSys-ID, data/beauty: a user and the items, oldest first, a line
datamaps.json              the same folder: item number -> ASIN, attribute number -> name and count
products_lookup.csv        github.com/dh-r/LLM-Sequential-Recommendation, beauty: product number -> title
item_id_to_int.json        the same folder: ASIN -> product number
Beauty_item2attributes.json  github.com/RUCAIBox/CIKM2020-S3Rec, data: item number -> attribute numbers
=========================  ============================================================================================

or ``sequential_data.txt`` beside ``items.tsv`` (item_id, asin, title, attributes joined by `` | ``). What is written:
interactions.csv (user, item, order), items.csv (item_id, title, brand, categories), about.json. An ASIN leads from one
file to the other and is not written: ties of a day were stored in its order. The item's number is its id, which no
model reads.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import html
import io
import json
import sys
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from karma_fast.data import DataError, cache_dir

from .queries import simulate_queries

TOP_LEVEL = ("Makeup", "Skin Care", "Hair Care", "Fragrance", "Bath & Body", "Tools & Accessories")
NO_BRAND = ("", "unknown", "unbranded")
RARE = 5  # S3-Rec numbers the attributes that occur so often, in the order of datamaps.json
LLM_RECSYS_ID = "Wenyueh/LLM-RecSys-ID/2200ad9fef647ef755c01d6d7e5c5de3082606c5/data/beauty"
SEQUENTIAL = "dh-r/LLM-Sequential-Recommendation/6464b39064f369b251580c63edbf635de0934101/beauty"
S3_REC = "RUCAIBox/CIKM2020-S3Rec/2a81540ae18615d88ef88227b0c066e5b74781e5/data"
# file -> (owner/repository/commit/folder, SHA-256) of what the tables of docs/quality.md were made from
SOURCES = {
    "sequential_data.txt": (LLM_RECSYS_ID, "f85a84ab47d70e82bf0e7301804270af10fb51e127ab8f0885697d593f6f6d43"),
    "datamaps.json": (LLM_RECSYS_ID, "715ab04838ff1ba21238475ed453a89e8c30aa6214b904d27a79e4168fc7b612"),
    "products_lookup.csv": (SEQUENTIAL, "65133eca0615999df67fc5b26a93a7da762e53e613a083fd6b9e37174896d128"),
    "item_id_to_int.json": (SEQUENTIAL, "3d1a1d362c7daeddf616057fae8fa24af9d70902fdaf4631852231a9953afa50"),
    "Beauty_item2attributes.json": (S3_REC, "129e40f67486f6877eff0f5318cfa8530ee8ac23d8b0d1de04e1bb7a2ba0b2d4"),
}
ORIGINALS = tuple(SOURCES)
RAW = "https://raw.githubusercontent.com"
TIMEOUT = 30  # seconds without an answer
QUERY_COLUMN = "simulated_query"


@dataclass(frozen=True)
class Counts:
    users: int
    items: int
    events: int


EXPECTED = Counts(22_363, 12_101, 198_502)


@dataclass(frozen=True)
class Item:
    """categories: from the top level down."""

    title: str
    brand: str
    categories: tuple[str, ...]


def convert(source: Path, out: Path, *, queries: bool = False, seed: int = 0, expected: Counts = EXPECTED) -> Counts:
    """Writes the tables into ``out``; DataError, with nothing written, if a file is missing or a count differs."""
    sequences = read_sequences(source / "sequential_data.txt")
    items = read_tidy(source / "items.tsv") if (source / "items.tsv").is_file() else read_originals(source)
    found = check(sequences, items, expected, source)
    events = [(user, item, order) for user, chosen in sequences for order, item in enumerate(chosen)]
    rows: Iterable[tuple] = ((f"u{user}", f"b{item}", order) for user, item, order in events)
    head = ("user", "item", "order")
    about = {"data": "Amazon Beauty 2014, 5-core", **vars(found), "queries": None}
    if queries:
        texts = simulate_queries([(items[item].categories, items[item].brand) for _, item, _ in events], seed)
        rows, head = ((*row, text) for row, text in zip(rows, texts, strict=True)), (*head, QUERY_COLUMN)
        about["queries"] = (f"simulated from the target's category path with seed {seed}; no user typed them. "
                            f"{sum(map(bool, texts)):,} of {len(texts):,} events have one")
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "items.csv", ("item_id", "title", "brand", "categories"),
              ((f"b{n}", item.title, item.brand, ", ".join(item.categories)) for n, item in items.items()))
    write_csv(out / "interactions.csv", head, rows)
    (out / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")  # last: all is there
    return found


def download(source: Path) -> None:
    """Gets the originals that ``source`` lacks; DataError, with the file not kept, if its SHA-256 is another."""
    source.mkdir(parents=True, exist_ok=True)
    for name, (place, wanted) in SOURCES.items():
        if (source / name).exists():
            continue
        url = f"{RAW}/{place}/{name}"
        print(f"fetching {url}", flush=True)
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
                content = answer.read()
        except OSError as error:  # URLError is one
            raise DataError(f"{url}: cannot be fetched ({error}); put the file into {source} by hand and leave out "
                            "--download") from error
        if (found := hashlib.sha256(content).hexdigest()) != wanted:
            raise DataError(f"{url}: SHA-256 is {found}, {wanted} is needed ({len(content):,} bytes came); try again")
        part = source / (name + ".part")
        part.write_bytes(content)
        part.replace(source / name)


def other_files(source: Path) -> list[str]:
    """Originals in ``source`` that are not those which docs/quality.md was made from."""
    return [name for name, (_, wanted) in SOURCES.items()
            if (source / name).is_file() and hashlib.sha256((source / name).read_bytes()).hexdigest() != wanted]


def check(sequences: list[tuple[int, list[int]]], items: dict[int, Item], expected: Counts, source: Path) -> Counts:
    used = {item for _, chosen in sequences for item in chosen}
    found = Counts(len({user for user, _ in sequences}), len(items), sum(len(chosen) for _, chosen in sequences))
    if used - items.keys():
        raise DataError(f"{source}: item {min(used - items.keys())} is in the sequences and has no title or "
                        "attribute; take all files from the repositories that this program names")
    for name, number in vars(found).items():
        if number != getattr(expected, name):
            raise DataError(f"{source}: {number:,} {name}, {getattr(expected, name):,} are expected; it is another "
                            "data set or was cut short, so take the files anew")
    return found


def read_sequences(path: Path) -> list[tuple[int, list[int]]]:
    """(user, items oldest first) of each line."""
    out = []
    for number, line in enumerate(open_text(path).splitlines(), start=1):
        try:
            user, *chosen = map(int, line.split())
        except ValueError:
            raise DataError(f"{path}, line {number}: whole numbers are needed, a user and then items; take the file "
                            "anew") from None
        out.append((user, chosen))
    return out


def read_tidy(path: Path) -> dict[int, Item]:
    """Item number -> item, of a table with tabs."""
    rows = csv.DictReader(io.StringIO(open_text(path)), delimiter="\t", quoting=csv.QUOTE_NONE)
    missing = {"item_id", "title", "attributes"} - set(rows.fieldnames or ())
    if missing:
        raise DataError(f"{path}, line 1: no column {', '.join(sorted(missing))}; item_id, title and attributes are "
                        "needed")
    return {int(row["item_id"]): item_of(row["title"], row["attributes"].split(" | ")) for row in rows}


def read_originals(source: Path) -> dict[int, Item]:
    """Item number -> item, from the four files beside the sequences."""
    maps, numbers, attributes = (json.loads(open_text(source / name)) for name in (ORIGINALS[1], *ORIGINALS[3:]))
    products = list(csv.DictReader(io.StringIO(open_text(source / ORIGINALS[2]))))
    titles = {int(row["global_product_id"]): row["name"] for row in products}
    names = [maps["id2attribute"][n] for n in sorted(maps["id2attribute"], key=int)
             if maps["attributeid2num"][n] >= RARE]
    most = max((max(found, default=0) for found in attributes.values()), default=0)
    if most != len(names):
        raise DataError(f"{source}: {ORIGINALS[4]} numbers its attributes up to {most}, and {ORIGINALS[1]} has "
                        f"{len(names)} that occur {RARE} times or more; the two do not belong together")
    out = {}
    for number, asin in sorted(maps["id2item"].items(), key=lambda pair: int(pair[0])):
        if numbers.get(asin) not in titles or number not in attributes:
            raise DataError(f"{source}: item {number} ({asin}) has no entry in {ORIGINALS[2]} or {ORIGINALS[4]}; take "
                            "the files anew")
        out[int(number)] = item_of(titles[numbers[asin]], [names[a - 1] for a in attributes[number]])
    return out


def item_of(title: str, attributes: list[str]) -> Item:
    """What stands before the top level of the category path is the brand.

    >>> item_of("Red  Polish", ["L&#39;Oreal", "Makeup", "Nails"])
    Item(title='Red Polish', brand="L'Oreal", categories=('Makeup', 'Nails'))
    """
    words = [plain(a) for a in attributes if plain(a)]
    top = next((n for n, word in enumerate(words) if word in TOP_LEVEL), len(words))
    if top == len(words) and words or top > 1:
        raise DataError(f"item {title!r}: its attributes {words} are not a brand and a category path; the path starts "
                        f"with one of {', '.join(TOP_LEVEL)}")
    brand = words[0] if top == 1 else ""
    return Item(plain(title), "" if brand.lower() in NO_BRAND else brand, tuple(dict.fromkeys(words[top:])))


def plain(text: str) -> str:
    """Without HTML entities, on one line."""
    return " ".join(html.unescape(text).split())


def open_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); the folder needs {', '.join(ORIGINALS)}, or "
                        f"{ORIGINALS[0]} and items.tsv; `python -m benchmarks.quality.beauty FOLDER --download` gets "
                        "them") from None


def write_csv(path: Path, head: tuple[str, ...], rows: Iterable[tuple]) -> None:
    part = path.with_name(path.name + ".part")
    with open(part, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    part.replace(path)


def default_folder(queries: bool) -> Path:
    return cache_dir() / "quality" / ("beauty-queries" if queries else "beauty")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.beauty", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FOLDER")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="default: the user's cache")
    parser.add_argument("--download", action="store_true", help="fetch what FOLDER lacks (4.5 MB), checked by SHA-256")
    parser.add_argument("--queries", action="store_true", help=f"a column {QUERY_COLUMN}, made from category paths")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated queries")
    args = parser.parse_args(arguments)
    out = args.out or default_folder(args.queries)
    try:
        if args.download:
            download(args.source)
        found = convert(args.source, out, queries=args.queries, seed=args.seed)
    except DataError as error:
        parser.error(str(error))
    if others := other_files(args.source):
        print(f"note: {', '.join(others)}: not the version that docs/quality.md was made from, so results may differ",
              file=sys.stderr)
    print(f"{found.users:,} users, {found.items:,} items, {found.events:,} events: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
