"""Serving: the nearest items of an interest embedding, by faiss where it is installed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch  # before faiss: both bring an OpenMP runtime, and the one loaded first serves both

from karma_fast.evaluation import Catalogue, top_k
from karma_fast.evaluation.csr import Csr, check_csr
from karma_fast.evaluation.rows import Rows, check_finite, check_widths

Kind = Literal["flat", "hnsw", "ivf"]
SETTINGS_FILE, INDEX_FILE, VECTORS_FILE = "index.json", "index.faiss", "index.safetensors"
HNSW_LINKS, HNSW_BUILD = 32, 200
GPU_RESULTS = 2048  # the most that faiss finds, and clusters it looks at, on a GPU
INSTALL = "pip install faiss-cpu"


class ItemIndex:
    """Items of highest inner product with a query.

    Args:
        embeddings: (N, d) float32 (or half precision), array or tensor: the retrieval embeddings of the catalogue.
        kind: "flat" compares with every item and is exact; "hnsw" (a graph) and "ivf" (clusters) look at a part of the
            catalogue and may miss items. Both need faiss. "flat" without faiss takes
            :func:`karma_fast.evaluation.top_k`.
        gpu: use a GPU if faiss can; None: if a GPU and a faiss built for it are there. ("hnsw" runs on the CPU.)

    Raises:
        ValueError: bad embeddings, an unknown kind. ImportError: faiss is needed and missing.

    Example:
        >>> index = ItemIndex(np.eye(4, dtype=np.float32))
        >>> scores, items = index.search(np.array([0.1, 0.4, 0.3, 0.2], np.float32), k=2)
        >>> items
        array([1, 2])
        >>> index.search(np.array([[0.1, 0.4, 0.3, 0.2]], np.float32), k=2, seen=([0, 1], [1]))[1]
        array([[2, 3]])
    """

    def __init__(self, embeddings: Any, kind: Kind = "flat", *, gpu: bool | None = None) -> None:
        _check_kind(kind)
        rows = Rows.of("items", embeddings)
        check_widths(rows.width, rows.width, len(rows))
        check_finite("items", rows)
        vectors = rows.float32()
        self.kind, self.num_items, self.width = kind, len(vectors), vectors.shape[1]
        self._vectors = self._index = None
        faiss = faiss_for(kind)
        if faiss is None:
            self._vectors = Catalogue(np.array(vectors))  # a copy: the caller's may change
            return
        if kind == "flat":
            index = faiss.IndexFlatIP(self.width)
        elif kind == "hnsw":
            index = faiss.IndexHNSWFlat(self.width, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = HNSW_BUILD
        else:
            # about 4 sqrt(N) clusters, but enough items in each for k-means
            clusters = max(1, min(int(4 * self.num_items**0.5), self.num_items // 39))
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(self.width), self.width, clusters,
                                       faiss.METRIC_INNER_PRODUCT)
            index.nprobe = min(clusters, max(8, clusters // 16))
            index.train(vectors)
        index.add(vectors)
        self._index = _to_gpu(faiss, index, kind, gpu)

    def __len__(self) -> int:
        return self.num_items

    def search(self, queries: Any, k: int, seen: Csr | Any | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k best items of each query, best first.

        Args:
            queries: (Q, d) or (d,), array or tensor.
            k: at least 1.
            seen: items never to return: a pair (indptr (Q + 1,), indices), or for one query (d,) simply their indices.

        Returns:
            scores float32 and indices int64, (Q, k), or (k,) for one query; -inf and -1 where fewer items remain (or,
            with "hnsw" and "ivf", where a search over the whole catalogue finds no more).
        """
        queries = queries.detach().cpu() if isinstance(queries, torch.Tensor) else torch.as_tensor(np.asarray(queries))
        single = queries.ndim == 1
        if single:
            queries = queries[None]
            if seen is not None and not (isinstance(seen, tuple) and len(seen) == 2 and np.ndim(seen[0]) == 1):
                seen = ([0, len(seen)], seen)
        rows = Rows.of("queries", queries)
        check_widths(rows.width, self.width, self.num_items)
        check_finite("queries", rows)
        queries = rows.float32()
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise ValueError(f"k: got {k!r}; a whole number >= 1 is needed")
        if seen is not None:
            seen = check_csr("seen", seen, len(queries), self.num_items)
        if self._index is None:
            scores, items = top_k(queries, self._vectors, k, seen=seen)
        else:
            scores, items = self._search(queries, k, seen)
        return (scores[0], items[0]) if single else (scores, items)

    def _search(self, queries: np.ndarray, k: int, seen: Csr | None) -> tuple[np.ndarray, np.ndarray]:
        best, found = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
        most_seen = int(np.diff(seen[0]).max(initial=0)) if seen is not None else 0
        fetch, todo = min(self.num_items, k + most_seen), np.arange(len(queries), dtype=np.int64)
        while len(todo):
            scores, items = self._fetch(queries[todo], fetch)
            keep = items >= 0
            if seen is not None:
                keep &= ~_member(items, todo, seen, self.num_items)
            place = np.cumsum(keep, axis=1) - 1
            keep &= place < k
            row, column = keep.nonzero()
            place = place[row, column]
            best[todo[row], place], found[todo[row], place] = scores[row, column], items[row, column]
            if fetch == self.num_items:
                break
            todo = todo[keep.sum(axis=1) < k]  # an approximate index stopped short: look further
            fetch = min(self.num_items, 4 * fetch)
        return best, found

    def _fetch(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        import faiss

        index = self._index
        if hasattr(index, "getDevice") and count > GPU_RESULTS:
            self._index = index = faiss.index_gpu_to_cpu(index)  # for good: seen lists of this size come back
        if self.kind == "hnsw":
            return index.search(queries, count, params=faiss.SearchParametersHNSW(efSearch=max(64, 2 * count)))
        if self.kind == "ivf":
            # clusters in proportion to the part of the catalogue asked for, all of them when everything is
            share = -(-count * index.nlist // self.num_items)
            probes = min(index.nlist, max(index.nprobe, 2 * share))
            return index.search(queries, count, params=faiss.SearchParametersIVF(nprobe=probes))
        return index.search(queries, count)

    def save(self, folder: str | Path) -> None:
        """Writes ``index.json`` and the vectors (``index.faiss``, or ``index.safetensors`` without faiss)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = VECTORS_FILE if self._index is None else INDEX_FILE
        temporary = folder / f".{name}.tmp"
        if self._index is None:
            from safetensors.numpy import save_file

            save_file({"vectors": self._vectors.rows.array}, temporary)
        else:
            import faiss

            on_gpu = hasattr(self._index, "getDevice")
            faiss.write_index(faiss.index_gpu_to_cpu(self._index) if on_gpu else self._index, str(temporary))
        os.replace(temporary, folder / name)
        settings = {"kind": self.kind, "num_items": self.num_items, "width": self.width, "file": name}
        temporary = folder / f".{SETTINGS_FILE}.tmp"
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, folder / SETTINGS_FILE)

    @classmethod
    def load(cls, folder: str | Path, *, gpu: bool | None = None) -> ItemIndex:
        """Reads what :meth:`save` wrote; FileNotFoundError without it, ValueError if its files do not fit."""
        folder = Path(folder)
        if not (folder / SETTINGS_FILE).is_file():
            raise FileNotFoundError(f"{folder / SETTINGS_FILE}: no index there; build one with ItemIndex(embeddings) "
                                    "and save it to this folder")
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        index = cls.__new__(cls)
        index.kind, index.num_items, index.width = settings["kind"], settings["num_items"], settings["width"]
        index._vectors = index._index = None
        _check_kind(index.kind)
        path = folder / settings["file"]
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing, though {SETTINGS_FILE} names it; save the index again")
        if settings["file"] == VECTORS_FILE:
            from safetensors.numpy import load_file

            index._vectors = Catalogue(load_file(path)["vectors"])
            found = index._vectors.rows.array.shape
        else:
            faiss = faiss_for("hnsw")  # the file needs faiss, whatever the kind
            read = faiss.read_index(str(path))
            found = (read.ntotal, read.d)
            index._index = _to_gpu(faiss, read, index.kind, gpu)
        if tuple(found) != (index.num_items, index.width):
            raise ValueError(f"{path}: holds {tuple(found)} and {SETTINGS_FILE} says "
                             f"{(index.num_items, index.width)}; save the index again")
        return index


def remove_index(folder: str | Path) -> None:
    """Removes what `ItemIndex.save` wrote, if it is there; first the file without which the rest is no index."""
    for name in (SETTINGS_FILE, INDEX_FILE, VECTORS_FILE):
        (Path(folder) / name).unlink(missing_ok=True)


def _member(items: np.ndarray, query_rows: np.ndarray, seen: Csr, num_items: int) -> np.ndarray:
    """(R, F) found items -> whether each is among its query's seen ones."""
    indptr, indices = seen
    pairs = np.repeat(np.arange(len(indptr) - 1, dtype=np.int64), np.diff(indptr)) * num_items + indices
    return np.isin(query_rows[:, None] * num_items + items, pairs)


def _check_kind(kind: str) -> None:
    if kind not in ("flat", "hnsw", "ivf"):
        raise ValueError(f"kind: got {kind!r}; flat, hnsw or ivf is needed")


def faiss_for(kind: str) -> Any:
    """The module; None if it is missing and the kind needs none, else ImportError."""
    try:
        import faiss
    except ImportError:
        if kind == "flat":
            return None
        raise ImportError(f"this index needs faiss, which is not installed: {INSTALL} (kind='flat' works without "
                          "it)") from None
    return faiss


def _to_gpu(faiss: Any, index: Any, kind: str, gpu: bool | None) -> Any:
    able = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
    if gpu and not able:
        raise ValueError("gpu: True, but no GPU was found or the installed faiss is built for CPUs; install faiss-gpu "
                         "or leave gpu out")
    if kind == "hnsw" or gpu is False or not able:
        return index
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
