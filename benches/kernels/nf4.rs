//! NF4 in memory: bf16, blocks of 64, each level of this CPU on one thread, and the best one on all threads.
//!
//! Rival: a plain copy that reads and writes as many bytes together (the goals: quantize at most 2 times, dequantize at
//! most 1.3 times its time, on two threads and 1 GiB of bf16). Each takes turns with its rival; counted are bytes read
//! + written. All buffers are touched before.
//!
//! `cargo bench -p fastft-kernels --bench nf4` works on 256 KiB (in cache) and 64 MiB of bf16; `-- --gib` on 1 GiB;
//! `-- "avx2 quantize"` only on cases whose name holds the words; `-- --test` runs each once, small;
//! `-- --once avx2 quantize` runs one case once, for `callgrind` (see `instructions.sh`).

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::expect_used,
    clippy::panic,
    reason = "test values are small, and a bench may stop at a fault"
)]

use std::hint::black_box;
use std::thread;
use std::time::Instant;

use fastft_kernels::nf4::{Blocks, Code};
use fastft_kernels::{Cpu, Element, Level, parallel};

const BLOCK: usize = 64;

/// The code of value `index`; each block has a 15, whose value is 1, so that its scale is the power of two below.
fn code(index: usize) -> u8 {
    if index.is_multiple_of(BLOCK) { 15 } else { (index.wrapping_mul(2_654_435_761) >> 13) as u8 & 15 }
}

fn scale(block: usize) -> f32 {
    1.0 / (1 << (block % 7)) as f32
}

fn bf16(value: f32) -> [u8; 2] {
    let bits = value.to_bits();
    ((bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16) as u16).to_le_bytes()
}

/// Buffers of one size.
struct Case {
    values: Vec<u8>,
    packed: Vec<u8>,
    absmax: Vec<f32>,
    /// What was put in: the codes, two to a byte.
    codes: Vec<u8>,
    rival: (Vec<u8>, Vec<u8>),
}

impl Case {
    fn new(bytes: usize) -> Self {
        let (count, book) = (bytes / 2, Code::Nf4.book());
        let values = (0..count).flat_map(|i| bf16(book[usize::from(code(i))] * scale(i / BLOCK))).collect();
        let codes = (0..count / 2).map(|i| code(2 * i) << 4 | code(2 * i + 1)).collect();
        let moved = bytes + count / 2 + count / BLOCK * 4;
        let rival = (vec![1; moved / 2], vec![2; moved / 2]);
        Self { values, packed: vec![0; count / 2], absmax: vec![0.0; count / BLOCK], codes, rival }
    }

    fn moved_bytes(&self) -> usize {
        2 * self.rival.0.len()
    }

    fn quantize(&mut self, cpu: Cpu, threads: usize) {
        let blocks = Blocks::new(Code::Nf4, BLOCK).expect("64 is allowed");
        let (packed, absmax) = (&mut self.packed, &mut self.absmax);
        let done =
            parallel::quantize_4bit(cpu, blocks, Element::Bf16, black_box(&self.values), packed, absmax, threads);
        assert_eq!(done, Ok(()));
    }

    fn dequantize(&mut self, cpu: Cpu, threads: usize) {
        let blocks = Blocks::new(Code::Nf4, BLOCK).expect("64 is allowed");
        let (packed, absmax) = (black_box(&self.packed), &self.absmax);
        let done = parallel::dequantize_4bit(cpu, blocks, packed, absmax, Element::Bf16, &mut self.values, threads);
        assert_eq!(done, Ok(()));
    }

    /// The values are those of the code book, so the codes and scales are known, and the way back gives them again.
    fn check(&mut self, cpu: Cpu, threads: usize) {
        let before = self.values.clone();
        self.packed.fill(0xAA);
        self.quantize(cpu, threads);
        assert!(self.packed == self.codes, "wrong codes");
        assert!(
            self.absmax.iter().enumerate().all(|(block, absmax)| absmax.to_bits() == scale(block).to_bits()),
            "wrong scales"
        );
        self.values.fill(0xAA);
        self.dequantize(cpu, threads);
        assert!(self.values == before, "wrong values");
    }

    fn copy(&mut self, threads: usize) {
        let (from, to) = (black_box(&self.rival.0), &mut self.rival.1);
        let share = from.len().div_ceil(threads);
        thread::scope(|scope| {
            let mut pairs = from.chunks(share).zip(to.chunks_mut(share));
            let own = pairs.next();
            for (from, to) in pairs {
                scope.spawn(move || to.copy_from_slice(from));
            }
            if let Some((from, to)) = own {
                to.copy_from_slice(from);
            }
        });
        black_box(&mut self.rival.1);
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    if has("--once") {
        return once(&arguments[1..]);
    }
    let filter = arguments.iter().find(|argument| !argument.starts_with("--")).map_or("", String::as_str);
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let sizes: &[(usize, usize)] = match (has("--test"), has("--gib")) {
        (true, _) => &[(1 << 20, 1)],
        (false, true) => &[(1 << 30, 9)],
        (false, false) => &[(256 << 10, 2001), (64 << 20, 41)],
    };
    for (bytes, rounds) in sizes {
        println!("{} KiB of bf16, min / median / max of {rounds} rounds, x copy: median of the rounds", bytes >> 10);
        let mut case = Case::new(*bytes);
        for level in Level::ALL {
            let Some(cpu) = Cpu::at(level) else {
                println!("{:<10} not run, this CPU lacks it", level.name());
                continue;
            };
            let slow = level == Level::Scalar;
            for threads in [1, cores] {
                if (slow && (threads > 1 || *bytes > 64 << 20)) || (threads > 1 && *bytes < 1 << 20) {
                    continue;
                }
                let rounds = if slow { rounds.div_ceil(20) } else { *rounds };
                case.check(cpu, threads);
                for (name, run) in
                    [("quantize", Case::quantize as fn(&mut Case, Cpu, usize)), ("dequantize", Case::dequantize)]
                {
                    let name =
                        format!("{} {name}, {threads} thread{}", level.name(), if threads > 1 { "s" } else { "" });
                    if name.contains(filter) {
                        report(&name, &mut case, rounds, |case| run(case, cpu, threads), threads);
                    }
                }
            }
        }
    }
}

/// One case, once, on 1 MiB, without check and rival: what callgrind counts is the kernel.
fn once(words: &[String]) {
    let [level, name] = words else { panic!("--once LEVEL quantize|dequantize|nothing") };
    let level = Level::ALL.into_iter().find(|known| known.name() == level).expect("a level");
    let cpu = Cpu::at(level).expect("a level of this CPU");
    let mut case = Case::new(1 << 20);
    match name.as_str() {
        "quantize" => case.quantize(cpu, 1),
        "dequantize" => case.dequantize(cpu, 1),
        _ => {}
    }
    black_box(&case.packed);
}

fn report(name: &str, case: &mut Case, rounds: usize, mut run: impl FnMut(&mut Case), threads: usize) {
    let mut timed = |work: &mut dyn FnMut(&mut Case)| {
        let start = Instant::now();
        work(case);
        start.elapsed().as_secs_f64()
    };
    timed(&mut |case| run(case));
    timed(&mut |case| case.copy(threads));
    let (mut seconds, mut ratios): (Vec<f64>, Vec<f64>) = (0..rounds)
        .map(|_| {
            let own = timed(&mut |case| run(case));
            (own, own / timed(&mut |case| case.copy(threads)))
        })
        .unzip();
    seconds.sort_by(f64::total_cmp);
    ratios.sort_by(f64::total_cmp);
    let (min, median, max) = (seconds[0], seconds[seconds.len() / 2], seconds[seconds.len() - 1]);
    println!(
        "{name:<30} {:9.3} / {:9.3} / {:9.3} ms  {:6.1} GB/s  x copy {:5.2}",
        min * 1e3,
        median * 1e3,
        max * 1e3,
        case.moved_bytes() as f64 / median / 1e9,
        ratios[ratios.len() / 2],
    );
}
