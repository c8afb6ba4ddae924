//! Makes one tile: some rows of one output tensor, in a buffer.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use fastft_checkpoint::{Error, Input, Result};
use fastft_kernels::{Cpu, Element, cast};

use crate::device::Device;
use crate::job::{Kind, Made, Number, PartPlace, Place};
use crate::shared::SharedFactors;

/// The buffers of a worker, kept from tile to tile.
#[derive(Debug, Default)]
pub struct Buffers {
    /// Bytes as read, where they cannot be read into their place.
    pub input: Vec<u8>,
    /// Bytes to be written.
    pub output: Vec<u8>,
    /// Numbers that are quantized.
    pub values: Vec<u8>,
    /// Weights in f32 before they are scaled to their magnitudes.
    pub updated: Vec<u8>,
}

/// Reads for one tensor, and names it in errors.
pub struct Reader<'a> {
    /// The tensor that is made.
    pub tensor: &'a str,
    /// What the kernels run on.
    pub cpu: Cpu,
    /// The files.
    pub inputs: &'a [Input],
    /// What several tensors take their factors from.
    pub shared: &'a SharedFactors,
    /// Counts what is read.
    pub bytes_read: &'a AtomicU64,
    /// Whether pages are dropped once they are read: not where they will be read again.
    pub forget: bool,
    /// Where merges are computed, if not here.
    pub device: Option<&'a dyn Device>,
    /// Whether the run was stopped: who waits for another worker gives up.
    pub stopped: &'a AtomicBool,
}

impl Reader<'_> {
    /// Fills `buffer` from `place` on.
    pub fn read(&self, place: Place, buffer: &mut [u8]) -> Result<()> {
        self.inputs[place.input].read_at(buffer, place.offset).map_err(|error| self.named(error))?;
        if self.forget {
            self.inputs[place.input].forget(place.offset, buffer.len() as u64);
        }
        self.bytes_read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// The file of `place`.
    pub fn path(&self, place: Place) -> &Path {
        self.inputs[place.input].path()
    }

    /// Whether the run was stopped.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    /// A refusal that names the tensor.
    pub fn refuse(&self, reason: &str) -> Error {
        Error::Plan(format!("tensor {:?}: {reason}", self.tensor))
    }

    fn named(&self, error: Error) -> Error {
        named(self.tensor, error)
    }
}

/// `error` with the tensor's name before it.
pub fn named(tensor: &str, error: Error) -> Error {
    let name = |reason| format!("tensor {tensor:?}: {reason}");
    match error {
        Error::Checkpoint(reason) => Error::Checkpoint(name(reason)),
        Error::File(reason) => Error::File(name(reason)),
        Error::System(reason, number) => Error::System(name(reason), number),
        Error::Plan(reason) => Error::Plan(name(reason)),
    }
}

/// Makes rows `first..first + count` of `made` in `buffers.output`.
pub fn make(made: &Made, reader: &Reader, first: usize, count: usize, buffers: &mut Buffers) -> Result<()> {
    let row_bytes = usize::try_from(made.row_bytes).map_err(|_| reader.refuse("a row is larger than memory"))?;
    make_rows(&made.kind, reader, row_bytes, first, count, buffers)
}

/// The same for rows of `row_bytes` bytes.
pub fn make_rows(
    kind: &Kind,
    reader: &Reader,
    row_bytes: usize,
    first: usize,
    count: usize,
    buffers: &mut Buffers,
) -> Result<()> {
    if let Kind::Quantize(quantize) = kind {
        return quantize.make(reader, first, count, buffers);
    }
    buffers.output.resize(count * row_bytes, 0);
    match kind {
        Kind::Copy { place } => reader.read(ahead(*place, first as u64), &mut buffers.output),
        Kind::Cast { content, from, to } => {
            let size = from.size_bytes();
            if *from == Number::Element(*to) {
                return content.read(reader, first, size, &mut buffers.output);
            }
            buffers.input.resize(count * size, 0);
            content.read(reader, first, size, &mut buffers.input)?;
            narrow(reader, *from, &buffers.input, *to, &mut buffers.output)
        }
        Kind::Rows { parts, to } => gather(reader, parts, *to, row_bytes, first, buffers),
        Kind::Merge(merge) => {
            let Buffers { input, output, .. } = buffers;
            merge.make(reader, first, input, output)
        }
        Kind::Dora(dora) => dora.make(reader, first, buffers),
        Kind::Bytes(bytes) => {
            buffers.output.copy_from_slice(&bytes[first..first + count]);
            Ok(())
        }
        Kind::Quantize(_) | Kind::Companion => Err(reader.refuse("a plan in a plan; this is a bug of fastft")),
    }
}

/// Forgets what the tiles of a tensor shared: no more will come.
pub fn finish(kind: &Kind, tensor: &str, device: Option<&dyn Device>) {
    match kind {
        Kind::Merge(merge) => merge.finish(tensor, device),
        Kind::Dora(dora) => dora.finish(tensor, device),
        Kind::Cast { content, .. } => content.finish(),
        Kind::Rows { parts, .. } => parts.iter().for_each(|part| part.content.finish()),
        Kind::Quantize(quantize) => finish(&quantize.inner, tensor, device),
        Kind::Copy { .. } | Kind::Bytes(_) | Kind::Companion => {}
    }
}

fn ahead(place: Place, bytes: u64) -> Place {
    Place { offset: place.offset + bytes, ..place }
}

/// Numbers in another dtype, rounded; a finite one that becomes infinite is an error.
pub fn narrow(reader: &Reader, from: Number, source: &[u8], to: Element, target: &mut [u8]) -> Result<()> {
    let kept = match from {
        Number::Element(from) => cast::cast(reader.cpu, from, source, to, target),
        Number::F64 => cast::cast_f64(source, to, target),
    };
    if kept.map_err(|error| reader.refuse(&error.to_string()))? {
        return Ok(());
    }
    Err(reader.refuse(&format!("a value is too large for {to:?}; choose a wider dtype")))
}

fn gather(
    reader: &Reader,
    parts: &[PartPlace],
    to: Option<Element>,
    row_bytes: usize,
    first: usize,
    buffers: &mut Buffers,
) -> Result<()> {
    let Buffers { input, output, .. } = buffers;
    let end = first as u64 + output.len().checked_div(row_bytes).unwrap_or(0) as u64;
    let from_part = parts.partition_point(|part| part.first_row + part.num_rows <= first as u64);
    let mut rest = &mut output[..];
    for part in parts[from_part..].iter().take_while(|part| part.first_row < end) {
        let start = part.first_row.max(first as u64);
        let rows = (part.first_row + part.num_rows).min(end) - start;
        let rows = usize::try_from(rows).map_err(|_| reader.refuse("too many rows"))?;
        let (target, after) = rest.split_at_mut(rows * row_bytes);
        rest = after;
        let row = start - part.first_row + part.start;
        let first_value = row * part.row_bytes / part.value_bytes as u64;
        let first_value = usize::try_from(first_value).map_err(|_| reader.refuse("too many values"))?;
        match part.from.zip(to) {
            None => part.content.read(reader, first_value, part.value_bytes, target)?,
            Some((from, to)) => {
                let values = target.len() / to.size_bytes();
                input.resize(values * from.size_bytes(), 0);
                part.content.read(reader, first_value, part.value_bytes, input)?;
                narrow(reader, from, input, to, target)?;
            }
        }
    }
    Ok(())
}
