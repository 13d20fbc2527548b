"""The one place that mends Triton's interpreter: it computes bfloat16 on the raw bits, silently wrong (3.6 to 3.9), gives a comparison the
type of what was compared, which as a mask it then refuses (3.9), and cannot run autotuned kernels."""

import ast

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def up(bits):
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def down(x):
    """float32 → bfloat16 bits, to nearest, ties to even."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((u.astype(np.uint64) + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def is_bfloat16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def widen_bfloat16() -> None:
    """Compute in float32, round to bfloat16."""
    binary, unary, dot, cast, convert = Builder.binary_op, Builder.unary_op, Builder.create_dot, Builder.cast_impl, Builder.create_fp_to_fp

    def binary_op(self, a, b, op):
        if not (is_bfloat16(a) and is_bfloat16(b)):
            out = binary(self, a, b, op)
            return Handle(out.data, tl.int1) if out.data.dtype == np.bool_ else out
        out = op(up(a.data), up(b.data))
        return Handle(out, tl.int1) if out.dtype == np.bool_ else Handle(down(out), a.dtype.scalar)

    def unary_op(self, a, op):
        return Handle(down(op(up(a.data))), a.dtype.scalar) if is_bfloat16(a) else unary(self, a, op)

    def create_dot(self, a, b, *rest):
        wide = lambda x: Handle(up(x.data), tl.float32) if is_bfloat16(x) else x
        return dot(self, wide(a), wide(b), *rest)

    def cast_impl(self, x, wanted):
        source, target = x.dtype.scalar, wanted.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            wide = Handle(up(x.data), tl.float32)
            return wide if target == tl.float32 else cast(self, wide, wanted)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return Handle(down(x.data.astype(np.float32)), target)
        return cast(self, x, wanted)

    def create_fp_to_fp(self, x, wanted, rounding):
        return cast_impl(self, x, wanted) if tl.bfloat16 in (x.dtype.scalar, wanted.scalar) else convert(self, x, wanted, rounding)

    Builder.binary_op, Builder.unary_op, Builder.create_dot = binary_op, unary_op, create_dot
    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    Builder.get_bf16 = lambda self, value: Handle(down(np.array([value], np.float32)), tl.bfloat16)


def run_autotuned() -> None:
    """An autotuned kernel takes its first configuration; a loop variable is a tensor, as it is when compiled."""

    def run(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        config = self.best_config = self.prune_configs(kwargs)[0]
        try:
            return self.fn.run(*args, **kwargs, **config.all_kwargs())
        finally:
            self.nargs = None

    def visit_For(self, node):
        self.generic_visit(node)
        over = node.iter.func if isinstance(node.iter, ast.Call) else None
        if isinstance(node.target, ast.Name) and isinstance(over, ast.Name) and over.id == "range" and node.target.id != "_":
            name = node.target.id
            wrap = ast.parse(f"{name} = interpreter_semantic.to_tensor({name}, False)").body[0]
            node.body.insert(0, ast.fix_missing_locations(ast.copy_location(wrap, node)))
        return node

    Autotuner.run = run
    interpreter.ASTTransformer.visit_For = visit_For
