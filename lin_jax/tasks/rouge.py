"""ROUGE of generated texts, by rouge-score (Lin, 2004)."""

from collections.abc import Sequence

import numpy as np

# Lsum is the longest common subsequence line by line, as the summaries of CNN/Daily Mail have a sentence a line.
KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the mean F1 of each kind, from 0 to 100, with stems of words, as papers give it.

    Args:
        texts: that were generated.
        references: what each should be.
    """
    from rouge_score.rouge_scorer import RougeScorer  # takes a second

    scorer = RougeScorer(list(KINDS), use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return {kind: 100 * float(np.mean([score[kind].fmeasure for score in scores])) for kind in KINDS}
