"""The statements of random programs: each writes one line, or declines the value that it is offered.

Contract
- A shape is a tuple in which a negative number -k stands for k times the batch size, `B` in the text.
- `ROW_WISE` statements keep rows apart on values whose rows are the batch's; the kind of a statement steers how many
  programs can be split, and nothing is concluded from it.
- Products are clamped or squashed, so that sums stay exact.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

STARTS = ("B = x.shape[0]",)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A variable of the program. `whole`: it holds whole numbers, or halves of them."""

    name: str
    shape: Shape
    whole: bool

    @property
    def batched(self) -> bool:
        return self.shape[:1] == (-1,)


class Writer:
    """The lines so far, and the values that they define. `whole_only`: all of them are whole numbers."""

    def __init__(self, rng: random.Random, whole_only: bool) -> None:
        self.rng, self.whole_only = rng, whole_only
        self.lines: list[str] = []
        self.values: list[Value] = []

    def add(self, text: str, shape: Shape, whole: bool) -> bool:
        if self.whole_only and not whole:
            return False
        name = f"v{len(self.values)}"
        self.lines.append(f"{name} = {text}")
        self.values.append(Value(name, shape, whole))
        return True

    def other(self, shape: Shape) -> Value | None:
        """Return another value of this shape."""
        found = [v for v in self.values if v.shape == shape]
        return self.rng.choice(found) if found else None

    def dim(self, v: Value, batch: bool) -> int | None:
        """Return a dimension of `v` that is the batch's, or one that is not."""
        found = [i for i, size in enumerate(v.shape) if (size < 0) == batch]
        return self.rng.choice(found) if found else None


Statement = Callable[[Writer, Value], bool]


def size(n: int) -> str:
    """Return a size as text."""
    return str(n) if n >= 0 else "B" if n == -1 else f"{-n} * B"


def without(shape: Shape, dim: int, new: int | None = None) -> Shape:
    return (*shape[:dim], *(() if new is None else (new,)), *shape[dim + 1 :])


UNARY_WHOLE = (
    "{} + 1",
    "-{}",
    "{} * 2",
    "{} * 0.5",
    "torch.relu({})",
    "{}.abs()",
    "{}.clamp(-3, 3)",
    "{}.sign()",
    "{}.remainder(5)",
    "torch.where({} > 0, {}, -1.0)",
    "({} > 0).double()",
    "{}.masked_fill({} == 0, 2.0)",
    "torch.ones_like({})",
    "{}.round()",
    "F.hardtanh({}, -4.0, 4.0)",
)
UNARY_REAL = (
    "{}.sin()",
    "{}.tanh()",
    "{}.sigmoid()",
    "F.silu({})",
    "{} * 0.3",
    "({} * 0.1).exp().clamp(max=9)",
    "F.softplus({})",
)


def unary(w: Writer, v: Value) -> bool:
    if v.whole and w.rng.random() < 0.7:
        text = w.rng.choice(UNARY_WHOLE)
        return w.add(text.replace("{}", v.name), v.shape, True)
    return w.add(w.rng.choice(UNARY_REAL).replace("{}", v.name), v.shape, False)


def binary(w: Writer, v: Value) -> bool:
    u = w.other(v.shape)
    assert u is not None
    whole = u.whole and v.whole
    kind = w.rng.choice(("+", "-", "*", "max", "where"))
    if kind in "+-":
        return w.add(f"{v.name} {kind} {u.name}", v.shape, whole)
    if kind == "*":
        product = f"({v.name} * {u.name})"
        return w.add(product + (".clamp(-9, 9)" if whole else ".tanh()"), v.shape, whole)
    if not whole:
        return False
    text = f"torch.maximum({v.name}, {u.name})" if kind == "max" else f"torch.where({v.name} > {u.name}, 1.0, {u.name})"
    return w.add(text, v.shape, True)


def weight(w: Writer, v: Value) -> bool:
    if v.shape[-1] != 4:
        return False
    kinds = ["{} @ self.w0", "F.linear({}, self.w1)", "F.linear({}, self.w0, self.scale)", "{} * self.scale",
        "{} + self.scale"]  # fmt: skip
    if len(v.shape) == 2:
        kinds += ["torch.einsum('bi,ij->bj', {}, self.w1)", "torch.addmm(self.scale, {}, self.w0)"]
    if len(v.shape) == 3:
        kinds += ["torch.einsum('bsi,ij->bsj', {}, self.w1)", "torch.matmul({}, self.w0.t())"]
    return w.add(w.rng.choice(kinds).replace("{}", v.name), v.shape, v.whole)


def norm(w: Writer, v: Value) -> bool:
    if v.shape[-1] != 4:
        return False
    kinds = (
        "F.layer_norm({}, (4,))",
        "F.layer_norm({}, (4,), self.scale)",
        "F.rms_norm({}, (4,), self.scale)",
        "{} * ({} * {}).sum(-1, keepdim=True).add(1).rsqrt()",
    )
    return w.add(w.rng.choice(kinds).replace("{}", v.name), v.shape, False)


def reduction(batch: bool) -> Statement:
    """Return the statement that works along a dimension: of the batch, or another."""

    def along(w: Writer, v: Value) -> bool:
        d = w.dim(v, batch)
        if d is None or len(v.shape) < 2:
            return False
        kind = w.rng.choice(("sum", "mean", "amax", "cumsum", "softmax", "sort", "flip", "roll", "logsumexp", "keep"))
        n, s = v.name, v.shape
        if kind in ("amax", "sort") and not v.whole:
            return False
        if kind in ("sum", "amax"):
            return w.add(f"{n}.{kind}({d})", without(s, d), v.whole)
        if kind == "keep":
            return w.add(f"({n} - {n}.sum({d}, keepdim=True)).clamp(-9, 9)", s, v.whole) if v.whole else False
        if kind == "mean":
            return w.add(f"{n}.mean({d}, keepdim=True)", without(s, d, 1), False)
        if kind == "logsumexp":
            return w.add(f"{n} - {n}.logsumexp({d}, keepdim=True)", s, False)
        if kind == "sort":
            return w.add(f"{n}.sort(dim={d}, stable=True).values", s, True)
        text = {"roll": f"{n}.roll(1, {d})", "flip": f"{n}.flip({d})"}.get(kind, f"{n}.{kind}({d})")
        return w.add(text, s, v.whole and kind != "softmax")

    return along


def transpose(w: Writer, v: Value) -> bool:
    if len(v.shape) < 2:
        return False
    a, b = w.rng.sample(range(len(v.shape)), 2)
    shape = list(v.shape)
    shape[a], shape[b] = shape[b], shape[a]
    return w.add(f"{v.name}.transpose({a}, {b})", tuple(shape), v.whole)


def rows(w: Writer, v: Value) -> bool:
    """k rows per token, and back."""
    s = v.shape
    if s[0] == -1 and len(s) >= 3 and s[1] > 0:
        return w.add(f"{v.name}.reshape(B * {s[1]}, {', '.join(map(size, s[2:]))})", (-s[1], *s[2:]), v.whole)
    if s[0] < -1:
        shape = (-1, -s[0], *s[1:])
        return w.add(f"{v.name}.reshape({', '.join(map(size, shape))})", shape, v.whole)
    if s[0] == -1 and len(s) == 2 and s[1] == 4:
        return w.add(f"{v.name}.reshape(B, 2, 2)", (-1, 2, 2), v.whole)
    return False


def halves(w: Writer, v: Value) -> bool:
    """A view whose leading dimension is not the token's."""
    s = v.shape
    if s[0] == -1 and len(s) >= 3 and s[1] > 0:
        rest = ", ".join(map(size, s[2:]))
        return w.add(f"{v.name}.reshape({s[1]}, B, {rest})", (s[1], -1, *s[2:]), v.whole)
    if s == (-1, 4):
        text = w.rng.choice(("{}.reshape(4, B).t()", "{}.t().reshape(B, 4)", "{}.reshape(2, -1).sum(0).view(B, 2)"))
        return w.add(text.replace("{}", v.name), (-1, 2) if "sum" in text else (-1, 4), v.whole)
    return False


def columns(w: Writer, v: Value) -> bool:
    d = w.dim(v, False)
    if d is None or v.shape[d] < 2:
        return False
    n, s, k = v.name, v.shape, v.shape[d]
    index = f"[{':, ' * d}1:]"
    kind = w.rng.choice(("slice", "select", "cat", "chunk", "pick"))
    if kind == "slice":
        return w.add(n + index, without(s, d, k - 1), v.whole)
    if kind == "select" and len(s) > 1:
        return w.add(f"{n}.select({d}, {w.rng.randrange(k)})", without(s, d), v.whole)
    if kind == "cat" and (u := w.other(s)) is not None and k < 9:
        return w.add(f"torch.cat([{n}, {u.name}], {d})", without(s, d, 2 * k), v.whole and u.whole)
    if kind == "chunk" and k % 2 == 0:
        return w.add(f"{n}.chunk(2, {d})[1]", without(s, d, k // 2), v.whole)
    if kind == "pick":
        return w.add(f"{n}.index_select({d}, torch.tensor([1, 0]))", without(s, d, 2), v.whole)
    return False


def expand(w: Writer, v: Value) -> bool:
    if len(v.shape) > 2 or v.shape[0] != -1:
        return False
    return w.add(f"{v.name}[:, None].expand(B, 2{', -1' * (len(v.shape) - 1)})", (-1, 2, *v.shape[1:]), v.whole)


def lookup(w: Writer, v: Value) -> bool:
    """Indices made of the rows' own values."""
    if not v.batched or not v.whole or len(v.shape) != 2:
        return False
    n, k = v.name, v.shape[1]
    if k == 4 and w.rng.random() < 0.5:
        return w.add(f"F.embedding({n}[:, 0].remainder(5).long(), self.table)", (-1, 4), True)
    kinds = (
        ("{}.gather(1, {}.remainder(K).long())", v.shape),
        ("{}.scatter(1, {}[:, :1].remainder(K).long(), 3.0)", v.shape),
        ("{}[torch.arange(B), {}[:, 0].remainder(K).long()]", (-1,)),
        ("{}.index_put((torch.arange(B), {}[:, 0].remainder(K).long()), {}[:, 0])", v.shape),
        ("{}.take_along_dim({}.argsort(dim=1, stable=True), 1)", v.shape),
        ("{}.scatter_add(1, {}.remainder(K).long(), {})", v.shape),
        ("self.table[{}[:, 0].remainder(5).long()].sum(1)", (-1,)),
    )
    text, shape = w.rng.choice(kinds)
    return w.add(text.replace("{}", n).replace("K", str(k)), shape, True)


def in_place(w: Writer, v: Value) -> bool:
    if len(v.shape) != 2 or v.shape[1] < 2:
        return False
    name = f"t{len(w.lines)}"
    kinds = ["{}[:, 0] = 1.0", "{}[:, 1:].mul_(2)", "{}.add_(1)", "{}.neg_()", "{}[:, 1] += {}[:, 0]"]
    if (u := w.other(v.shape)) is not None and (u.whole or not v.whole):
        kinds += [f"{{}}.add_({u.name})", f"{{}}.copy_({u.name})"]
    w.lines.append(f"{name} = {v.name}.clone()")
    w.lines.append(w.rng.choice(kinds).replace("{}", name))
    return w.add(f"{name} * 1", v.shape, v.whole)


def in_place_rows(w: Writer, v: Value) -> bool:
    if v.shape[:1] != (-1,) or len(v.shape) != 2:
        return False
    name = f"t{len(w.lines)}"
    kinds = ("{}[0] = 1.0", "{}[1:] += 1", "{}[-1].zero_()", "{}[:1].add_(2)", "{}[::2] = 0.0", "{}.cumsum_(0)")
    w.lines.append(f"{name} = {v.name}.clone()")
    w.lines.append(w.rng.choice(kinds).replace("{}", name))
    return w.add(f"{name} * 1", v.shape, v.whole)


def write_argument(w: Writer, v: Value) -> bool:
    if any(line.startswith("y.") for line in w.lines):
        return False
    w.lines.append(w.rng.choice(("y.add_(1)", "y[:, 0].mul_(2)", "y.clamp_(-2, 2)")))
    return w.add("y + 1", (-1, 3, 4), True)


FACTORIES = (
    ("{} + torch.zeros(B, 1)", True),
    ("{} + torch.ones({}.shape)", True),
    ("{} + {}.new_full(({}.shape[0], 1), 3.0)", True),
    ("{} + torch.zeros_like({})", True),
    ("torch.full((B, 1), 2.0) * {}", True),
)
COUNTING = (
    ("{} + torch.arange(B)[:, None]", True),
    ("{} * B", True),
    ("{} + torch.full((B, 1), float(B))", True),
    ("{} / B", False),
    ("{} / B ** 0.5", False),
    ("{} + torch.eye(B)[:, :1]", True),
    ("{} + torch.linspace(0, 1, B)[:, None]", False),
    ("{} + torch.ones(B, 1).cumsum(0)", True),
    ("{}.tril()", True),
    ("torch.where(torch.arange(B)[:, None] < 2, {}, 0.0)", True),
)
NEIGHBOURS = (
    "{} - {}[:1]",
    "{} + {}[-1:]",
    "torch.cat([{}[1:], {}[:1]])",
    "torch.cat([{}[1:] - {}[:-1], {}[:1]])",
    "{}[::2].repeat_interleave(2, 0)[:B]",
    "torch.cat([{}, {}])[:B]",
    "torch.cat([{}, -{}]).view(2, B, K).sum(0)",
    "{}[torch.arange(B).flip(0)]",
    "{}.index_select(0, (torch.arange(B) + 1) % B)",
    "{}.index_add(0, torch.arange(B).flip(0), {})",
    "{} + {}.select(0, 1)",
    "{}.index_put((torch.arange(B).flip(0),), {})",
    "F.pad({}[1:], (0, 0, 0, 1))",
    "({} @ {}.t()).clamp(-9, 9) @ {}",
    "{} @ ({}.t() @ {}).clamp(-9, 9)",
    "torch.einsum('bi,cj->bj', {}, {}).clamp(-9, 9)",
    "torch.einsum('bi,ci->bc', {}, {}).clamp(-9, 9) @ {}",
    "{} + {}.masked_select({} > 0).sum()",
    "{} - {}.mean()",
)


def factory(w: Writer, v: Value) -> bool:
    text, whole = w.rng.choice(FACTORIES)
    return v.batched and len(v.shape) == 2 and w.add(text.replace("{}", v.name), v.shape, v.whole and whole)


def counting(w: Writer, v: Value) -> bool:
    text, whole = w.rng.choice(COUNTING)
    return v.batched and len(v.shape) == 2 and w.add(text.replace("{}", v.name), v.shape, v.whole and whole)


def neighbours(w: Writer, v: Value) -> bool:
    if not v.batched or len(v.shape) != 2:
        return False
    text = w.rng.choice(NEIGHBOURS)
    whole = v.whole and "mean" not in text
    if ">" in text and not v.whole:
        return False
    return w.add(text.replace("{}", v.name).replace("K", str(v.shape[1])), v.shape, whole)


def attention(w: Writer, v: Value) -> bool:
    if len(v.shape) != 3 or v.shape[-1] != 4 or v.shape[0] != -1:
        return False
    kinds = (
        "torch.einsum('bij,bkj->bik', {0}, {0}).softmax(-1) @ {0}",
        "torch.bmm({0}, {0}.transpose(1, 2)).softmax(2) @ {0}",
        "F.scaled_dot_product_attention({0}[:, None], {0}[:, None], {0}[:, None])[:, 0]",
    )
    return w.add(w.rng.choice(kinds).format(v.name), v.shape, False)


def attention_of_batch(w: Writer, v: Value) -> bool:
    if v.shape != (-1, 4):
        return False
    kinds = (
        "F.scaled_dot_product_attention({0}[None], {0}[None], {0}[None])[0]",
        "({0} @ {0}.t()).softmax(-1) @ {0}",
        "F.batch_norm({0}, None, None, training=True)",
        "F.normalize({0} + 20, dim=0)",
        "F.scaled_dot_product_attention({0}[None, None], {0}[None, None], {0}[None, None], is_causal=True)[0, 0]",
    )
    return w.add(w.rng.choice(kinds).format(v.name), v.shape, False)


ROW_WISE: tuple[Statement, ...] = (
    unary,
    unary,
    binary,
    binary,
    weight,
    weight,
    norm,
    reduction(False),
    rows,
    rows,
    columns,
    expand,
    lookup,
    in_place,
    factory,
    attention,
    write_argument,
)
MIXING: tuple[Statement, ...] = (
    reduction(True),
    reduction(True),
    transpose,
    halves,
    in_place_rows,
    counting,
    neighbours,
    neighbours,
    attention_of_batch,
)
