//! Options in every order, and contexts that come and go with them: proto.md leaves a client much freedom, and each of
//! its sentences about that is one of these cases.

use crate::util::{
    self, Server,
    raw::{Raw, contexts, go},
};

const EXPORT_NAME: u32 = 1;
const ABORT: u32 = 2;
const LIST: u32 = 3;
const INFO: u32 = 6;
const GO: u32 = 7;
const STRUCTURED: u32 = 8;
const LIST_CONTEXTS: u32 = 9;
const SET_CONTEXTS: u32 = 10;
const UNKNOWN: u32 = 77;

const ACK: u32 = 1;
const META_CONTEXT: u32 = 4;
const ERR_UNSUP: u32 = 1 << 31 | 1;
const ERR_INVALID: u32 = 1 << 31 | 3;

const STATUS: u16 = 5;
const ERROR: u16 = 1 << 15 | 1;

/// Sends an option and returns all answers to it.
fn answers(raw: &mut Raw, option: u32, data: &[u8]) -> Vec<u32> {
    raw.option(option, data);
    let mut kinds = Vec::new();
    loop {
        kinds.push(raw.reply());
        let last = kinds[kinds.len() - 1];
        if last == ACK || last >> 31 == 1 {
            return kinds;
        }
    }
}

/// The last answer to an option.
fn answer(raw: &mut Raw, option: u32, data: &[u8]) -> u32 {
    answers(raw, option, data).pop().expect("an answer")
}

/// The kind of the reply to a block status request.
fn status(raw: &mut Raw) -> u16 {
    raw.request(0, 7, 0, 3);
    raw.chunks().pop().expect("a chunk").kind
}

fn set(export: &str) -> Vec<u8> {
    contexts(export, &["base:allocation"])
}

/// All orders of a list.
fn orders(list: &[u32]) -> Vec<Vec<u32>> {
    let Some((first, rest)) = list.split_first() else { return vec![Vec::new()] };
    let insert =
        |order: Vec<u32>| (0..=order.len()).map(move |at| [&order[..at], &[*first], &order[at..]].concat());
    orders(rest).into_iter().flat_map(insert).collect()
}

#[test]
fn every_order() {
    let server = Server::start(["info", "mode=exportname"]);
    let all = orders(&[LIST, INFO, STRUCTURED, LIST_CONTEXTS, SET_CONTEXTS, UNKNOWN]);
    assert_eq!(all.len(), 720);
    for order in all {
        let raw = &mut Raw::options(&server);
        let mut structured = false;
        let mut selected = false;
        for option in &order {
            let (data, want) = match *option {
                INFO => (go("abc"), ACK),
                LIST_CONTEXTS => (contexts("abc", &[]), ACK),
                SET_CONTEXTS if structured => (set("abc"), ACK),
                SET_CONTEXTS => (set("abc"), ERR_INVALID),
                UNKNOWN => (vec![], ERR_UNSUP),
                _ => (vec![], ACK),
            };
            assert_eq!(answer(raw, *option, &data), want, "option {option} of {order:?}");
            structured |= *option == STRUCTURED;
            selected |= *option == SET_CONTEXTS && structured;
        }
        assert_eq!(answer(raw, GO, &go("abc")), ACK, "{order:?}");
        assert_eq!(status(raw), if selected { STATUS } else { ERROR }, "{order:?}");
        raw.request(0, 0, 0, 3);
        assert_eq!(raw.chunks()[0].payload[8..], *b"abc", "{order:?}");
    }
}

#[test]
fn once_or_more() {
    let server = Server::start(["info", "mode=exportname"]);
    let raw = &mut Raw::options(&server);
    assert_eq!(answer(raw, STRUCTURED, b""), ACK);
    assert_eq!(answer(raw, STRUCTURED, b""), ERR_INVALID);
    assert_eq!(answer(raw, LIST, b""), ACK);
    assert_eq!(answer(raw, LIST, b""), ERR_INVALID);
    for name in ["one", "two", "one"] {
        assert_eq!(answer(raw, INFO, &go(name)), ACK);
    }
    // Errors of every kind change nothing.
    assert_eq!(answer(raw, GO, b"x"), ERR_INVALID);
    assert_eq!(answer(raw, INFO, &[0xff; 8]), ERR_INVALID);
    assert_eq!(answer(raw, UNKNOWN, b"data"), ERR_UNSUP);
    assert_eq!(answer(raw, GO, &go("three")), ACK);
    raw.request(0, 0, 0, 5);
    assert_eq!(raw.chunks()[0].payload[8..], *b"three");
    let mut raw = Raw::options(&server);
    assert_eq!(answer(&mut raw, UNKNOWN, b""), ERR_UNSUP);
    assert_eq!(answer(&mut raw, ABORT, b"with data"), ACK);
    raw.ends();
}

/// What a client selects replaces what it selected before, even if it fails.
#[test]
fn contexts_of_the_last_selection_count() {
    let server = Server::start(["info", "mode=exportname"]);
    let nothing = contexts("abc", &[]);
    let malformed = [&set("abc")[..], b"x"].concat();
    let other = contexts("abc", &["base:", "base:other", "qemu:dirty-bitmap:b", "no colon"]);
    for (selections, selected) in [
        (&[set("abc")][..], true),
        (&[set("xyz"), set("abc")], true),
        (&[set("abc"), set("xyz")], false),
        (&[set("abc"), nothing], false),
        (&[set("abc"), malformed.clone()], false),
        (&[malformed, set("abc")], true),
        (&[set("abc"), other], false),
        (&[contexts("abc", &["base:allocation", "base:allocation", "x-y:z"])], true),
    ] {
        for option in [GO, EXPORT_NAME] {
            let raw = &mut Raw::options(&server);
            assert_eq!(answer(raw, STRUCTURED, b""), ACK);
            for selection in selections {
                let kinds = answers(raw, SET_CONTEXTS, selection);
                assert!(kinds.iter().filter(|kind| **kind == META_CONTEXT).count() <= 1, "one each");
            }
            if option == GO {
                // To look at another export in between changes nothing.
                assert_eq!(answer(raw, INFO, &go("xyz")), ACK);
                assert_eq!(answer(raw, GO, &go("abc")), ACK);
            } else {
                raw.option(EXPORT_NAME, b"abc");
                assert_eq!(raw.read(10)[..8], 3_u64.to_be_bytes());
            }
            assert_eq!(status(raw), if selected { STATUS } else { ERROR }, "{selections:?}");
        }
    }
}

#[test]
fn zeroes_after_export_name() {
    let server = Server::start(["memory", "1M"]);
    for (flags, zeroes) in [(0_u32, 124), (1, 124), (2, 0), (3, 0)] {
        let raw = &mut Raw::connect(&server);
        raw.send(&flags.to_be_bytes());
        raw.option(EXPORT_NAME, b"");
        let reply = raw.read(10 + zeroes);
        assert_eq!(reply[..8], (1_u64 << 20).to_be_bytes());
        assert!(reply[10..].iter().all(|b| *b == 0));
        raw.request(0, 3, 0, 0);
        assert_eq!(raw.read(16)[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "flags {flags}");
    }
    // Without the server's flags there is neither.
    let server = Server::start(["--mask-handshake=0", "memory", "1M"]);
    let raw = &mut Raw::connect(&server);
    raw.send(&[0; 4]);
    raw.option(EXPORT_NAME, b"");
    raw.read(134);
}

/// INFO and GO say the same, whatever is asked for, and behind GO there is no padding.
#[test]
fn info_and_go_say_the_same() {
    let server =
        Server::start(["--filter=blocksize-policy", "info", "mode=exportname", "blocksize-minimum=1"]);
    let asked = |wanted: &[u16]| {
        let list = wanted.iter().flat_map(|w| w.to_be_bytes());
        let count = u16::try_from(wanted.len()).expect("a count").to_be_bytes();
        [&[0, 0, 0, 3], &b"abc"[..], &count].concat().into_iter().chain(list).collect::<Vec<u8>>()
    };
    let say = |raw: &mut Raw, option: u32, data: &[u8]| {
        raw.option(option, data);
        let mut said = Vec::new();
        loop {
            let (kind, payload) = raw.whole_reply();
            if kind == ACK {
                return said;
            }
            assert_eq!(kind, 3, "INFO");
            said.push(payload);
        }
    };
    // NAME, DESCRIPTION and BLOCK_SIZE; one that does not exist is ignored.
    for (wanted, pieces) in [(&[][..], 1), (&[0], 1), (&[3], 2), (&[1, 3, 777], 3), (&[3, 2, 1, 0], 3)] {
        for flags in [1_u32, 3] {
            let raw = &mut Raw::connect(&server);
            raw.send(&flags.to_be_bytes());
            let data = asked(wanted);
            let info = say(raw, INFO, &data);
            assert_eq!(info.len(), pieces, "{wanted:?}: {info:02x?}");
            assert_eq!(info[0][..10], [0, 0, 0, 0, 0, 0, 0, 0, 0, 3], "EXPORT and the size");
            assert!(!wanted.contains(&1) || info.contains(&b"\0\x01abc".to_vec()), "the name");
            assert_eq!(say(raw, GO, &data), info);
            raw.request(0, 3, 0, 0);
            assert_eq!(raw.read(4), [0x67, 0x44, 0x66, 0x98]);
        }
    }
}

/// Ten thousand exports are listed; of more there is no list that could be right, so the client hears why not.
#[test]
fn as_many_exports_as_there_may_be() {
    let dir = util::temp();
    let name = |i: u32| dir.path().join(format!("export-{i:05}"));
    for i in 0..10_000 {
        std::fs::File::create(name(i)).expect("a file");
    }
    let server = Server::start(["file", &format!("dir={}", dir.path().display())]);
    let raw = &mut Raw::options(&server);
    assert_eq!(answers(raw, LIST, b"").len(), 10_001);
    std::fs::File::create(name(10_000)).expect("a file");
    let raw = &mut Raw::options(&server);
    let kinds = answers(raw, LIST, b"");
    assert!(kinds.len() <= 10_001 && (kinds.len() == 10_001 || kinds[0] >> 31 == 1), "{}", kinds.len());
    assert_eq!(answer(raw, INFO, &go("export-00007")), ACK);
}
