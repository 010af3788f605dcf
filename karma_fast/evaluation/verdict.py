"""What the final metrics say, in words that are computed from them: who wins, by how much, and how sure that is."""

from __future__ import annotations

import math
import re
from typing import Any

METRIC = "HR@10"
NAMES = {"popularity": "popularity", "itemknn": "item-kNN", "titletfidf": "title TF-IDF",
         "querytfidf": "query TF-IDF", "queryknn": "query kNN", "karmastart": "KARMA at the start", "karma": "KARMA",
         "rarecstart": "RA-Rec at the start", "rarec": "RA-Rec"}


def number(value: Any) -> float:
    """A number from a log or metrics file, NaN for anything else; infinite beyond 1e100, which no scale can show."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return math.nan
    if abs(value) > 1e100:
        return math.inf if value > 0 else -math.inf
    return float(value)


def key_of(name: str) -> str:
    """One spelling for item_knn, item-kNN and Item KNN."""
    return re.sub(r"[\W_]+", "", name.lower())


def name_of(name: str) -> str:
    return NAMES.get(key_of(name), name)


def requests_of(metrics: dict[str, Any]) -> int:
    """Number of ranked requests: the field ``requests``, or what the protocol line says; 0 if neither tells."""
    if 0 < (count := number(metrics.get("requests"))) < math.inf:
        return int(count)
    found = re.search(r"([\d,]+) requests", str(metrics.get("protocol", "")))
    return int(found[1].replace(",", "") or 0) if found else 0


def standard_error(rate: float, requests: int) -> float:
    """Binomial standard error of a share of ``requests``.

    >>> round(standard_error(0.1, 900), 4)
    0.01
    """
    return math.sqrt(rate * (1 - rate) / requests) if requests and 0 <= rate <= 1 else math.nan


def verdict(rows: dict[str, dict[str, Any]], requests: int = 0, own: str = "karma") -> list[str]:
    """The finding, the other comparisons, and a word on noise; a defeat comes first.

    A row beats another one, or is behind it, by two standard errors of a difference of independent rows; below that,
    the gap is within noise. Where the number of requests is not known, by any gap.

    Args:
        rows: metrics of each recommender by name. requests: how many were ranked, 0 if unknown. own: name of the row
            that is compared with the others.

    Example:
        >>> rows = {"popularity": {"HR@10": 0.05}, "item_knn": {"HR@10": 0.2}, "karma": {"HR@10": 0.1}}
        >>> print(*verdict(rows, 943), sep="\\n")
        KARMA loses to item-kNN: HR@10 0.1000 against 0.2000 (0.50×).
        It beats popularity (0.0500, 2.00×).
        Noise: with 943 requests, HR@10 has a standard error of 0.0098 for KARMA and 0.0130 for item-kNN (binomial); \
the gap of 0.1000 is 6.1 standard errors of a difference of independent rows. All rows rank the same requests, so the \
true noise of a gap is often smaller; another seed or split is not covered.
    """
    scores = {key_of(name): number(row.get(METRIC)) for name, row in rows.items() if isinstance(row, dict)}
    start, who = key_of(own) + "start", name_of(own)
    names = {key_of(name): name_of(name) for name in rows} | {start: "its own start"}
    own = scores.pop(key_of(own), math.nan)
    rivals = {k: v for k, v in sorted(scores.items(), key=lambda kv: -kv[1]) if math.isfinite(v)}
    if not math.isfinite(own):
        best = next(iter(rivals), None)
        return [f"No {METRIC} of {who} is recorded, so there is no verdict on it."] + (
            [f"The best of what was measured is {name_of(best)} with {METRIC} {rivals[best]:.4f}."] if best else [])
    if not rivals:
        return [f"{who} reaches {METRIC} {own:.4f}, and nothing stands beside it.",
                "Without a baseline in the same run this number says little."]

    def told(key: str) -> str:
        return f"{names[key]} ({rivals[key]:.4f}{_ratio(own, rivals[key], ', ')})"

    lost = [k for k in rivals if rivals[k] > own]
    tied = [k for k in rivals if rivals[k] == own]
    beaten = [k for k in rivals if rivals[k] < own]
    # the row that a reader will compare with: the winner, or the best baseline
    rival = next((k for k in rivals if k != start), next(iter(rivals)))
    rival = lost[0] if lost else rival
    gap = abs(own - rivals[rival])
    errors = {k: math.hypot(standard_error(own, requests), standard_error(v, requests)) for k, v in rivals.items()}
    close = [k for k, v in rivals.items() if 0 < abs(own - v) < 2 * errors[k]]
    unsure = rival in close
    if lost:
        words = "is behind" if unsure else "loses to"
        lead = f"{who} {words} {names[rival]}: {METRIC} {own:.4f} against {rivals[rival]:.4f}" \
               f"{_ratio(own, rivals[rival])}"
    elif tied:
        lead = f"{who} ties with {_list([names[k] for k in tied])} at {METRIC} {own:.4f}"
    else:
        kind = "its own start" if rival == start else f"the best baseline, {names[rival]}"
        lead = f"{who} {'is ahead of' if unsure else 'beats'} {kind}: {METRIC} {own:.4f} against " \
               f"{rivals[rival]:.4f}{_ratio(own, rivals[rival])}"
    out = [lead + (", a gap within noise." if unsure else ".")]
    rest = []
    others = [k for k in rivals if k != rival or (tied and not lost)]  # whom the lead does not name
    if behind := [k for k in others if k in lost and k not in close]:
        rest.append(f"It is also behind {_list([told(k) for k in behind])}.")
    if lost and tied:
        rest.append(f"It ties with {_list([names[k] for k in tied])}.")
    if beaten := [k for k in others if k in beaten and k not in close]:
        rest.append(f"It beats {_list([told(k) for k in beaten])}.")
    elif lost and not tied:
        rest.append("It beats none of the others.")
    if near := [k for k in others if k in close]:
        gaps = "The gap" if len(near) == 1 else "The gaps"
        rest.append(f"{gaps} to {_list([told(k) for k in near])} {'is' if len(near) == 1 else 'are'} within noise.")
    if rest:
        out.append(" ".join(rest))
    out.append(_noise(who, own, rivals[rival], names[rival], requests, gap, errors[rival]))
    return out


def _noise(who: str, own: float, other: float, name: str, requests: int, gap: float, error: float) -> str:
    if not requests:
        return "Noise: the number of ranked requests is not recorded, so no standard error can be given."
    text = (f"Noise: with {requests:,} requests, {METRIC} has a standard error of {standard_error(own, requests):.4f} "
            f"for {who} and {standard_error(other, requests):.4f} for {name} (binomial)")
    if gap and error > 0:
        text += f"; the gap of {gap:.4f} is {gap / error:.1f} standard errors of a difference of independent rows"
    text += (". All rows rank the same requests, so the true noise of a gap is often smaller; another seed or split "
             "is not covered.")
    hits = round(min(own, other) * requests)
    return text + (f" With {hits} hits in one row, these errors are rough themselves." if hits < 10 else "")


def _ratio(own: float, other: float, before: str = " (") -> str:
    if other == 0:
        return ""
    ratio = own / other
    text = f"{ratio:.2f}×" if ratio < 10 else f"{ratio:,.0f}×"
    return f"{before}{text}" + (")" if before == " (" else "")


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
