//! Arbitrary bytes for the decoder; what must hold stands in `oracle`.

#![no_main]

mod heap;
mod oracle;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    oracle::check(bytes);
    let peak = heap::peak_of(|| oracle::decode_and_drop(bytes));
    assert!(peak <= oracle::MOST_MEMORY, "{peak} bytes of memory");
});
