"""Linear layers with weights in oneDNN's own blocked order, for models on a CPU.

oneDNN adds up a whole dot product in one accumulator; on 576 and 1536 inputs that rounds about twice as much as
torch's eager product, which after 30 layers is 1.1e-4 on logits of size 48. So the inputs are cut into pieces of at
most `MAX_PIECE` and the partial products added, which brings the difference to transformers' forward to 6.7e-5,
that of the eager product (four batches of `wisp-bench engine`), at a few percent of the pass.
"""

from __future__ import annotations

import torch
from torch import nn

MAX_PIECE = 400  # inputs added up in one accumulator
_PACK_FOR_TOKENS = 8  # the order is chosen for passes of about this many tokens; any number works


class PackedLinear(nn.Module):
    """Drop-in for `nn.Linear` at inference: same values up to rounding, no gradient."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else linear.bias.detach()
        pieces = linear.weight.detach().tensor_split(-(-linear.in_features // MAX_PIECE), dim=1)
        self._sizes = [piece.shape[1] for piece in pieces]
        # Not buffers: an opaque tensor can be neither moved nor saved.
        self._packed = [
            torch.ops.mkldnn._reorder_linear_weight(piece.contiguous(), _PACK_FOR_TOKENS) for piece in pieces
        ]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        product = torch.ops.mkldnn._linear_pointwise
        parts = inputs.split(self._sizes, dim=-1)
        total = product(parts[0].contiguous(), self._packed[0], self.bias, "none", [], "")
        for part, packed in zip(parts[1:], self._packed[1:], strict=True):
            total = product.binary(part.contiguous(), total, packed, None, "add")
        return total


def can_pack(dtype: torch.dtype) -> bool:
    """True if this build of torch has oneDNN and this CPU computes `dtype` in it at full speed."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(model: nn.Module) -> int:
    """Replace every plain `nn.Linear` of `model` and return how many there were.

    The plain weight is freed as its module goes. A head that is tied to the embedding is the exception: rows of a
    packed matrix cannot be looked up, so the embedding keeps the plain one beside it.
    """
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        setattr(parent, leaf, PackedLinear(getattr(parent, leaf)))
    return len(names)
