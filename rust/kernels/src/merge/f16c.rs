//! The sum in f16, by the conversions of F16C, which both x86 levels have.

use super::lanes::sum_or_base;
use crate::cast::f16c::{LANES, f16_bits};
use crate::cast::lanes::lost_f16;
use crate::element::Element;

/// See [`super::scalar::add`].
#[inline]
#[target_feature(enable = "f16c,avx")]
pub fn add_f16(base: &[f32], sums: &[f32], target: &mut [u8]) -> bool {
    let (bases, base_rest) = base.as_chunks::<LANES>();
    let (sum_blocks, sums_rest) = sums.as_chunks::<LANES>();
    let (targets, target_rest) = target.as_chunks_mut::<{ LANES * 2 }>();
    let mut lost = 0;
    for ((base, sums), bytes) in bases.iter().zip(sum_blocks).zip(targets) {
        let mut merged = [0.0; LANES];
        for lane in 0..LANES {
            merged[lane] = sum_or_base(base[lane], sums[lane]);
        }
        *bytes = f16_bits(&merged);
        for (base, half) in base.iter().zip(bytes.as_chunks::<2>().0) {
            lost |= lost_f16(base.to_bits(), u16::from_le_bytes(*half));
        }
    }
    super::scalar::add(base_rest, sums_rest, Element::F16, target_rest) && lost == 0
}
