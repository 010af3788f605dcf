"""Which folders of a run are its checkpoints, and which of them were written to their end."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

COMPLETE = "complete"  # an empty file that says a checkpoint was written to its end
PARTIAL = "partial"  # what it is called while the checkpoint is written or removed


def step_of(checkpoint: str | Path) -> int:
    """
    >>> step_of("runs/demo/checkpoint-60")
    60
    """
    return int(Path(checkpoint).name.removeprefix("checkpoint-"))


def checkpoints(folder: str | Path) -> list[Path]:
    """The folders ``checkpoint-STEP`` in the order of their steps, whoever wrote them."""
    found = (p for p in Path(folder).glob("checkpoint-*") if p.is_dir())
    return sorted((p for p in found if p.name.removeprefix("checkpoint-").isdecimal()), key=step_of)


def is_complete(checkpoint: Path) -> bool:
    """Whether it was written to its end."""
    return (checkpoint / COMPLETE).exists()


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None."""
    return next((p for p in reversed(checkpoints(folder)) if is_complete(p)), None)


def mark_partial(checkpoint: Path) -> None:
    """Says of a checkpoint, before it is written or removed, that it is ours and not whole."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    if is_complete(checkpoint):
        (checkpoint / COMPLETE).replace(checkpoint / PARTIAL)
    else:
        (checkpoint / PARTIAL).touch()


def mark_complete(checkpoint: Path) -> None:
    (checkpoint / PARTIAL).replace(checkpoint / COMPLETE)


def remove(checkpoint: Path, ignore_errors: bool = False) -> None:
    mark_partial(checkpoint)
    shutil.rmtree(checkpoint, ignore_errors=ignore_errors)


def remove_older(newest: Path, best: str | Path | None, limit: int) -> None:
    """Removes the oldest complete checkpoints beyond the limit, 0 for none, but neither the newest nor the best."""
    if limit <= 0:
        return
    found = [p for p in checkpoints(newest.parent) if is_complete(p)]
    kept = {newest.name, Path(best or newest).name}
    spare = len(found) - max(limit, len(kept))
    for old in [p for p in found if p.name not in kept][:max(0, spare)]:
        remove(old, ignore_errors=True)


def remove_stale(folder: Path, resumed: str | Path | None, overwrite: bool) -> None:
    """Removes what a run that goes on from ``resumed``, or starts anew, cannot use, and cuts the log to match.

    That is, of our checkpoints, those not written to their end, those later than the resumed one, and with
    ``overwrite`` all.
    """
    step = step_of(resumed) if resumed else 0
    for stale in checkpoints(folder):
        left = is_complete(stale) and step_of(stale) > step  # of another branch
        if (stale / PARTIAL).exists() or (left if resumed else overwrite):
            remove(stale)
    keep_log(folder / "log.jsonl", step)


def keep_log(path: Path, step: int) -> None:
    """Cuts a log's lines after ``step``, so that a resumed run writes them again."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a line that a kill cut short
            if json.loads(line).get("step", 0) <= step and step > 0:
                lines.append(line + "\n")
    part = path.with_suffix(".part")
    part.write_text("".join(lines), encoding="utf-8")
    part.replace(path)
