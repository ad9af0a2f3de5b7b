"""Sequences of a session that advance together, with the logits of every step."""

import numpy as np

from cqil_trt.runner import Runner
from cqil_trt.scheduler import Step


def score(session, prompt):
    """The logits after every token of a prompt, float32 [tokens, vocabulary]."""
    return Runner.of(session, "latency").score(prompt)


class Batch:
    """Prompts in slots 0, 1, …; `logits` [B, vocabulary] predict the next tokens, `tokens` [B] are the likeliest."""

    def __init__(self, session, prompts):
        self.session = session
        self.slots = tuple(range(len(prompts)))
        tokens, logits = [], []
        for slot, prompt in zip(self.slots, prompts):
            tokens.append(session.load(prompt, slot))
            logits.append(session.logits()[0])
        self.tokens, self.logits = np.array(tokens), np.stack(logits)

    def decode(self, tokens):
        """Appends one token to every sequence."""
        self.session.submit(Step(decode=self.slots, given=tuple(int(token) for token in tokens)))
        self.logits = self.session.logits()
        choices = self.session.collect().choices
        self.tokens = np.array([choices[slot][0].token for slot in self.slots])
