//! The numbers of a source by their index, whether they lie in the file as they are, are 4-bit codes there, or go
//! through 4 bit and back on the way.

use std::sync::{Arc, Mutex, PoisonError};

use fastft_checkpoint::{Dtype, Result};
use fastft_kernels::Element;
use fastft_kernels::nf4::{self, Blocks, Code, nested};

use crate::job::{Check, Number, Place};
use crate::plan::{Packed, Seen, Source};
use crate::tile::{self, Reader};

/// A checked source of numbers.
#[derive(Debug)]
pub struct Content {
    place: Place,
    lens: Option<Lens>,
}

/// What stands between the file and the numbers.
#[derive(Debug)]
struct Lens {
    blocks: Blocks,
    element: Element,
    num_values: usize,
    kind: Kind,
    /// (rows, columns) of the numbers where the blocks run over their transpose.
    transposed: Option<(usize, usize)>,
    /// The scales of a packed tensor, or all numbers of a transposed one, while tiles of it are worked on.
    kept: Mutex<Option<Kept>>,
}

#[derive(Debug)]
enum Kind {
    Packed(Scales),
    Seen { from: Number, offset: Option<f32> },
}

#[derive(Clone, Debug)]
enum Kept {
    Scales(Arc<Vec<f32>>),
    Numbers(Arc<Vec<u8>>),
}

/// Where the scales of a packed tensor are.
#[derive(Debug)]
struct Scales {
    absmax: Place,
    count: usize,
    nested: Option<(Place, f32)>,
}

impl Content {
    /// Checks a source: that all of it is inside its file.
    pub fn check(check: &Check, source: &Source) -> Result<Self> {
        let lens = match (&source.packed, &source.seen) {
            (None, None) => None,
            (Some(packed), None) => Some(Lens::packed(check, source, packed)?),
            (None, Some(seen)) => Some(Lens::seen(check, source, seen)?),
            (Some(_), Some(_)) => return check.refuse("4-bit numbers cannot go through 4 bit again"),
        };
        Ok(Self { place: check.place(source)?, lens })
    }

    /// Where the numbers lie as they are; `None` where they do not.
    pub fn place(&self) -> Option<Place> {
        if self.lens.is_none() { Some(self.place) } else { None }
    }

    /// Reads numbers from `first` on, of `size` bytes each, into `target`.
    pub fn read(&self, reader: &Reader, first: usize, size: usize, target: &mut [u8]) -> Result<()> {
        match &self.lens {
            None => reader.read(ahead(self.place, first * size), target),
            Some(lens) => lens.read(reader, self.place, first, target),
        }
    }

    /// Forgets what was kept: no more tiles will come.
    pub fn finish(&self) {
        if let Some(lens) = &self.lens {
            *lens.kept.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }
}

impl Lens {
    fn packed(check: &Check, source: &Source, packed: &Packed) -> Result<Self> {
        let num_values = num_values(check, source)?;
        let blocks = blocks(check, &packed.quant_type, packed.blocksize)?;
        let count = num_values.div_ceil(blocks.size());
        let absmax_dtype = if packed.nested.is_some() { Dtype::U8 } else { Dtype::F32 };
        let absmax = scales(check, &packed.absmax, absmax_dtype, count)?;
        let nested = match &packed.nested {
            None => None,
            Some(nested) => {
                let place = scales(check, &nested.absmax, Dtype::F32, count.div_ceil(nested::BLOCK))?;
                Some((place, offset(check, nested.offset)?))
            }
        };
        let kind = Kind::Packed(Scales { absmax, count, nested });
        let transposed = if packed.transposed { Some(matrix(check, source)?) } else { None };
        Ok(Self { blocks, element: check.element(source.dtype)?, num_values, kind, transposed, kept: Mutex::default() })
    }

    fn seen(check: &Check, source: &Source, seen: &Seen) -> Result<Self> {
        let blocks = blocks(check, &seen.quant_type, seen.blocksize)?;
        let kind = Kind::Seen {
            from: check.number(seen.stored)?,
            offset: seen.offset.map(|value| offset(check, value)).transpose()?,
        };
        let transposed = if seen.transposed { Some(matrix(check, source)?) } else { None };
        let num_values = num_values(check, source)?;
        Ok(Self { blocks, element: check.element(source.dtype)?, num_values, kind, transposed, kept: Mutex::default() })
    }

    fn read(&self, reader: &Reader, place: Place, first: usize, target: &mut [u8]) -> Result<()> {
        let size = self.element.size_bytes();
        let count = target.len() / size;
        if let Some((rows, columns)) = self.transposed {
            let numbers = self.numbers(reader, place, rows, columns)?;
            for (index, target) in (first..).zip(target.chunks_exact_mut(size)) {
                let from = (index % columns * rows + index / columns) * size;
                target.copy_from_slice(&numbers[from..from + size]);
            }
            return Ok(());
        }
        // Whole blocks, and with double quantization whole blocks of scales; only the tensor's end may cut one.
        let step = match &self.kind {
            Kind::Seen { offset: Some(_), .. } => self.blocks.size() * nested::BLOCK,
            _ => self.blocks.size(),
        };
        let start = first / step * step;
        let end = (first + count).next_multiple_of(step).min(self.num_values);
        if start == first && end == first + count {
            return self.read_blocks(reader, place, start, target);
        }
        let mut whole = vec![0; (end - start) * size];
        self.read_blocks(reader, place, start, &mut whole)?;
        target.copy_from_slice(&whole[(first - start) * size..][..target.len()]);
        Ok(())
    }

    /// Reads from the start of a block to the end of one.
    fn read_blocks(&self, reader: &Reader, place: Place, start: usize, target: &mut [u8]) -> Result<()> {
        match &self.kind {
            Kind::Packed(scales) => {
                let refuse = |error: nf4::Error| reader.refuse(&error.to_string());
                let count = target.len() / self.element.size_bytes();
                let num_blocks = count.div_ceil(self.blocks.size());
                let mut packed = vec![0; count.div_ceil(2)];
                let first_block = start / self.blocks.size();
                let kept = self.scales(reader, scales)?;
                reader.read(ahead(place, start / 2), &mut packed)?;
                let absmax = &kept[first_block..first_block + num_blocks];
                nf4::dequantize(reader.cpu, self.blocks, &packed, absmax, self.element, target).map_err(refuse)
            }
            Kind::Seen { from, offset } => {
                self.read_stored(reader, ahead(place, start * from.size_bytes()), *from, target)?;
                self.round_trip(reader, *offset, target)
            }
        }
    }

    /// The scales of a packed tensor, read once; all of them finite.
    fn scales(&self, reader: &Reader, scales: &Scales) -> Result<Arc<Vec<f32>>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Kept::Scales(known)) = kept.as_ref() {
            return Ok(Arc::clone(known));
        }
        let made = Arc::new(scales.read(reader)?);
        *kept = Some(Kept::Scales(Arc::clone(&made)));
        Ok(made)
    }

    /// All numbers of a transposed tensor in the order of its blocks, read once.
    fn numbers(&self, reader: &Reader, place: Place, rows: usize, columns: usize) -> Result<Arc<Vec<u8>>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Kept::Numbers(known)) = kept.as_ref() {
            return Ok(Arc::clone(known));
        }
        let size = self.element.size_bytes();
        let mut numbers = vec![0; self.num_values * size];
        match &self.kind {
            Kind::Packed(scales) => {
                let absmax = scales.read(reader)?;
                let mut packed = vec![0; self.num_values.div_ceil(2)];
                reader.read(place, &mut packed)?;
                nf4::dequantize(reader.cpu, self.blocks, &packed, &absmax, self.element, &mut numbers)
                    .map_err(|error| reader.refuse(&error.to_string()))?;
            }
            Kind::Seen { from, offset } => {
                let mut plain = vec![0; numbers.len()];
                self.read_stored(reader, place, *from, &mut plain)?;
                transpose(&plain, rows, columns, size, &mut numbers);
                self.round_trip(reader, *offset, &mut numbers)?;
            }
        }
        let made = Arc::new(numbers);
        *kept = Some(Kept::Numbers(Arc::clone(&made)));
        Ok(made)
    }

    /// Reads numbers of another dtype, rounded.
    fn read_stored(&self, reader: &Reader, place: Place, from: Number, target: &mut [u8]) -> Result<()> {
        if from == Number::Element(self.element) {
            return reader.read(place, target);
        }
        let mut stored = vec![0; target.len() / self.element.size_bytes() * from.size_bytes()];
        reader.read(place, &mut stored)?;
        tile::narrow(reader, from, &stored, self.element, target)
    }

    /// Whole blocks (with an offset whole blocks of scales) through 4 bit and back.
    fn round_trip(&self, reader: &Reader, offset: Option<f32>, numbers: &mut [u8]) -> Result<()> {
        let refuse = |error: nf4::Error| reader.refuse(&error.to_string());
        let count = numbers.len() / self.element.size_bytes();
        let (mut packed, num_blocks) = (vec![0; count.div_ceil(2)], count.div_ceil(self.blocks.size()));
        let mut absmax = vec![0.0; num_blocks];
        nf4::quantize(reader.cpu, self.blocks, self.element, numbers, &mut packed, &mut absmax).map_err(refuse)?;
        if let Some(offset) = offset {
            let (mut codes, mut nested) = (vec![0; num_blocks], vec![0.0; num_blocks.div_ceil(nested::BLOCK)]);
            nested::quantize(&absmax, offset, &mut codes, &mut nested)
                .and_then(|()| nested::dequantize(&codes, &nested, offset, &mut absmax))
                .map_err(|error| reader.refuse(&error.to_string()))?;
        }
        nf4::dequantize(reader.cpu, self.blocks, &packed, &absmax, self.element, numbers).map_err(refuse)
    }
}

impl Scales {
    fn read(&self, reader: &Reader) -> Result<Vec<f32>> {
        let mut absmax = vec![0.0; self.count];
        match self.nested {
            None => read_floats(reader, self.absmax, &mut absmax)?,
            Some((place, offset)) => {
                let mut codes = vec![0; self.count];
                reader.read(self.absmax, &mut codes)?;
                let mut nested = vec![0.0; self.count.div_ceil(nested::BLOCK)];
                read_floats(reader, place, &mut nested)?;
                nested::dequantize(&codes, &nested, offset, &mut absmax)
                    .map_err(|error| reader.refuse(&error.to_string()))?;
            }
        }
        if absmax.iter().all(|scale| scale.is_finite()) {
            return Ok(absmax);
        }
        let file = reader.path(self.absmax).display();
        Err(reader.refuse(&format!("its 4-bit scales in {file} are infinite or undefined")))
    }
}

/// `rows` x `columns` values of `size` bytes, turned over.
pub fn transpose(values: &[u8], rows: usize, columns: usize, size: usize, target: &mut [u8]) {
    for (index, target) in target.chunks_exact_mut(size).enumerate() {
        let from = (index % rows * columns + index / rows) * size;
        target.copy_from_slice(&values[from..from + size]);
    }
}

/// The blocks of a plan.
pub fn blocks(check: &Check, quant_type: &str, blocksize: usize) -> Result<Blocks> {
    let Some(code) = Code::ALL.into_iter().find(|code| code.name() == quant_type) else {
        return check.refuse(&format!("quant_type {quant_type:?} is not allowed; use nf4 or fp4"));
    };
    Blocks::new(code, blocksize).or_else(|error| check.refuse(&error.to_string()))
}

/// The mean of the scales as the f32 that it is.
pub fn offset(check: &Check, value: f64) -> Result<f32> {
    #[expect(clippy::cast_possible_truncation, reason = "it was an f32 when it was written")]
    let offset = value as f32;
    if offset.is_finite() { Ok(offset) } else { check.refuse(&format!("the offset {value} is no finite number")) }
}

/// The number of values of a source.
pub fn num_values(check: &Check, source: &Source) -> Result<usize> {
    let count =
        source.shape.iter().try_fold(1_usize, |product, size| product.checked_mul(usize::try_from(*size).ok()?));
    count.map_or_else(|| check.refuse("it is too large for this machine"), Ok)
}

/// Rows and columns of a two-dimensional source.
fn matrix(check: &Check, source: &Source) -> Result<(usize, usize)> {
    let small = |size: u64| usize::try_from(size).ok();
    match source.shape[..] {
        [rows, columns] if rows > 0 && columns > 0 => match small(rows).zip(small(columns)) {
            Some(shape) => Ok(shape),
            None => check.refuse("it is too large for this machine"),
        },
        _ => check.refuse(&format!("{:?} has no transpose; two dimensions are needed", source.shape)),
    }
}

fn scales(check: &Check, source: &Source, dtype: Dtype, count: usize) -> Result<Place> {
    let plain = source.packed.is_none() && source.seen.is_none();
    if plain && source.dtype == dtype && num_values(check, source)? == count {
        return check.place(source);
    }
    check.refuse(&format!(
        "its scales are {} {:?}, but {} of {count} are needed",
        source.dtype.name(),
        source.shape,
        dtype.name()
    ))
}

fn read_floats(reader: &Reader, place: Place, target: &mut [f32]) -> Result<()> {
    let mut bytes = vec![0; target.len() * 4];
    reader.read(place, &mut bytes)?;
    for (value, bytes) in target.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *value = f32::from_le_bytes(*bytes);
    }
    Ok(())
}

fn ahead(place: Place, bytes: usize) -> Place {
    Place { offset: place.offset + bytes as u64, ..place }
}

impl Number {
    /// Size of one value.
    pub fn size_bytes(self) -> usize {
        match self {
            Self::Element(element) => element.size_bytes(),
            Self::F64 => 8,
        }
    }
}
