"""A tiny generating grammar: `{a|b}` picks one branch (branches nest), `$name` is filled from a dictionary.

Only `random.Random.random()` is drawn from: it is the one part of the standard generator whose stream Python
promises never to change, so a seed gives the same text on every Python.
"""

import random
import re


class Draw:
    """Seeded choices."""

    def __init__(self, seed):
        self._random = random.Random(seed)

    def below(self, n):
        """An integer from 0 up to but not including `n`."""
        return int(self._random.random() * n)

    def chance(self, p):
        """True with probability `p`."""
        return self._random.random() < p

    def pick(self, items):
        """One of `items`."""
        return items[self.below(len(items))]

    def shuffle(self, items):
        """A shuffled copy of `items` (Fisher-Yates)."""
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]
        return items

    def digits(self, n):
        """`n` digits, the first not 0."""
        return str(1 + self.below(9)) + "".join(str(self.below(10)) for _ in range(n - 1))

    def expand(self, pattern, names=None):
        """`pattern` with every `{a|b}` chosen, innermost first, and every `$name` filled in."""
        while True:
            match = re.search(r"\{([^{}]*)\}", pattern)
            if match is None:
                break
            pattern = pattern[: match.start()] + self.pick(match.group(1).split("|")) + pattern[match.end() :]
        filled = re.sub(r"\$([a-z_]+)", lambda m: str((names or {})[m.group(1)]), pattern)
        # Branches that came out empty leave doubled blanks and blanks before punctuation behind.
        filled = re.sub(r" ([.,:;?!])", r"\1", re.sub(r"\s+", " ", filled)).replace(",?", ",").strip()
        return re.sub(r"\b([Aa]) (?=[aeio]|upright)", r"\1n ", filled)


def sentence(text):
    """`text` with a capital first letter and a full stop where it ends in none of `.!?:,`."""
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?", ":", ",")) else text + "."


def shingles(text, n=5):
    """The set of word n-grams of `text`, lower-cased, punctuation dropped; the whole text where it is shorter."""
    words = re.findall(r"[\w'-]+", text.lower())
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


class Distinct:
    """Accepts a text only when it shares at most `limit` of its word 5-grams with every text accepted before."""

    def __init__(self, limit=0.6):
        self._limit = limit
        self._texts = []
        self._where = {}
        self.rejected = 0
        self.largest = 0.0

    def accept(self, text):
        """True, and `text` is remembered; or False when it is too much like an earlier one."""
        mine = shingles(text)
        shared = {}
        for shingle in mine:
            for index in self._where.get(shingle, ()):
                shared[index] = shared.get(index, 0) + 1
        closest = max((n / min(len(mine), len(self._texts[i])) for i, n in shared.items()), default=0.0)
        if closest > self._limit:
            self.rejected += 1
            return False
        self.largest = max(self.largest, closest)
        for shingle in mine:
            self._where.setdefault(shingle, []).append(len(self._texts))
        self._texts.append(mine)
        return True
