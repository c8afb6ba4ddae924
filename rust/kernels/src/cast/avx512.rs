//! AVX-512: the loops of `lanes` and `scalar`, compiled for this level.

use super::{f16c, lanes, scalar};
use crate::element::Element;

/// See [`scalar::widen`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub fn widen(from: Element, source: &[u8], target: &mut [f32]) {
    match from {
        Element::F16 => f16c::widen_f16(source, target),
        Element::F32 | Element::Bf16 => scalar::widen(from, source, target),
    }
}

/// See [`scalar::narrow`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub fn narrow(source: &[f32], to: Element, target: &mut [u8]) -> bool {
    match to {
        Element::F32 => scalar::narrow(source, to, target),
        Element::F16 => f16c::narrow_f16(source, target),
        Element::Bf16 => lanes::narrow_bf16(source, target),
    }
}
