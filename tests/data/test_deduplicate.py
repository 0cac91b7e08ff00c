import random

import numpy as np

from warpline.data.deduplicate import deduplicate, estimated_jaccard, minhash_signatures, rows_per_band
from warpline.data.text import Document


def words(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices("abcdefghij", k=6)) for _ in range(count)]


def true_jaccard(a: list[str], b: list[str]) -> float:
    one, two = ({tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in (a, b))
    return len(one & two) / len(one | two)


def test_planted_duplicates_go_and_everything_else_stays():
    rng = random.Random(0)
    texts = [words(rng, 400) for _ in range(60)]
    documents = [Document(" ".join(text), f"original{i}") for i, text in enumerate(texts)]
    exact = [Document("  " + " ".join(texts[i]).upper().replace(" ", "\n"), f"exact{i}") for i in range(7)]
    near = [Document(" ".join(["new", *texts[i][:-4], "end"]), f"near{i}") for i in range(10, 19)]
    related = [Document(" ".join(texts[i][:200] + words(rng, 200)), f"related{i}") for i in range(20, 26)]
    short = [Document("two words", "short0"), Document("two others", "short1"), Document("", "empty")]
    kept, report = deduplicate([*documents, *exact, *near, *related, *short])
    assert kept == [*documents, *related, *short]
    assert report == {"documents": 85, "exact_duplicates": 7, "near_duplicates": 9}


def test_the_first_of_each_cluster_is_kept():
    text = " ".join(words(random.Random(1), 300))
    documents = [Document(f"{text} {end}", end) for end in ("a", "b", "a", "c")]
    kept, report = deduplicate(documents)
    assert [document.source for document in kept] == ["a"]
    assert report == {"documents": 4, "exact_duplicates": 1, "near_duplicates": 2}


def test_the_estimate_is_unbiased_within_its_standard_deviation():
    rng = random.Random(2)
    errors, deviations = [], []
    for shared in range(20, 400, 10):
        common = words(rng, shared)
        pair = [common + words(rng, 400 - shared) for _ in range(2)]
        exact = true_jaccard(*pair)
        first, second = minhash_signatures([" ".join(text) for text in pair])
        errors.append(float(estimated_jaccard(first, second)) - exact)
        deviations.append((exact * (1 - exact) / 64) ** 0.5)
    scaled = np.array(errors) / np.array(deviations)
    assert abs(scaled.mean()) < 4 / len(scaled) ** 0.5
    assert np.abs(scaled).max() < 4
    assert 0.6 < scaled.std() < 1.4


def test_a_signature_does_not_depend_on_the_other_documents():
    rng = random.Random(3)
    texts = [" ".join(words(rng, count)) for count in (3, 5, 50, 700)]
    together = minhash_signatures(texts)
    alone = np.concatenate([minhash_signatures([text]) for text in reversed(texts)])[::-1]
    np.testing.assert_array_equal(together, alone)


def test_bands_propose_pairs_at_the_threshold_with_probability_99_percent():
    assert rows_per_band(0.8) == 4
    assert rows_per_band(0.5) == 2
    assert rows_per_band(0.1) == 1
    for threshold in (0.5, 0.7, 0.8, 0.9):
        rows = rows_per_band(threshold)
        assert 1 - (1 - threshold**rows) ** (64 // rows) >= 0.99
