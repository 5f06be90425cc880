"""The names of a study's methods as pictures have them."""

from __future__ import annotations

import textwrap

from lwf_lightning.study.config import Study


def drawn_label(study: Study, method: str, width: int) -> str:
    """The label in lines of a width, as it stands: matplotlib reads formulas between dollars.

    Nor does it show what begins with an underscore in a legend.
    """
    label = study.label(method)
    hidden = "\u200b" if label.startswith("_") else ""
    return hidden + literal(textwrap.fill(label, width))


def literal(text: str) -> str:
    """Text in which dollars are dollars."""
    return text.replace("$", r"\$")
