//! AVX2: codes by a search of four compares, values by byte shuffles.
//!
//! A code is found by four compares: each is with the middle of what is left of the thresholds, looked up by the
//! answers so far. Dequantizing looks up bytes: the 16 values of a block are made once, cut into planes of first bytes,
//! second bytes and so on, and each plane is a table for one byte shuffle.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _CMP_NGE_UQ, _CMP_UNORD_Q, _MM_FROUND_TO_NEAREST_INT, _mm_and_si128, _mm_loadu_si128,
    _mm_packus_epi16, _mm_set1_epi8, _mm_set1_epi16, _mm_shuffle_epi8, _mm_srli_epi16, _mm_storeu_si128,
    _mm_unpackhi_epi8, _mm_unpackhi_epi16, _mm_unpacklo_epi8, _mm_unpacklo_epi16, _mm256_abs_epi8, _mm256_add_epi32,
    _mm256_and_si256, _mm256_blendv_epi8, _mm256_blendv_ps, _mm256_broadcastsi128_si256, _mm256_castps_si256,
    _mm256_castsi256_ps, _mm256_castsi256_si128, _mm256_cmp_ps, _mm256_cvtps_ph, _mm256_extracti128_si256,
    _mm256_loadu_ps, _mm256_loadu_si256, _mm256_maddubs_epi16, _mm256_mul_ps, _mm256_or_si256, _mm256_packs_epi16,
    _mm256_packs_epi32, _mm256_packus_epi16, _mm256_packus_epi32, _mm256_permute4x64_epi64,
    _mm256_permutevar8x32_epi32, _mm256_permutevar8x32_ps, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_setr_epi32, _mm256_shuffle_epi8, _mm256_slli_epi16, _mm256_slli_epi32, _mm256_srli_epi32, _mm256_srli_si256,
};

use super::{Code, SCRATCH, scalar};
use crate::cast;
use crate::element::Element;

/// Values that are packed together.
const GROUP: usize = 32;
/// f32 of a register.
const LANES: usize = 8;

/// See [`scalar::largest_magnitude`].
#[target_feature(enable = "avx2")]
pub fn largest_magnitude(values: &[f32]) -> f32 {
    let (blocks, rest) = values.as_chunks::<GROUP>();
    let mut largest = [0_u32; GROUP];
    for block in blocks {
        for (largest, value) in largest.iter_mut().zip(block) {
            *largest = (*largest).max(value.to_bits() & 0x7FFF_FFFF);
        }
    }
    let in_rest = scalar::largest_magnitude(rest).to_bits();
    f32::from_bits(largest.into_iter().fold(in_rest, u32::max))
}

/// See [`scalar::quantize_blocks`]; a full block is a multiple of 32 values.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn quantize_blocks(code: Code, size: usize, from: Element, source: &[u8], packed: &mut [u8], absmax: &mut [f32]) {
    let search = Search::new(code);
    let mut scratch = [0.0; SCRATCH];
    let batches = source.chunks(SCRATCH * from.size_bytes()).zip(packed.chunks_mut(SCRATCH / 2));
    for ((source, packed), absmax) in batches.zip(absmax.chunks_mut(SCRATCH / size)) {
        if from == Element::Bf16 {
            quantize_bf16(&search, size, source, packed, absmax);
            continue;
        }
        let values = &mut scratch[..source.len() / from.size_bytes()];
        match from {
            Element::F16 => cast::f16c::widen_f16(source, values),
            Element::F32 | Element::Bf16 => cast::widen_scalar(from, source, values),
        }
        // All scales of a batch first: they do not wait for each other.
        for (values, absmax) in values.chunks_exact(size).zip(absmax.iter_mut()) {
            *absmax = largest_magnitude(values);
        }
        let blocks = values.chunks_exact(size).zip(packed.chunks_exact_mut(size / 2));
        for ((values, packed), absmax) in blocks.zip(absmax) {
            let inverse = _mm256_set1_ps(1.0 / scalar::at_least_smallest(*absmax));
            for (group, bytes) in values.as_chunks::<GROUP>().0.iter().zip(packed.as_chunks_mut::<{ GROUP / 2 }>().0) {
                let parts = group.as_chunks::<LANES>().0;
                let found = [0, 1, 2, 3].map(|part| search.codes(_mm256_mul_ps(load(&parts[part]), inverse)));
                store(bytes, search.packed(found));
            }
        }
    }
}

/// Full blocks of bf16: the two values of a pair become f32 by a shift and a mask, where they lie.
#[target_feature(enable = "avx2,fma,f16c")]
fn quantize_bf16(search: &Search, size: usize, source: &[u8], packed: &mut [u8], absmax: &mut [f32]) {
    for (source, absmax) in source.chunks_exact(size * 2).zip(absmax.iter_mut()) {
        *absmax = largest_bf16(source);
    }
    let upper = _mm256_set1_epi32(0xFFFF_0000_u32.cast_signed());
    let blocks = source.chunks_exact(size * 2).zip(packed.chunks_exact_mut(size / 2));
    for ((source, packed), absmax) in blocks.zip(absmax) {
        let inverse = _mm256_set1_ps(1.0 / scalar::at_least_smallest(*absmax));
        let codes = |bits| search.codes(_mm256_mul_ps(_mm256_castsi256_ps(bits), inverse));
        for (group, bytes) in
            source.as_chunks::<{ GROUP * 2 }>().0.iter().zip(packed.as_chunks_mut::<{ GROUP / 2 }>().0)
        {
            let halves = group.as_chunks::<32>().0;
            let pairs = [load_pairs(&halves[0]), load_pairs(&halves[1])];
            let first = pairs.map(|pairs| codes(_mm256_slli_epi32::<16>(pairs)));
            let second = pairs.map(|pairs| codes(_mm256_and_si256(pairs, upper)));
            store(bytes, search.packed_pairs(first, second));
        }
    }
}

/// See [`scalar::largest_magnitude`]: magnitudes of bf16 order like their bits, which are the upper ones of an f32.
#[inline]
#[target_feature(enable = "avx2")]
fn largest_bf16(source: &[u8]) -> f32 {
    let mut largest = [0_u16; GROUP];
    for group in source.as_chunks::<2>().0.as_chunks::<GROUP>().0 {
        for (largest, bytes) in largest.iter_mut().zip(group) {
            *largest = (*largest).max(u16::from_le_bytes(*bytes) & 0x7FFF);
        }
    }
    f32::from_bits(u32::from(largest.into_iter().fold(0, u16::max)) << 16)
}

/// The thresholds, laid out for the search. The answers are -1 and 0, so a place counted down from 0 is the index.
struct Search {
    first: __m256,
    second: [__m256; 2],
    third: __m256,
    fourth: __m256,
    order: __m256i,
}

impl Search {
    #[target_feature(enable = "avx2")]
    fn new(code: Code) -> Self {
        let thresholds = code.thresholds();
        // Of 8 entries, the one for `answers` (0 to -7) stands at its three lowest bits.
        let third: [f32; LANES] = std::array::from_fn(|place| thresholds[((LANES - place) % 4) * 4 + 1]);
        let fourth: [f32; LANES] = std::array::from_fn(|place| thresholds[((LANES - place) % LANES) * 2]);
        let order = code.order();
        Self {
            first: _mm256_set1_ps(thresholds[7]),
            second: [_mm256_set1_ps(thresholds[3]), _mm256_set1_ps(thresholds[11])],
            third: load(&third),
            fourth: load(&fourth),
            order: _mm256_broadcastsi128_si256(load_bytes(&order)),
        }
    }

    /// Minus the number of thresholds that each value is above.
    #[target_feature(enable = "avx2")]
    fn codes(&self, values: __m256) -> __m256i {
        let above = |thresholds| _mm256_castps_si256(_mm256_cmp_ps::<_CMP_NGE_UQ>(thresholds, values));
        let first = _mm256_cmp_ps::<_CMP_NGE_UQ>(self.first, values);
        let second = above(_mm256_blendv_ps(self.second[0], self.second[1], first));
        let first = _mm256_castps_si256(first);
        let answers = _mm256_add_epi32(_mm256_add_epi32(first, first), second);
        let third = above(_mm256_permutevar8x32_ps(self.third, answers));
        let answers = _mm256_add_epi32(_mm256_add_epi32(answers, answers), third);
        let fourth = above(_mm256_permutevar8x32_ps(self.fourth, answers));
        _mm256_add_epi32(_mm256_add_epi32(answers, answers), fourth)
    }

    /// The bytes of 16 pairs of values, 8 in each register.
    #[target_feature(enable = "avx2")]
    fn packed_pairs(&self, first: [__m256i; 2], second: [__m256i; 2]) -> __m128i {
        let words = [_mm256_packs_epi32(first[0], first[1]), _mm256_packs_epi32(second[0], second[1])];
        let nibbles = _mm256_shuffle_epi8(self.order, _mm256_abs_epi8(_mm256_packs_epi16(words[0], words[1])));
        // In each half of the register 8 first and then 8 second ones.
        let bytes = _mm256_or_si256(_mm256_slli_epi16::<4>(nibbles), _mm256_srli_si256::<8>(nibbles));
        let bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 3, 6, 7));
        _mm256_castsi256_si128(bytes)
    }

    /// The bytes of 32 values.
    #[target_feature(enable = "avx2")]
    fn packed(&self, found: [__m256i; 4]) -> __m128i {
        let words = [_mm256_packs_epi32(found[0], found[1]), _mm256_packs_epi32(found[2], found[3])];
        // Packing works on each half of a register for itself; this puts the fours back in order.
        let bytes = _mm256_packs_epi16(words[0], words[1]);
        let bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        let nibbles = _mm256_shuffle_epi8(self.order, _mm256_abs_epi8(bytes));
        // 16 * first + 1 * second
        let pairs = _mm256_maddubs_epi16(nibbles, _mm256_set1_epi16(0x0110));
        let packed = _mm256_packus_epi16(pairs, pairs);
        _mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b1000>(packed))
    }
}

/// See [`scalar::dequantize_blocks`]; a full block is a multiple of 32 values.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn dequantize_blocks(code: Code, size: usize, packed: &[u8], absmax: &[f32], to: Element, target: &mut [u8]) {
    let book = code.book();
    let (book, _) = book.as_chunks::<LANES>();
    let book = [load(&book[0]), load(&book[1])];
    let targets = target.chunks_exact_mut(size * to.size_bytes());
    for ((packed, absmax), target) in packed.chunks_exact(size / 2).zip(absmax).zip(targets) {
        let absmax = _mm256_set1_ps(*absmax);
        let values = book.map(|values| _mm256_mul_ps(values, absmax));
        match to {
            Element::F32 => dequantize_with(&planes_of_words(values), packed, target),
            Element::F16 | Element::Bf16 => dequantize_with(&planes_of_halves(values, to), packed, target),
        }
    }
}

/// The values rounded to f16 or bf16: their low bytes, their high bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn planes_of_halves(values: [__m256; 2], to: Element) -> [__m128i; 2] {
    // Whether a value became infinite is the caller's question: the formula has it so.
    let [first, second] = if to == Element::F16 {
        values.map(|values| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values))
    } else {
        let words = values.map(|values| rounded_to_bf16(values));
        // Packing works on each half of a register for itself; this puts the fours back in order.
        let halves = _mm256_permute4x64_epi64::<0b1101_1000>(_mm256_packus_epi32(words[0], words[1]));
        [_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves)]
    };
    let low = _mm_set1_epi16(0x00FF);
    [
        _mm_packus_epi16(_mm_and_si128(first, low), _mm_and_si128(second, low)),
        _mm_packus_epi16(_mm_srli_epi16::<8>(first), _mm_srli_epi16::<8>(second)),
    ]
}

/// See [`crate::element::f32_to_bf16`]; the bits stand in the lower half of each word.
#[inline]
#[target_feature(enable = "avx2")]
fn rounded_to_bf16(values: __m256) -> __m256i {
    let bits = _mm256_castps_si256(values);
    let upper = _mm256_srli_epi32::<16>(bits);
    let odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd));
    let quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x0040));
    let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(values, values));
    _mm256_blendv_epi8(rounded, quiet, is_nan)
}

/// The bytes of the values, the lowest of each first.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn planes_of_words(values: [__m256; 2]) -> [__m128i; 4] {
    let [first, second] = values.map(|values| _mm256_castps_si256(values));
    let low = _mm256_set1_epi32(0xFF);
    let bytes = [
        (first, second),
        (_mm256_srli_epi32::<8>(first), _mm256_srli_epi32::<8>(second)),
        (_mm256_srli_epi32::<16>(first), _mm256_srli_epi32::<16>(second)),
        (_mm256_srli_epi32::<24>(first), _mm256_srli_epi32::<24>(second)),
    ];
    bytes.map(|(first, second)| {
        let words = _mm256_packus_epi32(_mm256_and_si256(first, low), _mm256_and_si256(second, low));
        let words = _mm256_permute4x64_epi64::<0b1101_1000>(words);
        _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words))
    })
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dequantize_with<const SIZE: usize>(planes: &[__m128i; SIZE], packed: &[u8], target: &mut [u8]) {
    let low = _mm_set1_epi8(0x0F);
    let groups = packed.as_chunks::<{ GROUP / 2 }>().0;
    for (group, target) in groups.iter().zip(target.chunks_exact_mut(GROUP * SIZE)) {
        let bytes = load_bytes(group);
        let (first, second) = (_mm_and_si128(_mm_srli_epi16::<4>(bytes), low), _mm_and_si128(bytes, low));
        let codes = [_mm_unpacklo_epi8(first, second), _mm_unpackhi_epi8(first, second)];
        for (codes, target) in codes.into_iter().zip(target.as_chunks_mut::<16>().0.chunks_exact_mut(SIZE)) {
            woven(&planes.map(|plane| _mm_shuffle_epi8(plane, codes)), target);
        }
    }
}

/// Stores planes of bytes so that the bytes of one value lie together.
#[inline]
#[target_feature(enable = "avx2")]
fn woven(planes: &[__m128i], target: &mut [[u8; 16]]) {
    let low = [_mm_unpacklo_epi8(planes[0], planes[1]), _mm_unpackhi_epi8(planes[0], planes[1])];
    if let [_, _, third, fourth] = planes {
        let high = [_mm_unpacklo_epi8(*third, *fourth), _mm_unpackhi_epi8(*third, *fourth)];
        for (half, targets) in target.chunks_exact_mut(2).enumerate() {
            store(&mut targets[0], _mm_unpacklo_epi16(low[half], high[half]));
            store(&mut targets[1], _mm_unpackhi_epi16(low[half], high[half]));
        }
    } else {
        store(&mut target[0], low[0]);
        store(&mut target[1], low[1]);
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(values: &[f32; LANES]) -> __m256 {
    // SAFETY: `values` is 32 readable bytes; the instruction allows any alignment.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_pairs(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: `bytes` is 32 readable bytes; the instruction allows any alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_bytes(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: `bytes` is 16 readable bytes; the instruction allows any alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(bytes: &mut [u8; 16], register: __m128i) {
    // SAFETY: `bytes` is 16 writable bytes; the instruction allows any alignment.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), register) };
}
