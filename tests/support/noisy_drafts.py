"""Drafts that are mostly right, of a test's choice, so that every way to accept and refuse them is taken."""

import random

from cqil_trt import speculation
from cqil_trt.speculation import Speculation


class Noisy:
    """Drafts what the test told it (`answers`: whole sequences), a third of the tokens changed."""

    answers: tuple = ()
    seed = 0
    vocabulary = 259

    def __init__(self):
        self.tokens = []
        self.random = random.Random(self.seed)

    def extend(self, tokens):
        self.tokens += tokens

    def draft(self, most):
        count = self.random.randint(0, most)
        for answer in self.answers:
            if answer[: len(self.tokens)] == self.tokens:
                draft = answer[len(self.tokens) : len(self.tokens) + count]
                return [t if self.random.random() < 0.7 else self.random.randrange(self.vocabulary) for t in draft]
        return [self.random.randrange(self.vocabulary) for _ in range(count)]


def noisy(patch, seed, vocabulary=259, tokens=6):
    """The speculation with these drafts, whatever they cost. `patch(object, name, value)` changes attributes."""
    patch(speculation, "DRAFTERS", {**speculation.DRAFTERS, "noisy": Noisy})
    for name in ("_SHARE", "_MOST"):
        patch(speculation, name, 100.0)
    for name, value in (("seed", seed), ("vocabulary", vocabulary), ("answers", ())):
        patch(Noisy, name, value)
    return Speculation(method="noisy", tokens=tokens)
