//! NEON, which every aarch64 CPU has: tiles of 6 rows x 16 columns, 24 of 32 registers of sums, in plain Rust. Tests
//! compile it on any CPU.

use super::Product;
use super::lanes::{self, add_bf16, add_f32, sum_or_base};
use crate::cast::lanes::{BLOCK, lost_f16};
use crate::cast::neon::f16_bits;
use crate::element::Element;

/// Columns of a tile: four registers.
const WIDTH: usize = 16;

/// See [`super::scalar::product`].
pub fn product(part: Product, left: &[f32], panels: &[f32], sums: &mut [f32]) {
    lanes::product::<WIDTH>(part, left, panels, sums);
}

/// See [`super::scalar::add`].
pub fn add(base: &[f32], sums: &[f32], to: Element, target: &mut [u8]) -> bool {
    match to {
        Element::F32 => add_f32(base, sums, target),
        Element::F16 => add_f16(base, sums, target),
        Element::Bf16 => add_bf16(base, sums, target),
    }
}

/// See [`super::scalar::add`].
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the bits of an f16 fit in 16")]
fn add_f16(base: &[f32], sums: &[f32], target: &mut [u8]) -> bool {
    let (bases, base_rest) = base.as_chunks::<BLOCK>();
    let (sum_blocks, sums_rest) = sums.as_chunks::<BLOCK>();
    let (targets, target_rest) = target.as_chunks_mut::<{ BLOCK * 2 }>();
    let mut lost = [0; BLOCK];
    for ((base, sums), bytes) in bases.iter().zip(sum_blocks).zip(targets) {
        let bytes = bytes.as_chunks_mut::<2>().0;
        for lane in 0..BLOCK {
            let half = f16_bits(sum_or_base(base[lane], sums[lane]).to_bits()) as u16;
            lost[lane] |= lost_f16(base[lane].to_bits(), half);
            bytes[lane] = half.to_le_bytes();
        }
    }
    super::scalar::add(base_rest, sums_rest, Element::F16, target_rest) && lost == [0; BLOCK]
}
