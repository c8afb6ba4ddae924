//! Quantization and the way back: each CPU level gives the bits of the scalar file.
#![no_main]

use arbitrary::Arbitrary;
use fastft_kernels::nf4::{self, Blocks, Code};
use fastft_kernels::{Cpu, Element, Level};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    is_nf4: bool,
    size_power: u8,
    element: u8,
    offset: f32,
    source: &'a [u8],
}

type Outcome = (Vec<u8>, Vec<u32>, Vec<u8>, Vec<u32>);

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Sets the bit that makes a NaN quiet: whether a product by 1 does so is the compiler's choice, on each level its own.
fn quiet(element: Element, bytes: &mut [u8]) {
    for value in bytes.chunks_exact_mut(element.size_bytes()) {
        let (infinite, quiet) = match element {
            Element::F32 => (0x7f80_0000, 0x40_0000),
            Element::F16 => (0x7c00, 0x200),
            Element::Bf16 => (0x7f80, 0x40),
        };
        let mut whole = [0; 4];
        whole[..value.len()].copy_from_slice(value);
        let bits = u32::from_le_bytes(whole);
        let sign = 1 << (8 * value.len() - 1);
        if bits & !sign > infinite {
            value.copy_from_slice(&(bits | quiet).to_le_bytes()[..value.len()]);
        }
    }
}

fn run(cpu: Cpu, blocks: Blocks, element: Element, source: &[u8]) -> Outcome {
    let count = source.len() / element.size_bytes();
    let (mut packed, mut absmax) = (vec![0; count.div_ceil(2)], vec![0.0; count.div_ceil(blocks.size())]);
    nf4::quantize(cpu, blocks, element, source, &mut packed, &mut absmax).unwrap_or_else(|error| panic!("{error}"));
    let mut maxima = vec![0.0; absmax.len()];
    nf4::block_maxima(cpu, blocks, element, source, &mut maxima).unwrap_or_else(|error| panic!("{error}"));
    let mut back = vec![0; source.len()];
    nf4::dequantize(cpu, blocks, &packed, &absmax, element, &mut back).unwrap_or_else(|error| panic!("{error}"));
    quiet(element, &mut back);
    (packed, bits(&absmax), back, bits(&maxima))
}

fuzz_target!(|input: Input| {
    let code = if input.is_nf4 { Code::Nf4 } else { Code::Fp4 };
    let Ok(blocks) = Blocks::new(code, 32 << (input.size_power % 8)) else { return };
    let element = Element::ALL[usize::from(input.element) % 3];
    let whole = input.source.len() / element.size_bytes() * element.size_bytes();
    let source = &input.source[..whole];
    let scalar = Cpu::at(Level::Scalar).unwrap_or_else(|| panic!("every CPU has the scalar level"));
    let expected = run(scalar, blocks, element, source);
    for level in [Level::Avx2, Level::Avx512] {
        if let Some(cpu) = Cpu::at(level) {
            assert_eq!(run(cpu, blocks, element, source), expected, "{level:?}");
        }
    }
    let absmax: Vec<f32> = expected.1.iter().map(|bits| f32::from_bits(*bits)).collect();
    let (mut codes, mut scales) = (vec![0; absmax.len()], vec![0.0; absmax.len().div_ceil(256)]);
    nf4::nested::quantize(&absmax, input.offset, &mut codes, &mut scales).unwrap_or_else(|error| panic!("{error}"));
    let mut again = vec![0.0; absmax.len()];
    nf4::nested::dequantize(&codes, &scales, input.offset, &mut again).unwrap_or_else(|error| panic!("{error}"));
});
