//! Arbitrary bytes to the decoder of what a caller says first.

#![no_main]

use libfuzzer_sys::fuzz_target;
use volley_transports::quic::describe_hello;

fuzz_target!(|data: &[u8]| {
    describe_hello(data);
});
