//! `DoRA`'s three passes over f32 values in memory, one thread, each level of this CPU: norms of rows, squares of rows
//! added to columns, and the scaled values in bf16.
//!
//! Rival: a plain copy of the same values. Counted: bytes read + written. `cargo bench -p fastft-kernels --bench dora`;
//! `-- --test` runs each case once, small.

#![allow(
    clippy::cast_precision_loss,
    clippy::expect_used,
    reason = "values are small, and a bench may stop at a fault"
)]

use std::hint::black_box;
use std::time::Instant;

use fastft_kernels::dora::{Factors, add_squares_of_rows, norms_of_rows, scale};
use fastft_kernels::merge::Band;
use fastft_kernels::{Cpu, Element, Level};

/// A tile as the stream makes it: 1 MiB of bf16 of a down projection of a 1.5B model, 2 MiB in f32.
const COLUMNS: usize = 8960;

fn main() {
    let is_test = std::env::args().any(|argument| argument == "--test");
    let (rows, rounds) = if is_test { (7, 1) } else { (58, 200) };
    let band = Band { rows, columns: COLUMNS };
    let value = |index: usize| (index * 7 % 251) as f32 / 4096.0;
    let values: Vec<u8> = (0..rows * COLUMNS).flat_map(|index| value(index).to_le_bytes()).collect();
    let (mut copy, mut target) = (values.clone(), vec![0; values.len() / 2]);
    let (mut norms, mut sums, ones) = (vec![0.0; rows], vec![0.0; COLUMNS], vec![1.0; rows]);
    println!("{rows} x {COLUMNS} f32, one thread, min / median / max of {rounds}");
    report("copy", 2 * values.len(), rounds, || black_box(&mut copy).copy_from_slice(black_box(&values)));
    for level in Level::ALL {
        let Some(cpu) = Cpu::at(level) else {
            println!("{} not run, this CPU lacks it", level.name());
            continue;
        };
        let name = level.name();
        report(&format!("{name} norms"), values.len(), rounds, || {
            norms_of_rows(cpu, band, black_box(&values), &mut norms).expect("the sizes agree");
        });
        // Sums of 8,960 squares in f32: off by at most 8,960 / 2 * 2^-24 of the norm.
        for (row, norm) in norms.iter().enumerate() {
            let squares = (0..COLUMNS).map(|column| f64::from(value(row * COLUMNS + column)).powi(2));
            let exact = squares.sum::<f64>().sqrt();
            assert!((f64::from(*norm) - exact).abs() <= 4480.0 * 2f64.powi(-24) * exact, "row {row}");
        }
        report(&format!("{name} columns"), values.len(), rounds, || {
            add_squares_of_rows(cpu, band, black_box(&values), &mut sums).expect("the sizes agree");
        });
        report(&format!("{name} scale"), values.len() + target.len(), rounds, || {
            let done = scale(cpu, band, black_box(&values), Factors::OfRows(&ones), Element::Bf16, &mut target);
            assert_eq!(done, Ok(true));
        });
    }
}

fn report(name: &str, bytes: usize, rounds: usize, mut work: impl FnMut()) {
    let mut seconds: Vec<f64> = (0..rounds)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    let (min, median, max) = (seconds[0], seconds[rounds / 2], seconds[rounds - 1]);
    let rate = bytes as f64 / median / 1e9;
    println!("{name:<16} {:7.3} / {:7.3} / {:7.3} ms  {rate:6.2} GB/s", min * 1e3, median * 1e3, max * 1e3);
}
