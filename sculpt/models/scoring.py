"""Measures of a generated answer.

ROUGE-L is computed here: the usual package keeps ASCII letters only, so that German loses its
umlauts and Chinese everything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sculpt.data.examples import CHOICE, EXACT_MATCH, ROUGE_L


def measures(
    written: Sequence[str], wanted: Sequence[str], labels: Sequence[str]
) -> dict[str, float]:
    """Means over all answers, in [0, 1]; `choice` only where there are labels."""
    pairs = list(zip(written, wanted, strict=True))
    found = {
        EXACT_MATCH: _mean([exact_match(a, b) for a, b in pairs]),
        ROUGE_L: _mean([rouge_l(a, b) for a, b in pairs]),
    }
    if labels:
        found[CHOICE] = _mean([begins_with(a, b, labels) for a, b in pairs])
    return found


def exact_match(written: str, wanted: str) -> float:
    """1 where both are the same, blanks apart."""
    return float(" ".join(written.split()) == " ".join(wanted.split()))


def begins_with(written: str, wanted: str, labels: Sequence[str]) -> float:
    """1 where the answer begins with the wanted label, ignoring case, and with no longer one."""
    start = written.strip().lower()
    found = [label for label in labels if re.match(re.escape(label.lower()) + r"(?!\w)", start)]
    return float(max(found, key=len, default=None) == wanted)


def rouge_l(written: str, wanted: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004); a CJK character is a word."""
    a, b = _words(written), _words(wanted)
    common = _longest_common(a, b)
    return 2 * common / (len(a) + len(b)) if common else 0.0


def _words(text: str) -> list[str]:
    return re.findall(
        r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+", text.lower()
    )


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for place, other in enumerate(b, 1):
            before, row[place] = (
                row[place],
                (before + 1 if word == other else max(row[place], row[place - 1])),
            )
    return row[-1]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
