"""Exact arithmetic and one rounding, as IEEE 754 defines it: an oracle that shares no code."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import inf, isinf, isnan, nan


@dataclass(frozen=True)
class Format:
    """A binary floating-point format with infinities."""

    exponent_bits: int
    mantissa_bits: int

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    def decode(self, bits: int) -> Fraction | float:
        """The value of a number's bits; infinities and NaN as floats."""
        mantissa = bits & ((1 << self.mantissa_bits) - 1)
        exponent = bits >> self.mantissa_bits & ((1 << self.exponent_bits) - 1)
        sign = -1 if bits >> (self.bits - 1) else 1
        if exponent == (1 << self.exponent_bits) - 1:
            return nan if mantissa else sign * inf
        if exponent:
            mantissa += 1 << self.mantissa_bits
        scale = max(exponent, 1) - self.bias - self.mantissa_bits
        return sign * mantissa * Fraction(2) ** scale

    def round(self, value: Fraction, mode: str = "rn", negative_zero: bool = False) -> int:
        """The bits of the number that `value` rounds to: rn, rna, rz, rm or rp."""
        negative = value < 0 or (value == 0 and negative_zero)
        sign = int(negative) << (self.bits - 1)
        magnitude = abs(value)
        if magnitude == 0:
            return sign
        exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
        if Fraction(2) ** exponent > magnitude:
            exponent -= 1
        exponent = max(exponent, 1 - self.bias)
        steps = magnitude / Fraction(2) ** (exponent - self.mantissa_bits)
        whole, rest = int(steps), steps - int(steps)
        up = {
            "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1),
            "rna": rest >= Fraction(1, 2),
            "rz": False,
            "rm": rest > 0 and negative,
            "rp": rest > 0 and not negative,
        }[mode]
        whole += up
        encoded = ((exponent + self.bias - 1) << self.mantissa_bits) + whole
        infinity = ((1 << self.exponent_bits) - 1) << self.mantissa_bits
        if encoded >= infinity:
            away = mode in ("rn", "rna", "rm" if negative else "rp")
            encoded = infinity if away else infinity - 1
        return sign | encoded


F16 = Format(5, 10)
BF16 = Format(8, 7)
TF32 = Format(8, 10)
F32 = Format(8, 23)


def is_special(value: Fraction | float) -> bool:
    return isinstance(value, float) and (isinf(value) or isnan(value))
