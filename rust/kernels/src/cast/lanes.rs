//! The bodies that several levels compile for themselves: branchless loops in plain Rust that the compiler turns into
//! vector code. F16C, which loops cannot express, is `f16c`.

use super::scalar;
use crate::element::Element;

/// Values that the loops take at a time: the compiler unrolls them into registers, one flag per lane.
pub const BLOCK: usize = 16;

/// 1 where the f32 with bits `wide` is finite and its f16 `half` is not, else 0.
#[inline(always)]
pub fn lost_f16(wide: u32, half: u16) -> u32 {
    u32::from(half & 0x7C00 == 0x7C00) & u32::from(wide & 0x7F80_0000 != 0x7F80_0000)
}

/// The bits of f32 -> bf16, without a branch, in the lower half of 32.
#[inline(always)]
pub fn bf16_bits(bits: u32) -> u32 {
    let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x0040;
    if bits & 0x7FFF_FFFF > 0x7F80_0000 { quiet } else { rounded }
}

/// 1 where the f32 with bits `wide` is finite and its bf16 `half` is not, else 0.
#[inline(always)]
pub fn lost_bf16(wide: u32, half: u32) -> u32 {
    u32::from(half & 0x7F80 == 0x7F80) & u32::from(wide & 0x7F80_0000 != 0x7F80_0000)
}

/// See [`scalar::narrow`].
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the bits of a bf16 fit in 16")]
pub fn narrow_bf16(source: &[f32], target: &mut [u8]) -> bool {
    let (blocks, rest) = source.as_chunks::<BLOCK>();
    let (targets, rest_target) = target.as_chunks_mut::<{ BLOCK * 2 }>();
    let mut lost = [0; BLOCK];
    for (values, bytes) in blocks.iter().zip(targets) {
        for ((value, bytes), lost) in values.iter().zip(bytes.as_chunks_mut::<2>().0).zip(&mut lost) {
            let half = bf16_bits(value.to_bits());
            *lost |= lost_bf16(value.to_bits(), half);
            *bytes = (half as u16).to_le_bytes();
        }
    }
    scalar::narrow(rest, Element::Bf16, rest_target) && lost == [0; BLOCK]
}
