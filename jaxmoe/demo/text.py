"""The text of the demo, as bytes: a training part, a held-out part, and what simple models make of it."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HELD_OUT_SHARE = 0.1


class Text(NamedTuple):
    """uint8 arrays: `train`, and behind it in the source, `held_out`."""

    name: str
    train: np.ndarray[Any, Any]
    held_out: np.ndarray[Any, Any]


def load_text(path: Path | None, least: int) -> Text:
    """The text of a file, or of Python's own documentation; each part has at least `least` bytes.

    Raises ValueError where the text is too short, OSError where the file cannot be read.
    """
    if path is None:
        topics = pydoc_data.topics.topics
        # Topics repeat whole paragraphs of each other. Each is kept once, so that none is both learnt and held out.
        paragraphs = dict.fromkeys("\n\n".join(topics[key] for key in sorted(topics)).split("\n\n"))
        name, data = "Python's own documentation (pydoc_data.topics)", "\n\n".join(paragraphs).encode()
    else:
        name, data = str(path), path.read_bytes()
    everything = np.frombuffer(data, np.uint8)
    train, held_out = np.split(everything, [int(len(everything) * (1 - HELD_OUT_SHARE))])
    if len(held_out) < least:
        wanted = int(least / HELD_OUT_SHARE)
        raise ValueError(f"text: expected at least {wanted} bytes, got {len(everything)} in {name}")
    return Text(name, train, held_out)


def batches(data: np.ndarray[Any, Any], batch: int, length: int, seed: int) -> Iterator[np.ndarray[Any, Any]]:
    """Without end: int32 [batch, length], pieces from random places."""
    generator = np.random.default_rng(seed)
    while True:
        starts = generator.integers(0, len(data) - length + 1, batch)
        yield data[starts[:, None] + np.arange(length)].astype(np.int32)


def windows(data: np.ndarray[Any, Any], most: int, length: int) -> np.ndarray[Any, Any]:
    """int32 [up to most, length]: the pieces of the text in order, without overlap."""
    count = min(most, len(data) // length)
    return data[: count * length].reshape(count, length).astype(np.int32)


def baselines(text: Text) -> dict[str, float]:
    """Bits per byte on the held-out part, by counts of the training part (each byte counted once more than seen)."""
    single = np.bincount(text.train, minlength=256) + 1.0
    pairs = np.ones((256, 256))
    np.add.at(pairs, (text.train[:-1], text.train[1:]), 1)
    follows = pairs / pairs.sum(axis=1, keepdims=True)
    return {
        "byte frequencies": float(-np.log2(single / single.sum())[text.held_out].mean()),
        "byte pairs": float(-np.log2(follows[text.held_out[:-1], text.held_out[1:]]).mean()),
    }
