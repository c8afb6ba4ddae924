//! `DoRA`: each row (or column) of an updated weight V = W + s B A is scaled to its trained magnitude,
//! `W' = round((m / norm) * V)`.
//!
//! V comes as f32 values, little-endian, row-major: what [`crate::merge`] writes with f32 as its target. The norm is the
//! square root of a sum of squares in f32 whose order is fixed: that of torch's CPU kernels (see `scalar`), so that a
//! merge has the bits of PEFT's. m / norm is rounded to f32, and so is its product with each value before the one
//! rounding to the target's element.
//!
//! # Source
//! Liu et al.: `DoRA`: Weight-Decomposed Low-Rank Adaptation (2024), equation 5. PEFT 0.21, `tuners/lora/variants.py`,
//! `merge_unsafe`, for the order of the operations. torch 2.15 on `x86_64` with AVX2, held against for rows of 1 to 4,099
//! values and columns of up to 70,000, for the order of the sums.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

use crate::cast::{LengthError, check_length, narrow_unchecked};
use crate::element::Element;
use crate::level::Cpu;
#[cfg(target_arch = "x86_64")]
use crate::level::Level;
use crate::merge::Band;

/// Partial sums of a row.
const LANES: usize = 8;

/// Values of the f32 scratch before the rounding: fits the first-level cache.
const SCRATCH: usize = 1024;

/// The norm of each row of a band into `norms`.
///
/// # Errors
/// The lengths do not agree.
pub fn norms_of_rows(cpu: Cpu, band: Band, updated: &[u8], norms: &mut [f32]) -> Result<(), LengthError> {
    let values = check_band("norms_of_rows: updated weight", band, updated)?;
    check_length("norms_of_rows: norms", norms.len(), Some(band.rows))?;
    if band.columns == 0 {
        norms.fill(0.0);
        return Ok(());
    }
    match cpu.level() {
        // SAFETY: a `Cpu` exists only for a level that this CPU was found to have.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::square_sums(band.columns, values, norms) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::square_sums(band.columns, values, norms) },
        _ => scalar::square_sums(band.columns, values, norms),
    }
    for sum in norms.iter_mut() {
        *sum = sum.sqrt();
    }
    Ok(())
}

/// Adds the squares of the rows of a band, one row after the other, to `sums`, one for each column. When all rows of
/// a weight have been added, from the first to the last, the square roots are the norms of its columns.
///
/// # Errors
/// The lengths do not agree.
pub fn add_squares_of_rows(cpu: Cpu, band: Band, updated: &[u8], sums: &mut [f32]) -> Result<(), LengthError> {
    let values = check_band("add_squares_of_rows: updated weight", band, updated)?;
    check_length("add_squares_of_rows: sums", sums.len(), Some(band.columns))?;
    for row in values.chunks_exact(band.columns.max(1)) {
        match cpu.level() {
            // SAFETY: a `Cpu` exists only for a level that this CPU was found to have.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { avx512::add_squares(row, sums) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2::add_squares(row, sums) },
            _ => scalar::add_squares(row, sums),
        }
    }
    Ok(())
}

/// What the rows of a band are multiplied by.
#[derive(Clone, Copy, Debug)]
pub enum Factors<'a> {
    /// One for each row.
    OfRows(&'a [f32]),
    /// One for each column.
    OfColumns(&'a [f32]),
}

/// Multiplies each value of a band by the factor of its row or column and rounds it into `target`, values of `to`.
/// Returns whether every result is finite.
///
/// # Errors
/// The lengths do not agree.
pub fn scale(
    cpu: Cpu,
    band: Band,
    updated: &[u8],
    factors: Factors,
    to: Element,
    target: &mut [u8],
) -> Result<bool, LengthError> {
    let values = check_band("scale: updated weight", band, updated)?;
    check_length("scale: target", target.len(), values.len().checked_mul(to.size_bytes()))?;
    match factors {
        Factors::OfRows(factors) => check_length("scale: factors of rows", factors.len(), Some(band.rows))?,
        Factors::OfColumns(factors) => check_length("scale: factors of columns", factors.len(), Some(band.columns))?,
    }
    let columns = band.columns.max(1);
    let mut same = [0.0; SCRATCH];
    let mut products = [0.0; SCRATCH];
    let mut finite = true;
    let targets = target.chunks_exact_mut(columns * to.size_bytes());
    for (index, (row, target)) in values.chunks_exact(columns).zip(targets).enumerate() {
        if let Factors::OfRows(factors) = factors {
            same.fill(factors[index]);
        }
        let pieces = row.chunks(SCRATCH).zip(target.chunks_mut(SCRATCH * to.size_bytes()));
        for (piece, (values, target)) in pieces.enumerate() {
            let factors = match factors {
                Factors::OfRows(_) => &same[..values.len()],
                Factors::OfColumns(factors) => &factors[piece * SCRATCH..][..values.len()],
            };
            let products = &mut products[..values.len()];
            finite &= multiply(cpu, values, factors, products);
            finite &= narrow_unchecked(cpu, products, to, target);
        }
    }
    Ok(finite)
}

/// The values of a band whose length is right.
fn check_band<'a>(what: &'static str, band: Band, updated: &'a [u8]) -> Result<&'a [[u8; 4]], LengthError> {
    check_length(what, updated.len(), band.rows.checked_mul(band.columns).and_then(|count| count.checked_mul(4)))?;
    Ok(updated.as_chunks::<4>().0)
}

/// `products = values * factors`; whether all of them are finite.
fn multiply(cpu: Cpu, values: &[[u8; 4]], factors: &[f32], products: &mut [f32]) -> bool {
    match cpu.level() {
        // SAFETY: a `Cpu` exists only for a level that this CPU was found to have.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::multiply(values, factors, products) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::multiply(values, factors, products) },
        _ => scalar::multiply(values, factors, products),
    }
}
