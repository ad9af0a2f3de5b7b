"""Run by mpirun on a GPU host with a full TensorRT (8.5 … 11): the three plugins inside one engine per rank.

usage: tensorrt_plugin_worker.py SEED; needs tensorrt, numpy, mpi4py, cuda-bindings and the built plugins, no torch.

The network is chained so that order and shapes matter: broadcast → all-reduce → bypass → all-reduce with RMSNorm. The
engine is serialised, read back, run at several shapes and replayed in a CUDA graph; the judge is numpy in float64.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import tensorrt as trt
from cuda.bindings import runtime as cuda
from mpi4py import MPI

from cqil_trt.gpu import abi, tensorrt_plugins
from cqil_trt.gpu.workspace import Workspace

HIDDEN, EPS, DISTANCE = 576, 1e-5, 1
comm = MPI.COMM_WORLD
rank, world = comm.Get_rank(), comm.Get_size()


def check(result):
    error, *values = result
    if error != cuda.cudaError_t.cudaSuccess:
        raise RuntimeError(f"{error} {failure()}")
    return values[0] if values else None


def failure():
    return workspace.failure() or ""


def plugin(name, **fields):
    return tensorrt_plugins.create(trt, name, fields | {"dtype": abi.dtype_code("float16")})


def build(weight):
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    x = network.add_input("x", trt.float16, (-1, -1, HIDDEN))
    tokens = network.add_input("tokens", trt.int32, (-1, -1))
    space = network.add_input("workspace", trt.int32, (1,))

    def add(inputs, p):
        layer = network.add_plugin_v2([*inputs, space], p)
        for i in range(layer.num_outputs):
            layer.get_output(i).dtype = trt.float16
        return [layer.get_output(i) for i in range(layer.num_outputs)]

    source = x if rank == 0 else tokens
    [start] = add([source], plugin("CqilBroadcast", rank=rank, hidden=HIDDEN))
    [summed] = add([x], plugin("CqilAllReduce", mode=0, eps=EPS))
    [joined] = add([x, summed], plugin("CqilAllReduce", mode=1, eps=EPS))
    [before] = add([x], plugin("CqilBypass", distance=DISTANCE))
    gamma = network.add_constant((HIDDEN,), weight).get_output(0)
    residual, normed = add([before, start, gamma], plugin("CqilAllReduce", mode=2, eps=EPS))
    for name, tensor in (
        ("start", start),
        ("joined", joined),
        ("before", before),
        ("residual", residual),
        ("normed", normed),
    ):
        tensor.name = name
        network.mark_output(tensor)
        tensor.dtype = trt.float16
    # Every rank's network has both inputs: one that is read by no layer must still be bound.
    if rank == 0:
        unused = network.add_identity(tokens).get_output(0)
        unused.name = "unused"
        network.mark_output(unused)
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_tactic_sources(0)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 1, HIDDEN), (1, 1, HIDDEN), (4, 32, HIDDEN))
    profile.set_shape("tokens", (1, 1), (1, 1), (4, 32))
    config.add_optimization_profile(profile)
    library.cqil_set_building(1)
    serialized = builder.build_serialized_network(network, config)
    library.cqil_set_building(0)
    assert serialized is not None
    engine = trt.Runtime(logger).deserialize_cuda_engine(serialized)
    return engine, logger


def expected(inputs, weight):
    wide = [x.astype(np.float64) for x in inputs]
    total = sum(wide)
    bypass = [sum(wide[max(0, r - DISTANCE) : r], np.zeros_like(total)) for r in range(world)]
    residual = inputs[0].astype(np.float64) + sum(bypass)
    normed = residual / np.sqrt((residual**2).mean(-1, keepdims=True) + EPS) * weight
    # joined has the rounded sum as its residual.
    return {"start": wide[0], "joined": total + total, "before": bypass[rank], "residual": residual, "normed": normed}


def main(seed):
    random = np.random.default_rng(seed)
    weight = random.standard_normal(HIDDEN).astype(np.float16)
    engine, _logger = build(weight)
    context = engine.create_execution_context()
    stream = check(cuda.cudaStreamCreate())
    worst = 0.0
    for batch, length in ((1, 1), (1, 32), (3, 7), (4, 32), (1, 1)):
        inputs = [random.standard_normal((batch, length, HIDDEN)).astype(np.float16) for _ in range(world)]
        buffers = {}
        for name, value in (("x", inputs[rank]), ("tokens", np.zeros((batch, length), np.int32))):
            context.set_input_shape(name, value.shape)
            buffers[name] = check(cuda.cudaMalloc(value.nbytes))
            check(
                cuda.cudaMemcpy(
                    buffers[name], value.ctypes.data, value.nbytes, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
                )
            )
        outputs = {}
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT:
                outputs[name] = np.empty(
                    tuple(context.get_tensor_shape(name)), np.int32 if name == "unused" else np.float16
                )
                buffers[name] = check(cuda.cudaMalloc(max(16, outputs[name].nbytes)))
        buffers["workspace"] = workspace.address
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            assert context.set_tensor_address(name, int(buffers[name])), name
        assert context.execute_async_v3(int(stream))
        check(cuda.cudaStreamSynchronize(stream))
        check(cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
        assert context.execute_async_v3(int(stream))
        graph = check(cuda.cudaStreamEndCapture(stream))
        runnable = check(cuda.cudaGraphInstantiate(graph, 0))
        for _ in range(100):
            check(cuda.cudaGraphLaunch(runnable, stream))
        check(cuda.cudaStreamSynchronize(stream))
        for name, value in expected(inputs, weight.astype(np.float64)).items():
            host = outputs[name]
            check(
                cuda.cudaMemcpy(
                    host.ctypes.data, buffers[name], host.nbytes, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
                )
            )
            scale = np.linalg.norm(value) or 1.0
            worst = max(worst, np.linalg.norm(host.astype(np.float64) - value) / scale)
            if name in ("start", "residual", "normed"):  # the same on every rank, bit for bit
                assert len(set(comm.allgather(host.tobytes()))) == 1, name
    worst = comm.allreduce(worst, MPI.MAX)
    if rank == 0:
        print(
            f"TensorRT {trt.__version__}, {world} ranks: relative error {worst:.1e}, 5 shapes, 100 graph replays each"
        )
    workspace.close()
    sys.exit(0 if worst < 2e-3 else 1)


devices = check(cuda.cudaGetDeviceCount())
check(cuda.cudaSetDevice(rank % devices))
library = tensorrt_plugins.register(trt)
workspace = Workspace(comm, timeout=20)
main(int(sys.argv[1]))
