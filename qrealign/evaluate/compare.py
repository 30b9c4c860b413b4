"""Two models on the same prompts: is one better than chance would make it?"""

from __future__ import annotations

from typing import Any

from qrealign.evaluate.statistics import mcnemar, minimum_detectable_difference, paired_difference
from qrealign.records import ModelScores


def comparison(realigned: ModelScores, quantized: ModelScores) -> dict[str, dict[str, Any]]:
    """Return, for each score that both models have on the same prompts, the paired comparison of the two.

    `delta` is realigned less quantized in percentage points, `low` and `high` its 95 % interval, `p_value` that of the
    exact McNemar test. `only_quantized` and `only_realigned` count the prompts true for one model alone, and
    `minimum_detectable_difference` is what the test could have found, given how often the two differ. Perplexity, which
    has no outcomes, gets `ratio`.
    """
    result: dict[str, dict[str, Any]] = {}
    for name, before in quantized.outcomes.items():
        after = realigned.outcomes.get(name)
        if after is None or len(after) != len(before):
            continue
        difference = paired_difference(before, after)
        differing = max(1, difference.only_first + difference.only_second)
        result[name] = {
            "p_value": mcnemar(before, after),
            "delta": difference.value,
            "low": difference.low,
            "high": difference.high,
            "n": difference.n,
            "only_quantized": difference.only_first,
            "only_realigned": difference.only_second,
            "minimum_detectable_difference": minimum_detectable_difference(
                difference.n, discordant_share=differing / difference.n
            ),
        }
    if realigned.perplexity is not None and quantized.perplexity:
        result["perplexity"] = {
            "delta": realigned.perplexity - quantized.perplexity,
            "ratio": realigned.perplexity / quantized.perplexity,
        }
    return result
