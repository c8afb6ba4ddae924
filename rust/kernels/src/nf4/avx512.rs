//! AVX-512: codes and values by look-up in whole registers.
//!
//! A code of NF4 is found with one compare. Scaled values lie between -1 and 1; that range is cut into 32 buckets, so
//! narrow that none holds two thresholds. A value's bucket gives the one threshold that it may be above, and the number
//! of those below. FP4 has thresholds that lie too close, and goes the way of [`avx2`], as do blocks that are not
//! finite. Dequantizing looks values up by their code in one register that holds the block's 16, rounded already.

use std::arch::x86_64::{
    __m128i, __m256i, __m512, __m512i, _CMP_GT_OQ, _mm_loadl_epi64, _mm_loadu_si128, _mm_storeu_si128,
    _mm256_loadu_si256, _mm256_storeu_si256, _mm512_and_si512, _mm512_broadcast_i64x4, _mm512_castps_si512,
    _mm512_castsi512_ps, _mm512_cmp_ps_mask, _mm512_cvtepi16_epi8, _mm512_cvtepi32_epi8, _mm512_cvtepu8_epi32,
    _mm512_cvtepu8_epi64, _mm512_cvtph_ps, _mm512_cvttps_epi32, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_maddubs_epi16, _mm512_mask_add_epi32, _mm512_max_epu16, _mm512_max_epu32, _mm512_mul_ps, _mm512_or_si512,
    _mm512_packus_epi16, _mm512_packus_epi32, _mm512_permutex2var_epi32, _mm512_permutex2var_ps,
    _mm512_permutexvar_epi16, _mm512_permutexvar_epi32, _mm512_permutexvar_ps, _mm512_reduce_max_epu32,
    _mm512_set1_epi16, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setr_epi32, _mm512_setzero_ps, _mm512_setzero_si512,
    _mm512_slli_epi32, _mm512_slli_epi64, _mm512_srli_epi32, _mm512_srli_epi64, _mm512_storeu_si512,
};

use super::{Code, avx2, scalar};
use crate::cast;
use crate::element::Element;

/// Values of f32 and f16 that are packed together; full blocks of more than 32 are multiples of it.
const GROUP: usize = 64;
/// Blocks whose scales are found together.
const BATCH: usize = 16;
/// f32 of a register.
const LANES: usize = 16;
/// -1 falls into bucket 0 and 1 into bucket 31; so does what a rounding error put a little beyond them.
const BUCKETS_PER_UNIT: f32 = 15.5;

/// See [`avx2::quantize_blocks`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub fn quantize_blocks(code: Code, size: usize, from: Element, source: &[u8], packed: &mut [u8], absmax: &mut [f32]) {
    if code == Code::Fp4 || (from != Element::Bf16 && !size.is_multiple_of(GROUP)) {
        return avx2::quantize_blocks(code, size, from, source, packed, absmax);
    }
    match from {
        Element::F32 => quantize_with::<4, false>(size, source, packed, absmax),
        Element::F16 => quantize_with::<2, false>(size, source, packed, absmax),
        Element::Bf16 => quantize_with::<2, true>(size, source, packed, absmax),
    }
}

/// `SIZE` is the element's in bytes, `BRAIN` whether it is bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn quantize_with<const SIZE: usize, const BRAIN: bool>(
    size: usize,
    source: &[u8],
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let from = if SIZE == 4 {
        Element::F32
    } else if BRAIN {
        Element::Bf16
    } else {
        Element::F16
    };
    let buckets = Buckets::new();
    let batches = source.chunks(size * SIZE * BATCH).zip(packed.chunks_mut(size / 2 * BATCH));
    for ((source, packed), absmax) in batches.zip(absmax.chunks_mut(BATCH)) {
        // All scales of a batch first: they do not wait for each other, and are divided together.
        let mut inverses = [0.0; BATCH];
        for (source, absmax) in source.chunks_exact(size * SIZE).zip(absmax.iter_mut()) {
            *absmax = largest_magnitude::<SIZE, BRAIN>(source);
        }
        for (inverse, absmax) in inverses.iter_mut().zip(absmax.iter()) {
            *inverse = 1.0 / scalar::at_least_smallest(*absmax);
        }
        let blocks = source.chunks_exact(size * SIZE).zip(packed.chunks_exact_mut(size / 2));
        for ((source, packed), (absmax, inverse)) in blocks.zip(absmax.iter_mut().zip(inverses)) {
            if absmax.is_finite() {
                quantize_block::<SIZE, BRAIN>(&buckets, _mm512_set1_ps(inverse), source, packed);
            } else {
                avx2::quantize_blocks(Code::Nf4, size, from, source, packed, std::slice::from_mut(absmax));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn quantize_block<const SIZE: usize, const BRAIN: bool>(
    buckets: &Buckets,
    inverse: __m512,
    source: &[u8],
    packed: &mut [u8],
) {
    if BRAIN {
        for (bytes, packed) in source.as_chunks::<64>().0.iter().zip(packed.as_chunks_mut::<16>().0) {
            let (first, second) = pairs(load(bytes));
            let first = buckets.codes(_mm512_mul_ps(first, inverse));
            let second = buckets.codes(_mm512_mul_ps(second, inverse));
            store_quarter(packed, _mm512_cvtepi32_epi8(_mm512_or_si512(_mm512_slli_epi32::<4>(first), second)));
        }
        return;
    }
    let parts = source.as_chunks::<SIZE>().0.as_chunks::<LANES>().0.as_chunks::<{ GROUP / LANES }>().0;
    for (parts, bytes) in parts.iter().zip(packed.as_chunks_mut::<{ GROUP / 2 }>().0) {
        let mut found = [_mm512_setzero_si512(); GROUP / LANES];
        for (found, part) in found.iter_mut().zip(parts) {
            *found = buckets.codes(_mm512_mul_ps(values::<SIZE>(part), inverse));
        }
        store_half(bytes, pack(found));
    }
}

/// 32 bf16 as f32: the first and the second of each pair.
#[inline]
#[target_feature(enable = "avx512f")]
fn pairs(bits: __m512i) -> (__m512, __m512) {
    let second = _mm512_and_si512(bits, _mm512_set1_epi32(0xFFFF_0000_u32.cast_signed()));
    (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)), _mm512_castsi512_ps(second))
}

/// See [`scalar::largest_magnitude`]; a multiple of 32 values.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn largest_magnitude<const SIZE: usize, const BRAIN: bool>(source: &[u8]) -> f32 {
    let mut largest = _mm512_setzero_si512();
    if BRAIN {
        // Magnitudes of bf16 order like their bits, and become f32 without a change of bits.
        let magnitude = _mm512_set1_epi16(0x7FFF);
        for bytes in source.as_chunks::<64>().0 {
            largest = _mm512_max_epu16(largest, _mm512_and_si512(load(bytes), magnitude));
        }
        let upper = _mm512_and_si512(largest, _mm512_set1_epi32(0x7FFF_0000));
        largest = _mm512_max_epu32(upper, _mm512_slli_epi32::<16>(largest));
    } else {
        let magnitude = _mm512_set1_epi32(0x7FFF_FFFF);
        for part in source.as_chunks::<SIZE>().0.as_chunks::<LANES>().0 {
            let bits = _mm512_castps_si512(values::<SIZE>(part));
            largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, magnitude));
        }
    }
    f32::from_bits(_mm512_reduce_max_epu32(largest))
}

/// Values of f32, or of f16 as f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn values<const SIZE: usize>(part: &[[u8; SIZE]; LANES]) -> __m512 {
    let bytes = part.as_flattened();
    match (bytes.as_chunks::<64>().0, bytes.as_chunks::<32>().0) {
        ([bytes], _) => _mm512_castsi512_ps(load(bytes)),
        (_, [bytes]) => _mm512_cvtph_ps(load_half(bytes)),
        _ => _mm512_setzero_ps(),
    }
}

/// The search for NF4's codes.
struct Buckets {
    /// Of each bucket the threshold in it, else infinity; two registers.
    threshold: [__m512; 2],
    /// Of each bucket the number of thresholds in those below.
    below: [__m512i; 2],
}

impl Buckets {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn new() -> Self {
        let mut threshold = [f32::INFINITY; 2 * LANES];
        let mut below = [0_i32; 2 * LANES];
        for limit in Code::Nf4.thresholds() {
            // The very operations of `codes`: they never put a larger value into a lower bucket, so every value of a
            // lower bucket is at most `limit`, and every value of a higher one is above it.
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and 31")]
            let bucket = limit.mul_add(BUCKETS_PER_UNIT, BUCKETS_PER_UNIT) as usize;
            debug_assert!(threshold[bucket].is_infinite(), "two thresholds in one bucket");
            threshold[bucket] = limit;
            below[bucket + 1..].iter_mut().for_each(|count| *count += 1);
        }
        let (low, high) = (&threshold.as_chunks::<LANES>().0, &below.as_chunks::<LANES>().0);
        Self {
            threshold: [load_floats(&low[0]), load_floats(&low[1])],
            below: [load_counts(&high[0]), load_counts(&high[1])],
        }
    }

    /// How many thresholds each value is above; the values are finite, from -1 to 1 but for a rounding error.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn codes(&self, values: __m512) -> __m512i {
        let unit = _mm512_set1_ps(BUCKETS_PER_UNIT);
        let bucket = _mm512_cvttps_epi32(_mm512_fmadd_ps(values, unit, unit));
        let threshold = _mm512_permutex2var_ps(self.threshold[0], bucket, self.threshold[1]);
        let below = _mm512_permutex2var_epi32(self.below[0], bucket, self.below[1]);
        let is_above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(values, threshold);
        _mm512_mask_add_epi32(below, is_above, below, _mm512_set1_epi32(1))
    }
}

/// The bytes of 64 codes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn pack(found: [__m512i; 4]) -> __m256i {
    let words = [_mm512_packus_epi32(found[0], found[1]), _mm512_packus_epi32(found[2], found[3])];
    let bytes = _mm512_packus_epi16(words[0], words[1]);
    // Packing works on each quarter of a register for itself; this puts the fours back in order.
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let bytes = _mm512_permutexvar_epi32(order, bytes);
    // 16 * first + 1 * second
    _mm512_cvtepi16_epi8(_mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x0110)))
}

/// See [`avx2::dequantize_blocks`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub fn dequantize_blocks(code: Code, size: usize, packed: &[u8], absmax: &[f32], to: Element, target: &mut [u8]) {
    let book = load_floats(&code.book());
    let targets = target.chunks_exact_mut(size * to.size_bytes());
    for ((packed, absmax), target) in packed.chunks_exact(size / 2).zip(absmax).zip(targets) {
        let values = _mm512_mul_ps(book, _mm512_set1_ps(*absmax));
        if to == Element::F32 {
            dequantize_words(values, packed, target);
        } else {
            dequantize_halves(halves(values, to), packed, target);
        }
    }
}

/// The 16 values as f16 or bf16, twice.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn halves(values: __m512, to: Element) -> __m512i {
    let mut floats = [0.0; LANES];
    // SAFETY: `floats` is 64 writable bytes; the instruction allows any alignment.
    unsafe { _mm512_storeu_si512(floats.as_mut_ptr().cast(), _mm512_castps_si512(values)) };
    let mut table = [0; 2 * LANES];
    match to {
        Element::F16 => cast::f16c::narrow_f16(&floats, &mut table),
        _ => cast::lanes::narrow_bf16(&floats, &mut table),
    };
    _mm512_broadcast_i64x4(load_half(&table))
}

/// A look-up of 16-bit values reads five bits of an index; the table is there twice, so the fifth does not matter.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn dequantize_halves(table: __m512i, packed: &[u8], target: &mut [u8]) {
    for (bytes, target) in packed.as_chunks::<16>().0.iter().zip(target.as_chunks_mut::<64>().0) {
        // SAFETY: `bytes` is 16 readable bytes; the instruction allows any alignment.
        let pairs = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) });
        let codes = _mm512_or_si512(_mm512_srli_epi32::<4>(pairs), _mm512_slli_epi32::<16>(pairs));
        store(target, _mm512_permutexvar_epi16(codes, table));
    }
}

/// A look-up of 32-bit values reads four bits of an index.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn dequantize_words(table: __m512, packed: &[u8], target: &mut [u8]) {
    for (bytes, target) in packed.as_chunks::<8>().0.iter().zip(target.as_chunks_mut::<64>().0) {
        // SAFETY: `bytes` is 8 readable bytes; the instruction allows any alignment.
        let pairs = _mm512_cvtepu8_epi64(unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) });
        let codes = _mm512_or_si512(_mm512_srli_epi64::<4>(pairs), _mm512_slli_epi64::<32>(pairs));
        store(target, _mm512_castps_si512(_mm512_permutexvar_ps(codes, table)));
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: `bytes` is 64 readable bytes; the instruction allows any alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_floats(values: &[f32; LANES]) -> __m512 {
    // SAFETY: `values` is 64 readable bytes; the instruction allows any alignment.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_counts(counts: &[i32; LANES]) -> __m512i {
    // SAFETY: `counts` is 64 readable bytes; the instruction allows any alignment.
    unsafe { _mm512_loadu_si512(counts.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx")]
fn load_half(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: `bytes` is 32 readable bytes; the instruction allows any alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(bytes: &mut [u8; 64], register: __m512i) {
    // SAFETY: `bytes` is 64 writable bytes; the instruction allows any alignment.
    unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), register) };
}

#[inline]
#[target_feature(enable = "avx")]
fn store_quarter(bytes: &mut [u8; 16], register: __m128i) {
    // SAFETY: `bytes` is 16 writable bytes; the instruction allows any alignment.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), register) };
}

#[inline]
#[target_feature(enable = "avx")]
fn store_half(bytes: &mut [u8; 32], register: __m256i) {
    // SAFETY: `bytes` is 32 writable bytes; the instruction allows any alignment.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), register) };
}
