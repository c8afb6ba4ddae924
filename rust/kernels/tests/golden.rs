//! NF4, FP4 and the 8-bit scales against what bitsandbytes made (tests/golden/nf4), `DoRA`'s norms against torch's
//! (tests/golden/dora), on every level of this CPU.

#![expect(clippy::panic, reason = "a broken golden file fails the test")]

use fastft_kernels::dora;
use fastft_kernels::merge::Band;
use fastft_kernels::nf4::{Blocks, Code, dequantize, nested, quantize};
use fastft_kernels::{Cpu, Element, Level};

fn levels() -> impl Iterator<Item = Cpu> {
    Level::ALL.into_iter().filter_map(Cpu::at)
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits = hex.trim_matches('-').as_bytes();
    digits
        .chunks(2)
        .map(|pair| {
            let digit = |sign: u8| char::from(sign).to_digit(16).unwrap_or_else(|| panic!("no hex: {hex}"));
            u8::try_from(digit(pair[0]) * 16 + digit(pair[1])).unwrap_or_else(|error| panic!("{error}"))
        })
        .collect()
}

fn floats(hex: &str) -> Vec<f32> {
    bytes(hex).as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four)).collect()
}

/// The bits, with one NaN for all NaN: which one comes out of a maximum or a product is not fixed.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { 0x7FC0_0000 } else { value.to_bits() }).collect()
}

/// The values of a dequantized array, with one NaN for all NaN.
fn numbers(element: Element, bytes: &[u8]) -> Vec<u32> {
    let mut values = vec![0.0; bytes.len() / element.size_bytes()];
    let cpu = Cpu::at(Level::Scalar).unwrap_or_else(|| unreachable!("scalar is always there"));
    assert_eq!(fastft_kernels::cast::widen(cpu, element, bytes, &mut values), Ok(()));
    bits(&values)
}

/// FP4 has two codes for zero. bitsandbytes' code book has 0.0 for both and so have its generic and AVX-512 paths; its
/// plain C path, which made the golden values, gives the second one a sign.
fn one_zero(values: Vec<u32>) -> Vec<u32> {
    values.into_iter().map(|bits| if bits == 0x8000_0000 { 0 } else { bits }).collect()
}

#[test]
fn four_bit_is_what_bitsandbytes_makes() {
    let mut num_cases = 0;
    let files =
        [include_str!("../../../tests/golden/nf4/cases.txt"), include_str!("../../../tests/golden/nf4/large.txt")];
    for line in files.iter().flat_map(|file| file.lines()) {
        let fields: Vec<_> = line.split(' ').collect();
        let [code, size, element, source, packed, absmax, back] = fields[..] else { panic!("seven fields: {line}") };
        let code = Code::ALL.into_iter().find(|known| known.name() == code).unwrap_or_else(|| panic!("{code}"));
        let element = match element {
            "f32" => Element::F32,
            "f16" => Element::F16,
            _ => Element::Bf16,
        };
        let blocks = Blocks::new(code, size.parse().unwrap_or(0)).unwrap_or_else(|error| panic!("{error}"));
        let (source, packed, absmax, back) = (bytes(source), bytes(packed), floats(absmax), bytes(back));
        for cpu in levels() {
            let case = format!("{cpu:?} {blocks:?} {element:?} line {}", num_cases + 1);
            let (mut got, mut scales) = (vec![0xAA; packed.len()], vec![-1.0; absmax.len()]);
            assert_eq!(quantize(cpu, blocks, element, &source, &mut got, &mut scales), Ok(()), "{case}");
            assert_eq!(bits(&scales), bits(&absmax), "{case}");
            assert_eq!(got, packed, "{case}");
            let mut values = vec![0xAA; back.len()];
            assert_eq!(dequantize(cpu, blocks, &packed, &absmax, element, &mut values), Ok(()), "{case}");
            let (values, back) = (numbers(element, &values), numbers(element, &back));
            assert_eq!(values, if code == Code::Fp4 { one_zero(back) } else { back }, "{case}");
        }
        num_cases += 1;
    }
    assert!(num_cases > 100, "{num_cases}");
}

#[test]
fn nested_scales_are_what_bitsandbytes_makes() {
    let mut num_cases = 0;
    for line in include_str!("../../../tests/golden/nf4/nested.txt").lines() {
        let fields: Vec<_> = line.split(' ').collect();
        let [absmax, offset, codes, scales, back] = fields[..] else { panic!("five fields: {line}") };
        let (absmax, offset, codes) = (floats(absmax), floats(offset)[0], bytes(codes));
        let (scales, back) = (floats(scales), floats(back));
        let (mut got, mut nested_absmax) = (vec![0xAA; codes.len()], vec![-1.0; scales.len()]);
        assert_eq!(nested::quantize(&absmax, offset, &mut got, &mut nested_absmax), Ok(()));
        assert_eq!(got, codes, "line {}", num_cases + 1);
        assert_eq!(bits(&nested_absmax), bits(&scales), "line {}", num_cases + 1);
        let mut values = vec![-1.0; back.len()];
        assert_eq!(nested::dequantize(&codes, &scales, offset, &mut values), Ok(()));
        assert_eq!(bits(&values), bits(&back), "line {}", num_cases + 1);
        num_cases += 1;
    }
    assert_eq!(num_cases, 18);
}

/// Norms that torch gave (tests/golden/dora), bit for bit: the order of the sums is what is tested.
#[test]
fn norms_are_torchs() {
    let mut num_lines = 0;
    for line in include_str!("../../../tests/golden/dora/norms.txt").lines() {
        let [kind, rows, columns, values, expected] = line.split(' ').collect::<Vec<_>>()[..] else {
            panic!("no case: {line}");
        };
        let number = |text: &str| text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
        let band = Band { rows: number(rows), columns: number(columns) };
        for cpu in levels() {
            let mut norms = vec![0.0; floats(expected).len()];
            let done = if kind == "rows" {
                dora::norms_of_rows(cpu, band, &bytes(values), &mut norms)
            } else {
                dora::add_squares_of_rows(cpu, band, &bytes(values), &mut norms)
            };
            assert_eq!(done, Ok(()));
            if kind == "columns" {
                norms = norms.into_iter().map(f32::sqrt).collect();
            }
            assert_eq!(bits(&norms), bits(&floats(expected)), "{cpu:?} {kind} {band:?}");
        }
        num_lines += 1;
    }
    assert_eq!(num_lines, 28);
}
