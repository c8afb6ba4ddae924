//! Values of one element as values of another: widen to f32, narrow with one rounding.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) mod f16c;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64", test))]
pub(crate) mod lanes;
#[cfg(any(target_arch = "aarch64", test))]
pub(crate) mod neon;
mod scalar;

use thiserror::Error;

use crate::element::{self, Element};
use crate::level::Cpu;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64", test))]
use crate::level::Level;

/// Two lengths that must agree do not.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{what}: {got} values or bytes, but {expected} are needed")]
pub struct LengthError {
    /// Which argument of which kernel.
    pub what: &'static str,
    /// What came.
    pub got: usize,
    /// What is needed.
    pub expected: usize,
}

/// Refuses `got` unless it is `expected`.
pub(crate) fn check_length(what: &'static str, got: usize, expected: Option<usize>) -> Result<(), LengthError> {
    match expected {
        Some(expected) if got == expected => Ok(()),
        _ => Err(LengthError { what, got, expected: expected.unwrap_or(usize::MAX) }),
    }
}

/// Values of the f32 scratch between two elements: fits the first-level cache.
const SCRATCH: usize = 1024;

/// Widens `source` (values of `from`, little-endian) into `target`, without loss.
///
/// # Errors
/// The lengths do not agree.
pub fn widen(cpu: Cpu, from: Element, source: &[u8], target: &mut [f32]) -> Result<(), LengthError> {
    check_length("widen: source", source.len(), target.len().checked_mul(from.size_bytes()))?;
    widen_unchecked(cpu, from, source, target);
    Ok(())
}

/// Narrows `source` into `target` (values of `to`, little-endian) with one rounding to nearest, ties to even.
/// Returns whether every finite value stayed finite.
///
/// # Errors
/// The lengths do not agree.
pub fn narrow(cpu: Cpu, source: &[f32], to: Element, target: &mut [u8]) -> Result<bool, LengthError> {
    check_length("narrow: target", target.len(), source.len().checked_mul(to.size_bytes()))?;
    Ok(narrow_unchecked(cpu, source, to, target))
}

/// Casts `source` (values of `from`) into `target` (values of `to`). Returns whether every finite value stayed finite.
/// The same element on both sides is a copy, bit for bit.
///
/// # Errors
/// The lengths do not agree.
pub fn cast(cpu: Cpu, from: Element, source: &[u8], to: Element, target: &mut [u8]) -> Result<bool, LengthError> {
    let count = source.len() / from.size_bytes();
    check_length("cast: source", source.len(), count.checked_mul(from.size_bytes()))?;
    check_length("cast: target", target.len(), count.checked_mul(to.size_bytes()))?;
    if from == to {
        target.copy_from_slice(source);
        return Ok(true);
    }
    let mut scratch = [0.0; SCRATCH];
    let mut kept = true;
    let sources = source.chunks(SCRATCH * from.size_bytes());
    for (source, target) in sources.zip(target.chunks_mut(SCRATCH * to.size_bytes())) {
        let values = &mut scratch[..source.len() / from.size_bytes()];
        widen_unchecked(cpu, from, source, values);
        kept &= narrow_unchecked(cpu, values, to, target);
    }
    Ok(kept)
}

/// Casts f64 values (little-endian) into `target` with one rounding. Returns whether every finite value stayed finite.
///
/// # Errors
/// The lengths do not agree.
pub fn cast_f64(source: &[u8], to: Element, target: &mut [u8]) -> Result<bool, LengthError> {
    let (values, rest) = source.as_chunks::<8>();
    check_length("cast_f64: source", source.len(), Some(source.len() - rest.len()))?;
    check_length("cast_f64: target", target.len(), values.len().checked_mul(to.size_bytes()))?;
    let mut kept = true;
    for (value, target) in values.iter().zip(target.chunks_exact_mut(to.size_bytes())) {
        let value = f64::from_le_bytes(*value);
        #[expect(clippy::cast_possible_truncation, reason = "the one rounding of a cast to f32")]
        let near = if to == Element::F32 { value as f32 } else { element::f64_to_f32_odd(value) };
        let stays = scalar::narrow(&[near], to, target) && (near.is_finite() || !value.is_finite());
        kept &= stays;
    }
    Ok(kept)
}

/// [`widen`] after its check.
pub(crate) fn widen_unchecked(cpu: Cpu, from: Element, source: &[u8], target: &mut [f32]) {
    match cpu.level() {
        // SAFETY: a `Cpu` exists only for a level that this CPU was found to have.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::widen(from, source, target) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::widen(from, source, target) },
        #[cfg(any(target_arch = "aarch64", test))]
        Level::Neon => neon::widen(from, source, target),
        _ => scalar::widen(from, source, target),
    }
}

/// [`widen`] by the specification; each CPU level compiles it anew where it is called.
#[inline(always)]
pub(crate) fn widen_scalar(from: Element, source: &[u8], target: &mut [f32]) {
    scalar::widen(from, source, target);
}

/// [`narrow`] by the specification, for few values: as many bytes as `source` has values of `to`.
pub(crate) fn narrow_scalar(source: &[f32], to: Element, target: &mut [u8]) -> bool {
    scalar::narrow(source, to, target)
}

/// [`narrow`] after its check.
pub(crate) fn narrow_unchecked(cpu: Cpu, source: &[f32], to: Element, target: &mut [u8]) -> bool {
    match cpu.level() {
        // SAFETY: a `Cpu` exists only for a level that this CPU was found to have.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::narrow(source, to, target) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::narrow(source, to, target) },
        #[cfg(any(target_arch = "aarch64", test))]
        Level::Neon => neon::narrow(source, to, target),
        _ => scalar::narrow(source, to, target),
    }
}
