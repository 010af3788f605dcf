"""Figures of others on Amazon Beauty with this split, and where they stand. None of them was measured here."""

from __future__ import annotations

from ..tables import rows_of

COLUMNS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10", "HR@20", "NDCG@20")
S3REC = "[S3-Rec's repository](https://github.com/RUCAIBox/CIKM2020-S3Rec)"
DUOREC = "[DuoRec issue 3](https://github.com/RuihongQiu/DuoRec/issues/3)"
BSAREC = ("[the log in BSARec's repository]"
          "(https://github.com/yehjin-shin/BSARec/blob/main/src/output/BSARec_Beauty_best.log)")
FIGURES: list[tuple[str, tuple[float, ...], str]] = [
    ("PopRec", (.0080, .0044, .0152, .0068, .0217, .0084), S3REC),
    ("GRU4Rec", (.0164, .0099, .0283, .0137, .0479, .0187), S3REC),
    ("Caser", (.0205, .0131, .0347, .0176, .0556, .0229), S3REC),
    ("BERT4Rec", (.0203, .0124, .0347, .0170, .0599, .0233), S3REC),
    ("HGN", (.0325, .0206, .0512, .0266, .0773, .0332), S3REC),
    ("SASRec", (.0387, .0249, .0605, .0318, .0902, .0394), S3REC),
    ("FDSA", (.0267, .0163, .0407, .0208, .0656, .0270), S3REC),
    ("S3-Rec", (.0387, .0244, .0647, .0327, .0994, .0414), S3REC),
    ("SASRec, full softmax, a user's rerun on RecBole's own build of the data",
     (.0555, .0326, .0830, .0415, .1191, .0506), DUOREC),
    ("BSARec (AAAI 2024)", (.0736, .0523, .1008, .0611, .1373, .0703), BSAREC),
]


def table() -> str:
    """Markdown."""
    head = ["as published", *COLUMNS, "where"]
    return rows_of([head, *([name, *(f"{value:.4f}" for value in values), where] for name, values, where in FIGURES)])
