"""Verdicts on an answer's text: is it a refusal, is it broken. Plain Python, no model needed."""
