//! A tensor in 4 bit: what another operation makes is packed tile by tile; the scales are kept until the last tile and
//! then written where their own tensors lie.

use std::sync::{Mutex, PoisonError};

use fastft_checkpoint::Result;
use fastft_kernels::Element;
use fastft_kernels::nf4::{self, Blocks, nested};

use crate::content::transpose;
use crate::job::Kind;
use crate::tile::{self, Buffers, Reader};

/// A checked quantization.
#[derive(Debug)]
pub struct Quantize {
    /// Makes the numbers; never a quantization itself.
    pub inner: Kind,
    /// Numbers of a row of `inner`.
    pub row_values: usize,
    /// Numbers in all.
    pub num_values: usize,
    /// What the numbers are before they are quantized.
    pub element: Element,
    /// How they are.
    pub blocks: Blocks,
    /// The mean of the scales where these are quantized too.
    pub offset: Option<f32>,
    /// (rows, columns) where the transpose is quantized.
    pub transposed: Option<(usize, usize)>,
    /// The scales so far.
    pub absmax: Mutex<Vec<f32>>,
    /// Where the scales go.
    pub companions: Vec<Companion>,
}

/// A tensor made from the scales of another.
#[derive(Clone, Copy, Debug)]
pub struct Companion {
    /// The file.
    pub file: usize,
    /// First byte in it.
    pub offset: u64,
    /// Whether it is the scales (or their codes), or the scales of their codes.
    pub nested: bool,
}

impl Quantize {
    /// Rows of `inner` that begin and end with a block.
    pub fn granule(&self, num_rows: usize) -> usize {
        if self.transposed.is_some() {
            return num_rows.max(1);
        }
        self.blocks.size() / greatest_common_divisor(self.blocks.size(), self.row_values.max(1))
    }

    /// First byte and number of bytes that `count` rows from `first` on become.
    pub fn range(&self, first: usize, count: usize) -> (u64, u64) {
        let start = first * self.row_values / 2;
        let end = ((first + count) * self.row_values).div_ceil(2);
        (start as u64, (end - start) as u64)
    }

    /// Packs rows `first..first + count` into `buffers.output`.
    pub fn make(&self, reader: &Reader, first: usize, count: usize, buffers: &mut Buffers) -> Result<()> {
        let absmax = self.quantized(reader, first, count, buffers, true)?;
        self.keep(reader, first, &absmax)
    }

    /// Only the scales of the same rows.
    pub fn scan(&self, reader: &Reader, first: usize, count: usize, buffers: &mut Buffers) -> Result<()> {
        let absmax = self.quantized(reader, first, count, buffers, false)?;
        self.keep(reader, first, &absmax)
    }

    fn quantized(
        &self,
        reader: &Reader,
        first: usize,
        count: usize,
        buffers: &mut Buffers,
        pack: bool,
    ) -> Result<Vec<f32>> {
        let refuse = |error: nf4::Error| reader.refuse(&error.to_string());
        tile::make_rows(&self.inner, reader, self.row_values * self.element.size_bytes(), first, count, buffers)?;
        std::mem::swap(&mut buffers.output, &mut buffers.values);
        if let Some((rows, columns)) = self.transposed {
            let plain = buffers.values.clone();
            transpose(&plain, rows, columns, self.element.size_bytes(), &mut buffers.values);
        }
        let num_values = buffers.values.len() / self.element.size_bytes();
        let mut absmax = vec![0.0; num_values.div_ceil(self.blocks.size())];
        if pack {
            buffers.output.resize(num_values.div_ceil(2), 0);
            let Buffers { values, output, .. } = buffers;
            nf4::quantize(reader.cpu, self.blocks, self.element, values, output, &mut absmax).map_err(refuse)?;
        } else {
            nf4::block_maxima(reader.cpu, self.blocks, self.element, &buffers.values, &mut absmax).map_err(refuse)?;
        }
        Ok(absmax)
    }

    fn keep(&self, reader: &Reader, first: usize, absmax: &[f32]) -> Result<()> {
        if !absmax.iter().all(|scale| scale.is_finite()) {
            return Err(reader.refuse("it holds infinite or undefined values; it cannot be quantized"));
        }
        let start = first * self.row_values / self.blocks.size();
        let mut kept = self.absmax.lock().unwrap_or_else(PoisonError::into_inner);
        // Made when the first tile comes and freed after the last: scales of all tensors together are large.
        kept.resize(self.num_values.div_ceil(self.blocks.size()), 0.0);
        kept[start..start + absmax.len()].copy_from_slice(absmax);
        Ok(())
    }

    /// The scales, which are then forgotten.
    pub fn take_scales(&self) -> Vec<f32> {
        std::mem::take(&mut *self.absmax.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The bytes of the scales, and of the scales of their codes (none without an offset).
    pub fn companion_bytes(&self, reader: &Reader) -> Result<(Vec<u8>, Vec<u8>)> {
        let absmax = self.take_scales();
        let Some(offset) = self.offset else { return Ok((little_endian(&absmax), Vec::new())) };
        let (mut codes, mut nested) = (vec![0; absmax.len()], vec![0.0; absmax.len().div_ceil(nested::BLOCK)]);
        nested::quantize(&absmax, offset, &mut codes, &mut nested)
            .map_err(|error| reader.refuse(&error.to_string()))?;
        Ok((codes, little_endian(&nested)))
    }
}

fn little_endian(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn greatest_common_divisor(first: usize, second: usize) -> usize {
    if second == 0 { first } else { greatest_common_divisor(second, first % second) }
}
