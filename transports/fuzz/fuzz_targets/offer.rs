//! Arbitrary bytes to the decoder of what two workers offer each other before they meet over RDMA.

#![no_main]

use libfuzzer_sys::fuzz_target;
use volley_transports::rdma::describe_offer;

fuzz_target!(|data: &[u8]| {
    describe_offer(data);
});
