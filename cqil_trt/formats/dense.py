"""Matrices as they are, in the engine's type."""

from __future__ import annotations

from cqil_trt.formats.format import Projection, RankTensor, WeightFormat


class Dense(WeightFormat):
    """`NAME.weight` [outputs, inputs] and, where there is one, `NAME.bias` [outputs]."""

    def tensors(self, projection: Projection, dtype: str) -> tuple[RankTensor, ...]:
        shape = projection.outputs, projection.inputs
        weight = RankTensor(name=f"{projection.name}.weight", shape=shape, dtype=dtype, pieces=projection.weight)
        if not projection.bias:
            return (weight,)
        return weight, RankTensor(name=f"{projection.name}.bias", shape=shape[:1], dtype=dtype, pieces=projection.bias)


FORMAT = Dense()
