"""The least an op can cost, to compute achieved TB/s and TFLOP/s from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The work no implementation of a call can avoid.

    bytes_moved: device-memory traffic in bytes if every input is read once and every output written once. What an
        implementation moves on top of that (partial sums, re-reads) lowers its achieved TB/s.
    flops: floating-point operations; a multiply-add is 2, an exp or rsqrt 1.
    """

    bytes_moved: int
    flops: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes_moved + other.bytes_moved, self.flops + other.flops)
