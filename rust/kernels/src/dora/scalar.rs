//! The specification, in loops that each level compiles for itself: they vectorise as they are.

use super::LANES;
use crate::element::is_finite;

/// Values of the rest of a row that are squared before they are added.
const GROUP: usize = 4;

/// The sum of the squares of each row of `columns` values.
#[inline(always)]
pub fn square_sums(columns: usize, values: &[[u8; 4]], sums: &mut [f32]) {
    for (row, sum) in values.chunks_exact(columns).zip(sums) {
        let (blocks, rest) = row.as_chunks::<LANES>();
        let mut partial = [0.0; LANES];
        for block in blocks {
            for lane in 0..LANES {
                let value = f32::from_le_bytes(block[lane]);
                partial[lane] += value * value;
            }
        }
        *sum = total(&partial, rest);
    }
}

/// The partial sums in order, then the squares of the fewer than 8 values that end a row.
///
/// The last ones (fewer than four) are fused with their addition: so does torch on CPUs with FMA.
#[inline(always)]
pub fn total(partial: &[f32; LANES], rest: &[[u8; 4]]) -> f32 {
    let mut sum = 0.0;
    for lane in partial {
        sum += lane;
    }
    let (group, last) = rest.split_at(rest.len() / GROUP * GROUP);
    for bytes in group {
        let value = f32::from_le_bytes(*bytes);
        sum += value * value;
    }
    for bytes in last {
        let value = f32::from_le_bytes(*bytes);
        sum = value.mul_add(value, sum);
    }
    sum
}

/// Adds the square of each value to the sum of its column; the square is rounded before.
#[inline(always)]
pub fn add_squares(row: &[[u8; 4]], sums: &mut [f32]) {
    for (bytes, sum) in row.iter().zip(sums) {
        let value = f32::from_le_bytes(*bytes);
        *sum += value * value;
    }
}

/// `products = values * factors`; whether all of them are finite.
#[inline(always)]
pub fn multiply(values: &[[u8; 4]], factors: &[f32], products: &mut [f32]) -> bool {
    let mut finite = true;
    for ((bytes, factor), product) in values.iter().zip(factors).zip(products) {
        *product = f32::from_le_bytes(*bytes) * factor;
        finite &= is_finite(product.to_bits());
    }
    finite
}
