//! AVX-512: tiles of 6 rows x 32 columns, 12 registers of sums.

use super::Product;
use super::f16c::add_f16;
use super::lanes::{self, add_bf16, add_f32};
use crate::element::Element;

/// Columns of a tile: two registers.
const WIDTH: usize = 32;

/// See [`super::scalar::product`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub fn product(part: Product, left: &[f32], panels: &[f32], sums: &mut [f32]) {
    lanes::product::<WIDTH>(part, left, panels, sums);
}

/// See [`super::scalar::add`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub fn add(base: &[f32], sums: &[f32], to: Element, target: &mut [u8]) -> bool {
    match to {
        Element::F32 => add_f32(base, sums, target),
        Element::F16 => add_f16(base, sums, target),
        Element::Bf16 => add_bf16(base, sums, target),
    }
}
