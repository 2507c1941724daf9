//! Any bytes in place of a client's, from the first one on.

#![no_main]

use std::{cell::OnceCell, sync::Arc};

use libfuzzer_sys::fuzz_target;
use nbdkit_core::Chain;
use nbdkit_fuzz::Disk;
use nbdkit_nbd::{Config, converse};

thread_local! {
    static CHAIN: OnceCell<Arc<Chain>> = const { OnceCell::new() };
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, bytes)) = input.split_first() else { return };
    let config = Config {
        threads: 1,
        readonly: kind & 1 != 0,
        oldstyle: kind & 2 != 0,
        structured_replies: kind & 4 == 0,
        meta_contexts: kind & 8 == 0,
        handshake_timeout: None,
        ..Config::default()
    };
    CHAIN.with(|chain| {
        let chain = chain.get_or_init(|| Disk::new(vec![1; 65_536]).chain(&[], &[]).expect("a chain"));
        let said = converse(chain, &config, bytes);
        // Whatever is asked, the answer is in proportion.
        assert!(said.len() <= (1 << 20) + input.len() * 65_536, "{} bytes for {}", said.len(), input.len());
    });
});
