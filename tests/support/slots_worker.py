"""Run by mpirun in the tests: sequences that share an engine's slots, and each alone.

usage: slots_worker.py CASE.json; CASE is {engine, device, seed, out}. Every rank writes what it got to OUT-RANK.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
from noisy_drafts import Noisy, noisy

from cqil_trt.job import Job, command
from cqil_trt.llm import Llm
from cqil_trt.runner import Follower, Runner
from cqil_trt.sampling import SamplingConfig
from cqil_trt.scheduler import Request, Scheduler

LENGTHS = 3, 1, 20, 9, 33, 2, 14, 27
STEPS = 24
SLOTS = 10  # two more than run at a time
SAMPLED = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 7},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.05},
    {"temperature": 0.9, "repetition_penalty": 1.4, "top_k": 50, "top_p": 0.9},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"temperature": 0.8, "logit_bias": ((5, 4.0), (17, -3.5), (5, 1.0)), "frequency_penalty": 0.3},
    {},
]


class Residues:
    """A matcher that allows the tokens t with t % 5 equal to the number of tokens so far % 5."""

    failure = ""

    def __init__(self, vocabulary):
        self._vocabulary, self._count = vocabulary, 0

    def mask(self):
        allowed = np.arange(32 * -(-self._vocabulary // 32)) % 5 == self._count % 5
        return np.packbits(allowed, bitorder="little").view(np.uint32)

    def advance(self, token):
        self._count += 1


def run(runner, requests, arrivals=None, aborted=None):
    """What each request gives that joins in its turn of `arrivals`; `aborted`: one, and its tokens before it ends."""
    arrivals = arrivals or [0] * len(requests)
    found = [{"tokens": [], "logprobs": [], "cached": 0, "reason": "", "accepted": 0} for _ in requests]
    waiting, numbers, turn = sorted(range(len(requests)), key=arrivals.__getitem__), {}, 0
    while waiting or not runner.scheduler.idle:
        while waiting and arrivals[waiting[0]] <= turn:
            index = waiting.pop(0)
            numbers[runner.scheduler.add(requests[index])] = index
        for event in runner.turn():
            mine = found[numbers[event.number]]
            mine["tokens"] += [choice.token for choice in event.choices]
            mine["logprobs"] += [choice.logprobs for choice in event.choices if choice.logprobs is not None]
            mine["cached"], mine["reason"] = event.cached, event.finish_reason
            mine["accepted"] += event.accepted
            if aborted and numbers[event.number] == aborted[0] and len(mine["tokens"]) >= aborted[1]:
                runner.scheduler.abort(event.number)
        turn += 1
    return found


def each_alone(session, requests):
    """What each request gives by itself, in a cache from which nothing is reused."""
    limits = session.limits
    scheduler = Scheduler(
        slots=session.slots, rows=1, max_seq_len=limits.max_seq_len, chunk=limits.prefill_chunk, reuse=False
    )
    return [run(Runner(session, scheduler), [request])[0] for request in requests]


def greedy(prompts, steps=STEPS, **options):
    return [Request(prompt=tuple(prompt), max_new_tokens=steps, **options) for prompt in prompts]


def reused(session, prompts, vocabulary):
    """Prompts with a common beginning: while the first one runs, after it, and its continuation."""
    long, *others = sorted(prompts, key=len, reverse=True)
    starts = [long, long[:30] + others[0][:4], long[:19] + others[1][:5], long[:10] + others[2][:5]]
    runner = Runner.of(session, "latency")
    beside = run(runner, greedy(starts), [0, 9, 9, 20])
    after = [starts[1] + beside[1]["tokens"] + [7, 8, 9], long]
    found = beside + run(runner, greedy(after))
    alone = each_alone(session, greedy([*starts, *after]))
    return {"found": found, "alone": alone}


def followed(session, comm, requests, policy):
    """Rank 0 plans and sends its orders; every rank returns the tokens of each slot in the order of their outcomes."""
    collected = []
    collect = session.collect

    def kept():
        outcome = collect()
        collected.append({slot: [c.token for c in choices] for slot, choices in outcome.choices.items()})
        return outcome

    session.collect = kept
    if comm.Get_rank() == 0:
        run(Runner.of(session, policy, send=lambda order: comm.bcast(order)), requests)
        comm.bcast(None)
    else:
        follower = Follower(session)
        while (order := comm.bcast(None)) is not None:
            follower.follow(order)
        follower.finish()
    session.collect = collect
    return collected


def main(case, job):
    llm = Llm(Path(case["engine"]), job, case["device"], slots=SLOTS)
    session, vocabulary = llm.session, llm.engine.model.vocab_size
    random = np.random.default_rng(case["seed"])
    prompts = [random.integers(3, vocabulary, size=length).tolist() for length in LENGTHS]
    if session.on_gpu:
        session.warm_up(3, 8)  # nothing has run yet
    session.measure_steps()
    result = {"prompts": prompts, "step costs": session.step_costs and session.step_costs.steps}

    together = llm.generate(prompts, STEPS, ignore_eos=True)
    result["together"] = [completion.tokens for completion in together]
    result["alone"] = [found["tokens"] for found in each_alone(session, greedy(prompts))]

    steps = [24, 9, 17, 24, 24, 3, 11, 24]  # of which number 4 gets 8
    joining = [greedy([prompt], count)[0] for prompt, count in zip(prompts, steps)]
    arrivals = [0, 0, 3, 3, 5, 10, 11, 30]
    result["joining"] = run(Runner.of(session, "latency"), joining, arrivals, aborted=(4, 8))
    result["few rows"] = run(Runner.of(session, "latency", rows=3), joining, arrivals)
    result["joining steps"] = steps

    result["reused"] = reused(session, prompts, vocabulary)

    configs = [SamplingConfig(**config, seed=seed) for seed, config in enumerate(SAMPLED)]
    sampled = [greedy([prompt], sampling=config)[0] for prompt, config in zip(prompts, configs)]
    result["sampled"] = run(Runner.of(session, "throughput"), sampled)
    result["sampled alone"] = each_alone(session, sampled)

    counts = [5, 0, 20, 5, 3, 1, 20, None]
    configs = [SamplingConfig(**c, seed=seed, logprobs=n) for seed, (c, n) in enumerate(zip(SAMPLED, counts))]
    wanted = [greedy([prompt], sampling=config)[0] for prompt, config in zip(prompts, configs)]
    result["logprobs"] = run(Runner.of(session, "latency"), wanted, [0, 0, 2, 2, 2, 9, 9, 9])
    result["logprobs wanted"] = counts

    def mixed():
        requests = []
        for i, prompt in enumerate(prompts):
            config = {**SAMPLED[i], "logprobs": 2 if i == 4 else None}
            guided = i % 2 == 0
            requests += greedy(
                [prompt],
                sampling=SamplingConfig(**config, seed=i, guided=guided),
                matcher=Residues(vocabulary) if guided else None,
            )
        # A greedy one among the guided.
        plain = SamplingConfig(guided=True)
        return requests + greedy([prompts[2]], sampling=plain, matcher=Residues(vocabulary))

    result["guided"] = run(Runner.of(session, "latency"), mixed(), [0, 0, 1, 4, 4, 4, 12, 20, 25])
    result["guided alone"] = each_alone(session, mixed())

    # Without drafts, then with some, where they can be verified.
    drafting = session.step_costs is not None
    for name, requests in (("reported", lambda: wanted), ("masked", mixed)):
        result[f"{name} undrafted"] = run(Runner.of(session, "latency"), requests())
        if not drafting:
            continue
        speculation = noisy(setattr, case["seed"], vocabulary)
        Noisy.answers = tuple(
            [*request.prompt, *found["tokens"]] for request, found in zip(requests(), result[f"{name} undrafted"])
        )
        runner = Runner.of(session, "latency", speculation=speculation)
        result[f"{name} drafted"] = run(runner, requests(), [0, 0, 2, 2, 5, 9, 9, 20, 30])

    if job.size > 1:
        result["followed"] = [followed(session, job.comm, sampled, policy) for policy in ("latency", "throughput")]
        result["followed"].append(followed(session, job.comm, mixed(), "latency"))
    llm.close()
    Path(f"{case['out']}-{job.rank}.json").write_text(json.dumps(result))


job = Job()
with command(job):
    main(json.loads(Path(sys.argv[1]).read_text()), job)
