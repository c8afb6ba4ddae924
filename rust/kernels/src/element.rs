//! The three kinds of number that weights are made of, and how one of them becomes another.
//!
//! 16-bit values widen to f32 without loss. f32 narrows with round to nearest, ties to even. A NaN keeps its sign and
//! the upper bits of its payload and becomes quiet, which is what the CPU's own F16C conversion does.

/// A floating-point dtype with arithmetic; little-endian in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
}

impl Element {
    /// Every element.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Size of one value in bytes.
    #[must_use]
    pub fn size_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

const F32_EXPONENT: u32 = 0x7F80_0000;
const F32_MAGNITUDE: u32 = 0x7FFF_FFFF;

/// Whether the f32 with these bits is neither infinite nor NaN.
#[must_use]
#[inline(always)]
pub fn is_finite(bits: u32) -> bool {
    bits & F32_EXPONENT != F32_EXPONENT
}

/// bf16 to f32, exactly (a NaN keeps all its bits).
#[must_use]
#[inline(always)]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// f32 to bf16: nearest, ties to even.
#[must_use]
#[inline(always)]
pub fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if bits & F32_MAGNITUDE > F32_EXPONENT {
        return (bits >> 16) as u16 | 0x0040;
    }
    (bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16) as u16
}

/// f16 to f32, exactly (a NaN becomes quiet).
#[must_use]
pub fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let exponent = u32::from(bits >> 10) & 0x1F;
    let fraction = u32::from(bits & 0x03FF);
    match (exponent, fraction) {
        // Zero and subnormal: fraction * 2^-24, exact in f32.
        (0, _) => {
            #[expect(clippy::cast_precision_loss, reason = "ten bits fit in the 24 of f32")]
            let magnitude = fraction as f32 * (1.0 / 16_777_216.0);
            f32::from_bits(sign | magnitude.to_bits())
        }
        (0x1F, 0) => f32::from_bits(sign | F32_EXPONENT),
        (0x1F, _) => f32::from_bits(sign | F32_EXPONENT | 0x0040_0000 | (fraction << 13)),
        _ => f32::from_bits(sign | ((exponent + 112) << 23) | (fraction << 13)),
    }
}

/// f32 to f16: nearest, ties to even; too large becomes infinite.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "each part is masked to its place in 16 bits")]
pub fn f32_to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16) as u16 & 0x8000;
    let magnitude = bits & F32_MAGNITUDE;
    if magnitude > F32_EXPONENT {
        return sign | 0x7E00 | (magnitude >> 13) as u16 & 0x03FF;
    }
    if magnitude >= 0x4780_0000 {
        return sign | 0x7C00; // 65536 and more
    }
    if magnitude >= 0x3880_0000 {
        // Normal in f16 (2^-14 and more): rebias; a carry out of the fraction is the right next exponent, or infinity.
        let rounded = magnitude - (112 << 23) + 0x0FFF + ((magnitude >> 13) & 1);
        return sign | (rounded >> 13) as u16;
    }
    if magnitude < 0x3300_0000 {
        return sign; // below half of the least subnormal
    }
    // Subnormal in f16: the fraction in units of 2^-24, shifted out with its remainder.
    let fraction = (magnitude & 0x007F_FFFF) | 0x0080_0000;
    let shift = 126 - (magnitude >> 23);
    let kept = fraction >> shift;
    let remainder = fraction & ((1 << shift) - 1);
    let half = 1 << (shift - 1);
    let up = remainder > half || (remainder == half && kept & 1 == 1);
    sign | (kept + u32::from(up)) as u16
}

/// f64 to an f32 that rounds on to f16 or bf16 as the f64 itself would: an inexact result gets an odd last bit.
///
/// # Source
/// Boldo, Melquiond: Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd (2008).
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the loss is what is looked at")]
pub fn f64_to_f32_odd(value: f64) -> f32 {
    let near = value as f32;
    let back = f64::from(near);
    #[expect(clippy::float_cmp, reason = "exactness is the question")]
    if value.is_nan() || back == value {
        return near;
    }
    let bits = near.to_bits();
    if bits & 1 == 1 {
        return near;
    }
    // `near` is even and wrong: its odd neighbour on the other side of `value` is the answer.
    f32::from_bits(if back.abs() > value.abs() { bits - 1 } else { bits + 1 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_widens_as_the_half_crate_says() {
        for bits in 0..=u16::MAX {
            assert_eq!(f16_to_f32(bits).to_bits(), half::f16::from_bits(bits).to_f32().to_bits(), "{bits:#06x}");
        }
    }

    #[test]
    fn every_bf16_widens_as_the_half_crate_says() {
        for bits in 0..=u16::MAX {
            let ours = bf16_to_f32(bits);
            let theirs = half::bf16::from_bits(bits).to_f32();
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{bits:#06x}");
        }
    }

    /// f32 patterns around every place where rounding changes its mind: each upper half with critical lower halves.
    fn critical_patterns() -> impl Iterator<Item = u32> {
        const LOWER: [u32; 14] =
            [0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF];
        (0..=0xFFFF_u32).flat_map(|upper| LOWER.into_iter().map(move |lower| upper << 16 | lower))
    }

    #[test]
    fn narrowing_agrees_with_the_half_crate() {
        for bits in critical_patterns() {
            let value = f32::from_bits(bits);
            assert_eq!(f32_to_bf16(value), half::bf16::from_f32(value).to_bits(), "bf16 of {bits:#010x}");
            assert_eq!(f32_to_f16(value), half::f16::from_f32(value).to_bits(), "f16 of {bits:#010x}");
        }
    }

    #[test]
    fn f64_rounds_once_where_two_roundings_differ() {
        // 1 + 2^-8 is the middle between two bf16; a little more must go up, though f32 drops the little more.
        let value = 1.0 + 2f64.powi(-8) + 2f64.powi(-40);
        assert_eq!(f32_to_bf16(f64_to_f32_odd(value)), 0x3F81);
        #[expect(clippy::cast_possible_truncation, reason = "shows the trap")]
        let twice = value as f32;
        assert_eq!(f32_to_bf16(twice), 0x3F80);
    }

    #[test]
    fn f64_too_large_for_f32_stays_large() {
        assert_eq!(f32_to_bf16(f64_to_f32_odd(1e300)), 0x7F80);
        assert_eq!(f32_to_f16(f64_to_f32_odd(-1e300)), 0xFC00);
        assert_eq!(f64_to_f32_odd(1e-300).to_bits(), 1);
        assert_eq!(f64_to_f32_odd(f64::INFINITY).to_bits(), f32::INFINITY.to_bits());
    }
}
