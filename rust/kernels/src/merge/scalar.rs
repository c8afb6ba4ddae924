//! The specification: one value after the other.

use super::{MOST_COLUMNS, PANEL, Product};
use crate::element::{Element, f32_to_bf16, f32_to_f16, is_finite};

/// `sums[row][column] = scale * sum over k in order of left[k][row] * panel[k][column]`, or that added to it.
pub fn product(part: Product, left: &[f32], panels: &[f32], sums: &mut [f32]) {
    for (index, panel) in panels.chunks_exact(part.rank * PANEL).enumerate() {
        for row in 0..part.rows {
            for column in 0..PANEL {
                let mut sum = 0.0_f32;
                for k in 0..part.rank {
                    sum = left[k * part.rows + row].mul_add(panel[k * PANEL + column], sum);
                }
                let scaled = sum * part.scale;
                let place = &mut sums[row * MOST_COLUMNS + index * PANEL + column];
                *place = if part.add { *place + scaled } else { scaled };
            }
        }
    }
}

/// `target = round(base + sum)`; a base that is not finite stays. Whether every finite base value stayed finite.
pub fn add(base: &[f32], sums: &[f32], to: Element, target: &mut [u8]) -> bool {
    let mut kept = true;
    for ((base, sum), bytes) in base.iter().zip(sums).zip(target.chunks_exact_mut(to.size_bytes())) {
        let base_is_finite = is_finite(base.to_bits());
        let merged = if base_is_finite { base + sum } else { *base };
        let merged_is_finite = match to {
            Element::F32 => {
                bytes.copy_from_slice(&merged.to_le_bytes());
                is_finite(merged.to_bits())
            }
            Element::F16 => {
                let half = f32_to_f16(merged);
                bytes.copy_from_slice(&half.to_le_bytes());
                half & 0x7C00 != 0x7C00
            }
            Element::Bf16 => {
                let half = f32_to_bf16(merged);
                bytes.copy_from_slice(&half.to_le_bytes());
                half & 0x7F80 != 0x7F80
            }
        };
        kept &= merged_is_finite || !base_is_finite;
    }
    kept
}
