//! Whether weights hold a value that is infinite or undefined.

use crate::element::Element;

/// Whether every value is finite; `bytes` are values of `element`, little-endian. Bytes after the last whole value are
/// not looked at.
#[must_use]
pub fn all_finite(element: Element, bytes: &[u8]) -> bool {
    match element {
        Element::F32 => none_has(bytes, 0x7F80_0000, |value: [u8; 4]| u32::from_le_bytes(value)),
        Element::F16 => none_has(bytes, 0x7C00, |value: [u8; 2]| u16::from_le_bytes(value)),
        Element::Bf16 => none_has(bytes, 0x7F80, |value: [u8; 2]| u16::from_le_bytes(value)),
    }
}

/// Whether no value has all bits of the exponent set. Without a way out, so that the compiler makes lanes of it.
#[inline(always)]
fn none_has<const N: usize, T>(bytes: &[u8], exponent: T, read: impl Fn([u8; N]) -> T) -> bool
where
    T: Copy + PartialEq + std::ops::BitAnd<Output = T>,
{
    let (values, _) = bytes.as_chunks::<N>();
    values.iter().fold(true, |finite, value| finite & (read(*value) & exponent != exponent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_16_bit_value_is_judged_as_its_f32() {
        for bits in 0..=u16::MAX {
            let (bf16, f16) = (crate::element::bf16_to_f32(bits), crate::element::f16_to_f32(bits));
            assert_eq!(all_finite(Element::Bf16, &bits.to_le_bytes()), bf16.is_finite(), "{bits:#x}");
            assert_eq!(all_finite(Element::F16, &bits.to_le_bytes()), f16.is_finite(), "{bits:#x}");
        }
    }

    #[test]
    fn one_value_anywhere_is_found() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in 0..67 {
                let mut values = [f32::MAX; 67];
                assert!(all_finite(Element::F32, &values.map(f32::to_le_bytes).concat()));
                values[place] = bad;
                assert!(!all_finite(Element::F32, &values.map(f32::to_le_bytes).concat()));
            }
        }
    }
}
