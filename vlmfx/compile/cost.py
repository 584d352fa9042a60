"""What a program costs by its graph: operations and bytes, before anything is compiled."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vlmfx.ops.registry import OPS, Cost, nbytes


def cost(exported: ExportedProgram) -> Cost:
    """Operations and bytes of one call.

    An op of vlmfx costs what its contract says. Of others, torch's counter knows the operations: those of matmuls, convolutions and
    attentions, a multiplication and an addition being two; the rest counts as none. Their bytes are those of each op's inputs and
    outputs, each tensor once an op and views for nothing, as if nothing were fused: more than a compiler moves."""
    placeholders = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"]
    mode = next((value.fake_mode for value in placeholders), nullcontext())
    attention = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops
    }  # which torch's counter lacks
    with torch.no_grad(), mode, FlopCounterMode(display=False, custom_mapping=attention) as counter:
        walk = _Walk(exported.graph_module)
        walk.run(*placeholders)
    return Cost(flops=walk.flops + counter.get_total_flops(), bytes=walk.bytes)


class _Walk(torch.fx.Interpreter):
    """Adds up what torch's counter does not see, op by op."""

    flops = bytes = 0

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_function(target, args, kwargs)
        if not isinstance(target, torch._ops.OpOverload):
            return result
        if target.namespace == "vlmfx":
            op = OPS[target._schema.name.partition("::")[2]]
            contract = op.cost(*args, **kwargs)
            self.flops, self.bytes = self.flops + contract.flops, self.bytes + contract.bytes
        else:
            taken, given = _tensors((args, kwargs)), _tensors(result)
            if target._schema.is_mutable or not _is_view(taken, given):
                self.bytes += nbytes(*{id(t): t for t in [*taken, *given]}.values())
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_view(taken: list[Tensor], given: list[Tensor]) -> bool:
    is_alias: Any = torch._C._is_alias_of  # type: ignore[attr-defined]
    return all(any(is_alias(out, t) for t in taken) for out in given)


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))
