//! Plans of any operations, half of them out of range, over a real file: refused or checked, never a panic.
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use arbitrary::{Arbitrary, Unstructured};
use fastft_convert::{Job, Plan};
use libfuzzer_sys::fuzz_target;

const DTYPES: [&str; 8] = ["F32", "F16", "BF16", "F64", "U8", "I64", "BOOL", "F4"];
const KINDS: [&str; 9] = ["copy", "cast", "rows", "merge", "dora", "shift", "bytes", "quantize", "absmax_of"];
const NUMBERS: [u64; 12] = [0, 1, 2, 3, 4, 32, 64, 128, 4096, 1 << 32, 1 << 63, u64::MAX];
const FILE_BYTES: usize = 4096;

/// A file of zeros that sources point into.
fn file() -> &'static PathBuf {
    static FILE: OnceLock<PathBuf> = OnceLock::new();
    FILE.get_or_init(|| {
        let memory = PathBuf::from("/dev/shm");
        let folder = if memory.is_dir() { memory } else { std::env::temp_dir() };
        let path = folder.join("fastft-fuzz-plan"); // one for all runs: nothing is left over but this

        std::fs::write(&path, [0; FILE_BYTES]).unwrap_or_else(|error| panic!("{error}"));
        path
    })
}

/// Writes a value as JSON, the way the bytes say.
struct Writer<'a, 'b> {
    bytes: &'a mut Unstructured<'b>,
    depth: u8,
}

impl Writer<'_, '_> {
    fn below(&mut self, count: usize) -> usize {
        self.bytes.int_in_range(0..=count - 1).unwrap_or(0)
    }

    fn number(&mut self) -> u64 {
        match self.below(4) {
            0 => u64::arbitrary(self.bytes).unwrap_or(0),
            1 => self.below(256) as u64,
            _ => NUMBERS[self.below(NUMBERS.len())],
        }
    }

    fn dtype(&mut self) -> &'static str {
        DTYPES[self.below(DTYPES.len())]
    }

    fn shape(&mut self) -> String {
        let sizes: Vec<_> = (0..self.below(4)).map(|_| self.number().to_string()).collect();
        format!("[{}]", sizes.join(","))
    }

    fn source(&mut self) -> String {
        let (file, offset, dtype, shape) = (self.below(2), self.number(), self.dtype(), self.shape());
        let lens = match self.below(6) {
            0 if self.depth < 3 => {
                self.depth += 1;
                let (absmax, blocksize) = (self.source(), self.number());
                self.depth -= 1;
                format!(r#","packed":{{"quant_type":"nf4","blocksize":{blocksize},"absmax":{absmax}}}"#)
            }
            1 => {
                let (blocksize, stored) = (self.number(), self.dtype());
                format!(r#","seen":{{"quant_type":"fp4","blocksize":{blocksize},"stored":"{stored}"}}"#)
            }
            _ => String::new(),
        };
        format!(r#"{{"file":{file},"offset":{offset},"dtype":"{dtype}","shape":{shape}{lens}}}"#)
    }

    fn delta(&mut self) -> String {
        let (a, b, transposed) = (self.source(), self.source(), self.below(2) == 1);
        let mut more = String::new();
        if self.below(3) == 0 {
            more += &format!(r#","b_columns":[{},{}]"#, self.number(), self.number());
        }
        if self.below(3) == 0 {
            more += &format!(r#","rows":[[{},{},{}]]"#, self.number(), self.number(), self.number());
        }
        if self.below(3) == 0 {
            more += &format!(r#","magnitude":{}"#, self.source());
        }
        format!(r#"{{"a":{a},"b":{b},"scale":1.0,"transposed":{transposed}{more}}}"#)
    }

    fn operation(&mut self) -> String {
        let kind = KINDS[self.below(KINDS.len())];
        match kind {
            "rows" => {
                let (source, start, count) = (self.source(), self.number(), self.number());
                format!(r#"{{"kind":"rows","parts":[{{"source":{source},"start":{start},"count":{count}}}]}}"#)
            }
            "merge" | "dora" => {
                let (source, delta) = (self.source(), self.delta());
                format!(r#"{{"kind":"{kind}","source":{source},"deltas":[{delta}]}}"#)
            }
            "shift" => {
                let (source, addend) = (self.source(), self.source());
                format!(r#"{{"kind":"shift","source":{source},"addends":[{{"source":{addend},"scale":1.0}}]}}"#)
            }
            "bytes" => format!(r#"{{"kind":"bytes","hex":"{:x}"}}"#, self.number()),
            "quantize" if self.depth < 3 => {
                self.depth += 1;
                let (of, dtype, shape, blocksize) = (self.operation(), self.dtype(), self.shape(), self.number());
                self.depth -= 1;
                let transposed = self.below(2) == 1;
                format!(
                    r#"{{"kind":"quantize","of":{of},"dtype":"{dtype}","shape":{shape},"quant_type":"nf4","blocksize":{blocksize},"transposed":{transposed}}}"#
                )
            }
            "absmax_of" | "quantize" => {
                format!(r#"{{"kind":"absmax_of","tensor":"t{}"}}"#, self.below(3))
            }
            _ => format!(r#"{{"kind":"{kind}","source":{}}}"#, self.source()),
        }
    }

    fn tensor(&mut self, index: usize) -> String {
        let (dtype, shape, op) = (self.dtype(), self.shape(), self.operation());
        format!(r#"{{"name":"t{index}","dtype":"{dtype}","shape":{shape},"op":{op}}}"#)
    }
}

fuzz_target!(|input: &[u8]| {
    let mut writer = Writer { bytes: &mut Unstructured::new(input), depth: 0 };
    let count = writer.below(2) + 1;
    let tensors: Vec<_> = (0..count).map(|index| writer.tensor(index)).collect();
    let text = format!(
        r#"{{"files":[{:?}],"shards":[{{"path":"/nowhere/a","tensors":[{}]}}]}}"#,
        file().display().to_string(),
        tensors.join(",")
    );
    if let Ok(job) = Plan::from_json(&text).and_then(Job::new) {
        assert!(job.total_bytes() <= 1 << 40, "{text}");
    }
});
