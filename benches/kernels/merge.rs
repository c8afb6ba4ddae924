//! The merge kernel in memory: bf16 weights, f32 factors, one thread, each level of this CPU.
//!
//! Rival: a plain copy of the same weights. Counted: weights read + written, and 2 operations per element and rank.
//! `cargo bench -p fastft-kernels --bench merge` times all cases; `-- "avx2 rank 8"` only those whose name holds the
//! words; `-- --test` runs each case once, small.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::expect_used,
    reason = "test values are small, and a bench may stop at a fault"
)]

use std::hint::black_box;
use std::time::Instant;

use fastft_kernels::merge::{Band, Base, Delta, Left, Panels, Rounding, merge};
use fastft_kernels::{Cpu, Element, Level};

/// A band of the size that the stream works on: 4 MiB of a down projection of a 1.5B model.
const COLUMNS: usize = 8960;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let is_test = arguments.iter().any(|argument| argument == "--test");
    let filter = arguments.iter().find(|argument| !argument.starts_with("--"));
    let (rows, rounds) = if is_test { (7, 1) } else { (234, 50) };
    let bytes = rows * COLUMNS * 2;
    let base: Vec<u8> = (0..bytes).map(|index| if index % 2 == 1 { 0x3D } else { (index * 7 % 251) as u8 }).collect();
    let mut target = vec![0; bytes];
    println!("{rows} x {COLUMNS} bf16, one thread, min / median / max of {rounds}");
    report("copy", bytes, 0, &time(rounds, || black_box(&mut target).copy_from_slice(black_box(&base))));
    for rank in [8, 16, 64, 256] {
        for level in Level::ALL {
            let name = format!("{} rank {rank}", level.name());
            if filter.is_some_and(|filter| !name.contains(filter)) {
                continue;
            }
            let Some(cpu) = Cpu::at(level) else {
                println!("{name:<18} not run, this CPU lacks it");
                continue;
            };
            if level == Level::Scalar && rank > 8 {
                continue; // seconds; the specification is not meant to be fast
            }
            let left: Vec<f32> = (0..rows * rank).map(|index| (index % 13) as f32 / 64.0).collect();
            let right: Vec<f32> = (0..rank * COLUMNS).map(|index| (index % 17) as f32 / 64.0).collect();
            let panels = Panels::from_rows(rank, COLUMNS, &right).expect("the sizes agree");
            let delta =
                Delta { left: Left { values: &left, row_stride: rank, rank_stride: 1 }, right: &panels, scale: 0.5 };
            let band = Band { rows, columns: COLUMNS };
            let mut run = |cpu| {
                merge(
                    cpu,
                    band,
                    Base::Apart(Element::Bf16, &base),
                    Element::Bf16,
                    &mut target,
                    &[delta],
                    Rounding::Once,
                )
            };
            assert_eq!(run(cpu), Ok(true));
            let times = time(rounds, || assert_eq!(run(cpu), Ok(true)));
            check(&target, &base, &left, &right, rank);
            report(&name, bytes, rank, &times);
        }
    }
}

/// All factors are multiples of 1/64 below 1: the products are exact, so f64 gives the expected bits.
fn check(target: &[u8], base: &[u8], left: &[f32], right: &[f32], rank: usize) {
    for index in (0..base.len() / 2).step_by(9973) {
        let (row, column) = (index / COLUMNS, index % COLUMNS);
        let sum: f64 =
            (0..rank).map(|k| f64::from(left[row * rank + k]) * f64::from(right[k * COLUMNS + column])).sum();
        let bits = |bytes: &[u8]| u16::from_le_bytes([bytes[index * 2], bytes[index * 2 + 1]]);
        let merged = (f64::from(f32::from_bits(u32::from(bits(base)) << 16)) + sum * 0.5) as f32;
        let rounded = ((merged.to_bits() + 0x7FFF + ((merged.to_bits() >> 16) & 1)) >> 16) as u16;
        assert_eq!(bits(target), rounded, "element {index}");
    }
}

fn time(rounds: usize, mut work: impl FnMut()) -> Vec<f64> {
    work();
    let mut seconds: Vec<f64> = (0..rounds)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds
}

fn report(name: &str, bytes: usize, rank: usize, seconds: &[f64]) {
    let (min, median, max) = (seconds[0], seconds[seconds.len() / 2], seconds[seconds.len() - 1]);
    let rate = 2.0 * bytes as f64 / median / 1e9;
    let flops = (bytes * rank) as f64 / median / 1e9;
    println!(
        "{name:<18} {:7.2} / {:7.2} / {:7.2} ms  {rate:6.2} GB/s  {flops:6.1} GFLOP/s",
        min * 1e3,
        median * 1e3,
        max * 1e3
    );
}
