//! The specification: one value after the other.

use crate::element::{Element, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16, is_finite};

/// Widens each value of `source` into `target`.
#[inline(always)]
pub fn widen(from: Element, source: &[u8], target: &mut [f32]) {
    match from {
        Element::F32 => {
            for (bytes, value) in source.as_chunks::<4>().0.iter().zip(target) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        Element::F16 => {
            for (bytes, value) in source.as_chunks::<2>().0.iter().zip(target) {
                *value = f16_to_f32(u16::from_le_bytes(*bytes));
            }
        }
        Element::Bf16 => {
            for (bytes, value) in source.as_chunks::<2>().0.iter().zip(target) {
                *value = bf16_to_f32(u16::from_le_bytes(*bytes));
            }
        }
    }
}

/// Narrows each value of `source` into `target`; whether every finite value stayed finite.
#[inline(always)]
pub fn narrow(source: &[f32], to: Element, target: &mut [u8]) -> bool {
    let mut kept = true;
    match to {
        Element::F32 => {
            for (value, bytes) in source.iter().zip(target.as_chunks_mut::<4>().0) {
                *bytes = value.to_le_bytes();
            }
        }
        Element::F16 => {
            for (value, bytes) in source.iter().zip(target.as_chunks_mut::<2>().0) {
                let bits = f32_to_f16(*value);
                kept &= bits & 0x7C00 != 0x7C00 || !is_finite(value.to_bits());
                *bytes = bits.to_le_bytes();
            }
        }
        Element::Bf16 => {
            for (value, bytes) in source.iter().zip(target.as_chunks_mut::<2>().0) {
                let bits = f32_to_bf16(*value);
                kept &= bits & 0x7F80 != 0x7F80 || !is_finite(value.to_bits());
                *bytes = bits.to_le_bytes();
            }
        }
    }
    kept
}
