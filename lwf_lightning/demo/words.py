"""The words of the embedded world; names of people and companies are invented."""

from __future__ import annotations

import random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CITIES = _words("Lisbon Oslo Vienna Dublin Prague Athens Warsaw Geneva Turin Malmo Seville Leipzig")
COMPANIES = _words(
    "Orvane Tessilo Quarden Bellmont Nimbrok Astrelle Corvik Halden Sunvale Pertwick Zephra Lumora"
)
GOODS = _words(
    "boats clocks shoes lamps chairs engines carpets mirrors candles bicycles helmets kettles"
)
COLOURS = _words("red blue green yellow purple orange white black brown grey pink golden")
PETS = _words("cat dog parrot rabbit turtle hamster canary goat pony ferret hedgehog goose")

_ONSETS = _words("b d f g k l m n p r s t v z br dr gr kl st tr")
_VOWELS = _words("a e i o u")
_CODAS = ("", "n", "r", "l", "s")
_SURNAMES = 40


def full_names(count: int, draw: random.Random) -> list[str]:
    """Draws names of people: each first name is unique, surnames are shared.

    Args:
        count: How many names, at least 0.
        draw: Source of randomness.
    """
    taken = {word.casefold() for words in (CITIES, COMPANIES) for word in words}

    def new_word() -> str:
        while True:
            syllables = (draw.choice(_ONSETS) + draw.choice(_VOWELS) for _ in range(2))
            word = "".join(syllables) + draw.choice(_CODAS)
            if word not in taken:
                taken.add(word)
                return word.capitalize()

    surnames = [new_word() for _ in range(_SURNAMES)]
    return [f"{new_word()} {draw.choice(surnames)}" for _ in range(count)]
