//! A weight with low-rank products whose rows (or columns) are then scaled to trained magnitudes.
//!
//! Rows need nothing but themselves. The norm of a column needs the whole weight: so the first worker that comes to such
//! a tensor begins a pass over it, and every further one that comes takes the next piece. They compute apart and add
//! their squares in the order of the rows, so that the sums do not depend on pieces or threads.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fastft_checkpoint::{Error, Result};
use fastft_kernels::dora::{self as kernel, Factors};
use fastft_kernels::merge::Band;
use fastft_kernels::{Element, cast};

use crate::device::Device;
use crate::job::Check;
use crate::merge::{Factor, Merge};
use crate::plan::{Delta, Source};
use crate::tile::{Buffers, Reader};

/// Bytes of f32 values of a piece of the pass over a weight: it stays in the caches.
const PIECE_BYTES: usize = 1 << 20;

/// How often a worker that waits for others looks whether the run was stopped.
const TICK: Duration = Duration::from_millis(50);

/// A checked weight with magnitudes.
#[derive(Debug)]
pub struct Dora {
    /// Makes W + D in f32.
    updated: Merge,
    to: Element,
    scaling: Scaling,
}

#[derive(Debug)]
enum Scaling {
    /// The magnitude of each row of each product; `None`: its rows are not scaled.
    Rows(Vec<Option<Factor>>),
    Columns(Columns),
}

/// The one magnitude of each column.
#[derive(Debug)]
struct Columns {
    magnitude: Factor,
    pass: Mutex<Pass>,
    changed: Condvar,
}

/// A pass over the weight.
#[derive(Debug, Default)]
struct Pass {
    /// Pieces that a worker has taken.
    taken: usize,
    /// Pieces whose squares are in the sums.
    added: usize,
    sums: Vec<f32>,
    /// Magnitude by norm, when all pieces are added.
    factors: Option<Arc<Vec<f32>>>,
    /// Why there will be none.
    failure: Option<Error>,
}

impl Dora {
    /// Checks the shapes.
    pub fn check(check: &Check, source: &Source, to: Element, deltas: &[Delta]) -> Result<Self> {
        let updated = Merge::check_disjoint(check, source, deltas)?;
        let mut magnitudes = Vec::with_capacity(deltas.len());
        for delta in deltas {
            let Some(source) = &delta.magnitude else {
                magnitudes.push(None);
                continue;
            };
            let magnitude = Factor::check_vector(check, source)?;
            let outputs = delta.b.num_rows();
            if magnitude.num_values() as u64 != outputs {
                return check.refuse(&format!("a magnitude of {:?} does not fit {outputs} outputs", source.shape));
            }
            if delta.transposed && (deltas.len() > 1 || delta.rows.is_some()) {
                return check.refuse("the columns of a part of a weight cannot be scaled");
            }
            magnitudes.push(Some(magnitude));
        }
        let scaling = match (deltas, &magnitudes[..]) {
            ([Delta { transposed: true, .. }], [Some(magnitude)]) => {
                Scaling::Columns(Columns { magnitude: *magnitude, pass: Mutex::default(), changed: Condvar::new() })
            }
            _ => Scaling::Rows(magnitudes),
        };
        Ok(Self { updated, to, scaling })
    }

    /// Rows of the weight.
    pub fn num_rows(&self) -> u64 {
        self.updated.num_rows()
    }

    /// Makes rows `first..first + output / row size` of the scaled weight in `buffers.output`.
    pub fn make(&self, reader: &Reader, first: usize, buffers: &mut Buffers) -> Result<()> {
        let columns = self.updated.columns();
        let num_rows = buffers.output.len() / (columns * self.to.size_bytes());
        let factors = match &self.scaling {
            Scaling::Columns(by_column) => Some(by_column.factors(&self.updated, reader, buffers)?),
            Scaling::Rows(_) => None,
        };
        let Buffers { input, output, updated, .. } = buffers;
        updated.resize(num_rows * columns * size_of::<f32>(), 0);
        self.updated.make(reader, first, input, updated)?;
        let magnitudes = match &self.scaling {
            Scaling::Rows(magnitudes) => magnitudes,
            Scaling::Columns(_) => {
                let band = Band { rows: num_rows, columns };
                return self.scale(reader, band, updated, Factors::OfColumns(&factors.unwrap_or_default()), output);
            }
        };
        for (start, end) in self.updated.bands(first, first + num_rows) {
            let band = Band { rows: end - start, columns };
            let part = |size: usize| (start - first) * columns * size..(end - first) * columns * size;
            let (updated, output) = (&updated[part(size_of::<f32>())], &mut output[part(self.to.size_bytes())]);
            let product = self.updated.product_at(start);
            let scaled = product.and_then(|(index, row)| Some((magnitudes[index].as_ref()?, row)));
            if let Some((magnitude, row)) = scaled {
                let mut norms = vec![0.0; band.rows];
                kernel::norms_of_rows(reader.cpu, band, updated, &mut norms)
                    .map_err(|error| reader.refuse(&error.to_string()))?;
                let factors = divided(&magnitude.read(reader, row, band.rows)?, &norms);
                self.scale(reader, band, updated, Factors::OfRows(&factors), output)?;
            } else {
                let kept = cast::cast(reader.cpu, Element::F32, updated, self.to, output);
                if !kept.map_err(|error| reader.refuse(&error.to_string()))? {
                    return Err(self.not_finite(reader));
                }
            }
        }
        Ok(())
    }

    /// Forgets what the tiles shared: no more will come.
    pub fn finish(&self, tensor: &str, device: Option<&dyn Device>) {
        self.updated.finish(tensor, device);
        if let Scaling::Columns(columns) = &self.scaling {
            *columns.lock() = Pass::default();
        }
    }

    fn scale(&self, reader: &Reader, band: Band, updated: &[u8], factors: Factors, output: &mut [u8]) -> Result<()> {
        let finite = kernel::scale(reader.cpu, band, updated, factors, self.to, output);
        if finite.map_err(|error| reader.refuse(&error.to_string()))? {
            return Ok(());
        }
        Err(self.not_finite(reader))
    }

    fn not_finite(&self, reader: &Reader) -> Error {
        Error::Checkpoint(format!(
            "tensor {:?}: scaled to its DoRA magnitudes it holds infinite or undefined values (dtype {:?}); a row or column of zeros \
             or of values that are not finite cannot be scaled, and a wider dtype holds larger values",
            reader.tensor, self.to
        ))
    }
}

impl Columns {
    /// What each column is multiplied by: from the pass over the whole weight, in which this worker takes part.
    fn factors(&self, updated: &Merge, reader: &Reader, buffers: &mut Buffers) -> Result<Arc<Vec<f32>>> {
        let columns = updated.columns();
        let num_rows = usize::try_from(updated.num_rows()).map_err(|_| reader.refuse("too many rows"))?;
        let piece_rows = (PIECE_BYTES / (columns * size_of::<f32>())).max(1);
        let num_pieces = num_rows.div_ceil(piece_rows);
        loop {
            let mut pass = self.lock();
            if pass.taken == num_pieces {
                return self.wait(reader, pass, |pass| pass.factors.clone());
            }
            if reader.is_stopped() {
                return Err(reader.refuse("the run was stopped"));
            }
            let piece = pass.taken;
            pass.taken += 1;
            drop(pass);
            let abandoned = Abandoned(self);
            let rows = piece_rows.min(num_rows - piece * piece_rows);
            let added = self.add(updated, reader, buffers, piece, piece * piece_rows, rows);
            std::mem::forget(abandoned);
            if let Err(error) = added {
                self.lock().failure.get_or_insert_with(|| error.clone());
                self.changed.notify_all();
                return Err(error);
            }
            let mut pass = self.lock();
            if pass.added == num_pieces {
                let norms: Vec<_> = pass.sums.iter().map(|sum| sum.sqrt()).collect();
                drop(pass);
                let magnitude = self.magnitude.read(reader, 0, columns);
                pass = self.lock();
                match magnitude {
                    Ok(magnitude) => pass.factors = Some(Arc::new(divided(&magnitude, &norms))),
                    Err(error) => pass.failure = Some(error),
                }
                self.changed.notify_all();
            }
        }
    }

    /// Computes a piece, waits until those before it are added, and adds its squares.
    fn add(
        &self,
        updated: &Merge,
        reader: &Reader,
        buffers: &mut Buffers,
        piece: usize,
        first: usize,
        rows: usize,
    ) -> Result<()> {
        // The pages will be read again.
        let reader = &Reader { forget: false, ..*reader };
        let band = Band { rows, columns: updated.columns() };
        let values = &mut buffers.updated;
        values.resize(rows * band.columns * size_of::<f32>(), 0);
        updated.make(reader, first, &mut buffers.input, values)?;
        let turn = |pass: &mut Pass| (pass.added == piece).then(|| std::mem::take(&mut pass.sums));
        let mut sums = self.wait(reader, self.lock(), turn)?;
        sums.resize(band.columns, 0.0);
        kernel::add_squares_of_rows(reader.cpu, band, values, &mut sums)
            .map_err(|error| reader.refuse(&error.to_string()))?;
        let mut pass = self.lock();
        pass.sums = sums;
        pass.added += 1;
        drop(pass);
        self.changed.notify_all();
        Ok(())
    }

    /// Waits until `ready` gives something, another worker failed, or the run was stopped.
    fn wait<T>(
        &self,
        reader: &Reader,
        mut pass: MutexGuard<Pass>,
        mut ready: impl FnMut(&mut Pass) -> Option<T>,
    ) -> Result<T> {
        loop {
            if let Some(error) = &pass.failure {
                return Err(error.clone());
            }
            if let Some(found) = ready(&mut pass) {
                return Ok(found);
            }
            if reader.is_stopped() {
                return Err(reader.refuse("the run was stopped"));
            }
            pass = self.changed.wait_timeout(pass, TICK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pass> {
        self.pass.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets nobody wait for a worker that panicked.
struct Abandoned<'a>(&'a Columns);

impl Drop for Abandoned<'_> {
    fn drop(&mut self) {
        let failure = || Error::Plan("a worker panicked; this is a bug of fastft".to_owned());
        self.0.lock().failure.get_or_insert_with(failure);
        self.0.changed.notify_all();
    }
}

fn divided(magnitudes: &[f32], norms: &[f32]) -> Vec<f32> {
    magnitudes.iter().zip(norms).map(|(magnitude, norm)| magnitude / norm).collect()
}
