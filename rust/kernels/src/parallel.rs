//! Whole arrays on several threads; the result does not depend on their number.

use std::thread;

use crate::cast::{LengthError, check_length};
use crate::element::Element;
use crate::level::Cpu;
use crate::nf4::{self, Blocks, Error};

/// Values below which a second thread costs more than it brings.
const LEAST_VALUES: usize = 1 << 18;

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
    )
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
    )
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

/// Runs `work` for every share, all but the last in threads of their own.
fn in_parallel<Share: Send>(
    shares: impl Iterator<Item = Share>,
    work: impl Fn(Share) -> Result<(), Error> + Sync,
) -> Result<(), Error> {
    let mut shares: Vec<_> = shares.collect();
    let last = shares.pop();
    thread::scope(|scope| {
        let others: Vec<_> = shares.into_iter().map(|share| scope.spawn(|| work(share))).collect();
        let mut result = last.map_or(Ok(()), &work);
        for other in others {
            match other.join() {
                Ok(done) => result = result.and(done),
                Err(payload) => std::panic::resume_unwind(payload),
            }
        }
        result
    })
}
