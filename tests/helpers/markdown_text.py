"""Markdown tables as tests compare them."""

import re


def squeezed(text: str) -> str:
    """The text without the padding of its columns, and with short rules: `|:--|--:|`."""
    return re.sub(r"-{2,}", "--", re.sub(r" {2,}", " ", text))
