//! The conversions of F16C, 8 values each, which both x86 levels have.

use std::arch::x86_64::{
    _MM_FROUND_TO_NEAREST_INT, _mm_loadu_si128, _mm_storeu_si128, _mm256_cvtph_ps, _mm256_cvtps_ph, _mm256_loadu_ps,
    _mm256_storeu_ps,
};

use super::lanes::lost_f16;
use super::scalar;
use crate::element::Element;

/// Values that one instruction converts.
pub const LANES: usize = 8;

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
