"""The one file that knows JAX's internals and its versions.

Everything else sees a traced program as equations (``Eqn``) and asks here for what their parameters mean. It does not decide
anything about weights. Differences bridged: open and closed jaxprs (merged in 0.12), and the fields of ``scan`` (``num_consts``
and ``num_carry`` up to 0.10, ``ft_in`` from 0.11).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple

import jax
from jax._src import core, source_info_util
from jax._src.interpreters import partial_eval
from jax._src.sharding_impls import UnspecifiedValue
from jax.extend import core as jex
from jax.sharding import NamedSharding, PartitionSpec

Jaxpr = Any
Eqn = Any
Var = Any

# Code of frameworks: an error should name the line of the model that called them.
_FRAMEWORKS = ("/flax/", "/equinox/", "/haiku/", "/optax/", "/jraph/", "/penzai/", "/keras/", "/e3nn_jax/")
_SOLVERS = ("/diffrax/", "/optimistix/", "/lineax/", "/jaxopt/")


CUSTOM = ("custom_jvp_call", "custom_vjp_call")
"""Primitives that call the one program they hold, and have a derivative of their own."""

OPAQUE = ("custom_linear_solve", "call_hi_primitive")
"""Primitives that hold several programs or functions, for their values and their derivatives, as solvers do."""

CALLS = ("jit", "pjit", "closed_call", "eval_jaxpr", "remat2", "checkpoint")
"""Primitives that do nothing but call the one program they hold, once."""


class Program(NamedTuple):
    """A traced function: its equations and the values it closed over."""

    jaxpr: Jaxpr
    consts: Sequence[Any]


class Scan(NamedTuple):
    """What a ``scan`` equation means, whatever the version that wrote it."""

    body: Program
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: int | bool


class While(NamedTuple):
    """What a ``while`` equation means."""

    cond: Program
    body: Program
    cond_consts: int
    body_consts: int


def trace(fn: Callable[..., Any], args: Sequence[Any]) -> Program:
    """Traces ``fn(*args)``, where ``args`` are arrays or ``jax.ShapeDtypeStruct``s and ``fn`` returns a list of arrays.

    What no output and no effect needs is left out: a use that nobody sees is none.
    """
    jaxpr, consts = program(jax.make_jaxpr(fn)(*args))
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return Program(jaxpr, consts)


def inputs_read(program: Program, wanted: Sequence[bool]) -> list[bool]:
    """Which inputs of ``program`` matter for the outputs marked in ``wanted``, or for an effect."""
    return list(partial_eval.dce_jaxpr(program.jaxpr, list(wanted))[1])


def program(jaxpr: Any) -> Program:
    """Takes a closed or open jaxpr apart."""
    return Program(getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ()))


def is_literal(atom: Any) -> bool:
    """Whether an input of an equation is a constant written into it."""
    return isinstance(atom, jex.Literal)


def among(atom: Any, variables: Set[Var]) -> bool:
    """Whether an input of an equation is one of ``variables``; constants are not."""
    return not is_literal(atom) and atom in variables


def last_uses(jaxpr: Jaxpr) -> dict[Var, int]:
    """For each variable the index of the last equation that reads it; absent if it is an output or never read."""
    last = {}
    for index, eqn in enumerate(jaxpr.eqns):
        last.update({v: index for v in eqn.invars if not is_literal(v)})
    for v in jaxpr.outvars:
        if not is_literal(v):
            last.pop(v, None)
    return last


@contextmanager
def location(eqn: Eqn) -> Iterator[None]:
    """New equations made inside carry ``eqn``'s source line, name scopes, mesh and metadata."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=names), eqn.ctx.manager:
        yield


def bind(eqn: Eqn, values: Sequence[Any]) -> list[Any]:
    """Evaluates ``eqn`` as it stands on ``values``."""
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def subprogram(eqn: Eqn) -> Program:
    """The body of an equation that has exactly one."""
    params = eqn.params
    return program(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"])


def function_name(eqn: Eqn) -> str:
    """The name of the function whose program an equation calls."""
    return subprogram(eqn).jaxpr.debug_info.func_name


def scan(eqn: Eqn) -> Scan:
    """Reads a ``scan`` equation."""
    p = eqn.params
    if "ft_in" in p:  # jax >= 0.11
        num_consts, num_carry = (len(list(part)) for part in p["ft_in"].unpack()[:2])
    else:
        num_consts, num_carry = p["num_consts"], p["num_carry"]
    return Scan(program(p["jaxpr"]), num_consts, num_carry, p["length"], p["reverse"], p["unroll"])


def while_(eqn: Eqn) -> While:
    """Reads a ``while`` equation."""
    p = eqn.params
    return While(program(p["cond_jaxpr"]), program(p["body_jaxpr"]), p["cond_nconsts"], p["body_nconsts"])


def branches(eqn: Eqn) -> list[Program]:
    """The branches of a ``cond`` equation, in the order of its index."""
    return [program(branch) for branch in eqn.params["branches"]]


def platforms(eqn: Eqn) -> Sequence[tuple[str, ...] | None] | None:
    """The platforms of each branch of a ``cond`` that ``lax.platform_dependent`` made, ``None`` for the default; else ``None``."""
    return eqn.params.get("branches_platforms")


def repeated(jaxpr: Jaxpr) -> list[Jaxpr]:
    """The bodies that ``jaxpr`` calls more than once: those of a function that was jitted or rematerialised, and traced once."""
    called = [subprogram(eqn).jaxpr for eqn in jaxpr.eqns if eqn.primitive.name in CALLS]
    count = Counter(map(id, called))
    return [body for body in called if count[id(body)] > 1]


def bodies(eqn: Eqn, marked: Sequence[bool]) -> list[tuple[Program, list[bool]]]:
    """The programs inside an equation, each with which of its inputs are marked: as outside, and all that change in a loop."""
    name, marked = eqn.primitive.name, list(marked)
    if name in (*CALLS, *CUSTOM, "shard_map"):
        return [(subprogram(eqn), marked)]
    if name == "scan":
        s = scan(eqn)
        head = s.num_consts + s.num_carry
        return [(s.body, marked[: s.num_consts] + [True] * s.num_carry + marked[head:])]
    if name == "while":
        w = while_(eqn)
        head = w.cond_consts + w.body_consts
        carry = [True] * (len(marked) - head)
        return [(w.cond, marked[: w.cond_consts] + carry), (w.body, marked[w.cond_consts : head] + carry)]
    if name == "cond":
        return [(branch, marked[1:]) for branch in branches(eqn)]
    return []


def copy_of(jaxpr: Jaxpr, plain: dict[int, Eqn]) -> Jaxpr:
    """``jaxpr`` with variables of its own; ``plain`` gets the equation that each new one stands for."""
    new: dict[Var, Var] = {}

    def fresh(atom: Any) -> Any:
        if is_literal(atom) or isinstance(atom, core.DropVar):
            return atom
        return new.setdefault(atom, core.Var(atom.aval))

    constvars, invars = [fresh(v) for v in jaxpr.constvars], [fresh(v) for v in jaxpr.invars]
    eqns = []
    for eqn in jaxpr.eqns:
        eqns.append(eqn.replace(invars=[fresh(v) for v in eqn.invars], outvars=[fresh(v) for v in eqn.outvars]))
        plain[id(eqns[-1])] = plain.get(id(eqn), eqn)
    consts = {"consts": jaxpr.consts} if getattr(jaxpr, "consts", ()) else {}  # part of it since 0.12
    return jaxpr.replace(
        constvars=constvars, invars=invars, outvars=[fresh(v) for v in jaxpr.outvars], eqns=eqns, **consts
    )


def with_bodies(eqn: Eqn, jaxprs: Sequence[Jaxpr], plain: dict[int, Eqn]) -> Eqn:
    """``eqn`` with ``jaxprs`` in place of its programs, in the order of ``bodies``; itself where they are the same.

    ``plain`` gets the equation that a new one stands for.
    """
    old = [body.jaxpr for body, _ in bodies(eqn, [False] * len(eqn.invars))]
    if all(a is b for a, b in zip(old, jaxprs, strict=True)):
        return eqn
    rest = iter(jaxprs)

    def put(value: Any) -> Any:
        inner = getattr(value, "jaxpr", value)
        return next(rest) if inner is value else value.replace(jaxpr=next(rest))

    keys = {"while": ("cond_jaxpr", "body_jaxpr"), "cond": ("branches",)}.get(eqn.primitive.name)
    keys = keys or (("jaxpr",) if "jaxpr" in eqn.params else ("call_jaxpr",))
    changed = {k: tuple(map(put, v)) if isinstance(v := eqn.params[k], tuple) else put(v) for k in keys}
    new = eqn.replace(params={**eqn.params, **changed})
    plain[id(new)] = plain.get(id(eqn), eqn)
    return new


def remat(eqn: Eqn) -> dict[str, Any]:
    """The arguments ``jax.checkpoint`` was called with."""
    return {"prevent_cse": eqn.params["prevent_cse"], "policy": eqn.params["policy"]}


def shard_map(eqn: Eqn) -> dict[str, Any]:
    """The arguments ``jax.shard_map`` was called with."""
    p = eqn.params
    return {"axis_names": p["newly_manual_axes"]} | {k: p[k] for k in ("mesh", "in_specs", "out_specs", "check_vma")}


def varies(x: Any) -> frozenset[Any]:
    """The axes of a ``shard_map`` along which ``x`` is known to differ from device to device; none known if it does not check."""
    return frozenset(jax.typeof(x).mat.varying)


def is_staging() -> bool:
    """Whether what is bound now becomes part of a program, as under ``jit``, and is not evaluated at once."""
    trace = core.trace_ctx.trace
    while trace is not None and not isinstance(trace, partial_eval.DynamicJaxprTrace):
        trace = getattr(trace, "parent_trace", None)
    return trace is not None


def jit_shardings(eqn: Eqn) -> tuple[list[Any], list[Any]]:
    """The shardings an inner ``jit`` fixes for its inputs and outputs; ``None`` where it fixes none."""

    def fixed(shardings: Sequence[Any], count: int) -> list[Any]:
        return [None if isinstance(s, UnspecifiedValue) else s for s in shardings] or [None] * count

    p = eqn.params
    return (
        fixed(p.get("in_shardings", ()), len(eqn.invars)),
        fixed(p.get("out_shardings", ()), len(eqn.outvars)),
    )


def where(eqns: Sequence[Eqn]) -> str:
    """``"model.py:12 (Block.__call__)"``: the line of the model's source that made the last of ``eqns``, the others being around it.

    An equation inside a ``jit`` or ``scan`` knows only the lines inside it; where those are a library's, the line of the call counts.
    """
    known = [frame for eqn in reversed(eqns) for frame in _frames(eqn)]
    own = [f for f in known if not any(part in f.file_name.replace("\\", "/") for part in (*_FRAMEWORKS, *_SOLVERS))]
    if not known:
        return "an unknown line"
    frame = (own or known)[0]
    return f"{frame.file_name}:{frame.start_line} ({frame.function_name})"


def _frames(eqn: Eqn) -> Iterator[Any]:
    """The user's frames of one equation, innermost first, up to the call of jlora that traced it."""
    for frame in source_info_util.user_frames(eqn.source_info.traceback):
        if frame.file_name.replace("\\", "/").split("/")[-2:-1] == ["jlora"]:
            return
        yield frame


def promote(*dtypes: Any) -> Any:
    """The dtype that holds values of all ``dtypes``, whatever promotion mode the user has set.

    JAX promotes no float of 8 bits or fewer: where one meets another dtype, it counts as bf16.
    """
    if len(set(map(jax.numpy.dtype, dtypes))) > 1:
        dtypes = tuple(jax.numpy.bfloat16 if is_tiny(d) else d for d in dtypes)
    with jax.numpy_dtype_promotion("standard"):
        return reduce(jax.numpy.promote_types, dtypes)


def is_tiny(dtype: Any) -> bool:
    """Whether ``dtype`` is a float of 8 bits or fewer."""
    return jax.numpy.issubdtype(dtype, jax.numpy.floating) and jax.numpy.finfo(dtype).bits <= 8


def thin_dtype(*dtypes: Any) -> Any:
    """The dtype of thin products where the model has values of ``dtypes``: that of all of them, but at least bf16.

    In floats of 8 bits most gradients of factors would be rounded to zero.
    """
    found = promote(*dtypes)
    return jax.numpy.dtype(jax.numpy.bfloat16) if is_tiny(found) else found


def thin_precision(precision: Any) -> Any:
    """The precision of thin products: as the model's, unless that is an algorithm that rounds operands to floats of 8 bits."""
    if isinstance(precision, jax.lax.DotAlgorithm):
        tiny = is_tiny(precision.lhs_precision_type) or is_tiny(precision.rhs_precision_type)
        return None if tiny else precision
    if isinstance(precision, jax.lax.DotAlgorithmPreset) and "F8" in precision.name:
        return None
    return precision


def swapped(precision: Any) -> Any:
    """The precision of the product with its operands exchanged."""
    if isinstance(precision, jax.lax.DotAlgorithm):
        pairs = ("lhs_precision_type", "rhs_precision_type"), ("lhs_component_count", "rhs_component_count")
        return precision._replace(**{a: getattr(precision, b) for pair in pairs for a, b in (pair, pair[::-1])})
    return precision[::-1] if isinstance(precision, tuple) else precision


def place(x: Any, sharding: Any) -> Any:
    """``x`` placed as ``sharding`` says, inside ``jit``: a constraint on automatic mesh axes, a change of type on explicit ones."""
    mesh = getattr(sharding, "mesh", None)
    if mesh is not None and mesh._any_axis_explicit:
        return jax.sharding.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)


def explicit_part(sharding: Any) -> Any:
    """What of a sharding runs along mesh axes in explicit mode, for ``out_sharding=``; ``None`` if there are none."""
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or not mesh._any_axis_explicit:
        return None
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = jax.sharding.AxisType.Explicit

    def kept(axis: Any) -> Any:
        names = axis if isinstance(axis, tuple) else (axis,)
        found = tuple(name for name in names if kinds.get(name) == explicit)
        return (found if isinstance(axis, tuple) else found[0]) if found else None

    return NamedSharding(mesh, PartitionSpec(*map(kept, sharding.spec)))


def reshard(eqn: Eqn, x: Any, axes: Sequence[int | None]) -> Any:
    """``x`` moved as ``eqn``, a ``reshard``, moves its operand; ``axes`` says which axis of that each axis of ``x`` follows."""
    to = eqn.params["dst_sharding"]
    spec = PartitionSpec(*(None if d is None else dict(enumerate(to.spec)).get(d) for d in axes))
    return eqn.primitive.bind(x, **eqn.params | {"dst_sharding": to.update(spec=spec)})


def placed_like(x: Any, like: Any) -> Any:
    """``x``, of the shape of ``like``, split as it is where the mesh is in explicit mode."""
    return x if not is_explicit(like) else jax.sharding.reshard(x, jax.typeof(like).sharding)


def is_explicit(x: Any) -> bool:
    """Whether ``x`` lives on a mesh that has axes in explicit mode: its sharding is part of its type."""
    mesh = jax.typeof(x).sharding.mesh
    return not mesh.empty and mesh._any_axis_explicit


def explicit_sharding(spec: Sequence[Any], *arrays: Any) -> Any:
    """The sharding that splits axes by ``spec``, for ``out_sharding=``, if one of ``arrays`` lives on a mesh in explicit mode."""
    meshes = [jax.typeof(x).sharding.mesh for x in arrays if is_explicit(x)]
    return NamedSharding(meshes[0], PartitionSpec(*spec)) if meshes else None


def conv_sharding(eqn: Eqn, like: Any = None, whole: int | None = None) -> dict[str, Any]:
    """``out_sharding=`` of a convolution that is part of ``eqn``, if that has one: as ``like`` or else as the result of ``eqn`` is split.

    Axis ``whole`` is not split.
    """
    to = eqn.params.get("out_sharding")
    if to is None:
        return {}
    spec = to.spec if like is None else jax.typeof(like).sharding.spec
    return {
        "out_sharding": NamedSharding(
            to.mesh, PartitionSpec(*(None if d == whole else axis for d, axis in enumerate(spec)))
        )
    }


def mesh_spec(x: Any) -> Any:
    """The ``PartitionSpec`` of ``x`` if it may be split over devices, else ``None``.

    On explicit mesh axes the type tells. On automatic ones the compiler decides, and says nothing: then any axis may be split, unless
    there is but one device. Inside ``shard_map`` axes are manual: an array there is on one device.
    """
    sharding = jax.typeof(x).sharding
    spec = getattr(sharding, "spec", ())
    mesh = jax.sharding.get_abstract_mesh() if sharding.mesh.empty else sharding.mesh
    automatic = any(
        n > 1 and kind == jax.sharding.AxisType.Auto for n, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    )
    return spec if automatic or any(s is not None for s in spec) else None
