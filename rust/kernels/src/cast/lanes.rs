//! The bodies that both x86 levels compile for themselves: branchless loops that the compiler turns into vector code,
//! and the F16C conversions, which loops cannot express.

use std::arch::x86_64::{
    _MM_FROUND_TO_NEAREST_INT, _mm_loadu_si128, _mm_storeu_si128, _mm256_cvtph_ps, _mm256_cvtps_ph, _mm256_loadu_ps,
    _mm256_storeu_ps,
};

use super::scalar;
use crate::element::Element;

/// Values that one F16C instruction converts.
const LANES: usize = 8;

/// Values that the other loops take at a time: the compiler unrolls them into registers, one flag per lane.
pub const BLOCK: usize = 16;

/// See [`scalar::widen`].
#[inline]
#[target_feature(enable = "f16c,avx")]
pub fn widen_f16(source: &[u8], target: &mut [f32]) {
    let (blocks, rest) = source.as_chunks::<{ LANES * 2 }>();
    let (targets, rest_target) = target.as_chunks_mut::<LANES>();
    for (block, values) in blocks.iter().zip(targets) {
        // SAFETY: `block` is 16 readable bytes, `values` 32 writable ones; both instructions allow any alignment.
        unsafe { _mm256_storeu_ps(values.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(block.as_ptr().cast()))) };
    }
    scalar::widen(Element::F16, rest, rest_target);
}

/// The f16 bits of eight values, nearest, ties to even.
#[inline]
#[target_feature(enable = "f16c,avx")]
pub fn f16_bits(values: &[f32; LANES]) -> [u8; LANES * 2] {
    let mut bytes = [0; LANES * 2];
    // SAFETY: `values` is 32 readable bytes, `bytes` 16 writable ones; both instructions allow any alignment.
    unsafe {
        let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(values.as_ptr()));
        _mm_storeu_si128(bytes.as_mut_ptr().cast(), halves);
    }
    bytes
}

/// See [`scalar::narrow`].
#[inline]
#[target_feature(enable = "f16c,avx")]
pub fn narrow_f16(source: &[f32], target: &mut [u8]) -> bool {
    let (blocks, rest) = source.as_chunks::<LANES>();
    let (targets, rest_target) = target.as_chunks_mut::<{ LANES * 2 }>();
    let mut lost = 0;
    for (values, bytes) in blocks.iter().zip(targets) {
        *bytes = f16_bits(values);
        for (value, half) in values.iter().zip(bytes.as_chunks::<2>().0) {
            lost |= lost_f16(value.to_bits(), u16::from_le_bytes(*half));
        }
    }
    scalar::narrow(rest, Element::F16, rest_target) && lost == 0
}

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
