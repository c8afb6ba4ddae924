//! 4-bit quantization by blocks: NF4 and FP4 as bitsandbytes' CPU backend makes them, bit for bit.
//!
//! A tensor is flat and row-major; blocks of `blocksize` values run across rows. Each block has a scale, its largest
//! magnitude (`absmax`, f32); each value is divided by it and becomes the index of the nearest of 16 values, two to a
//! byte, the first in the upper half. The last block may be shorter; its scale is at least 1e-38 and it is divided by,
//! where full blocks are multiplied by the reciprocal. [`nested`] quantizes the scales once more, to 8 bit.
//!
//! # Source
//! bitsandbytes 0.50.2, `csrc/cpu_ops.cpp` and `functional.py` (behaviour, checked by golden values made with it);
//! NF4: Dettmers et al. 2023, `QLoRA`, appendix E.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod nested;
mod scalar;

use thiserror::Error;

use crate::cast::{LengthError, check_length, widen_unchecked};
use crate::element::Element;
use crate::level::Cpu;
#[cfg(target_arch = "x86_64")]
use crate::level::Level;

/// A code book.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// The quantiles of a normal distribution.
    Nf4,
    /// A sign, two bits of exponent, one of fraction.
    Fp4,
}

/// How a tensor is cut and coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Blocks {
    code: Code,
    size: usize,
}

/// What a call cannot be done with.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// The block size is none of those that exist.
    #[error("block size {0} is not allowed; use 32, 64, 128, 256, 512, 1024, 2048 or 4096")]
    Blocksize(usize),
    /// Two lengths do not agree.
    #[error(transparent)]
    Length(#[from] LengthError),
}

/// Least scale that a block is divided by; a subnormal f32.
const SMALLEST: f32 = 1e-38;

/// Smallest and largest block.
const SIZES: std::ops::RangeInclusive<usize> = 32..=4096;

/// Values of a scratch buffer on the stack: the largest block.
const SCRATCH: usize = 4096;

/// The 16 values of NF4 in ascending order; a value's place is its code.
const NF4: [f32; 16] = from_bits([
    0xBF80_0000,
    0xBF32_39B1,
    0xBF06_6B30,
    0xBECA_32A0,
    0xBE91_A24D,
    0xBE3D_353F,
    0xBDBA_7871,
    0x0000_0000,
    0x3DA2_FAFF,
    0x3E24_CAE3,
    0x3E7C_04DD,
    0x3EAD_033A,
    0x3EE1_A4B8,
    0x3F10_07AB,
    0x3F39_13B3,
    0x3F80_0000,
]);

/// Between the values of [`NF4`]: a value equal to a threshold gets the lower code.
const NF4_THRESHOLDS: [f32; 15] = from_bits([
    0xBF59_1CD8,
    0xBF1C_5270,
    0xBEEB_8480,
    0xBEAD_EA76,
    0xBE70_3CEC,
    0xBE0D_38BC,
    0xBD3A_7871,
    0x3D22_FAFF,
    0x3DF6_4862,
    0x3E50_67E0,
    0x3E95_82D4,
    0x3EC7_53F9,
    0x3F00_6D04,
    0x3F24_8DAF,
    0x3F5C_89DA,
]);

/// The values of FP4 by code; code 8 is zero too, not minus zero.
const FP4: [f32; 16] = [
    0.0,
    0.005_208_333_5,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    0.0,
    -0.005_208_333_5,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];

/// The codes of FP4 in the order of their values; the two zeros are neighbours.
const FP4_ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];

/// The codes of NF4 in the order of their values.
const NF4_ORDER: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

const fn from_bits<const N: usize>(bits: [u32; N]) -> [f32; N] {
    let mut values = [0.0; N];
    let mut index = 0;
    while index < N {
        values[index] = f32::from_bits(bits[index]);
        index += 1;
    }
    values
}

impl Code {
    /// Both code books.
    pub const ALL: [Self; 2] = [Self::Nf4, Self::Fp4];

    /// The name in files and options.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    /// The 16 values by code.
    #[must_use]
    pub fn book(self) -> [f32; 16] {
        match self {
            Self::Nf4 => NF4,
            Self::Fp4 => FP4,
        }
    }

    /// The codes in ascending order of their values.
    fn order(self) -> [u8; 16] {
        match self {
            Self::Nf4 => NF4_ORDER,
            Self::Fp4 => FP4_ORDER,
        }
    }

    /// What separates the values in ascending order: the middle, rounded to f32.
    fn thresholds(self) -> [f32; 15] {
        match self {
            Self::Nf4 => NF4_THRESHOLDS,
            Self::Fp4 => {
                let sorted = FP4_ORDER.map(|code| FP4[usize::from(code)]);
                std::array::from_fn(|index| f32::midpoint(sorted[index], sorted[index + 1]))
            }
        }
    }
}

impl Blocks {
    /// Blocks of `size` values.
    ///
    /// # Errors
    /// `size` is no power of two from 32 to 4096.
    pub fn new(code: Code, size: usize) -> Result<Self, Error> {
        if SIZES.contains(&size) && size.is_power_of_two() {
            Ok(Self { code, size })
        } else {
            Err(Error::Blocksize(size))
        }
    }

    /// The code book.
    #[must_use]
    pub fn code(self) -> Code {
        self.code
    }

    /// Values of a block.
    #[must_use]
    pub fn size(self) -> usize {
        self.size
    }
}

/// Quantizes a piece of a tensor that begins with a block.
///
/// A last block of less than the block's size is taken for the end of the tensor. A NaN makes its whole block NaN
/// (every code is 15); with an infinite value the finite ones get the code of zero.
///
/// # Arguments
/// * `source`: n values of `from`, little-endian.
/// * `packed`: n/2 bytes, rounded up; an odd last value is followed by the code of zero.
/// * `absmax`: the scale of each block.
///
/// # Errors
/// The lengths do not agree.
pub fn quantize(
    cpu: Cpu,
    blocks: Blocks,
    from: Element,
    source: &[u8],
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Result<(), Error> {
    let count = check_source("quantize_4bit", blocks, from, source, absmax)?;
    check_length("quantize_4bit: packed", packed.len(), Some(count.div_ceil(2)))?;
    let full = count / blocks.size;
    let (source, tail) = source.split_at(full * blocks.size * from.size_bytes());
    let (packed, packed_tail) = packed.split_at_mut(full * blocks.size / 2);
    let (absmax, absmax_tail) = absmax.split_at_mut(full);
    match cpu.level() {
        // SAFETY: a `Cpu` exists only for a level that this CPU was found to have.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::quantize_blocks(blocks.code, blocks.size, from, source, packed, absmax) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::quantize_blocks(blocks.code, blocks.size, from, source, packed, absmax) },
        _ => scalar::quantize_blocks(blocks.code, blocks.size, from, source, packed, absmax),
    }
    if let Some(absmax) = absmax_tail.first_mut() {
        let mut scratch = [0.0; SCRATCH];
        let values = &mut scratch[..tail.len() / from.size_bytes()];
        widen_unchecked(cpu, from, tail, values);
        *absmax = scalar::quantize_tail(blocks.code, values, packed_tail);
    }
    Ok(())
}

/// The scales alone, as [`quantize`] gives them.
///
/// # Errors
/// The lengths do not agree.
pub fn block_maxima(cpu: Cpu, blocks: Blocks, from: Element, source: &[u8], absmax: &mut [f32]) -> Result<(), Error> {
    check_source("block_maxima", blocks, from, source, absmax)?;
    let mut scratch = [0.0; SCRATCH];
    for (source, absmax) in source.chunks(blocks.size * from.size_bytes()).zip(absmax) {
        let values = &mut scratch[..source.len() / from.size_bytes()];
        widen_unchecked(cpu, from, source, values);
        let largest = match cpu.level() {
            // SAFETY: a `Cpu` exists only for a level that this CPU was found to have.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::Avx512 => unsafe { avx2::largest_magnitude(values) },
            _ => scalar::largest_magnitude(values),
        };
        *absmax = if values.len() < blocks.size { scalar::at_least_smallest(largest) } else { largest };
    }
    Ok(())
}

/// The way back: `round(book[code] * absmax)`, one product in f32 and one rounding to `to`.
///
/// # Arguments
/// * `packed`: n/2 bytes, rounded up.
/// * `absmax`: the scale of each block.
/// * `target`: n values of `to`, little-endian.
///
/// # Errors
/// The lengths do not agree.
pub fn dequantize(
    cpu: Cpu,
    blocks: Blocks,
    packed: &[u8],
    absmax: &[f32],
    to: Element,
    target: &mut [u8],
) -> Result<(), Error> {
    let count = target.len() / to.size_bytes();
    check_length("dequantize_4bit: target", target.len(), count.checked_mul(to.size_bytes()))?;
    check_length("dequantize_4bit: packed", packed.len(), Some(count.div_ceil(2)))?;
    check_length("dequantize_4bit: absmax", absmax.len(), Some(count.div_ceil(blocks.size)))?;
    let full = count / blocks.size;
    let (packed, packed_tail) = packed.split_at(full * blocks.size / 2);
    let (absmax, absmax_tail) = absmax.split_at(full);
    let (target, tail) = target.split_at_mut(full * blocks.size * to.size_bytes());
    match cpu.level() {
        // SAFETY: a `Cpu` exists only for a level that this CPU was found to have.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::dequantize_blocks(blocks.code, blocks.size, packed, absmax, to, target) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::dequantize_blocks(blocks.code, blocks.size, packed, absmax, to, target) },
        _ => scalar::dequantize_blocks(blocks.code, blocks.size, packed, absmax, to, target),
    }
    if let Some(absmax) = absmax_tail.first() {
        scalar::dequantize_block(&blocks.code.book().map(|value| value * absmax), packed_tail, to, tail);
    }
    Ok(())
}

/// Checks a source against its scales; how many values it has.
fn check_source(
    what: &'static str,
    blocks: Blocks,
    from: Element,
    source: &[u8],
    absmax: &[f32],
) -> Result<usize, Error> {
    let count = source.len() / from.size_bytes();
    check_length(what, source.len(), count.checked_mul(from.size_bytes()))?;
    check_length(what, absmax.len(), Some(count.div_ceil(blocks.size)))?;
    Ok(count)
}
