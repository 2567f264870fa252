"""Thin products that share an operand, made as one: x [A_q; A_k; A_v]^T in place of three products of a few columns.

Weights that read the same x (queries, keys and values; gate and up) each need x A^T and (g B)^T x in the backward pass.
Apart, each of them reads x again and is too thin to keep a processor busy. torch.compile knows which x is the same, and
takes this pass over its backward graph, in which nothing but the grouping of products changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch._inductor import config, list_mode_options
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import Graph, Node

_HOOK = "post_grad_custom_pre_pass"
_THIN = 4  # a product's own operand is thin below a fourth of the width: of more, weight.py forms the dense gradient


class ThinProducts(CustomGraphPass):
    """The pass; compiled graphs are cached by the text of this file."""

    def __call__(self, graph: Graph) -> None:
        if any(node.name.startswith("tangents") for node in graph.find_nodes(op="placeholder")):
            fuse_thin_products(graph)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def with_fusion(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of torch.compile with this pass, where they leave the backend and its hook for passes alone."""
    mode, given = options.get("mode"), options.get("options") or {}
    is_inductor = options.get("backend", "inductor") == "inductor"
    is_valid = isinstance(given, dict) and not (mode and given)  # of what is not, torch says so
    if not is_inductor or not is_valid or _HOOK in given or getattr(config, _HOOK) is not None:
        return options
    rest = {key: value for key, value in options.items() if key != "mode"}  # torch takes a mode or options
    of_mode = list_mode_options(mode, options.get("dynamic")) if mode else {}
    return {**rest, "options": {**of_mode, **given, _HOOK: ThinProducts()}}


def fuse_thin_products(graph: Graph) -> int:
    """Fuse the products of a graph that share an operand and do not wait for each other; return how many are saved."""
    by_operand: dict[tuple[Node, int], list[Node]] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
        for side in (0, 1):
            if _is_thin(node, side):
                by_operand.setdefault((node.args[side], side), []).append(node)
    num_saved = 0
    fused = set[Node]()
    for (operand, side), nodes in by_operand.items():
        apart = _independent(node for node in nodes if node not in fused)
        if len(apart) > 1:
            _fuse(graph, operand, side, apart)
            fused.update(apart)
            num_saved += len(apart) - 1
    if num_saved:
        stable_topological_sort(graph)
    return num_saved


def _is_thin(product: Node, side: int) -> bool:
    """Say whether the operand that is not on this side is thin beside the one on it, (tokens, n)."""
    n, own = _shape(product.args[side])[1], _shape(product)[1 - side]
    return isinstance(n, int) and isinstance(own, int) and _THIN * own <= n


def _independent(products: Iterator[Node]) -> list[Node]:
    """Return the products of which none waits for another."""
    apart: list[Node] = []
    after_these = set[Node]()
    for product in products:
        after = _descendants(product)
        if product not in after_these and after.isdisjoint(apart):
            apart.append(product)
            after_these |= after
    return apart


def _descendants(node: Node) -> set[Node]:
    seen, waiting = set[Node](), [node]
    while waiting:
        new = waiting.pop().users.keys() - seen
        seen |= new
        waiting += new
    return seen


def _fuse(graph: Graph, operand: Node, side: int, products: list[Node]) -> None:
    """Put one product in the place of several; its order is for the sort to find."""
    dim = 1 - side
    with graph.inserting_before(products[-1]):
        own = _call(graph, torch.ops.aten.cat.default, [product.args[dim] for product in products], dim)
        operands = (operand, own) if side == 0 else (own, operand)
        whole = _call(graph, torch.ops.aten.mm.default, *operands)
        start = 0
        for product in products:
            end = start + _shape(product)[dim]
            part = _call(graph, torch.ops.aten.slice.Tensor, whole, dim, start, end)
            product.replace_all_uses_with(part)
            graph.erase_node(product)
            start = end


def _call(graph: Graph, target: Any, *args: Any) -> Node:
    """Add a call to a graph, with what it returns as the compiler's passes know it."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*torch.fx.node.map_arg(args, lambda arg: arg.meta["val"]))
    return node


def _shape(node: Any) -> torch.Size:
    shape: torch.Size = node.meta["val"].shape
    return shape
