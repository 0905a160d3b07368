"""Where K and V of each token lie in a chunk's payload, as far as its KVSpec's `layout_id` says. Pure.

Lossy codecs need it: K's channels have offsets of their own, V's tokens have scales of their own.
"""

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcore.types import KVSpec

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_OURS = re.compile(r"paged\.L2BHD\.b(?P<block>\d+)")
_VLLM = re.compile(
    r"vllm\.v1\.(?P<packing>.+)\.(?P<dtype>[a-z0-9_]+)\.b(?P<block>\d+)\.(?P<shape>\d+(?:x\d+)*)(?:\.o(?P<order>\d+))?\.L\d+"
)
Array = npt.NDArray[np.generic]


class UnknownLayoutError(ValueError):
    """Its text says why, for people."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """A payload is blocks, each an array of `extents`, its axes named by `axes`: a permutation of `L2BHD` (layer, K or
    V, token of the block, head, channel)."""

    axes: str
    extents: tuple[int, ...]
    dtype: str

    @property
    def block_bytes(self) -> int:
        """Of one block's payload."""
        return int(np.prod(self.extents)) * ITEM_BYTES[self.dtype]

    @property
    def block_tokens(self) -> int:
        """Tokens of one block."""
        return self.extents[self.axes.index("B")]

    def canonical(self, payload: Array) -> Array:
        """A view of a flat array of numbers as `[blocks, layers, 2, block_tokens, heads, channels]`."""
        blocks = payload.reshape(-1, *self.extents)
        return blocks.transpose(0, *(1 + self.axes.index(axis) for axis in "L2BHD"))


def kv_layout(spec: KVSpec) -> KVLayout:
    """Of the payloads of `spec`. Raises UnknownLayoutError."""
    if spec.dtype not in ITEM_BYTES:
        raise UnknownLayoutError(f"its numbers are {spec.dtype}, not {', '.join(ITEM_BYTES)}")
    if match := _OURS.fullmatch(spec.layout_id):
        extents = (spec.num_layers, 2, int(match["block"]), spec.num_kv_heads, spec.head_dim)
        layout = KVLayout("L2BHD", extents, spec.dtype)
    elif match := _VLLM.fullmatch(spec.layout_id):
        layout = _vllm_layout(spec, match)
    else:
        raise UnknownLayoutError(f"where K and V lie in {spec.layout_id} is not known")
    num_blocks = spec.chunk_tokens // layout.block_tokens
    if num_blocks * layout.block_tokens != spec.chunk_tokens or num_blocks * layout.block_bytes != spec.chunk_bytes:
        raise UnknownLayoutError(f"a chunk of {spec.chunk_bytes} bytes is not made of blocks as {spec.layout_id} says")
    return layout


def _vllm_layout(spec: KVSpec, match: re.Match[str]) -> KVLayout:
    """vLLM's block in each layer: `heads x tokens x 2 channels`, or, where K and V are apart, `2 x ...`."""
    if match["packing"].startswith("cpu"):
        raise UnknownLayoutError("vLLM's kernels for CPUs pack K and V inside of a block as they like")
    shape = tuple(int(extent) for extent in match["shape"].split("x"))
    block, heads, channels = int(match["block"]), spec.num_kv_heads, spec.head_dim
    known = {
        (heads, block, 2 * channels): ("H", "B", "2D"),
        (2, heads, block, channels): ("2", "H", "B", "D"),
        (2, block, heads, channels): ("2", "B", "H", "D"),
    }
    if shape not in known or (len(shape) == 4 and heads == block):
        raise UnknownLayoutError(f"which axis of {spec.layout_id} is which is not known")
    names = known[shape]
    order = [int(digit) for digit in match["order"] or ""] or [at for at, extent in enumerate(shape) if extent > 1]
    if sorted(order) != [at for at, extent in enumerate(shape) if extent > 1]:
        raise UnknownLayoutError(f"the order of {spec.layout_id} cannot be read")
    axes = "L" + "".join(names[at] for at in order)
    extents = {"L": spec.num_layers, "2": 2, "B": block, "H": heads, "D": channels}
    axes += "".join(axis for axis in "2BHD" if axis not in axes)  # of one element: it does not matter where
    return KVLayout(axes, tuple(extents[axis] for axis in axes), spec.dtype)
