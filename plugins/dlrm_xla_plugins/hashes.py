"""Hash functions of ids in int32 arithmetic that wraps alike on every device."""

from __future__ import annotations

from torch import Tensor

# Knuth's multiplicative constant, floor(2^32 / golden ratio), as a signed 32-bit number (TAOCP 3, section 6.4).
_GOLDEN = 2654435769 - 2**32
# The second multiplier of MurmurHash3's finalizer (Appleby 2011), signed.
_MURMUR = 0xC2B2AE35 - 2**32


def mixed(ids: Tensor, seed: int = 0) -> Tensor:
    """Well mixed numbers from 0 to 2^31 - 1, int32.

    Seeds are shifts of one function: mixed(i, seed) = mixed(i + seed * 0x3C6EF372 mod 2^31), of period 2^31. So the
    numbers of one seed are those of another at other ids, which a table of fewer rows than lie between the two does not
    have: 56.5 million at the least among 34 seeds, but 6.7 million among 55. Trained checkpoints depend on it.
    """
    # Masked before each shift: torch_xla 2.9 shifts a negative number as if it divided, rounding towards zero.
    x = (ids + seed * 0x3C6EF372 % 2**31) * _GOLDEN
    x = (x.bitwise_and(0x7FFFFFFF) >> 15) ^ x
    x = x * _MURMUR
    return ((x.bitwise_and(0x7FFFFFFF) >> 13) ^ x).bitwise_and(0x7FFFFFFF)


def bucket(ids: Tensor, buckets: int, seed: int = 0) -> Tensor:
    """A bucket from 0 to ``buckets`` - 1 for each id, int32."""
    return mixed(ids, seed) % buckets


def sign(ids: Tensor, seed: int = 0) -> Tensor:
    """+1 or -1 for each id, float32, independent of the bucket of the same seed."""
    return 1.0 - 2.0 * (mixed(ids, seed + 101) >> 30).float()
