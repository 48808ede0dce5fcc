"""The files under `results`: what was measured, and on what.

A file holds the conditions of each run ("runs"), the timings, each with the number of its run ("results"), and what
`host` and `huggingface` measured under their names. "machine" repeats the conditions of the last run. Files of before
2026-11-22 have one run and no "runs".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Data = dict[str, Any]


def load(path: Path) -> Data:
    """A file's contents, older ones in the form of today's."""
    data: Data = json.loads(path.read_text())
    if "runs" not in data:
        data["runs"] = [data["machine"]]
        data["results"] = [{"run": 0, "peers": {}, **record} for record in data["results"]]
    return data


def start(machine: Data, earlier: Data | None = None) -> Data:
    """A file for a new run, which goes on after `earlier` where that is given.

    Raises ValueError where that comes from another GPU: its times would stand beside these in one table.
    """
    if earlier is None:
        return {"machine": machine, "runs": [machine], "results": []}
    if earlier["machine"]["gpu"] != machine["gpu"]:
        raise ValueError(f"--append: expected results of {machine['gpu']}, got those of {earlier['machine']['gpu']}")
    return {**earlier, "machine": machine, "runs": [*earlier["runs"], machine], "results": [*earlier["results"]]}


def add(data: Data, record: Data) -> None:
    """Adds a timing of this run, in place of an earlier one of the same operation at the same size."""
    key = record["operation"], record["tokens"]
    data["results"] = [old for old in data["results"] if (old["operation"], old["tokens"]) != key]
    data["results"].append({**record, "run": len(data["runs"]) - 1})


def save(path: Path, data: Data) -> None:
    """Writes the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(data, indent=1) + "\n")
    beside.replace(path)


def best_peer(record: Data) -> tuple[str, float] | None:
    """(name, median) of the fastest peer, None where none was timed."""
    medians = {name: timing["p50"] for name, timing in record["peers"].items()}
    return min(medians.items(), key=lambda item: item[1]) if medians else None


def operations(data: Data) -> dict[str, list[Data]]:
    """The timings of each operation that has some, by number of tokens."""
    found: dict[str, list[Data]] = {}
    for record in sorted(data["results"], key=lambda record: record["tokens"]):
        if "jaxmoe" in record:
            found.setdefault(record["operation"], []).append(record)
    order = {record["operation"]: i for i, record in reversed(list(enumerate(data["results"])))}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))
