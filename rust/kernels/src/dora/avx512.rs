//! AVX-512: the loops of `scalar`, compiled for this level.

use super::scalar;

/// See [`scalar::square_sums`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub fn square_sums(columns: usize, values: &[[u8; 4]], sums: &mut [f32]) {
    scalar::square_sums(columns, values, sums);
}

/// See [`scalar::add_squares`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub fn add_squares(row: &[[u8; 4]], sums: &mut [f32]) {
    scalar::add_squares(row, sums);
}

/// See [`scalar::multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub fn multiply(values: &[[u8; 4]], factors: &[f32], products: &mut [f32]) -> bool {
    scalar::multiply(values, factors, products)
}
