"""The scheduler against a simulated device: every sequence sees its own tokens only, whatever else runs."""

import random
import zlib
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import currently_in_test_context, event, given, settings
from hypothesis import strategies as st
from support import SEED

from cqil_trt.errors import UserError
from cqil_trt.runner import Follower, Runner
from cqil_trt.sampling import Choice, SamplingConfig
from cqil_trt.scheduler import Circle, Outcome, Request, Scheduler, Step, check_prompt

VOCABULARY = 8


def likeliest(tokens):
    """The fake model: what follows depends on every token before it."""
    return zlib.crc32(bytes(tokens))


def allowed(generated):
    """The fake grammar: a mask that depends on every token of the answer so far, and allows at least one."""
    bits = zlib.crc32(b"grammar" + bytes(generated)) % (1 << VOCABULARY)
    return bits or 1


def pick(score, mask):
    """The likeliest token of those in `mask`."""
    return next(t % VOCABULARY for t in range(score, score + VOCABULARY) if mask >> (t % VOCABULARY) & 1)


def seen(what):
    """For pytest --hypothesis-show-statistics: how often the examples reach it."""
    if currently_in_test_context():
        event(what)


class FakeMatcher:
    failure = ""

    def __init__(self, ends):
        self.tokens, self.ends = [], ends

    def mask(self):
        assert not set(self.tokens) & set(self.ends), "a mask for a text that has ended"
        return np.array([allowed(self.tokens)], np.uint32)

    def advance(self, token):
        self.tokens.append(token)


@dataclass
class Wanted:
    """A request of the test, and what came of it."""

    prompt: tuple
    max_new_tokens: int
    ends: tuple = ()
    guided: bool = False
    scored: int | None = None
    logprobs: int | None = None
    aborted: bool = False
    finish_reason: str = ""
    tokens: list = field(default_factory=list)
    logits: list = field(default_factory=list)
    cached: int | None = None

    def request(self):
        return Request(
            prompt=self.prompt,
            max_new_tokens=self.max_new_tokens,
            eos_token_ids=self.ends,
            sampling=SamplingConfig(guided=self.guided, logprobs=self.logprobs),
            scored=self.scored,
            matcher=FakeMatcher(self.ends) if self.guided else None,
        )

    def alone(self, max_seq_len):
        """The tokens of this request and the reason for its end when nothing else runs, by the model's definition."""
        found = []
        room = min(self.max_new_tokens, max_seq_len + 1 - len(self.prompt))
        while len(found) < room:
            mask = allowed(found) if self.guided else (1 << VOCABULARY) - 1
            found.append(pick(likeliest([*self.prompt, *found]), mask))
            if found[-1] in self.ends:
                return found, "eos"
        return found, "length"


def padded_width(width):
    return next(known for known in (1, 2, 4, 8, 16) if known >= width)


def padded_chunk(most, count, past, max_seq_len):
    """To a multiple of four, as far as a chunk may be so long and there is room."""
    padded = min(count + -count % 4, most)
    return padded if past + padded <= max_seq_len else count


class Window:
    """A layer with a window, whose cache is a circle: which position every place of every slot holds."""

    def __init__(self, slots, circle):
        self.circle = circle
        self.places = [[None] * circle.length for _ in range(slots)]

    def copy(self, source, target, count):
        count = min(count, self.circle.length)
        self.places[target][:count] = self.places[source][:count]

    def write(self, slot, first, count):
        """A step's tokens; then the first one attends, and the others up to the one before the padding."""
        for position in range(first, first + count):
            self.places[slot][position % self.circle.length] = position
        for position in range(max(0, first + 1 - self.circle.window), first):
            assert self.places[slot][position % self.circle.length] == position, "a key in the window is gone"


class FakeSession:
    """Executes steps in the order of their submission, as a stream does, on a cache of tokens.

    `window`: of layers whose cache is a circle. `chunk`: the longest that it pads to.
    """

    def __init__(self, slots, max_seq_len, ahead, window=None, chunk=None):
        self.ahead, self.window, self.chunk = ahead, window, chunk
        self.cache = [[None] * max_seq_len for _ in range(slots)]
        self.next, self.past = [0] * slots, [0] * slots
        self.guided, self.left = [False] * slots, [0] * slots
        self.outcomes = deque()
        self.waits = None
        self.digest = []

    def submit(self, step):
        assert self.waits is None
        for start in step.starts:
            if start.cached and start.source != start.slot:
                self.cache[start.slot][: start.cached] = self.cache[start.source][: start.cached]
                if self.window is not None:
                    self.window.copy(start.source, start.slot, start.cached)
            assert tuple(self.cache[start.slot][: start.cached]) == start.prompt[: start.cached]
            self.guided[start.slot], self.left[start.slot] = start.sampling.guided, start.room
        self.waits = step
        if not step.guided:
            self.choose({})

    def choose(self, masks):
        step, self.waits = self.waits, None
        choices = {slot: [] for slot in step.choosing}
        logits = None
        if step.chunk is not None:
            chunk = step.chunk
            cache = self.cache[chunk.slot]
            cache[chunk.past : chunk.past + len(chunk.tokens)] = chunk.tokens
            if self.window is not None:
                padded = padded_chunk(self.chunk, len(chunk.tokens), chunk.past, len(cache))
                self.window.write(chunk.slot, chunk.past, padded)
            self.past[chunk.slot] = chunk.past + len(chunk.tokens)
            if chunk.scored:
                # In place of the logits, the number that stands for the prefix.
                logits = np.array([[likeliest(cache[: p + 1])] for p in range(chunk.first, self.past[chunk.slot])])
        drafts = dict(zip(step.decode, step.drafts))
        for slot in step.decode:
            draft = drafts.get(slot, ())
            fed = [self.next[slot], *draft, *[None] * (step.width - 1 - len(draft))]
            for place, token in enumerate(fed, self.past[slot]):
                self.cache[slot][place] = token  # IndexError: it would write into another slot
            if self.window is not None:
                padded = min(padded_width(step.width), len(self.cache[slot]) - self.past[slot])
                self.window.write(slot, self.past[slot], padded)
            self.past[slot] += 1
        for slot in step.choosing:
            for expected in (*drafts.get(slot, ()), None):
                self.left[slot] -= 1
                assert self.left[slot] >= 0, "there is no random number for this token"
                mask = int(masks[slot][0]) if slot in masks else (1 << VOCABULARY) - 1
                assert slot not in masks or self.guided[slot]
                self.next[slot] = pick(likeliest(self.cache[slot][: self.past[slot]]), mask)
                choices[slot].append(Choice(self.next[slot]))
                if self.next[slot] != expected:
                    break
                self.past[slot] += 1
        self.outcomes.append(Outcome(choices=choices, logits=logits))

    def collect(self):
        outcome = self.outcomes.popleft()
        self.digest.append(outcome.choices)
        return outcome


def draft_width(sequences):
    return max(1, 13 // sequences)


class FakeSpeculator:
    """Knows the model; how many of its drafts are right depends on the tokens."""

    def __init__(self):
        self.tokens = []
        self.drafted = 0

    def extend(self, tokens):
        self.tokens += tokens

    def draft(self, room, sequences):
        assert room >= 0 and sequences >= 1
        chance = zlib.crc32(b"draft" + bytes(self.tokens))
        draft = []
        while len(draft) < min(room, chance % 6):
            draft.append(pick(likeliest([*self.tokens, *draft]), (1 << VOCABULARY) - 1))
        if draft and chance % 3:
            draft[chance % len(draft)] ^= 1
        self.drafted = len(draft)
        return tuple(draft)

    def pays_to_wait(self, sequences):
        assert sequences >= 1
        return zlib.crc32(b"wait" + bytes(self.tokens)) % 2 == 0

    def verified(self, drafted, accepted, sequences):
        assert sequences >= 1 and 0 <= accepted <= drafted
        assert drafted in (0, self.drafted)
        if accepted:
            seen("accepted drafts")


class World:
    """A scheduler, a runner, two devices that must agree, and what is checked at every step."""

    def __init__(self, *, slots, rows, max_seq_len, chunk, policy, reuse, ahead, drafts=False, window=None):
        self.max_seq_len, self.chunk, self.policy, self.reuse = max_seq_len, chunk, policy, reuse
        self.rows = min(rows, slots)
        # As short as may be: a window, and what a step writes after its first token.
        circle = None if window is None else Circle(length=window + max(chunk, 16) - 1, window=window)
        self.scheduler = Scheduler(
            slots=slots,
            rows=rows,
            max_seq_len=max_seq_len,
            chunk=chunk,
            policy=policy,
            reuse=reuse,
            speculator=lambda sampling: FakeSpeculator() if drafts else None,
            draft_width=draft_width,
            circle=circle,
            padded_width=padded_width,
            padded_chunk=lambda count, past: padded_chunk(chunk, count, past, max_seq_len),
        )
        windows = [None if circle is None else Window(slots, circle) for _ in range(2)]
        self.session, self.other = (FakeSession(slots, max_seq_len, ahead, each, chunk) for each in windows)
        self.follower = Follower(self.other)
        self.runner = Runner(self.session, self.scheduler, self.check)
        self.wanted: dict[int, Wanted] = {}
        self.queue: list[int] = []
        # By slot: whose it is, as far as the scheduler can know; by number: prompt tokens read and tokens chosen.
        self.owner: dict[int, int] = {}
        self.read: dict[int, int] = {}
        self.chosen: dict[int, int] = {}
        self.last_was_chunk = False
        self.steps = 0

    # What the test does

    def add(self, wanted):
        number = self.scheduler.add(wanted.request())
        assert number not in self.wanted
        self.wanted[number] = wanted
        self.queue.append(number)

    def abort(self, number):
        self.scheduler.abort(number)
        if number in self.wanted and not self.wanted[number].finish_reason:
            self.wanted[number].aborted = True
            self.leave(number)

    def turn(self):
        steps, idle = self.steps, self.scheduler.idle
        in_flight = self.scheduler.in_flight
        for news in self.runner.turn():
            self.take(news)
        # Something must happen, or there is nothing to do.
        assert idle or self.steps > steps or self.scheduler.in_flight < in_flight
        self.check_state()

    def finish(self):
        turns = 0
        while not self.scheduler.idle:
            self.turn()
            turns += 1
            assert turns < 10_000
        self.follower.finish()
        assert self.session.digest == self.other.digest
        assert self.session.cache == self.other.cache
        for wanted in self.wanted.values():
            tokens, reason = wanted.alone(self.max_seq_len)
            if wanted.aborted:
                assert wanted.tokens == tokens[: len(wanted.tokens)]
                continue
            assert (wanted.tokens, wanted.finish_reason) == (tokens, reason)
            first = len(wanted.prompt) if wanted.scored is None else wanted.scored
            prefixes = [wanted.prompt[: p + 1] for p in range(first, len(wanted.prompt))]
            assert wanted.logits == [likeliest(prefix) for prefix in prefixes]
        assert (self.scheduler.running, self.scheduler.waiting, self.scheduler.usage) == (0, 0, 0)
        assert not self.owner and not self.queue

    # What must hold

    def leave(self, number):
        self.owner = {slot: owner for slot, owner in self.owner.items() if owner != number}
        self.queue = [other for other in self.queue if other != number]

    def take(self, news):
        wanted = self.wanted[news.number]
        assert not wanted.aborted and not wanted.finish_reason
        assert news.choices or news.finish_reason or news.logits is not None
        assert wanted.cached in (None, news.cached)
        wanted.cached = news.cached
        wanted.tokens += [choice.token for choice in news.choices]
        # One was counted when the step was planned.
        self.chosen[news.number] += max(len(news.choices) - 1, 0)
        assert len(news.choices) <= 1 + news.drafted
        if news.logits is not None:
            assert wanted.scored is not None and news.first == wanted.scored + len(wanted.logits)
            wanted.logits += news.logits[:, 0].tolist()
        wanted.finish_reason = news.finish_reason
        if news.finish_reason:
            self.leave(news.number)

    def check(self, order):
        """Every order, before it is executed."""
        if not isinstance(order, Step):
            self.follower.follow(order)
            return
        self.steps += 1
        decodable = {
            slot
            for slot, number in self.owner.items()
            if self.read[number] == len(self.wanted[number].prompt) and self.chosen[number] < self.room(number)
        }
        reading_before = any(self.read[number] < len(self.wanted[number].prompt) for number in self.owner.values())
        for start in order.starts:
            assert start.slot not in self.owner, "a slot for two sequences"
            number = self.queue.pop(0)  # first come, first served
            wanted = self.wanted[number]
            assert (start.prompt, start.ends, start.room) == (wanted.prompt, wanted.ends, self.room(number))
            assert 0 <= start.cached < len(start.prompt)
            assert wanted.scored is None or start.cached <= wanted.scored
            assert self.reuse or start.cached == 0
            self.owner[start.slot], self.read[number], self.chosen[number] = number, start.cached, 0
            if start.cached:
                seen("a copy" if start.source != start.slot else "a continued slot")
        assert len(self.owner) <= self.rows
        reading = [n for n in self.owner.values() if self.read[n] < len(self.wanted[n].prompt)]
        assert len(reading) <= 1
        if order.starts == () and self.queue and len(self.owner) < self.rows:
            assert reading_before, "a request waits for nothing"
        if order.chunk is not None:
            self.check_chunk(order, decodable)
        else:
            self.check_decode(order, decodable, reading)
        self.last_was_chunk = order.chunk is not None
        self.follower.follow(order)

    def check_chunk(self, order, decodable):
        chunk = order.chunk
        number = self.owner[chunk.slot]
        wanted = self.wanted[number]
        assert not (self.policy == "latency" and self.last_was_chunk and decodable)
        assert not order.decode
        assert chunk.past == self.read[number] and chunk.length == len(wanted.prompt)
        assert 1 <= len(chunk.tokens) <= self.chunk
        self.read[number] += len(chunk.tokens)
        assert chunk.tokens == wanted.prompt[chunk.past : self.read[number]]
        # Unless it starts here, what was read before is there; FakeSession checks what is cached.
        if not order.starts:
            assert tuple(self.session.cache[chunk.slot][: chunk.past]) == wanted.prompt[: chunk.past]
        assert chunk.ends == (self.read[number] == len(wanted.prompt))
        assert chunk.choose == (chunk.ends and self.room(number) > 0)
        assert 1 <= chunk.predict <= len(chunk.tokens)
        assert chunk.scored == (wanted.scored is not None and wanted.scored < self.read[number])
        self.chosen[number] += chunk.choose
        assert order.guided == ((chunk.slot,) if chunk.choose and wanted.guided else ())

    def check_decode(self, order, decodable, reading):
        assert order.width <= draft_width(len(order.decode))
        assert set(order.decode) == decodable and list(order.decode) == sorted(order.decode)
        assert not (self.policy == "throughput" and reading)
        members = [self.wanted[self.owner[slot]] for slot in order.decode]
        assert order.guided == tuple(s for s, wanted in zip(order.decode, members) if wanted.guided)
        for slot in order.decode:
            number = self.owner[slot]
            wanted, past = self.wanted[number], self.session.past[slot]
            self.chosen[number] += 1
            # Its slot holds its own tokens: the prompt, then those that came out so far.
            mine = [*wanted.prompt, *wanted.tokens]
            known = min(past, len(mine))
            assert self.session.cache[slot][:known] == mine[:known]
            assert self.chosen[number] <= self.room(number)

    def room(self, number):
        wanted = self.wanted[number]
        return min(wanted.max_new_tokens, self.max_seq_len + 1 - len(wanted.prompt))

    def check_state(self):
        scheduler = self.scheduler
        assert scheduler.running == len(self.owner) <= self.rows == scheduler.rows
        assert scheduler.waiting == len(self.queue)
        assert 0 <= scheduler.usage <= 1
        assert scheduler.in_flight <= self.session.ahead + 1
        # What it believes to be in the cache is there.
        for slot, cache in zip(scheduler._slots, self.session.cache):
            held = slot.held().tolist()
            assert held == cache[: len(held)]
        started = scheduler.started()
        assert started == sorted(started)

    def stop(self):
        """The end of a server, whatever runs."""
        self.runner.finish()
        self.follower.finish()
        assert self.scheduler.in_flight == 0 and not self.session.outcomes and not self.other.outcomes
        assert self.session.digest == self.other.digest


# Texts that prompts begin with, so that they share prefixes.
DOCUMENTS = [[(i * i * step + i // 3) % VOCABULARY for i in range(64)] for step in (1, 2, 5)]


@st.composite
def worlds(draw):
    slots = draw(st.integers(1, 6))
    return dict(
        slots=slots,
        rows=draw(st.integers(1, 4)),
        max_seq_len=draw(st.sampled_from([1, 2, 7, 24, 40, 64])),
        chunk=draw(st.sampled_from([1, 2, 5, 16, 64])),
        policy=draw(st.sampled_from(["latency", "throughput"])),
        reuse=draw(st.sampled_from([True, True, True, False])),
        ahead=draw(st.integers(0, 2)),
        drafts=draw(st.booleans()),
        window=draw(st.sampled_from([None, 1, 3, 9])),
    )


REQUESTS = st.fixed_dictionaries(
    {
        # The text that the prompt begins with: a document, or an earlier request with its answer.
        "base": st.integers(0, 12),
        "cut": st.integers(0, 64),
        "more": st.lists(st.integers(0, VOCABULARY - 1), max_size=5),
        "max_new_tokens": st.sampled_from([0, 1, 2, 3, 9, 30, 100]),
        "ends": st.sampled_from([(), (), (0,), (1, 5)]),
        "guided": st.sampled_from([False, False, False, True]),
        "scored": st.sampled_from([None, None, None, 0, 1, 10, 30]),
        "logprobs": st.sampled_from([None, None, None, 0]),
    }
)
ACTIONS = st.one_of(
    st.tuples(st.just("add"), REQUESTS),
    st.tuples(st.just("turn"), st.integers(1, 12)),
    st.tuples(st.just("abort"), st.integers(0, 30)),
)


def wanted_of(values, world):
    """The request that drawn values describe, in a world that may have had others."""
    bases = [*DOCUMENTS]
    for earlier in world.wanted.values():
        bases.append([*earlier.prompt, *earlier.alone(world.max_seq_len)[0]])
    base = bases[values["base"] % len(bases)]
    cut = base[: values["cut"]] if values["cut"] % 2 else base
    prompt = tuple([*cut, *values["more"]][: world.max_seq_len]) or (3,)
    scored = values["scored"]
    return Wanted(
        prompt=prompt,
        max_new_tokens=values["max_new_tokens"],
        ends=values["ends"],
        guided=values["guided"],
        scored=None if scored is None else min(scored, len(prompt) - 1),
        logprobs=values["logprobs"],
    )


@settings(max_examples=400)
@given(worlds(), st.lists(ACTIONS, min_size=1, max_size=40), st.booleans())
def test_every_request_gets_what_it_gets_alone(options, actions, stops):
    world = World(**options)
    for kind, value in actions:
        if kind == "add":
            world.add(wanted_of(value, world))
        elif kind == "abort":
            world.abort(value)
        else:
            for _ in range(value):
                world.turn()
    world.stop() if stops else world.finish()


@settings(max_examples=150)
@given(worlds(), st.lists(REQUESTS, min_size=1, max_size=12))
def test_a_closed_set_of_requests(options, requests):
    world = World(**options)
    for values in requests:
        world.add(wanted_of(values, world))
    world.finish()


def random_request(rng):
    return {
        "base": rng.randrange(13),
        "cut": rng.randrange(65),
        "more": [rng.randrange(VOCABULARY) for _ in range(rng.randrange(4))],
        "max_new_tokens": rng.choice([0, 1, 2, 3, 9, 30, 100]),
        "ends": rng.choice([(), (), (0,), (1, 5)]),
        "guided": rng.random() < 0.2,
        "scored": rng.choice([None, None, None, 0, 10, 30]),
        "logprobs": rng.choice([None, None, None, 0]),
    }


@pytest.mark.parametrize("policy", ["latency", "throughput"])
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_busy_servers(policy, ahead):
    """Longer lives than the examples above have: some fifty requests, of which some are aborted."""
    rng = random.Random(SEED + ahead)
    for _ in range(25):
        world = World(
            slots=rng.randint(1, 6),
            rows=rng.randint(1, 4),
            max_seq_len=rng.choice([7, 24, 40, 64, 90]),
            chunk=rng.choice([1, 2, 5, 16, 64]),
            policy=policy,
            reuse=rng.random() < 0.9,
            ahead=ahead,
            drafts=rng.random() < 0.7,
            window=rng.choice([None, 1, 4, 20]),
        )
        eager = rng.choice([0.05, 0.2, 0.6])
        while len(world.wanted) < 50:
            if rng.random() < eager:
                world.add(wanted_of(random_request(rng), world))
            elif rng.random() < 0.05:
                world.abort(len(world.wanted) - rng.randrange(6))
            else:
                world.turn()
        world.finish()


@settings(max_examples=100)
@given(st.integers(0, 2), st.lists(st.tuples(st.integers(1, 20), st.integers(1, 6)), min_size=2, max_size=8))
def test_a_conversation_continues_in_its_slot(ahead, turns):
    world = World(slots=3, rows=2, max_seq_len=200, chunk=8, policy="latency", reuse=True, ahead=ahead)
    history = []
    for number, (said, answered) in enumerate(turns, 1):
        history += [DOCUMENTS[number % 3][i] for i in range(said)]
        wanted = Wanted(prompt=tuple(history), max_new_tokens=answered)
        world.add(wanted)
        world.finish()
        # All is reused but what is new, and the last token of the answer, which was never fed.
        if number > 1:
            assert wanted.cached == len(history) - said - 1
        history += wanted.tokens


def test_two_conversations_keep_their_slots():
    world = World(slots=2, rows=1, max_seq_len=200, chunk=8, policy="latency", reuse=True, ahead=1)
    histories = [[1] * 20, [2] * 20]
    for turn in range(6):
        history = histories[turn % 2]
        wanted = Wanted(prompt=tuple(history), max_new_tokens=3)
        world.add(wanted)
        world.finish()
        if turn >= 2:
            assert wanted.cached == len(history) - 3
        history += [*wanted.tokens, 4, 5]


def test_a_common_beginning_is_copied_while_its_owner_runs():
    world = World(slots=3, rows=2, max_seq_len=100, chunk=64, policy="latency", reuse=True, ahead=1)
    first = Wanted(prompt=tuple(DOCUMENTS[1][:40]), max_new_tokens=20)
    second = Wanted(prompt=tuple([*DOCUMENTS[1][:30], 7, 7, 7]), max_new_tokens=4)
    world.add(first)
    world.turn()
    world.add(second)
    world.finish()
    assert (first.cached, second.cached) == (0, 30)


def test_the_slot_that_was_not_used_for_longest_is_given_up():
    world = World(slots=3, rows=1, max_seq_len=100, chunk=64, policy="latency", reuse=True, ahead=1)

    def cached(prompt):
        wanted = Wanted(prompt=tuple(prompt), max_new_tokens=1)
        world.add(wanted)
        world.finish()
        return wanted.cached

    assert cached(DOCUMENTS[0]) == cached(DOCUMENTS[1]) == 0
    assert cached([*DOCUMENTS[0][:20], 7, 7]) == 20  # in the third slot, so the first one was used
    assert cached([6] * 40) == 0  # instead of the second one
    assert cached([*DOCUMENTS[0], 1]) == len(DOCUMENTS[0])
    assert cached([6] * 41) == 40
    assert cached([*DOCUMENTS[1], 1]) == 0


@pytest.mark.parametrize("running", [False, True])
def test_a_beginning_is_reused_while_its_window_is_there(running):
    """Of 100 positions written, a circle of 40 still has the last; a window of 9 before position 68 is among them."""
    found = {}
    for kept in (59, 67, 68, 90):
        world = World(slots=2, rows=2, max_seq_len=200, chunk=32, policy="latency", reuse=True, ahead=0, window=9)
        assert world.scheduler._circle == Circle(length=40, window=9)
        world.add(Wanted(prompt=tuple([5, 6] * 49), max_new_tokens=3 + 97 * running))
        while len(world.wanted[1].tokens) < 3:
            world.turn()
        assert running == (world.scheduler.running == 1)
        wanted = Wanted(prompt=tuple([*([5, 6] * 49)[:kept], 7, 7, 7]), max_new_tokens=4)
        world.add(wanted)
        world.finish()
        found[kept] = wanted.cached
    assert found == {59: 0, 67: 0, 68: 68, 90: 90}


def test_a_short_sequence_keeps_all_beginnings():
    world = World(slots=1, rows=1, max_seq_len=200, chunk=32, policy="latency", reuse=True, ahead=0, window=9)
    for kept in (39, 20, 11):  # with its answer it is as long as the circle
        wanted = Wanted(prompt=tuple([*DOCUMENTS[0][:kept], *[7 - kept % 2] * (39 - kept)]), max_new_tokens=2)
        world.add(wanted)
        world.finish()
        assert wanted.cached == kept % 39


def test_a_long_prompt_does_not_hold_up_a_running_sequence():
    world = World(slots=2, rows=2, max_seq_len=64, chunk=2, policy="latency", reuse=True, ahead=0)
    runs = Wanted(prompt=(1,), max_new_tokens=60)
    reads = Wanted(prompt=tuple(DOCUMENTS[0][:60]), max_new_tokens=1)
    world.add(runs)
    world.turn()
    world.add(reads)
    while not reads.tokens:
        before = len(runs.tokens)
        world.turn()
        world.turn()
        assert len(runs.tokens) > before
    world.finish()


def test_an_aborted_request_frees_its_row_at_once():
    world = World(slots=1, rows=1, max_seq_len=64, chunk=8, policy="latency", reuse=True, ahead=2)
    world.add(Wanted(prompt=(1, 2, 3), max_new_tokens=60))
    world.add(Wanted(prompt=(1, 2, 4), max_new_tokens=2))
    for _ in range(5):
        world.turn()
    assert (world.scheduler.running, world.scheduler.waiting) == (1, 1)
    world.abort(1)
    assert (world.scheduler.running, world.scheduler.waiting) == (0, 1)
    world.turn()
    assert (world.scheduler.running, world.scheduler.waiting) == (1, 0)
    world.abort(2)
    world.abort(2)
    world.abort(99)
    world.finish()


def test_messages():
    with pytest.raises(UserError, match="--policy"):
        Scheduler(slots=1, rows=1, max_seq_len=1, chunk=1, policy="fast")
    for prompt in ([], [1] * 9, [8], [-1], [True], [1.0], ["1"], [None]):
        with pytest.raises(UserError, match="the prompt"):
            check_prompt(prompt, "the prompt", 8, 8)
    check_prompt([0, 7], "the prompt", 8, 8)
