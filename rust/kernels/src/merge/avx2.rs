//! AVX2 and FMA: tiles of 6 rows x 16 columns (12 of the 16 registers hold sums).

use super::Product;
use super::lanes::{add_bf16, add_f16, add_f32, product_of};
use crate::element::Element;

/// Rows that are multiplied together.
pub const ROWS: usize = 6;

const WIDTH: usize = 16;

/// See [`super::scalar::product`].
#[target_feature(enable = "avx2,fma,f16c")]
pub fn product(part: Product, left: &[f32], panels: &[f32], sums: &mut [f32]) {
    match part.rows {
        1 => product_of::<1, WIDTH>(part, left, panels, sums),
        2 => product_of::<2, WIDTH>(part, left, panels, sums),
        3 => product_of::<3, WIDTH>(part, left, panels, sums),
        4 => product_of::<4, WIDTH>(part, left, panels, sums),
        5 => product_of::<5, WIDTH>(part, left, panels, sums),
        _ => product_of::<ROWS, WIDTH>(part, left, panels, sums),
    }
}

/// See [`super::scalar::add`].
#[target_feature(enable = "avx2,fma,f16c")]
pub fn add(base: &[f32], sums: &[f32], to: Element, target: &mut [u8]) -> bool {
    match to {
        Element::F32 => add_f32(base, sums, target),
        Element::F16 => add_f16(base, sums, target),
        Element::Bf16 => add_bf16(base, sums, target),
    }
}
