#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| volley_models::fuzz::config(bytes));
