//! Whole arrays on several threads; the result does not depend on their number.

use std::thread;

use crate::cast::{LengthError, check_length};
use crate::dora::{self, Factors};
use crate::element::Element;
use crate::level::Cpu;
use crate::merge::{self, Band, Base, Delta, Left, Rounding};
use crate::nf4::{self, Blocks, Error, nested};

/// Values below which a second thread costs more than it brings.
const LEAST_VALUES: usize = 1 << 18;

/// f32 values of an updated weight that are looked at together; they stay in the second-level cache.
const STEP_VALUES: usize = 1 << 17;

/// The same for scales, which cost more each.
const LEAST_SCALES: usize = 1 << 15;

/// [`nf4::quantize`] of a whole tensor.
///
/// # Errors
/// The lengths do not agree.
pub fn quantize_4bit(
    cpu: Cpu,
    blocks: Blocks,
    from: Element,
    source: &[u8],
    packed: &mut [u8],
    absmax: &mut [f32],
    threads: usize,
) -> Result<(), Error> {
    let share = share(blocks, source.len() / from.size_bytes(), threads);
    check_shares("quantize_4bit", share, source.len() / from.size_bytes(), packed.len(), blocks, absmax.len())?;
    in_parallel(
        source
            .chunks(share * from.size_bytes())
            .zip(packed.chunks_mut(share / 2))
            .zip(absmax.chunks_mut(share / blocks.size())),
        |((source, packed), absmax)| nf4::quantize(cpu, blocks, from, source, packed, absmax),
    )?;
    Ok(())
}

/// [`nf4::dequantize`] of a whole tensor.
///
/// # Errors
/// The lengths do not agree.
pub fn dequantize_4bit(
    cpu: Cpu,
    blocks: Blocks,
    packed: &[u8],
    absmax: &[f32],
    to: Element,
    target: &mut [u8],
    threads: usize,
) -> Result<(), Error> {
    let share = share(blocks, target.len() / to.size_bytes(), threads);
    check_shares("dequantize_4bit", share, target.len() / to.size_bytes(), packed.len(), blocks, absmax.len())?;
    in_parallel(
        packed
            .chunks(share / 2)
            .zip(absmax.chunks(share / blocks.size()))
            .zip(target.chunks_mut(share * to.size_bytes())),
        |((packed, absmax), target)| nf4::dequantize(cpu, blocks, packed, absmax, to, target),
    )?;
    Ok(())
}

/// [`nested::quantize`] of all scales of a tensor.
///
/// # Errors
/// The lengths do not agree.
pub fn quantize_scales(
    absmax: &[f32],
    offset: f32,
    codes: &mut [u8],
    nested_absmax: &mut [f32],
    threads: usize,
) -> Result<(), LengthError> {
    check_length("quantize_scales: codes", codes.len(), Some(absmax.len()))?;
    check_length("quantize_scales: nested_absmax", nested_absmax.len(), Some(absmax.len().div_ceil(nested::BLOCK)))?;
    let share = share_of_scales(absmax.len(), threads);
    let shares = absmax.chunks(share).zip(codes.chunks_mut(share)).zip(nested_absmax.chunks_mut(share / nested::BLOCK));
    in_parallel(shares, |((absmax, codes), scales)| nested::quantize(absmax, offset, codes, scales))?;
    Ok(())
}

/// [`nested::dequantize`] of all scales of a tensor.
///
/// # Errors
/// The lengths do not agree.
pub fn dequantize_scales(
    codes: &[u8],
    nested_absmax: &[f32],
    offset: f32,
    absmax: &mut [f32],
    threads: usize,
) -> Result<(), LengthError> {
    check_length("dequantize_scales: absmax", absmax.len(), Some(codes.len()))?;
    check_length("dequantize_scales: nested_absmax", nested_absmax.len(), Some(codes.len().div_ceil(nested::BLOCK)))?;
    let share = share_of_scales(codes.len(), threads);
    let shares = codes.chunks(share).zip(nested_absmax.chunks(share / nested::BLOCK)).zip(absmax.chunks_mut(share));
    in_parallel(shares, |((codes, scales), absmax)| nested::dequantize(codes, scales, offset, absmax))?;
    Ok(())
}

/// Scales that one thread takes: whole blocks of 256.
fn share_of_scales(count: usize, threads: usize) -> usize {
    let threads = threads.clamp(1, (count / LEAST_SCALES).max(1));
    count.div_ceil(threads).next_multiple_of(nested::BLOCK).max(nested::BLOCK)
}

/// [`merge::merge`] of a whole weight, rounded once: each thread takes a band of its rows.
///
/// # Errors
/// The sizes of the weight, the target, the base or a factor do not agree.
pub fn merge(
    cpu: Cpu,
    weight: Band,
    base: Base,
    to: Element,
    target: &mut [u8],
    delta: Delta,
    threads: usize,
) -> Result<bool, LengthError> {
    merge::check(weight, base, to, target, &[delta])?;
    let whole = Update { cpu, band: weight, base, delta };
    whole.in_bands(to, target, threads, |update, _, target| update.merge(to, target))
}

/// A whole weight merged and scaled to `magnitude` ([`dora`]), one for each row, or for each column; each thread takes a
/// band of its rows. Returns whether every result is finite.
///
/// # Errors
/// The sizes of the weight, the target, the base, the magnitudes or a factor do not agree.
#[expect(clippy::too_many_arguments, reason = "a weight, its update, its target, and how")]
pub fn merge_dora(
    cpu: Cpu,
    weight: Band,
    base: Base,
    to: Element,
    target: &mut [u8],
    delta: Delta,
    magnitude: Magnitude,
    threads: usize,
) -> Result<bool, LengthError> {
    merge::check(weight, base, to, target, &[delta])?;
    let whole = Update { cpu, band: weight, base, delta };
    match magnitude {
        Magnitude::OfRows(magnitude) => {
            check_length("merge_dora: magnitude", magnitude.len(), Some(weight.rows))?;
            whole.in_bands(to, target, threads, |update, first, target| {
                update.in_steps(to, target, |band, row, updated, target| {
                    let mut factors = vec![0.0; band.rows];
                    dora::norms_of_rows(cpu, band, updated, &mut factors)?;
                    divide(&magnitude[first + row..][..band.rows], &mut factors);
                    dora::scale(cpu, band, updated, Factors::OfRows(&factors), to, target)
                })
            })
        }
        Magnitude::OfColumns(magnitude) => {
            check_length("merge_dora: magnitude", magnitude.len(), Some(weight.columns))?;
            // The squares of a column are added from the first row to the last, so this part has one thread.
            let mut factors = vec![0.0; weight.columns];
            let mut kept = whole.in_steps(to, target, |band, _, updated, _| {
                dora::add_squares_of_rows(cpu, band, updated, &mut factors)?;
                Ok(true)
            })?;
            for sum in &mut factors {
                *sum = sum.sqrt();
            }
            divide(magnitude, &mut factors);
            kept &= whole.in_bands(to, target, threads, |update, _, target| {
                update.in_steps(to, target, |band, _, updated, target| {
                    dora::scale(cpu, band, updated, Factors::OfColumns(&factors), to, target)
                })
            })?;
            Ok(kept)
        }
    }
}

/// What the rows or the columns of a weight are scaled to.
#[derive(Clone, Copy, Debug)]
pub enum Magnitude<'a> {
    /// One for each row.
    OfRows(&'a [f32]),
    /// One for each column.
    OfColumns(&'a [f32]),
}

/// Makes factors of norms.
fn divide(magnitude: &[f32], norms: &mut [f32]) {
    for (norm, magnitude) in norms.iter_mut().zip(magnitude) {
        *norm = magnitude / *norm;
    }
}

/// Some rows of a weight and what is added to them; sizes are checked.
#[derive(Clone, Copy)]
struct Update<'a> {
    cpu: Cpu,
    band: Band,
    base: Base<'a>,
    delta: Delta<'a>,
}

impl<'a> Update<'a> {
    fn rows(self, first: usize, rows: usize) -> Self {
        let band = Band { rows, columns: self.band.columns };
        let base = match self.base {
            Base::InPlace => Base::InPlace,
            Base::Apart(from, source) => {
                let row_bytes = band.columns * from.size_bytes();
                Base::Apart(from, &source[first * row_bytes..][..rows * row_bytes])
            }
        };
        let values = &self.delta.left.values[first * self.delta.left.row_stride..];
        let delta = Delta { left: Left { values, ..self.delta.left }, ..self.delta };
        Self { band, base, delta, ..self }
    }

    fn merge(self, to: Element, target: &mut [u8]) -> Result<bool, LengthError> {
        merge::merge(self.cpu, self.band, self.base, to, target, &[self.delta], Rounding::Once)
    }

    /// Has each thread do some rows: the update of these, the first one's number, their part of the target.
    fn in_bands(
        self,
        to: Element,
        target: &mut [u8],
        threads: usize,
        work: impl Fn(Update<'a>, usize, &mut [u8]) -> Result<bool, LengthError> + Sync,
    ) -> Result<bool, LengthError> {
        if target.is_empty() {
            return Ok(true);
        }
        let Band { rows, columns } = self.band;
        let share = rows.div_ceil(threads.clamp(1, (rows * columns / LEAST_VALUES).max(1)));
        let bands = target.chunks_mut(share * columns * to.size_bytes()).enumerate();
        let kept = in_parallel(bands, |(index, target)| {
            let first = index * share;
            work(self.rows(first, share.min(rows - first)), first, target)
        })?;
        Ok(kept.into_iter().all(|kept| kept))
    }

    /// Gives `work` the updated weight in f32, some rows at a time, with their band, the first one's number, and their
    /// part of the target. Whether every finite weight stayed finite in f32, and `work` gave true each time.
    fn in_steps(
        self,
        to: Element,
        target: &mut [u8],
        mut work: impl FnMut(Band, usize, &[u8], &mut [u8]) -> Result<bool, LengthError>,
    ) -> Result<bool, LengthError> {
        let Band { rows, columns } = self.band;
        let step = (STEP_VALUES / columns.max(1)).max(1);
        let mut updated = vec![0; step.min(rows) * columns * 4];
        let mut kept = true;
        for (index, target) in target.chunks_mut((step * columns * to.size_bytes()).max(1)).enumerate() {
            let first = index * step;
            let part = self.rows(first, step.min(rows - first));
            let base = match part.base {
                Base::InPlace => Base::Apart(to, target),
                apart @ Base::Apart(..) => apart,
            };
            let updated = &mut updated[..part.band.rows * columns * 4];
            kept &= merge::merge(self.cpu, part.band, base, Element::F32, updated, &[part.delta], Rounding::Once)?;
            kept &= work(part.band, first, updated, target)?;
        }
        Ok(kept)
    }
}

/// Values that one thread takes: whole blocks.
fn share(blocks: Blocks, count: usize, threads: usize) -> usize {
    let threads = threads.clamp(1, (count / LEAST_VALUES).max(1));
    count.div_ceil(threads).next_multiple_of(blocks.size()).max(blocks.size())
}

/// Lengths must agree before they are cut: a zip would drop what is too long.
fn check_shares(
    what: &'static str,
    share: usize,
    count: usize,
    packed: usize,
    blocks: Blocks,
    absmax: usize,
) -> Result<(), LengthError> {
    debug_assert!(share.is_multiple_of(blocks.size()));
    check_length(what, packed, Some(count.div_ceil(2)))?;
    check_length(what, absmax, Some(count.div_ceil(blocks.size())))
}

/// Runs `work` for every share, all but the last in threads of their own; what it gave, in order but for the last one,
/// which comes first.
fn in_parallel<Share: Send, Done: Send, Failure: Send>(
    shares: impl Iterator<Item = Share>,
    work: impl Fn(Share) -> Result<Done, Failure> + Sync,
) -> Result<Vec<Done>, Failure> {
    let mut shares: Vec<_> = shares.collect();
    let last = shares.pop();
    thread::scope(|scope| {
        let others: Vec<_> = shares.into_iter().map(|share| scope.spawn(|| work(share))).collect();
        let mut results: Vec<_> = last.map(&work).into_iter().collect();
        for other in others {
            match other.join() {
                Ok(done) => results.push(done),
                Err(payload) => std::panic::resume_unwind(payload),
            }
        }
        results.into_iter().collect()
    })
}
