"""Measures a model: answers, judged; perplexity; scores with intervals, and paired comparisons."""
