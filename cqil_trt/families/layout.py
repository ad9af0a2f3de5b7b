"""Where a checkpoint stores each part of each layer, and in which shape."""

from __future__ import annotations

from cqil_trt import families
from cqil_trt.families.family import EMBEDDING, FINAL_NORM, LM_HEAD
from cqil_trt.formats import Piece
from cqil_trt.model import ModelConfig


class LayerLayout:
    """Where a checkpoint of the model stores the parts of one layer."""

    def __init__(self, model: ModelConfig, index: int):
        q, kv, hidden = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim, model.hidden_size
        self._family, self._prefix = families.of(model), f"model.layers.{index}"
        self._rows = {
            **dict.fromkeys(("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"), hidden),
            **dict.fromkeys(("o", "down"), hidden),
            "q_norm": q if model.joint_qk_norm else model.head_dim,
            "k_norm": kv if model.joint_qk_norm else model.head_dim,
            **dict.fromkeys(("k", "v"), kv),
            **dict.fromkeys(("gate", "up"), model.intermediate_size),
            "q": q,
        }
        self._columns = {"q": hidden, "k": hidden, "v": hidden, "o": q, "gate": hidden, "up": hidden}
        self._columns["down"] = model.intermediate_size
        self._biases = {
            **dict.fromkeys(("q", "k", "v"), model.qkv_bias),
            **dict.fromkeys(("gate", "up", "down"), model.mlp_bias),
            "o": model.o_bias,
        }
        self._absent = () if model.qk_norm else ("q_norm", "k_norm")

    def piece(
        self, part: str, kind: str, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None
    ) -> Piece:
        """Rows and columns (None: all) of a part, within the tensor that holds it. `kind`: weight or bias."""
        module, first = self._family.place(part, self._rows)
        if rows is not None:
            rows = (first + rows[0], first + rows[1])
        return Piece(f"{self._prefix}.{module}.{kind}", rows, columns)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the layer's tensors in a checkpoint, by name."""
        modules: dict[str, list[str]] = {}
        for part, module in self._family.layer.items():
            if part not in self._absent:
                modules.setdefault(module, []).append(part)
        shapes: dict[str, tuple[int, ...]] = {}
        for module, parts in modules.items():
            rows, part = sum(self._rows[part] for part in parts), parts[0]
            matrix = part in self._columns
            shapes[f"{self._prefix}.{module}.weight"] = (rows, self._columns[part]) if matrix else (rows,)
            if self._biases.get(part):
                shapes[f"{self._prefix}.{module}.bias"] = (rows,)
        return shapes


def layer_matrices(model: ModelConfig) -> list[tuple[int, str]]:
    """The matrices of all layers in a checkpoint, each with its layer."""
    layers = ((index, LayerLayout(model, index).shapes()) for index in range(model.num_layers))
    return [(index, name) for index, shapes in layers for name, shape in shapes.items() if len(shape) == 2]


def checkpoint_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this model must hold, and its shape."""
    table = (model.vocab_size, model.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": table}
    for index in range(model.num_layers):
        shapes |= LayerLayout(model, index).shapes()
    shapes[f"{FINAL_NORM}.weight"] = (model.hidden_size,)
    if not model.tie_embeddings:
        shapes[f"{LM_HEAD}.weight"] = table
    return shapes
