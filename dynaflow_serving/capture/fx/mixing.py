"""Operators that keep the shape of a tensor, but mix its elements along some dimensions.

Contract
- A split is wrong if the token axis is one of these dimensions. `axes` refuses the graph then, by name.
- The shapes of all other operators tell whether they mix tokens (`axes`).
- Names are those of ATen operators and of torch functions, without a trailing underscore.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch import fx


class Mixing(abc.ABC):
    """How to find the dimensions along which an operator mixes."""

    @abc.abstractmethod
    def dims(self, node: fx.Node, source: torch.Tensor) -> list[int]:
        """Return the dimensions of `source`, the first argument, along which `node` mixes. They may be negative."""


@dataclass(frozen=True)
class AlongArgument(Mixing):
    """The operator mixes along the dimensions that its argument `dim` or `dims` names."""

    position: int  # of that argument
    default: int | None  # where the argument is missing; None: all dimensions
    variadic: bool = False  # whether every argument from the position on is a dimension

    def dims(self, node: fx.Node, source: torch.Tensor) -> list[int]:
        positional = node.args[self.position :] if self.variadic else node.args[self.position : self.position + 1]
        given = pytree.tree_leaves(positional or node.kwargs.get("dim", node.kwargs.get("dims", self.default)))
        if given in ([], [None]):
            return list(range(source.dim()))
        return [d for d in given if isinstance(d, int)]


@dataclass(frozen=True)
class Along(Mixing):
    """The operator mixes along one fixed dimension."""

    dim: int

    def dims(self, node: fx.Node, source: torch.Tensor) -> list[int]:
        return [self.dim]


@dataclass(frozen=True)
class AlongLast(Mixing):
    """The operator mixes along the last dimensions."""

    count: int

    def dims(self, node: fx.Node, source: torch.Tensor) -> list[int]:
        return list(range(max(0, source.dim() - self.count), source.dim()))


@dataclass(frozen=True)
class AlongFrom(Mixing):
    """The operator mixes along a dimension and all after it: those before are batch and channels."""

    first: int

    def dims(self, node: fx.Node, source: torch.Tensor) -> list[int]:
        return list(range(self.first, source.dim()))


@dataclass(frozen=True)
class AlongNormalizedShape(Mixing):
    """The operator mixes along as many last dimensions as its second argument has sizes."""

    def dims(self, node: fx.Node, source: torch.Tensor) -> list[int]:
        count = len(pytree.tree_leaves(node.args[1])) if len(node.args) > 1 else 0
        return list(range(source.dim() - count, source.dim()))


# Along the dimension, each operator does what the comment says.
MIXING: dict[str, Mixing] = {
    "softmax": AlongArgument(1, default=-1),  # divides by a sum of exponentials
    "_softmax": AlongArgument(1, default=-1),  # the same
    "log_softmax": AlongArgument(1, default=-1),  # subtracts the logarithm of that sum
    "_log_softmax": AlongArgument(1, default=-1),  # the same
    "softmin": AlongArgument(1, default=-1),  # softmax of the negated input
    "glu": AlongArgument(1, default=-1),  # multiplies one half with a gate from the other
    "cumsum": AlongArgument(1, default=0),  # sums all elements before
    "cumprod": AlongArgument(1, default=0),  # multiplies all elements before
    "cummax": AlongArgument(1, default=0),  # takes the greatest element before
    "cummin": AlongArgument(1, default=0),  # takes the least element before
    "logcumsumexp": AlongArgument(1, default=0),  # sums exponentials of all elements before
    "sort": AlongArgument(1, default=-1),  # reorders by value
    "argsort": AlongArgument(1, default=-1),  # gives the positions of that order
    "msort": Along(0),  # reorders by value
    "topk": AlongArgument(2, default=-1),  # takes the greatest elements
    "flip": AlongArgument(1, default=None, variadic=True),  # reverses the order
    "fliplr": Along(1),  # reverses the order
    "flipud": Along(0),  # reverses the order
    "roll": AlongArgument(2, default=None),  # rotates the order
    "index_select": AlongArgument(1, default=0),  # picks positions
    "gather": AlongArgument(1, default=0),  # picks a position per element
    "take_along_dim": AlongArgument(2, default=None),  # picks a position per element
    "scatter": AlongArgument(1, default=0),  # writes to positions
    "scatter_add": AlongArgument(1, default=0),  # adds to positions
    "scatter_reduce": AlongArgument(1, default=0),  # combines at positions
    "index_add": AlongArgument(1, default=0),  # adds to positions
    "index_copy": AlongArgument(1, default=0),  # writes to positions
    "index_fill": AlongArgument(1, default=0),  # writes one number to positions
    "renorm": AlongArgument(2, default=None),  # limits the norm of each slice
    "fft_fft": AlongArgument(2, default=-1),  # sums all elements with phases
    "fft_ifft": AlongArgument(2, default=-1),  # sums all elements with phases
    "normalize": AlongArgument(2, default=1),  # divides by a norm
    "triu": AlongLast(2),  # zeroes by the position in a matrix
    "tril": AlongLast(2),  # zeroes by the position in a matrix
    "scaled_dot_product_attention": AlongLast(2),  # weights positions of a sequence, sums features
    "group_norm": AlongFrom(1),  # divides by statistics of a group of channels
    "instance_norm": AlongFrom(1),  # divides by statistics of a channel
    "conv1d": AlongFrom(2),  # sums neighbours
    "conv2d": AlongFrom(2),  # sums neighbours
    "conv3d": AlongFrom(2),  # sums neighbours
    "convolution": AlongFrom(2),  # sums neighbours
    "interpolate": AlongFrom(2),  # averages neighbours
    "avg_pool1d": AlongFrom(2),  # averages neighbours
    "avg_pool2d": AlongFrom(2),  # averages neighbours
    "max_pool1d": AlongFrom(2),  # takes the greatest neighbour
    "max_pool2d": AlongFrom(2),  # takes the greatest neighbour
    "layer_norm": AlongNormalizedShape(),  # divides by statistics
    "rms_norm": AlongNormalizedShape(),  # divides by the root of the mean square
}


def mixed_dims(node: fx.Node, names: set[str], source: torch.Tensor) -> set[int]:
    """Return the dimensions of `source`, from 0 on, along which `node` mixes.

    Args:
        node: a call.
        names: all names that the call goes by.
        source: the fake value of its first argument.
    """
    rank = source.dim()
    dims = [d for name in names & MIXING.keys() for d in MIXING[name].dims(node, source)]
    return {d % rank for d in dims if -rank <= d < rank}
