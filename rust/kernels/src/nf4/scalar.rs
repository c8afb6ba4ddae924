//! The specification: one value after the other.

use super::{Code, SCRATCH, SMALLEST};
use crate::cast;
use crate::element::Element;

/// The largest magnitude; a NaN is larger than all (f32 magnitudes order like their bits).
pub fn largest_magnitude(values: &[f32]) -> f32 {
    f32::from_bits(values.iter().map(|value| value.to_bits() & 0x7FFF_FFFF).max().unwrap_or(0))
}

/// `scale`, or the smallest that may be divided by; a NaN stays.
pub fn at_least_smallest(scale: f32) -> f32 {
    if scale < SMALLEST { SMALLEST } else { scale }
}

/// Quantizes full blocks of `size` values.
pub fn quantize_blocks(code: Code, size: usize, from: Element, source: &[u8], packed: &mut [u8], absmax: &mut [f32]) {
    let mut scratch = [0.0; SCRATCH];
    let values = &mut scratch[..size];
    let sources = source.chunks_exact(size * from.size_bytes());
    for ((source, packed), absmax) in sources.zip(packed.chunks_exact_mut(size / 2)).zip(absmax) {
        cast::widen_scalar(from, source, values);
        *absmax = quantize_block(code, values, packed);
    }
}

/// Quantizes a full block; gives its scale.
fn quantize_block(code: Code, values: &[f32], packed: &mut [u8]) -> f32 {
    let absmax = largest_magnitude(values);
    let inverse = 1.0 / at_least_smallest(absmax);
    pack(code, values, packed, |value| value * inverse);
    absmax
}

/// Quantizes a last, shorter block; gives its scale.
pub fn quantize_tail(code: Code, values: &[f32], packed: &mut [u8]) -> f32 {
    let absmax = at_least_smallest(largest_magnitude(values));
    pack(code, values, packed, |value| value / absmax);
    absmax
}

/// Two codes to a byte; the partner of an odd last value is the code of zero.
fn pack(code: Code, values: &[f32], packed: &mut [u8], scaled: impl Fn(f32) -> f32) {
    let (thresholds, order) = (code.thresholds(), code.order());
    let nibble = |value: f32| order[above(&thresholds, value)];
    for (pair, byte) in values.chunks(2).zip(packed) {
        let second = pair.get(1).map_or(0.0, |value| scaled(*value));
        *byte = nibble(scaled(pair[0])) << 4 | nibble(second);
    }
}

/// How many thresholds a value is above; for a NaN all of them. Values beyond -1 and 1 need no clamping for it.
#[expect(clippy::neg_cmp_op_on_partial_ord, reason = "a NaN is above all thresholds")]
fn above(thresholds: &[f32; 15], value: f32) -> usize {
    thresholds.iter().filter(|threshold| !(**threshold >= value)).count()
}

/// Looks up the codes of full blocks of `size` values.
pub fn dequantize_blocks(code: Code, size: usize, packed: &[u8], absmax: &[f32], to: Element, target: &mut [u8]) {
    let targets = target.chunks_exact_mut(size * to.size_bytes());
    for ((packed, absmax), target) in packed.chunks_exact(size / 2).zip(absmax).zip(targets) {
        dequantize_block(&code.book().map(|value| value * absmax), packed, to, target);
    }
}

/// Looks up the codes of a block.
///
/// # Arguments
/// * `values`: the code book times the block's scale.
pub fn dequantize_block(values: &[f32; 16], packed: &[u8], to: Element, target: &mut [u8]) {
    let size = to.size_bytes();
    let mut table = [0; 16 * 4];
    // Whether a value became infinite is the caller's question: the formula has it so.
    cast::narrow_scalar(values, to, &mut table[..16 * size]);
    for (index, target) in target.chunks_exact_mut(size).enumerate() {
        let byte = packed[index / 2];
        let code = usize::from(if index % 2 == 0 { byte >> 4 } else { byte & 0x0F });
        target.copy_from_slice(&table[code * size..][..size]);
    }
}
