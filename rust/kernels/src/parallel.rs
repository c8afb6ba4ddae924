//! Whole arrays on several threads; the result does not depend on their number.

use std::thread;

use crate::cast::{LengthError, check_length};
use crate::element::Element;
use crate::level::Cpu;
use crate::merge::{self, Band, Base, Delta, Left};
use crate::nf4::{self, Blocks, Error, nested};

/// Values below which a second thread costs more than it brings.
const LEAST_VALUES: usize = 1 << 18;

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

/// [`merge::merge`] of a whole weight: each thread takes a band of its rows.
///
/// # Errors
/// The sizes of the weight, the target, the base or a factor do not agree.
pub fn merge(
    cpu: Cpu,
    weight: Band,
    base: Base,
    to: Element,
    target: &mut [u8],
    deltas: &[Delta],
    threads: usize,
) -> Result<bool, LengthError> {
    merge::check(weight, base, to, target, deltas)?;
    if target.is_empty() {
        return Ok(true);
    }
    let count = weight.rows * weight.columns;
    let rows = weight.rows.div_ceil(threads.clamp(1, (count / LEAST_VALUES).max(1)));
    let bands = target.chunks_mut(rows * weight.columns * to.size_bytes()).enumerate();
    let kept = in_parallel(bands, |(index, target)| {
        let first = index * rows;
        let band = Band { rows: rows.min(weight.rows - first), columns: weight.columns };
        let base = match base {
            Base::InPlace => Base::InPlace,
            Base::Apart(from, source) => {
                let row_bytes = weight.columns * from.size_bytes();
                Base::Apart(from, &source[first * row_bytes..][..band.rows * row_bytes])
            }
        };
        let deltas: Vec<_> = deltas
            .iter()
            .map(|delta| {
                let values = &delta.left.values[first * delta.left.row_stride..];
                Delta { left: Left { values, ..delta.left }, ..*delta }
            })
            .collect();
        merge::merge(cpu, band, base, to, target, &deltas)
    })?;
    Ok(kept.into_iter().all(|kept| kept))
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
