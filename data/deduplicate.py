"""De-duplication: exact (equal normalised text) and near (MinHash of word shingles, hashed into bands, then verified).

A near duplicate is a document whose estimated Jaccard similarity with a document already kept reaches `threshold`.
The share of equal entries of two signatures estimates the similarity J of their shingle sets, with standard deviation
sqrt(J(1-J)/64). Only kept documents are compared with, so chains of gradual change are not swallowed whole, and n copies
cost n comparisons.
Source: Broder, "On the resemblance and containment of documents", 1997.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from .record import BadData
from .text import Document

NUM_PERMUTATIONS = 64
WORDS_PER_SHINGLE = 5
WORDS_PER_BATCH = 1 << 20  # bounds memory: about 40 bytes a word
RECALL_AT_THRESHOLD = 0.99
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def deduplicate(documents: Iterable[Document], threshold: float = 0.8) -> tuple[list[Document], dict[str, int]]:
    """The documents, the first of each group kept, and {documents, exact_duplicates, near_duplicates}."""
    if not 0 < threshold <= 1:
        raise BadData(f"threshold is {threshold}, expected a Jaccard similarity above 0 and at most 1")
    documents = list(documents)
    unique: dict[bytes, tuple[Document, str]] = {}
    for document in documents:
        text = " ".join(document.text.lower().split())
        unique.setdefault(hashlib.blake2b(text.encode(), digest_size=16).digest(), (document, text))
    signatures = minhash_signatures([text for _, text in unique.values()])
    originals = _originals(signatures, threshold)
    kept = [document for (document, _), is_original in zip(unique.values(), originals, strict=True) if is_original]
    report = {
        "documents": len(documents),
        "exact_duplicates": len(documents) - len(unique),
        "near_duplicates": len(unique) - len(kept),
    }
    return kept, report


def minhash_signatures(texts: Sequence[str]) -> np.ndarray:
    """uint64 [len(texts), 64]: for each permutation the smallest permuted hash of the text's shingles."""
    rng = np.random.Generator(np.random.PCG64(0))
    factors = rng.integers(0, 2**63, NUM_PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    offsets = rng.integers(0, 2**64, NUM_PERMUTATIONS, dtype=np.uint64)
    signatures = np.empty((len(texts), NUM_PERMUTATIONS), dtype=np.uint64)
    for first, shingles in _shingle_batches(texts):
        ends = np.cumsum([len(one) for one in shingles])
        starts = np.concatenate(([0], ends[:-1]))
        joined = np.concatenate(shingles)
        for column, (factor, offset) in enumerate(zip(factors, offsets, strict=True)):
            signatures[first : first + len(shingles), column] = np.minimum.reduceat(joined * factor + offset, starts)
    return signatures


def estimated_jaccard(signature: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Share of equal entries of one signature [64] with each of `others` [..., 64]."""
    return (signature == others).mean(axis=-1)


def rows_per_band(threshold: float) -> int:
    """The longest bands (fewest false candidates) that propose a pair at the threshold with probability 0.99."""
    for rows in (16, 8, 4, 2):
        if 1 - (1 - threshold**rows) ** (NUM_PERMUTATIONS // rows) >= RECALL_AT_THRESHOLD:
            return rows
    return 1


def _originals(signatures: np.ndarray, threshold: float) -> list[bool]:
    rows = rows_per_band(threshold)
    buckets: list[dict[bytes, list[int]]] = [{} for _ in range(NUM_PERMUTATIONS // rows)]
    is_original = []
    for index, signature in enumerate(signatures):
        raw = signature.tobytes()
        keys = [raw[start : start + 8 * rows] for start in range(0, len(raw), 8 * rows)]
        candidates = sorted({other for bucket, key in zip(buckets, keys, strict=True) for other in bucket.get(key, ())})
        found = bool(candidates) and bool((estimated_jaccard(signature, signatures[candidates]) >= threshold).any())
        is_original.append(not found)
        if not found:
            for bucket, key in zip(buckets, keys, strict=True):
                bucket.setdefault(key, []).append(index)
    return is_original


def _shingle_batches(texts: Sequence[str]) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(index of the first text, shingle hashes of each text), about WORDS_PER_BATCH words at a time."""
    first, num_words, batch = 0, 0, []
    word_hashes: dict[str, int] = {}
    for index, text in enumerate(texts):
        words = text.split()
        batch.append(_shingles(words, word_hashes))
        num_words += len(words)
        if num_words >= WORDS_PER_BATCH or index == len(texts) - 1:
            yield first, batch
            first, num_words, batch = index + 1, 0, []
            word_hashes = {}


def _shingles(words: list[str], word_hashes: dict[str, int]) -> np.ndarray:
    """One mixed 64-bit hash per run of five words; a shorter text is one shingle. Repeats leave a minimum as it is."""
    for word in set(words).difference(word_hashes):
        word_hashes[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
    hashes = np.array([word_hashes[word] for word in words] or [0], dtype=np.uint64)
    width = min(WORDS_PER_SHINGLE, len(hashes))
    shingles = np.zeros(len(hashes) - width + 1, dtype=np.uint64)
    for place in range(width):
        shingles = (shingles + hashes[place : place + len(shingles)]) * MULTIPLIER
        shingles ^= shingles >> np.uint64(29)
    return shingles
