//! No bytes may make the reader of control links panic, hold more than what came asks for, or give out a message that was not sent.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: (u8, &[u8])| {
    let (piece, bytes) = input;
    volley_transports::quic::read_messages(bytes, usize::from(piece));
});
