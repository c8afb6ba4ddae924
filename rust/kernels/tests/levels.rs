//! One runner for every kernel: each level that this CPU has gives the bits of the scalar file, for odd sizes and odd
//! values. What this CPU cannot run is named in the output of `levels_of_this_cpu` (`--no-capture`).

use fastft_kernels::cast::{cast, narrow, widen};
use fastft_kernels::dora::{self, Factors};
use fastft_kernels::merge::{Band, Base, Delta, Left, Panels, Rounding, merge};
use fastft_kernels::nf4::{self, Blocks, Code};
use fastft_kernels::parallel::{self, Magnitude};
use fastft_kernels::{Cpu, Element, Level};
use proptest::prelude::*;

fn scalar() -> Cpu {
    Cpu::at(Level::Scalar).unwrap_or_else(|| unreachable!("scalar is always there"))
}

/// Calls `check` with every level above scalar that this CPU has.
fn for_each_level(mut check: impl FnMut(Cpu)) {
    Level::ALL.into_iter().filter(|level| *level > Level::Scalar).filter_map(Cpu::at).for_each(&mut check);
}

#[test]
fn levels_of_this_cpu() {
    for level in Level::ALL {
        println!("{}: {}", level.name(), if level.is_available() { "run" } else { "NOT RUN, this CPU lacks it" });
    }
}

/// A small generator, so that large inputs are cheap and the same everywhere (Steele, Lea, Flood: `SplitMix64`, 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Between -1 and 1.
    fn value(&mut self) -> f32 {
        #[expect(clippy::cast_precision_loss, reason = "any value will do")]
        let value = (self.next() >> 40) as f32 / 8_388_608.0 - 1.0;
        value
    }

    fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.value()).collect()
    }

    /// Any bits: NaN, infinite, subnormal and all.
    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next().to_le_bytes()[0]).collect()
    }
}

/// Values at which something changes, as f32 bits.
const ODD: [u32; 24] = [
    0x0000_0000,
    0x8000_0000,
    0x0000_0001,
    0x8000_0001,
    0x007F_FFFF,
    0x0080_0000,
    0x3F80_0000,
    0xBF80_0000,
    0x7F7F_FFFF,
    0xFF7F_FFFF,
    0x7F80_0000,
    0xFF80_0000,
    0x7F80_0001,
    0xFF80_0001,
    0x7FC0_0000,
    0xFFFF_FFFF,
    0x477F_E000,
    0x477F_EFFF,
    0x477F_F000,
    0x3880_0000,
    0x387F_E000,
    0x3300_0000,
    0x3300_0001,
    0x32FF_FFFF,
];

fn odd_values(count: usize) -> Vec<f32> {
    ODD.into_iter().cycle().take(count).map(f32::from_bits).collect()
}

#[test]
fn narrow_agrees_for_every_length() {
    for length in 0..70 {
        let source = odd_values(length);
        for to in Element::ALL {
            let mut expected = vec![0; length * to.size_bytes()];
            let kept = narrow(scalar(), &source, to, &mut expected);
            for_each_level(|cpu| {
                let mut target = vec![0xAA; expected.len()];
                assert_eq!(narrow(cpu, &source, to, &mut target), kept, "{cpu:?} {to:?} {length}");
                assert_eq!(target, expected, "{cpu:?} {to:?} {length}");
            });
        }
    }
}

#[test]
fn whether_finite_values_stayed_finite() {
    let kept = |value: f32, to: Element| {
        // In a full block, and in the rest that is shorter than a block.
        [16, 3].map(|length| {
            let mut source = vec![f32::NAN; length];
            source[length / 2] = value;
            let mut target = vec![0; length * to.size_bytes()];
            let mut answers = vec![narrow(scalar(), &source, to, &mut target)];
            for_each_level(|cpu| answers.push(narrow(cpu, &source, to, &mut target)));
            answers.dedup();
            answers
        })
    };
    let same = |answer: bool| [vec![Ok(answer)], vec![Ok(answer)]];
    assert_eq!(kept(65519.0, Element::F16), same(true));
    assert_eq!(kept(65520.0, Element::F16), same(false));
    assert_eq!(kept(-1e6, Element::F16), same(false));
    assert_eq!(kept(f32::INFINITY, Element::F16), same(true));
    assert_eq!(kept(3.39e38, Element::Bf16), same(true));
    assert_eq!(kept(f32::MAX, Element::Bf16), same(false));
    assert_eq!(kept(f32::MAX, Element::F32), same(true));
}

#[test]
fn widen_agrees_for_every_16_bit_value() {
    let every: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for from in [Element::F16, Element::Bf16] {
        // An odd start: no kernel may count on alignment.
        for source in [&every[..], &every[2..], &every[1..every.len() - 1]] {
            let mut expected = vec![0.0; source.len() / 2];
            assert_eq!(widen(scalar(), from, source, &mut expected), Ok(()));
            for_each_level(|cpu| {
                let mut target = vec![0.0; expected.len()];
                assert_eq!(widen(cpu, from, source, &mut target), Ok(()));
                assert!(
                    target.iter().zip(&expected).all(|(one, other)| one.to_bits() == other.to_bits()),
                    "{cpu:?} {from:?}"
                );
            });
        }
    }
}

/// A merge in one place or from one buffer into another.
#[derive(Clone, Debug)]
struct Case {
    rows: usize,
    columns: usize,
    ranks: Vec<usize>,
    from: Element,
    to: Element,
    transposed: bool,
    any_bits: bool,
    seed: u64,
}

fn element() -> impl Strategy<Value = Element> {
    prop::sample::select(&Element::ALL[..])
}

prop_compose! {
    fn case()(
        rows in 0_usize..20, columns in prop_oneof![0_usize..80, 500_usize..1100], ranks in prop::collection::vec(1_usize..20, 0..3),
        from in element(), to in element(), transposed: bool, any_bits: bool, seed: u64,
    ) -> Case {
        Case { rows, columns, ranks, from, to, transposed, any_bits, seed }
    }
}

/// The factors of a case: left, right, scale.
fn factors(case: &Case, random: &mut Random) -> Vec<(Vec<f32>, Panels, f32)> {
    let ranks = case.ranks.iter().filter(|_| case.columns > 0);
    ranks
        .map(|rank| {
            let left = random.values(case.rows * rank);
            let right = random.values(rank * case.columns);
            let panels = if case.transposed {
                Panels::from_columns(*rank, case.columns, &right)
            } else {
                Panels::from_rows(*rank, case.columns, &right)
            };
            (left, panels.unwrap_or_else(|error| unreachable!("{error}")), random.value() * 3.0)
        })
        .collect()
}

fn base(case: &Case, random: &mut Random) -> Vec<u8> {
    let count = case.rows * case.columns;
    if case.any_bits {
        return random.bytes(count * case.from.size_bytes());
    }
    let mut bytes = vec![0; count * case.from.size_bytes()];
    assert!(narrow(scalar(), &random.values(count), case.from, &mut bytes).is_ok());
    bytes
}

fn run(cpu: Cpu, case: &Case, base: &[u8], factors: &[(Vec<f32>, Panels, f32)]) -> (Vec<u8>, bool) {
    let deltas: Vec<_> = factors
        .iter()
        .zip(&case.ranks)
        .map(|((left, right, scale), rank)| {
            let (row_stride, rank_stride) = if case.transposed { (1, case.rows) } else { (*rank, 1) };
            Delta { left: Left { values: left, row_stride, rank_stride }, right, scale: *scale }
        })
        .collect();
    let band = Band { rows: case.rows, columns: case.columns };
    let mut target = vec![0xAA; case.rows * case.columns * case.to.size_bytes()];
    let kept = merge(cpu, band, Base::Apart(case.from, base), case.to, &mut target, &deltas, Rounding::Once);
    let kept = kept.unwrap_or_else(|error| unreachable!("{error}"));
    if case.from == case.to {
        let mut in_place = base.to_vec();
        assert_eq!(merge(cpu, band, Base::InPlace, case.to, &mut in_place, &deltas, Rounding::Once), Ok(kept));
        assert_eq!(in_place, target, "in place differs");
    }
    (target, kept)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn merge_agrees(case in case()) {
        let mut random = Random(case.seed);
        let factors = factors(&case, &mut random);
        let base = base(&case, &mut random);
        let expected = run(scalar(), &case, &base, &factors);
        for_each_level(|cpu| assert_eq!(run(cpu, &case, &base, &factors), expected, "{cpu:?}"));
    }

    /// Against f64: `|error| <= (rank + 3) 2^-24 (|W| + |s| sum |b||a|)` for f32 (formats 2.2: one rounding per fused
    /// step, one for the scale, one for the sum), and half a step of the narrower dtype on top.
    #[test]
    fn merge_is_right(case in case()) {
        let case = Case { ranks: case.ranks.into_iter().take(1).collect(), any_bits: false, ..case };
        let mut random = Random(case.seed);
        let factors = factors(&case, &mut random);
        let base = base(&case, &mut random);
        let (merged, kept) = run(scalar(), &case, &base, &factors);
        prop_assert!(kept);
        let count = case.rows * case.columns;
        let (mut weights, mut results) = (vec![0.0; count], vec![0.0; count]);
        prop_assert!(widen(scalar(), case.from, &base, &mut weights).is_ok() && widen(scalar(), case.to, &merged, &mut results).is_ok());
        let half_step = match case.to {
            Element::F32 => 0.0,
            Element::F16 => 2f64.powi(-11),
            Element::Bf16 => 2f64.powi(-8),
        };
        let mut again = Random(case.seed);
        for rank in &case.ranks {
            let (left, right) = (again.values(case.rows * rank), again.values(rank * case.columns));
            let scale = f64::from(again.value() * 3.0);
            for index in 0..count {
                let (row, column) = (index / case.columns, index % case.columns);
                let products = (0..*rank).map(|k| {
                    let b = if case.transposed { left[k * case.rows + row] } else { left[row * rank + k] };
                    let a = if case.transposed { right[column * rank + k] } else { right[k * case.columns + column] };
                    f64::from(a) * f64::from(b)
                });
                let weight = f64::from(weights[index]);
                let exact = weight + scale * products.clone().sum::<f64>();
                let size = weight.abs() + (scale * products.map(f64::abs).sum::<f64>()).abs();
                #[expect(clippy::cast_precision_loss, reason = "a rank is small")]
                let bound = (*rank as f64 + 3.0) * 2f64.powi(-24) * size + half_step * exact.abs() + 2f64.powi(-25);
                prop_assert!((f64::from(results[index]) - exact).abs() <= bound, "at {index}: {} instead of {exact}", results[index]);
            }
        }
    }

    #[test]
    fn cast_agrees(length in 0_usize..9000, seed: u64, from in element(), to in element()) {
        let bytes = Random(seed).bytes(length);
        let source = &bytes[..length / from.size_bytes() * from.size_bytes()];
        let mut expected = vec![0; source.len() / from.size_bytes() * to.size_bytes()];
        let kept = cast(scalar(), from, source, to, &mut expected);
        for_each_level(|cpu| {
            let mut target = vec![0xAA; expected.len()];
            assert_eq!(cast(cpu, from, source, to, &mut target), kept);
            assert_eq!(target, expected);
        });
    }
}

#[test]
fn merge_does_not_depend_on_the_number_of_threads() {
    let mut random = Random(8);
    let band = Band { rows: 1031, columns: 517 };
    let count = band.rows * band.columns;
    let (left, right) = (random.values(band.rows * 5), random.values(5 * band.columns));
    let Ok(right) = Panels::from_rows(5, band.columns, &right) else { unreachable!("the sizes agree") };
    for (row_stride, rank_stride) in [(5, 1), (1, band.rows)] {
        let delta = Delta { left: Left { values: &left, row_stride, rank_stride }, right: &right, scale: 0.3 };
        let base = weights(&mut random, Element::F16, count);
        for cpu in Level::ALL.into_iter().filter_map(Cpu::at) {
            let mut alone = vec![0; count * 4];
            let apart = Base::Apart(Element::F16, &base);
            let kept = merge(cpu, band, apart, Element::F32, &mut alone, &[delta], Rounding::Once);
            for threads in [1, 2, 3, 7] {
                let mut target = vec![0xAA; count * 4];
                assert_eq!(parallel::merge(cpu, band, apart, Element::F32, &mut target, delta, threads), kept);
                assert!(target == alone, "{cpu:?} {threads}");
                let mut in_place = base.clone();
                let done = parallel::merge(cpu, band, Base::InPlace, Element::F16, &mut in_place, delta, threads);
                let mut expected = base.clone();
                assert_eq!(
                    merge(cpu, band, Base::InPlace, Element::F16, &mut expected, &[delta], Rounding::Once),
                    done
                );
                assert!(in_place == expected, "{cpu:?} {threads} in place");
            }
            assert!(parallel::merge(cpu, band, apart, Element::F32, &mut alone[1..], delta, 2).is_err());
        }
    }
}

#[test]
fn dora_of_a_whole_weight_agrees_for_every_number_of_threads() {
    let mut random = Random(9);
    let band = Band { rows: 700, columns: 811 };
    let (left, right) = (random.values(band.rows * 3), random.values(3 * band.columns));
    let Ok(right) = Panels::from_rows(3, band.columns, &right) else { unreachable!("the sizes agree") };
    let delta = Delta { left: Left { values: &left, row_stride: 3, rank_stride: 1 }, right: &right, scale: 0.3 };
    let mut base = vec![0; band.rows * band.columns * 2];
    assert_eq!(narrow(scalar(), &random.values(band.rows * band.columns), Element::Bf16, &mut base), Ok(true));
    let (rows, columns) = (random.values(band.rows), random.values(band.columns));
    for magnitude in [Magnitude::OfRows(&rows), Magnitude::OfColumns(&columns)] {
        let run = |cpu, threads| {
            let mut target = vec![0xAA; base.len()];
            let apart = Base::Apart(Element::Bf16, &base);
            let done = parallel::merge_dora(cpu, band, apart, Element::Bf16, &mut target, delta, magnitude, threads);
            assert_eq!(done, Ok(true));
            let mut in_place = base.clone();
            let (here, to) = (Base::InPlace, Element::Bf16);
            let done = parallel::merge_dora(cpu, band, here, to, &mut in_place, delta, magnitude, threads);
            assert_eq!(done, Ok(true));
            assert!(in_place == target, "{cpu:?} {threads} in place");
            target
        };
        let expected = run(scalar(), 1);
        for_each_level(|cpu| {
            for threads in [1, 2, 5] {
                assert!(run(cpu, threads) == expected, "{cpu:?} {threads}");
            }
        });
        let mut short = vec![0; base.len()];
        let wrong = match magnitude {
            Magnitude::OfRows(rows) => Magnitude::OfRows(&rows[1..]),
            Magnitude::OfColumns(columns) => Magnitude::OfColumns(&columns[1..]),
        };
        let apart = Base::Apart(Element::Bf16, &base);
        assert!(parallel::merge_dora(scalar(), band, apart, Element::Bf16, &mut short, delta, wrong, 1).is_err());
    }
}

#[test]
fn wrong_sizes_are_refused() {
    let panels = Panels::from_rows(2, 3, &[0.0; 6]).unwrap_or_else(|error| unreachable!("{error}"));
    let mut target = [0; 24];
    let mut merge_of = |rows, columns, values: &[f32]| {
        let delta = Delta { left: Left { values, row_stride: 2, rank_stride: 1 }, right: &panels, scale: 1.0 };
        merge(scalar(), Band { rows, columns }, Base::InPlace, Element::F32, &mut target, &[delta], Rounding::Once)
    };
    assert_eq!(merge_of(2, 3, &[0.0; 4]), Ok(true));
    assert!(merge_of(2, 3, &[0.0; 3]).is_err());
    assert!(merge_of(3, 2, &[0.0; 6]).is_err());
    assert!(merge_of(1, 3, &[0.0; 4]).is_err());
    assert!(merge_of(usize::MAX, 3, &[0.0; 4]).is_err());
    assert!(Panels::from_rows(0, 3, &[]).is_err());
    assert!(Panels::from_columns(2, 3, &[0.0; 5]).is_err());
    assert!(widen(scalar(), Element::F16, &[0; 3], &mut [0.0; 1]).is_err());
    assert!(cast(scalar(), Element::F16, &[0; 3], Element::F32, &mut [0; 4]).is_err());
}

/// Source bytes of `count` values: any bits in every third block, small numbers in the others.
fn weights(random: &mut Random, element: Element, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count * element.size_bytes()];
    let values = random.values(count);
    assert_eq!(narrow(scalar(), &values, element, &mut bytes), Ok(true));
    for block in bytes.chunks_mut(96 * element.size_bytes()).skip(2).step_by(3) {
        let length = block.len();
        block.copy_from_slice(&random.bytes(length));
    }
    bytes
}

#[test]
fn four_bit_agrees_for_every_element_block_size_and_odd_length() {
    let mut random = Random(4);
    for code in Code::ALL {
        for size in [32, 64, 128, 256, 512, 1024, 2048, 4096] {
            let Ok(blocks) = Blocks::new(code, size) else { unreachable!("{size} is allowed") };
            for element in Element::ALL {
                for count in [0, 1, 2, 31, 33, size - 1, size, size + 1, 3 * size + 17, 5 * size + 64] {
                    let source = weights(&mut random, element, count);
                    let quantized = |cpu| {
                        let (mut packed, mut absmax) =
                            (vec![0xAA; count.div_ceil(2)], vec![-1.0; count.div_ceil(size)]);
                        assert_eq!(nf4::quantize(cpu, blocks, element, &source, &mut packed, &mut absmax), Ok(()));
                        let mut maxima = vec![-1.0; absmax.len()];
                        assert_eq!(nf4::block_maxima(cpu, blocks, element, &source, &mut maxima), Ok(()));
                        assert_eq!(bits(&maxima), bits(&absmax), "{cpu:?} {blocks:?} {element:?} {count}");
                        let mut back = vec![0xAA; source.len()];
                        assert_eq!(nf4::dequantize(cpu, blocks, &packed, &absmax, element, &mut back), Ok(()));
                        (packed, bits(&absmax), back)
                    };
                    let expected = quantized(scalar());
                    for_each_level(|cpu| {
                        assert_eq!(quantized(cpu), expected, "{cpu:?} {blocks:?} {element:?} {count}");
                    });
                }
            }
        }
    }
}

/// Every bf16, each in a block whose scale is one of many: small and large ones, whose reciprocal is not exact.
#[test]
fn four_bit_agrees_for_every_bf16() {
    let scales = [0x3F80, 0x3F81, 0x3FC0, 0x3F55, 0x4049, 0x7F7F, 0x7F01, 0x0080, 0x006D, 0x006C, 0x0003, 0x3C23];
    for scale in scales {
        let smaller: Vec<u16> = (0..=u16::MAX).filter(|bits| bits & 0x7FFF <= scale).collect();
        let mut source = Vec::new();
        for values in smaller.chunks(63) {
            let block = std::iter::once(scale).chain(values.iter().copied()).chain(std::iter::repeat(0)).take(64);
            source.extend(block.flat_map(u16::to_le_bytes));
        }
        for code in Code::ALL {
            let Ok(blocks) = Blocks::new(code, 64) else { unreachable!("64 is allowed") };
            let quantized = |cpu| {
                let (mut packed, mut absmax) = (vec![0xAA; source.len() / 4], vec![-1.0; source.len() / 128]);
                let done = nf4::quantize(cpu, blocks, Element::Bf16, &source, &mut packed, &mut absmax);
                assert_eq!(done, Ok(()));
                (packed, bits(&absmax))
            };
            let expected = quantized(scalar());
            for_each_level(|cpu| assert!(quantized(cpu) == expected, "{cpu:?} {code:?} {scale:#06x}"));
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn four_bit_does_not_depend_on_the_number_of_threads() {
    let mut random = Random(5);
    let Ok(blocks) = Blocks::new(Code::Nf4, 64) else { unreachable!("64 is allowed") };
    let count = (1 << 20) + 64 * 3 + 5;
    let source = weights(&mut random, Element::Bf16, count);
    for_each_level(|cpu| {
        let run = |threads| {
            let (mut packed, mut absmax) = (vec![0; count.div_ceil(2)], vec![0.0; count.div_ceil(64)]);
            let done = parallel::quantize_4bit(cpu, blocks, Element::Bf16, &source, &mut packed, &mut absmax, threads);
            assert_eq!(done, Ok(()));
            let mut back = vec![0; source.len()];
            let done = parallel::dequantize_4bit(cpu, blocks, &packed, &absmax, Element::Bf16, &mut back, threads);
            assert_eq!(done, Ok(()));
            (packed, bits(&absmax), back)
        };
        let alone = run(1);
        for threads in [2, 3, 4, 7] {
            assert!(run(threads) == alone, "{cpu:?} {threads}");
        }
    });
}

#[test]
fn nested_scales_do_not_depend_on_the_number_of_threads() {
    let absmax = Random(6).values(3 * (1 << 15) + 300);
    let run = |threads| {
        let (mut codes, mut scales) = (vec![0; absmax.len()], vec![0.0; absmax.len().div_ceil(256)]);
        assert_eq!(parallel::quantize_scales(&absmax, 0.25, &mut codes, &mut scales, threads), Ok(()));
        let mut back = vec![0.0; absmax.len()];
        assert_eq!(parallel::dequantize_scales(&codes, &scales, 0.25, &mut back, threads), Ok(()));
        (codes, bits(&scales), bits(&back))
    };
    let (mut codes, mut scales) = (vec![0; absmax.len()], vec![0.0; absmax.len().div_ceil(256)]);
    assert_eq!(nf4::nested::quantize(&absmax, 0.25, &mut codes, &mut scales), Ok(()));
    let mut back = vec![0.0; absmax.len()];
    assert_eq!(nf4::nested::dequantize(&codes, &scales, 0.25, &mut back), Ok(()));
    let alone = (codes, bits(&scales), bits(&back));
    for threads in [1, 2, 3, 8] {
        assert!(run(threads) == alone, "{threads}");
    }
    assert!(parallel::quantize_scales(&absmax, 0.0, &mut [0; 3], &mut [0.0; 1], 2).is_err());
}

#[test]
fn four_bit_refuses_lengths_that_do_not_fit() {
    let Ok(blocks) = Blocks::new(Code::Nf4, 64) else { unreachable!("64 is allowed") };
    let source = [0; 100 * 2];
    let quantized = |num_packed, num_scales| {
        let (mut packed, mut absmax) = (vec![0; num_packed], vec![0.0; num_scales]);
        nf4::quantize(scalar(), blocks, Element::Bf16, &source, &mut packed, &mut absmax).is_ok()
            && parallel::quantize_4bit(scalar(), blocks, Element::Bf16, &source, &mut packed, &mut absmax, 2).is_ok()
    };
    assert!(quantized(50, 2));
    assert!(!quantized(49, 2) && !quantized(51, 2) && !quantized(50, 1) && !quantized(50, 3));
    for size in [0, 16, 48, 63, 8192, usize::MAX] {
        assert!(Blocks::new(Code::Nf4, size).is_err(), "{size}");
    }
}

proptest! {
    /// The nearest value of the code book is at most half the widest gap away: 0.1520 of the scale for NF4.
    #[test]
    fn four_bit_stays_near_the_value(values in proptest::collection::vec(-1000.0_f32..1000.0, 1..300)) {
        let Ok(blocks) = Blocks::new(Code::Nf4, 32) else { unreachable!("32 is allowed") };
        let source: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let (mut packed, mut absmax) = (vec![0; values.len().div_ceil(2)], vec![0.0; values.len().div_ceil(32)]);
        prop_assert_eq!(nf4::quantize(scalar(), blocks, Element::F32, &source, &mut packed, &mut absmax), Ok(()));
        let mut back = vec![0; source.len()];
        prop_assert_eq!(nf4::dequantize(scalar(), blocks, &packed, &absmax, Element::F32, &mut back), Ok(()));
        for (index, (value, back)) in values.iter().zip(back.as_chunks::<4>().0).enumerate() {
            let error = (f32::from_le_bytes(*back) - value).abs();
            prop_assert!(error <= 0.1521 * absmax[index / 32], "{} became {}", value, f32::from_le_bytes(*back));
        }
    }
}

/// The two roundings by hand, from the products alone (merged onto zeros in f32).
#[test]
fn a_delta_can_be_rounded_first() {
    let (rows, columns, rank) = (7, 45, 3);
    let mut random = Random(6);
    let (left, right) = (random.values(rows * rank), random.values(rank * columns));
    let Ok(right) = Panels::from_rows(rank, columns, &right) else { unreachable!("the sizes fit") };
    let base = random.values(rows * columns);
    for to in [Element::F16, Element::Bf16] {
        let narrowed = |values: &[f32]| {
            let mut bytes = vec![0; values.len() * to.size_bytes()];
            assert_eq!(narrow(scalar(), values, to, &mut bytes), Ok(true));
            let mut wide = vec![0.0; values.len()];
            assert_eq!(widen(scalar(), to, &bytes, &mut wide), Ok(()));
            (bytes, wide)
        };
        let (base_bytes, base) = narrowed(&base);
        let delta = Delta { left: Left { values: &left, row_stride: rank, rank_stride: 1 }, right: &right, scale: 0.7 };
        let band = Band { rows, columns };
        let mut products = vec![0; rows * columns * 4];
        let done = merge(scalar(), band, Base::InPlace, Element::F32, &mut products, &[delta], Rounding::Once);
        assert_eq!(done, Ok(true));
        let mut values = vec![0.0; rows * columns];
        assert_eq!(widen(scalar(), Element::F32, &products, &mut values), Ok(()));
        let (_, rounded) = narrowed(&values);
        let sums: Vec<_> = base.iter().zip(&rounded).map(|(base, delta)| base + delta).collect();
        let (expected, _) = narrowed(&sums);
        for cpu in Level::ALL.into_iter().filter_map(Cpu::at) {
            let mut target = base_bytes.clone();
            let done = merge(cpu, band, Base::InPlace, to, &mut target, &[delta], Rounding::DeltaFirst);
            assert_eq!(done, Ok(true));
            assert_eq!(target, expected, "{cpu:?} {to:?}");
        }
    }
}

/// Norms of rows, sums of columns, and for each element and kind of factors the values and whether they are finite.
type Scaled = (Vec<u32>, Vec<u32>, Vec<(Vec<u8>, bool)>);

/// All that `DoRA`'s kernels make of a band; one NaN stands for all in sums.
fn scaled(cpu: Cpu, band: Band, values: &[u8], factors: &[Vec<f32>; 2]) -> Scaled {
    let one_nan = |values: &[f32]| {
        values.iter().map(|value| if value.is_nan() { 0x7FC0_0000 } else { value.to_bits() }).collect::<Vec<_>>()
    };
    let (mut norms, mut sums) = (vec![-1.0; band.rows], vec![0.25; band.columns]);
    assert_eq!(dora::norms_of_rows(cpu, band, values, &mut norms), Ok(()));
    assert_eq!(dora::add_squares_of_rows(cpu, band, values, &mut sums), Ok(()));
    let mut results = Vec::new();
    for to in Element::ALL {
        for factors in [Factors::OfRows(&factors[0]), Factors::OfColumns(&factors[1])] {
            let mut target = vec![0xAA; band.rows * band.columns * to.size_bytes()];
            let finite = dora::scale(cpu, band, values, factors, to, &mut target);
            results.push((target, finite.unwrap_or_else(|error| unreachable!("{error}"))));
        }
    }
    (one_nan(&norms), one_nan(&sums), results)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn dora_agrees(rows in 0_usize..14, columns in prop_oneof![0_usize..70, 1000_usize..1100], any_bits: bool, seed: u64) {
        let mut random = Random(seed);
        let band = Band { rows, columns };
        let count = rows * columns;
        let values = if any_bits { random.bytes(count * 4) } else { weights(&mut random, Element::F32, count) };
        let factors = [random.values(rows), random.values(columns)];
        let expected = scaled(scalar(), band, &values, &factors);
        for_each_level(|cpu| assert_eq!(scaled(cpu, band, &values, &factors), expected, "{cpu:?}"));
    }

    /// Against f64. A sum of n squares in f32 is off by at most n 2^-24 of itself whatever its order (Higham, section
    /// 4.2, and each square's own rounding), its root by half of that and its own rounding; first order, hence the 1.01.
    /// The product is rounded once in f32 and once to the target.
    #[test]
    fn dora_is_right(rows in 1_usize..7, columns in 1_usize..300, seed: u64, to in element()) {
        let mut random = Random(seed);
        let band = Band { rows, columns };
        let values = random.values(rows * columns);
        let stored: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let (mut norms, mut sums) = (vec![0.0; rows], vec![0.0; columns]);
        prop_assert_eq!(dora::norms_of_rows(scalar(), band, &stored, &mut norms), Ok(()));
        prop_assert_eq!(dora::add_squares_of_rows(scalar(), band, &stored, &mut sums), Ok(()));
        let near = |found: f32, squares: &mut dyn Iterator<Item = f32>, count: usize| {
            let exact = squares.map(|value| f64::from(value) * f64::from(value)).sum::<f64>().sqrt();
            #[expect(clippy::cast_precision_loss, reason = "a count is small")]
            let bound = 1.01 * (count as f64 / 2.0 + 1.0) * 2f64.powi(-24) * exact;
            (f64::from(found) - exact).abs() <= bound
        };
        for (row, norm) in values.chunks_exact(columns).zip(&norms) {
            prop_assert!(near(*norm, &mut row.iter().copied(), columns));
        }
        for (column, sum) in sums.iter().enumerate() {
            prop_assert!(near(sum.sqrt(), &mut values.iter().skip(column).step_by(columns).copied(), rows));
        }
        let factors = random.values(rows);
        let mut target = vec![0; values.len() * to.size_bytes()];
        prop_assert_eq!(dora::scale(scalar(), band, &stored, Factors::OfRows(&factors), to, &mut target), Ok(true));
        let products: Vec<_> = values.iter().enumerate().map(|(index, value)| value * factors[index / columns]).collect();
        let mut expected = vec![0; target.len()];
        prop_assert_eq!(narrow(scalar(), &products, to, &mut expected), Ok(true));
        prop_assert_eq!(target, expected);
    }
}

#[test]
fn dora_says_what_is_not_finite() {
    let band = Band { rows: 2, columns: 20 };
    for cpu in Level::ALL.into_iter().filter_map(Cpu::at) {
        let finite = |values: &[f32], factors, to: Element| {
            let stored: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            dora::scale(cpu, band, &stored, factors, to, &mut vec![0; 40 * to.size_bytes()])
        };
        let mut values = vec![1.0; 40];
        assert_eq!(finite(&values, Factors::OfRows(&[1.0, 65519.0]), Element::F16), Ok(true));
        assert_eq!(finite(&values, Factors::OfRows(&[1.0, 65520.0]), Element::F16), Ok(false));
        assert_eq!(finite(&values, Factors::OfRows(&[1.0, f32::INFINITY]), Element::F32), Ok(false));
        assert!(finite(&values, Factors::OfRows(&[1.0]), Element::F32).is_err());
        assert!(finite(&values, Factors::OfColumns(&[1.0, 2.0]), Element::F32).is_err());
        values[38] = f32::INFINITY;
        assert_eq!(finite(&values, Factors::OfRows(&[1.0, 0.0]), Element::Bf16), Ok(false));
        assert!(finite(&values[..39], Factors::OfRows(&[1.0, 1.0]), Element::Bf16).is_err());
    }
    assert!(dora::norms_of_rows(scalar(), band, &[0; 160], &mut [0.0; 3]).is_err());
    assert!(dora::add_squares_of_rows(scalar(), band, &[0; 160], &mut [0.0; 2]).is_err());
}
