"""The words of the embedded world; whatever must look invented is invented."""

from __future__ import annotations

import random

CITIES = tuple("Lisbon Oslo Vienna Dublin Prague Athens Warsaw Geneva Turin Malmo Seville Leipzig".split())
COMPANIES = tuple(
    "Orvane Tessilo Quarden Bellmont Nimbrok Astrelle Corvik Halden Sunvale Pertwick Zephra Lumora".split()
)
GOODS = tuple(
    "boats clocks shoes lamps chairs engines carpets mirrors candles bicycles helmets kettles".split()
)
COLOURS = tuple("red blue green yellow purple orange white black brown grey pink golden".split())
PETS = tuple("cat dog parrot rabbit turtle hamster canary goat pony ferret hedgehog goose".split())

_ONSETS = "b d f g k l m n p r s t v z br dr gr kl st tr".split()
_VOWELS = "a e i o u".split()
_CODAS = ("", "n", "r", "l", "s")
_SURNAMES = 40


def names(count: int, draw: random.Random) -> list[str]:
    """Draws full names: each first name is unique, surnames are shared.

    Args:
        count: How many names, at least 0.
        draw: Source of randomness.
    """
    taken = {word.lower() for words in (CITIES, COMPANIES) for word in words}

    def new_word() -> str:
        while True:
            syllables = (draw.choice(_ONSETS) + draw.choice(_VOWELS) for _ in range(2))
            word = "".join(syllables) + draw.choice(_CODAS)
            if word not in taken:
                taken.add(word)
                return word.capitalize()

    surnames = [new_word() for _ in range(_SURNAMES)]
    return [f"{new_word()} {draw.choice(surnames)}" for _ in range(count)]
