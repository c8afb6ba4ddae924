//! Any text as a plan: read or refused, never a panic.
#![no_main]

use fastft_convert::Plan;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = Plan::from_json(text);
});
