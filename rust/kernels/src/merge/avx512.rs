//! AVX-512: tiles of 8 rows x 32 columns (16 of the 32 registers hold sums).

use super::lanes::{add_bf16, add_f16, add_f32, product_of};
use super::{MOST_ROWS, Product};
use crate::element::Element;

const WIDTH: usize = 32;

/// See [`super::scalar::product`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub fn product(part: Product, left: &[f32], panels: &[f32], sums: &mut [f32]) {
    match part.rows {
        1 => product_of::<1, WIDTH>(part, left, panels, sums),
        2 => product_of::<2, WIDTH>(part, left, panels, sums),
        3 => product_of::<3, WIDTH>(part, left, panels, sums),
        4 => product_of::<4, WIDTH>(part, left, panels, sums),
        5 => product_of::<5, WIDTH>(part, left, panels, sums),
        6 => product_of::<6, WIDTH>(part, left, panels, sums),
        7 => product_of::<7, WIDTH>(part, left, panels, sums),
        _ => product_of::<MOST_ROWS, WIDTH>(part, left, panels, sums),
    }
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
