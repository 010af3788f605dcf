"""`karma-fast recommend`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .common import fit_to, load_data, load_model, user_index

if TYPE_CHECKING:
    from ..data import Items
    from ..model.karma import KarmaModel
    from ..retrieval import ItemIndex


def main(args: argparse.Namespace) -> int:
    model, folder = load_model(args.model)
    if args.user is not None:
        data = fit_to(model, load_data(args.data, folder))
        user = user_index(data.sequences.user_ids, args.user)
        history = data.sequences.items[slice(*data.sequences.indptr[user:user + 2])].astype(np.int64)
    else:
        history = find_items(model.items, args.history)
    u = model.encode_users([history], [args.query])
    seen = ([0, len(history)], history) if args.masked else None
    scores, found = item_index(model, folder).search(u, args.k, seen=seen)
    listed = [{"rank": n + 1, "score": round(float(score), 4), "id": str(model.items.ids[item]),
               "title": model.items.titles[item], "text": model.items.texts[item]}
              for n, (item, score) in enumerate(zip(found[0], scores[0], strict=True)) if item >= 0]
    interest = model.decode(u)[0] if args.explain else None
    read = [model.items.titles[i] or str(model.items.ids[i]) for i in history[-model.config.max_history:]]
    if args.json:
        print(json.dumps({"history": read, "query": args.query, "items": listed}
                         | ({"interest": interest} if args.explain else {}), indent=1, ensure_ascii=False))
        return 0
    print(f"history: {' > '.join(read) or '(empty)'}" + (f"\nquery:   {args.query}" if args.query else ""))
    if interest is not None:
        print(f"decoded interest: {interest!r}")
    width = max((len(row["id"]) for row in listed), default=0)
    for row in listed:
        print(f"{row['rank']:>4}  {row['score']:7.4f}  {row['id']:<{width}}  {row['text'] or row['title']}")
    return 0


def item_index(model: KarmaModel, folder: Path) -> ItemIndex:
    """The index saved with the model; a new one where there is none, or it cannot be read without faiss."""
    from ..retrieval import ItemIndex

    try:
        return ItemIndex.load(folder)
    except (FileNotFoundError, ImportError):
        return ItemIndex(model.encode_items())  # flat needs no faiss


def find_items(items: Items, text: str) -> np.ndarray:
    """Ids or titles with commas between -> (n,) catalogue indices; KeyError for one that is unknown or not unique.

    A title may hold commas itself: of what could be meant, the longest is taken.

    >>> from karma_fast.data import Items
    >>> items = Items(np.array(["a", "b"], dtype=object), ["", ""], ["Usual Suspects, The", "Toy Story"])
    >>> find_items(items, "toy, usual suspects, the, a")
    array([1, 0, 0])
    """
    words = [word.strip() for word in text.split(",")]
    words = [word for word in words if word]
    titles: dict[str, list[int]] = {}
    for place, title in enumerate(items.titles):
        titles.setdefault(title.lower(), []).append(place)
    longest = 1 + max((name.count(",") for names in (titles, items.places) for name in names), default=0)
    found, at = [], 0
    while at < len(words):
        for end in range(min(len(words), at + longest), at, -1):
            places = matches(items, titles, ", ".join(words[at:end]), part=end == at + 1)
            if len(places) == 1:
                break
            if len(places) > 1:
                some = ", ".join(f"{items.ids[p]} ({items.titles[p]})" for p in places[:5])
                raise KeyError(f"{', '.join(words[at:end])!r} fits {len(places)} items: {some}"
                               f"{', ...' if len(places) > 5 else ''}; give the id of one")
        else:
            items.index([words[at]])  # raises with near ids and titles
        found.append(places[0])
        at = end
    return np.array(found, dtype=np.int64)


def matches(items: Items, titles: dict[str, list[int]], word: str, part: bool) -> list[int]:
    """Places of the items with this id, else with this title, else (``part``) with it in their title.

    titles: in lower case, with the places that have them.
    """
    if word in items.places:
        return [items.places[word]]
    lower = word.lower()
    exact = titles.get(lower, [])
    return exact if exact or not part else sorted(p for title in titles if lower in title for p in titles[title])
