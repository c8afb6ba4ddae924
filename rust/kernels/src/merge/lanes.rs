//! The bodies that several levels compile for themselves. The compiler keeps the sums of a small tile (rows x width)
//! in vector registers; each sum still runs over the rank in the scalar order, so the bits are those of `scalar`.

use super::{MOST_COLUMNS, PANEL, Product, ROWS};
use crate::cast::lanes::{BLOCK, bf16_bits, lost_bf16};
use crate::element::{Element, is_finite};

/// The product, `WIDTH` columns at a time; `WIDTH` divides the panel.
///
/// With 6 rows the sums fill 12 registers and each step of the rank keeps both multipliers busy; with 8 rows of AVX-512
/// the compiler spills them to the stack (rustc 1.95).
#[inline(always)]
pub fn product<const WIDTH: usize>(part: Product, left: &[f32], panels: &[f32], sums: &mut [f32]) {
    match part.rows {
        1 => product_of::<1, WIDTH>(part, left, panels, sums),
        2 => product_of::<2, WIDTH>(part, left, panels, sums),
        3 => product_of::<3, WIDTH>(part, left, panels, sums),
        4 => product_of::<4, WIDTH>(part, left, panels, sums),
        5 => product_of::<5, WIDTH>(part, left, panels, sums),
        _ => product_of::<ROWS, WIDTH>(part, left, panels, sums),
    }
}

/// The product for exactly `ROWS` rows.
#[inline(always)]
fn product_of<const ROWS: usize, const WIDTH: usize>(part: Product, left: &[f32], panels: &[f32], sums: &mut [f32]) {
    let left = left.as_chunks::<ROWS>().0;
    for (index, panel) in panels.chunks_exact(part.rank * PANEL).enumerate() {
        let panel = panel.as_chunks::<PANEL>().0;
        for first in (0..PANEL).step_by(WIDTH) {
            let tile = tile::<ROWS, WIDTH>(left, panel, first);
            for (row, tile_row) in tile.iter().enumerate() {
                let places = &mut sums[row * MOST_COLUMNS + index * PANEL + first..][..WIDTH];
                if part.add {
                    for (place, sum) in places.iter_mut().zip(tile_row) {
                        *place += sum * part.scale;
                    }
                } else {
                    for (place, sum) in places.iter_mut().zip(tile_row) {
                        *place = sum * part.scale;
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn tile<const ROWS: usize, const WIDTH: usize>(
    left: &[[f32; ROWS]],
    panel: &[[f32; PANEL]],
    first: usize,
) -> [[f32; WIDTH]; ROWS] {
    let mut sums = [[0.0_f32; WIDTH]; ROWS];
    for (left, right) in left.iter().zip(panel) {
        let right = &right[first..first + WIDTH];
        for row in 0..ROWS {
            for column in 0..WIDTH {
                sums[row][column] = left[row].mul_add(right[column], sums[row][column]);
            }
        }
    }
    sums
}

/// See [`super::scalar::add`].
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the bits of a bf16 fit in 16")]
pub fn add_bf16(base: &[f32], sums: &[f32], target: &mut [u8]) -> bool {
    let (bases, base_rest) = base.as_chunks::<BLOCK>();
    let (sum_blocks, sums_rest) = sums.as_chunks::<BLOCK>();
    let (targets, target_rest) = target.as_chunks_mut::<{ BLOCK * 2 }>();
    let mut lost = [0; BLOCK];
    for ((base, sums), bytes) in bases.iter().zip(sum_blocks).zip(targets) {
        let bytes = bytes.as_chunks_mut::<2>().0;
        for lane in 0..BLOCK {
            let half = bf16_bits(sum_or_base(base[lane], sums[lane]).to_bits());
            lost[lane] |= lost_bf16(base[lane].to_bits(), half);
            bytes[lane] = (half as u16).to_le_bytes();
        }
    }
    super::scalar::add(base_rest, sums_rest, Element::Bf16, target_rest) && lost == [0; BLOCK]
}

/// See [`super::scalar::add`].
#[inline(always)]
pub fn add_f32(base: &[f32], sums: &[f32], target: &mut [u8]) -> bool {
    let (bases, base_rest) = base.as_chunks::<BLOCK>();
    let (sum_blocks, sums_rest) = sums.as_chunks::<BLOCK>();
    let (targets, target_rest) = target.as_chunks_mut::<{ BLOCK * 4 }>();
    let mut lost = [0; BLOCK];
    for ((base, sums), bytes) in bases.iter().zip(sum_blocks).zip(targets) {
        let bytes = bytes.as_chunks_mut::<4>().0;
        for lane in 0..BLOCK {
            let merged = sum_or_base(base[lane], sums[lane]);
            lost[lane] |= u32::from(is_finite(base[lane].to_bits())) & u32::from(!is_finite(merged.to_bits()));
            bytes[lane] = merged.to_le_bytes();
        }
    }
    super::scalar::add(base_rest, sums_rest, Element::F32, target_rest) && lost == [0; BLOCK]
}

/// The sum, or a base that is not finite.
#[inline(always)]
pub fn sum_or_base(base: f32, sum: f32) -> f32 {
    let merged = base + sum;
    if is_finite(base.to_bits()) { merged } else { base }
}
