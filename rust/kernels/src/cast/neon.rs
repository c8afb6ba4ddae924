//! NEON, which every aarch64 CPU has: the loops of `lanes` and `scalar` in plain Rust. Tests compile it on any CPU.

use super::lanes::{self, BLOCK, lost_f16};
use super::scalar;
use crate::element::Element;

/// See [`scalar::widen`].
pub fn widen(from: Element, source: &[u8], target: &mut [f32]) {
    match from {
        Element::F16 => widen_f16(source, target),
        Element::F32 | Element::Bf16 => scalar::widen(from, source, target),
    }
}

/// See [`scalar::narrow`].
pub fn narrow(source: &[f32], to: Element, target: &mut [u8]) -> bool {
    match to {
        Element::F32 => scalar::narrow(source, to, target),
        Element::F16 => narrow_f16(source, target),
        Element::Bf16 => lanes::narrow_bf16(source, target),
    }
}

/// The bits of f32 -> f16, without a branch, in the lower half of 32; see [`crate::element::f32_to_f16`].
#[inline(always)]
pub fn f16_bits(bits: u32) -> u32 {
    let (sign, magnitude) = ((bits >> 16) & 0x8000, bits & 0x7FFF_FFFF);
    let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0x0FFF + ((magnitude >> 13) & 1)) >> 13;
    // At 0.5 the steps of f32 are those of subnormal f16: the addition rounds.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0x3F00_0000);
    let finite = if magnitude < 0x3880_0000 { subnormal } else { normal };
    let large = if magnitude > 0x7F80_0000 { 0x7E00 | ((magnitude >> 13) & 0x03FF) } else { 0x7C00 };
    sign | if magnitude >= 0x4780_0000 { large } else { finite }
}

/// f16 -> f32, without a branch; see [`crate::element::f16_to_f32`].
#[inline(always)]
fn f16_value(half: u16) -> f32 {
    let (sign, magnitude) = (u32::from(half & 0x8000) << 16, u32::from(half & 0x7FFF));
    // The exponent starts 112 lower; the product is exact, for subnormal numbers too.
    let finite = (f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23)).to_bits();
    let quiet = u32::from(magnitude > 0x7C00) << 22;
    f32::from_bits(sign | if magnitude >= 0x7C00 { 0x7F80_0000 | (magnitude << 13) | quiet } else { finite })
}

/// See [`scalar::widen`].
#[inline(always)]
fn widen_f16(source: &[u8], target: &mut [f32]) {
    for (bytes, value) in source.as_chunks::<2>().0.iter().zip(target) {
        *value = f16_value(u16::from_le_bytes(*bytes));
    }
}

/// See [`scalar::narrow`].
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the bits of an f16 fit in 16")]
fn narrow_f16(source: &[f32], target: &mut [u8]) -> bool {
    let (blocks, rest) = source.as_chunks::<BLOCK>();
    let (targets, rest_target) = target.as_chunks_mut::<{ BLOCK * 2 }>();
    let mut lost = [0; BLOCK];
    for (values, bytes) in blocks.iter().zip(targets) {
        for ((value, bytes), lost) in values.iter().zip(bytes.as_chunks_mut::<2>().0).zip(&mut lost) {
            let half = f16_bits(value.to_bits()) as u16;
            *lost |= lost_f16(value.to_bits(), half);
            *bytes = half.to_le_bytes();
        }
    }
    scalar::narrow(rest, Element::F16, rest_target) && lost == [0; BLOCK]
}

#[cfg(test)]
mod tests {
    use super::{f16_bits, f16_value};
    use crate::element::{f16_to_f32, f32_to_f16};

    #[test]
    fn f16_without_branches_is_the_scalar_one() {
        for half in 0..=u16::MAX {
            assert_eq!(f16_value(half).to_bits(), f16_to_f32(half).to_bits(), "{half:#06x}");
        }
        // Each upper half with lower halves around every place where rounding changes its mind.
        for upper in 0..=0xFFFF_u32 {
            for lower in [0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0xFFFF]
            {
                let bits = upper << 16 | lower;
                assert_eq!(f16_bits(bits), u32::from(f32_to_f16(f32::from_bits(bits))), "{bits:#010x}");
            }
        }
    }
}
