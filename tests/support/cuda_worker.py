"""Run by mpirun on a GPU host: the CUDA collectives against sums computed from all ranks' inputs, which every rank has.

usage: cuda_worker.py SEED OPERATIONS REPLAYS [RANKS_PER_LAYER]

With RANKS_PER_LAYER, operations of all ranks, of those that share a layer and of those with the same part of their
layers follow each other in any order, each kind in a workspace of its own.

With a library built with CQIL_TEST_DELAYS=ON, named by CQIL_TRT_PLUGINS, each rank also delays some blocks at random,
and the counters of operations begin again meanwhile.
Sums must equal, bit for bit but for the sign of zero, the float32 sum in rank order rounded once, and be within a
rounding of the float64 sum. Prints one line on rank 0 and exits 0 when everything was right.
"""

import ctypes
import random
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from mpi4py import MPI

from cqil_trt.collectives import split
from cqil_trt.config import CqilConfig
from cqil_trt.gpu import abi
from cqil_trt.gpu.workspace import CudaCommunicator
from cqil_trt.schedule import Peers, schedule

EPS = 1e-5
comm = MPI.COMM_WORLD
rank, world = comm.Get_rank(), comm.Get_size()
torch.cuda.set_device(rank % torch.cuda.device_count())
# Half a unit in the last place, relative, with room for float32's own rounding.
ROUNDING = {torch.float32: 3e-7, torch.float16: 5e-4 * 1.01, torch.bfloat16: 4e-3 * 1.01}


def generator(*seed):
    return torch.Generator("cuda").manual_seed(zlib.crc32(repr(seed).encode()))


def random_inputs(dtype, shape, *seed):
    """Every rank's input, the same on all ranks."""
    return [torch.randn(shape, generator=generator(*seed, r), device="cuda").to(dtype) for r in range(world)]


def add_specials(inputs, *seed):
    """-0.0, infinities, NaN, subnormals and the largest values, at random places, on random ranks."""
    for r, x in enumerate(inputs):
        flat, g = x.view(-1), generator(*seed, "special", r)
        info = torch.finfo(x.dtype)
        for value in (
            -0.0,
            0.0,
            float("inf"),
            -float("inf"),
            float("nan"),
            info.tiny / 4,
            -info.tiny / 8,
            info.max,
            info.min,
        ):
            where = torch.randint(flat.numel(), (max(1, flat.numel() // 50),), generator=g, device="cuda")
            flat[where] = value
        # Whole 32-bit words of negative zeros: the pattern that marks an empty buffer is among them.
        flat[: flat.numel() // 16] = -0.0


def ordered_sum(parts, residual=None):
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total += part.float()
    return (total if residual is None else total + residual.float()).to(parts[0].dtype)


def norm(x, weight):
    wide = x.double()
    scaled = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)
    return weight.double() * scaled.double()


class Check:
    """Counts wrong elements on the device, so that it works inside a graph."""

    def __init__(self):
        self.wrong = torch.zeros((), dtype=torch.long, device="cuda")
        self.checksum = torch.zeros((), dtype=torch.long, device="cuda")

    def equal(self, found, expected):
        same = (found == expected) | (found.isnan() & expected.isnan())
        self.wrong += (~same).sum()
        bits = found.contiguous().view(torch.int16 if found.element_size() == 2 else torch.int32).long()
        # NaN payloads may differ between our sum and torch's, not between ranks.
        self.checksum.mul_(31).add_(bits.sum())

    def close(self, found, expected, dtype):
        error = (found.double() - expected).abs()
        self.wrong += (error > 4 * ROUNDING[dtype] * expected.abs() + 4 * torch.finfo(dtype).tiny).sum()
        self.checksum.mul_(31).add_(found.view(torch.int16 if found.element_size() == 2 else torch.int32).long().sum())


class Ring:
    """Ranks that join: their numbers, this one's place among them, and the check of what they compute."""

    def __init__(self, part, members, check):
        sizes = {"one_shot_bytes": 256 << 10, "max_bytes": 2 << 20}
        self.communicator = CudaCommunicator(part, timeout=60, **sizes)
        self.members, self.place, self.check = list(members), part.Get_rank(), check

    def of(self, inputs):
        """The inputs of these ranks, of those of all ranks."""
        return [inputs[member] for member in self.members]


def operation(kind, dtype, rows, hidden, d, ring, inputs, residual, weight, special=False):
    communicator, check, inputs = ring.communicator, ring.check, ring.of(inputs)
    mine, rank, world = inputs[ring.place], ring.place, len(inputs)
    d = min(d, world - 1)
    if kind == "all_reduce":
        found = communicator.all_reduce(mine)
        check.equal(found, ordered_sum(inputs))
    elif kind == "residual":
        check.equal(communicator.all_reduce_residual(mine, residual), ordered_sum(inputs, residual))
    elif kind == "norm":
        found, normed = communicator.all_reduce_residual_norm(mine, residual, weight, EPS)
        check.equal(found, ordered_sum(inputs, residual))
        if special:
            # Squares may overflow float32, as they do in Hugging Face's norm: what is compared is where NaN appears.
            wide = found.float()
            expected = weight.float() * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS))
            check.wrong += (normed.isnan() != expected.to(dtype).isnan()).sum()
        else:
            check.close(normed, norm(found, weight), dtype)
    elif kind == "norms":
        any_norms(ring, mine, residual, weight, ordered_sum(inputs), ordered_sum(inputs, residual), special)
    elif kind == "broadcast":
        # With memory of its own on rank 0, as a plugin's output is.
        found = torch.empty_like(mine)
        given = mine.data_ptr() if rank == 0 else None
        size = mine.numel(), abi.dtype_code(str(dtype).removeprefix("torch."))
        stream = torch.cuda.current_stream().cuda_stream
        communicator.workspace.call("broadcast", given, found.data_ptr(), *size, stream)
        check.wrong += (found.view(-1).view(torch.uint8) != inputs[0].view(-1).view(torch.uint8)).sum()
    elif kind == "bypass":
        found = communicator.bypass(mine, d)
        before = inputs[max(0, rank - d) : rank]
        if before and d:
            same = (found == ordered_sum(before)) | (found.isnan() & ordered_sum(before).isnan())
            check.wrong += (~same).sum()
    elif kind == "argmax":
        values = torch.stack([x.view(-1)[:rows].float() for x in inputs])
        indices = torch.arange(world, device="cuda")[:, None] * 1000 + torch.arange(rows, device="cuda")
        found = communicator.argmax(values[rank].contiguous(), indices[rank])
        check.wrong += (found != indices.gather(0, values.argmax(0, keepdim=True))[0]).sum()


def any_norms(ring, mine, residual, weight, total, joined, special):
    """Norms of every kind, of the sum before it is added and after, by the sizes of what is added up."""
    (rows, hidden), dtype, check = mine.shape, mine.dtype, ring.check
    kind, before, following = hidden // 8 % 3, rows % 2 == 1, rows % 3 > 0
    out, normed = torch.empty_like(mine), torch.empty_like(mine)
    pointers = [mine, weight if before else None, residual, weight if following else None, out]
    pointers = [t if t is None else t.data_ptr() for t in [*pointers, normed if following else None]]
    code = abi.dtype_code(str(dtype).removeprefix("torch."))
    stream = torch.cuda.current_stream().cuda_stream
    ring.communicator.workspace.call("all_reduce_norms", *pointers, rows, hidden, EPS, kind, code, stream)
    wide = weight.double() + (kind == abi.cqil_norm.CQIL_NORM_OFFSET)
    if before:
        added = norm(total, wide)
        bound = 4 * ROUNDING[dtype] * (added.abs() + residual.double().abs()) + 4 * torch.finfo(dtype).tiny
        wrong = ((out.double() - added - residual.double()).abs() > bound).sum()
        check.checksum.mul_(31).add_(out.view(torch.int16 if out.element_size() == 2 else torch.int32).long().sum())
        check.wrong += 0 if special else wrong
    else:
        check.equal(out, joined)
    if following and not special:
        check.close(normed, norm(out, wide), dtype)


KINDS = ["all_reduce", "residual", "norm", "norm", "norms", "norms", "broadcast", "bypass", "argmax"]


def draw(chance):
    dtype = chance.choice(list(ROUNDING))
    kind = chance.choice(KINDS)
    rows = chance.choice([1, 1, 2, chance.randint(1, 256)])
    # A packet is 16 bytes; a fused row may have 32 KiB.
    hidden = chance.choice([576, 4096, 8192, 8 * chance.randint(72, 1024)])
    if kind == "norms":  # half of that
        hidden = min(hidden, 4096)
    if kind in ("all_reduce", "residual", "broadcast", "bypass") and chance.random() < 0.5:
        rows, hidden = 1, chance.randint(1, 100_000)
    return kind, dtype, rows, hidden, chance.randint(0, world - 1)


def float64_bound(inputs, found, dtype):
    exact = sum(x.double() for x in inputs)
    scale = sum(x.double().abs() for x in inputs)
    return (
        ((found.double() - exact).abs() > ROUNDING[dtype] * exact.abs() + 1e-6 * scale + torch.finfo(dtype).tiny)
        .sum()
        .item()
    )


def delay_blocks(library, chance):
    """Delays some blocks of the kernels to come, or none; only in a library that can."""
    if not hasattr(library, "cqil_test_delays"):
        return
    torch.cuda.synchronize()
    for place in range(2):
        delays = [chance.choice([0, 0, 0, 5_000, 100_000]) for _ in range(chance.choice([0, 1, 7, 64]))]
        assert library.cqil_test_delays(place, (ctypes.c_uint32 * len(delays))(*delays), len(delays)) == 0


def count_from(ring, chance):
    """Lets the counter of a workspace's operations begin again soon; only in a library that can."""
    workspace = ring.communicator.workspace
    if hasattr(workspace.library, "cqil_test_epoch"):
        workspace.call("test_epoch", chance.randint(1, 40))


def flood(ring, chance, seed):
    """Messages whose sender is soon as far ahead as it may be, each checked."""
    communicator, check, rank, world = ring.communicator, ring.check, ring.place, len(ring.members)
    size = chance.choice([1, 1000, 100_000])
    rounds = [ring.of(random_inputs(torch.float32, size, seed, "flood", number)) for number in range(12)]
    bypassed = [communicator.bypass(inputs[rank], world - 1) for inputs in rounds]
    sent = [communicator.broadcast(inputs[rank]) for inputs in rounds]
    for inputs, one, other in zip(rounds, bypassed, sent):
        check.equal(other, inputs[0])
        if rank:  # each rank's is another: no part of the checksum that all must share
            check.wrong += (one != ordered_sum(inputs[:rank])).sum()


def main(seed, operations, replays, ranks_per_layer=1):
    chance = random.Random(seed)  # the same on every rank
    lag = random.Random(seed * 31 + rank)  # each rank's own delays
    check, own = Check(), Check()  # of what all ranks have, and of what only some have
    mine = schedule(CqilConfig(p=world // ranks_per_layer, ranks_per_layer=ranks_per_layer), 1)[rank]
    peers = {kind: mine.peers(kind) for kind in Peers if kind is Peers.ALL or 1 < len(mine.peers(kind)) < world}
    parts = split(comm, peers)
    rings = [Ring(part, mine.peers(kind), check if kind is Peers.ALL else own) for kind, part in parts.items()]
    everyone = rings[0].communicator
    wrong64 = 0
    for ring in rings:
        count_from(ring, chance)
    comm.Barrier()

    def tune(*settings):
        for ring in rings:
            ring.communicator.workspace.call("workspace_tune", *settings)

    for number in range(operations):
        kind, dtype, rows, hidden, d = draw(chance)
        inputs = random_inputs(dtype, (rows, hidden), seed, number)
        residual, weight = random_inputs(dtype, (rows, hidden), seed, number, "residual")[0], torch.ones(1)
        weight = torch.randn(hidden, generator=generator(seed, number, "w"), device="cuda").to(dtype)
        special = chance.random() < 0.5
        if special:
            add_specials(inputs, seed, number)
        threads = chance.choice([0, 0, 32, 128, 512]) if kind not in ("norm", "norms") else 0
        tune(
            threads,
            chance.choice([0, 0, 1, 3, 64]),
            chance.choice([0, 0, 16, 4096]),
            chance.randint(0, 1),
        )
        if number % 4 == 0:
            delay_blocks(everyone.workspace.library, lag)
        torch.cuda._sleep(lag.choice([0, 0, 1000, 200_000]))
        ring = chance.choice(rings)
        operation(kind, dtype, rows, hidden, d, ring, inputs, residual, weight, special)
        if kind == "all_reduce" and not special:
            wrong64 += float64_bound(inputs, everyone.all_reduce(inputs[rank]), dtype)
        if number % 20 == 0:
            flood(chance.choice(rings), chance, (seed, number))
    eager = (check.wrong + own.wrong).item()

    # Graphs: inputs change on the device at every replay, and results are checked there.
    tune(0, 0, 0, 1)
    graphs = []
    cases = []
    for number in range(10):
        kind, dtype, rows, hidden, d = draw(chance)
        rows = min(rows, 32)
        inputs = random_inputs(dtype, (rows, hidden), seed, "graph", number)
        ones, zeros = torch.ones_like(inputs[0][0]), torch.zeros_like(inputs[0])
        cases.append((kind, dtype, rows, hidden, d, chance.choice(rings), inputs, zeros, ones))
    stream = torch.cuda.Stream()
    for _ in range(6):
        chance.shuffle(cases)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                for *what, inputs, residual, weight in cases:
                    torch.cuda._sleep(lag.choice([0, 0, 2000, 30_000]))
                    for r, x in enumerate(inputs):
                        x.mul_(-0.75).add_(0.125 * (r + 1))
                    operation(*what, inputs, residual, weight)
        graphs.append(graph)
    with torch.cuda.stream(stream):
        for _ in range(replays):
            graphs[chance.randrange(len(graphs))].replay()
        stream.synchronize()
    wrong = (check.wrong + own.wrong).item()
    checksums = comm.allgather(check.checksum.item())
    totals = comm.allgather((eager, wrong, wrong64))
    for ring in rings:
        ring.communicator.workspace.close()
    if rank == 0:
        print(f"{world} ranks, {ranks_per_layer} per layer: {operations} operations, {replays} replays of graphs")
        print(f"wrong elements per rank (eager, with graphs, against float64): {totals}")
        print(f"ranks bit-identical: {len(set(checksums)) == 1}")
    sys.exit(0 if all(total == (0, 0, 0) for total in totals) and len(set(checksums)) == 1 else 1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]))
