"""Launches: how many kernels of a GPU an ATen operation is.

One: each operation that writes a result, with what PyTorch fuses into it (a bias or a summand of a product, statistics
and gain of a norm, all of fused attention, all tensors of a foreach or fused optimizer call). None: views, allocations,
collectives. SEVERAL lists those that are known to launch more. A composite operation counts as what it dispatches to.
"""

from typing import Any

# Radix selection and a sort of what it selects; keys, indices and two copies; a product and its bias; the passes of
# fused attention's backward kernel.
SEVERAL = {
    "topk": 6, "sort": 4, "convolution": 2, "convolution_backward": 3,
    "_scaled_dot_product_flash_attention_backward": 3, "_scaled_dot_product_flash_attention_for_cpu_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 3,
}  # fmt: skip
# Results that are arguments in another shape, although their schema does not say so; and what allocates only.
_NO_KERNEL = {"_unsafe_view", "_reshape_alias", "lift_fresh", "lift_fresh_copy", "detach"}
_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def launches_of(func: Any) -> int:
    """Kernels of one call of an ATen operation; 0 for views, allocations and other namespaces."""
    name = func.overloadpacket.__name__
    if func.namespace != "aten" or name in _NO_KERNEL or name in _ALLOCATES or _is_view(func):
        return 0
    return SEVERAL.get(name, 1)


def _is_view(func: Any) -> bool:
    """Whether the schema says that a result shares memory with an argument that is not written to."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
