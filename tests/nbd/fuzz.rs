//! Two thousand clients that are wrong, each in its own way and the same in every run, against one server: every one
//! is answered as the specification says or dropped, the server stays small, and an honest client notices nothing.

use std::{fs, io::Write, ops::Range, path::Path};

use crate::util::{
    self, Server,
    raw::{OPTION_MAGIC, Raw, contexts, go},
};

const WAYS: u64 = 2000;
const THREADS: u64 = 8;
const SIZE: u64 = 2 << 20;
/// The honest client works below.
const BORDER: u64 = 1 << 20;

const ERR_UNSUP: u32 = 1 << 31 | 1;
const ERR_POLICY: u32 = 1 << 31 | 2;
const ERR_INVALID: u32 = 1 << 31 | 3;
const ERR_TOO_BIG: u32 = 1 << 31 | 9;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

/// xorshift: the same numbers in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[usize::try_from(self.below(list.len() as u64)).expect("an index")]
    }

    fn bytes(&mut self, n: u64) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
}

/// What has to come of it.
#[derive(Debug, PartialEq)]
enum Want {
    /// Not a word.
    Nothing,
    /// This answer to the last option; the count of answers.
    Answer(u32, usize),
    /// Nothing in the transmission phase.
    Silence,
    /// These error numbers.
    Errors(Vec<u32>),
    /// Whatever; only it must end.
    End,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Simple,
    Structured,
    Extended,
}

fn option(number: u32, length: u32, data: &[u8]) -> Vec<u8> {
    [&OPTION_MAGIC.to_be_bytes()[..], &number.to_be_bytes(), &length.to_be_bytes(), data].concat()
}

/// An option whose length is right.
fn whole(number: u32, data: &[u8]) -> Vec<u8> {
    option(number, u32::try_from(data.len()).expect("a length"), data)
}

impl Mode {
    /// Up to the transmission phase.
    fn negotiation(self) -> Vec<u8> {
        let replies = match self {
            Mode::Simple => vec![],
            Mode::Structured => whole(8, b""),
            Mode::Extended => whole(11, b""),
        };
        [&3_u32.to_be_bytes()[..], &replies, &whole(1, b"")].concat()
    }

    fn request(self, flags: u16, command: u16, offset: u64, length: u64) -> Vec<u8> {
        let magic: u32 = if self == Mode::Extended { 0x21e4_1c71 } else { 0x2560_9513 };
        let head =
            [&magic.to_be_bytes()[..], &flags.to_be_bytes(), &command.to_be_bytes(), b"a cookie"].concat();
        let length = if self == Mode::Extended {
            length.to_be_bytes().to_vec()
        } else {
            u32::try_from(length.min(u32::MAX.into())).expect("32 bits").to_be_bytes().to_vec()
        };
        [&head[..], &offset.to_be_bytes(), &length].concat()
    }

    /// Bytes of the answers to the negotiation.
    fn agreed(self) -> usize {
        if self == Mode::Simple { 10 } else { 30 }
    }

    /// The error number of the next reply.
    fn error(self, raw: &mut Raw) -> u32 {
        let word = |bytes: &[u8]| u32::from_be_bytes(bytes[..4].try_into().expect("4 bytes"));
        let (magic, header) = match self {
            Mode::Simple => (0x6744_6698, 16),
            Mode::Structured => (0x668e_33ef, 20),
            Mode::Extended => (0x6e8a_278c, 32),
        };
        let head = raw.read(header);
        assert_eq!(word(&head), magic);
        assert_eq!(&head[8..16], b"a cookie");
        if self == Mode::Simple {
            return word(&head[4..]);
        }
        assert_eq!(head[5], 1, "one chunk");
        let payload = raw.read(word(&head[header - 4..]) as usize);
        if head[6] & 0x80 == 0 { 0 } else { word(&payload) }
    }
}

/// The kinds of the answers to options.
fn answers(mut bytes: &[u8]) -> Vec<u32> {
    let mut kinds = Vec::new();
    while !bytes.is_empty() {
        assert_eq!(bytes[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
        let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        kinds.push(word(12));
        bytes = &bytes[20 + word(16) as usize..];
    }
    kinds
}

/// In the handshake: all that is sent, and what for.
fn bad_handshake(way: u64, random: &mut Random) -> (Vec<u8>, Want) {
    let flags = 3_u32.to_be_bytes();
    let after = |bytes: Vec<u8>| [&flags[..], &bytes].concat();
    match way {
        0 => (((random.next() as u32) | 4 << random.below(29)).to_be_bytes().to_vec(), Want::Nothing),
        1 => (after(random.bytes(16)), Want::Nothing),
        2 => {
            let all = [whole(8, b""), whole(10, &contexts("", &["base:allocation"])), whole(7, &go(""))];
            let mut bytes = after(all.concat());
            bytes.truncate(usize::try_from(random.below(bytes.len() as u64)).expect("a length"));
            (bytes, Want::End)
        }
        3 => {
            let length = random.pick(&[(16 << 20) + 1, 64 << 20, 1 << 31, u32::MAX]);
            (
                after(option(random.pick(&[1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 99]), length, b"data")),
                Want::Nothing,
            )
        }
        4 => {
            let length = random.pick(&[0, 1, 4096, 65_536, 70_000]);
            (
                after(whole(12 + (random.next() as u32 >> 1), &random.bytes(length))),
                Want::Answer(ERR_UNSUP, 1),
            )
        }
        5 => (after(whole(1, &vec![b'x'; random.pick(&[4097, 5000, 65_536])])), Want::Nothing),
        6 => {
            let length = 1 + random.below(4096);
            (after(whole(random.pick(&[3, 5, 8, 11]), &random.bytes(length))), Want::Answer(ERR_INVALID, 1))
        }
        7 => {
            // Inner lengths that lie: of the name, of the list, of a query; and one byte too many.
            let meta = random.below(2) == 0;
            let mut data = if meta { contexts("abc", &["base:allocation"]) } else { go("abc") };
            match random.below(3) {
                0 => data[random.pick(&[0, 1, 2])] = 1 + random.below(255) as u8,
                1 => data[random.pick(if meta { &[7, 8, 9, 10, 11, 14] } else { &[7, 8] })] = 0xff,
                _ => data.push(0),
            }
            let structured = whole(8, b"");
            let lie = whole(random.pick(if meta { &[9, 10] } else { &[6, 7] }), &data);
            (after([structured, lie].concat()), Want::Answer(ERR_INVALID, 2))
        }
        8 => {
            let data = random.pick(&[65_537_usize, 100_000, 200_000]);
            (after(whole(random.pick(&[6, 7, 9, 10]), &vec![0; data])), Want::Answer(ERR_TOO_BIG, 1))
        }
        9 => {
            let count = usize::try_from(33 + random.below(40)).expect("a count");
            let number = 20 + random.next() as u32 % 1000;
            (after(whole(number, b"").repeat(count)), Want::Answer(ERR_UNSUP, 32))
        }
        10 => {
            let command = random.below(9) as u16;
            (after(Mode::Simple.request(0, command, BORDER, 512)), Want::Nothing)
        }
        11 => {
            let name = if random.below(2) == 0 { "x".repeat(4097) } else { "a\0b".to_owned() };
            (after(whole(random.pick(&[6, 7]), &go(&name))), Want::Answer(ERR_INVALID, 1))
        }
        12 => {
            // Without fixed newstyle only EXPORT_NAME is certain.
            let bytes = [&random.pick(&[0_u32, 2]).to_be_bytes()[..], &whole(random.pick(&[3, 6, 7]), b"")];
            (bytes.concat(), Want::Answer(ERR_INVALID, 1))
        }
        13 => {
            let bytes = whole(10, &contexts("", &["base:allocation"]));
            (after(bytes), Want::Answer(ERR_INVALID, 1))
        }
        _ => (after(whole(5, b"")), Want::Answer(ERR_POLICY, 1)),
    }
}

/// In the transmission phase: what is sent there, and what for. A flush behind it tells whether both sides still agree
/// on where a request begins.
fn bad_request(way: u64, mode: Mode, random: &mut Random) -> (Vec<u8>, Want) {
    let flush = mode.request(0, 3, 0, 0);
    let refused = |bytes: Vec<u8>, error| ([bytes, flush.clone()].concat(), Want::Errors(vec![error, 0]));
    let ends = [SIZE - 1, SIZE, SIZE + 1, i64::MAX as u64, 1 << 63, u64::MAX - 511, u64::MAX];
    match way {
        15 => ([random.bytes(32), flush].concat(), Want::Silence),
        16 => {
            let mut bytes = mode.request(0, 3, 0, 0);
            bytes.truncate(usize::try_from(random.below(bytes.len() as u64)).expect("a length"));
            (bytes, Want::Silence)
        }
        17 => {
            let command = 8 + random.below(65_528) as u16;
            refused(mode.request(0, command, random.next(), random.next()), EINVAL)
        }
        18 => {
            let length = random.pick(&[2, 512, 65_536, 1 << 26, (1 << 26) + 1, 1 << 31, (1 << 32) - 1]);
            refused(mode.request(0, 0, random.pick(&ends), length), EINVAL)
        }
        19 => {
            let length = random.pick(&[0, 2, 512, 65_536, 65_537, 300_000]);
            let write = mode.request(0, 1, random.pick(&ends), length);
            refused([write, random.bytes(length)].concat(), ENOSPC)
        }
        20 => {
            let length = random.pick(&[(128 << 20) + 1, 1 << 31, u64::from(u32::MAX)]);
            ([mode.request(0, 1, BORDER, length), random.bytes(4096)].concat(), Want::Silence)
        }
        21 => {
            let length = 1 + random.below(BORDER);
            let part = random.below(length);
            let part = part.min(100_000);
            ([mode.request(0, 1, BORDER, length), random.bytes(part)].concat(), Want::Silence)
        }
        22 => {
            let (command, flag) = random.pick(&[
                (0, 1 << 1),
                (0, 1 << 3),
                (0, 1 << 4),
                (3, 1 << 1),
                (3, 1 << 2),
                (3, 1 << 3),
                (4, 1 << 1),
                (4, 1 << 2),
                (5, 1 << 4),
                (6, 1 << 2),
                (6, 1 << 3),
                (3, 1 << 15),
                (4, 1 << 6),
            ]);
            let (offset, length) = if command == 3 { (0, 0) } else { (BORDER, 512) };
            refused(mode.request(flag, command, offset, length), EINVAL)
        }
        23 => {
            let (command, error) = random.pick(&[(4, EINVAL), (5, EINVAL), (6, ENOSPC)]);
            refused(mode.request(0, command, random.pick(&ends), random.pick(&[0, 2, 1 << 31])), error)
        }
        24 => refused(mode.request(0, 3, random.below(2), 1 + random.below(9)), EINVAL),
        25 => refused(mode.request(0, 7, BORDER, 512), EINVAL),
        26 => {
            let length = random.below(5000);
            ([mode.request(0, 2, 0, 0), random.bytes(length)].concat(), Want::Silence)
        }
        _ => {
            // Data where none belongs; only extended headers can say so.
            let length = random.below(5000);
            if mode == Mode::Extended {
                let command = random.pick(&[0, 3, 4, 5, 6, 7]);
                let request = mode.request(1 << 5, command, BORDER, length);
                return refused([request, random.bytes(length)].concat(), EINVAL);
            }
            refused([mode.request(8, 1, BORDER, length), random.bytes(length)].concat(), EINVAL)
        }
    }
}

fn attack(server: &Server, number: u64, random: &mut Random) {
    let way = number % 28;
    let mode = random.pick(&[Mode::Simple, Mode::Structured, Mode::Extended]);
    let (bytes, want) = if way < 15 {
        bad_handshake(way, random)
    } else {
        let (requests, want) = bad_request(way, mode, random);
        ([mode.negotiation(), requests].concat(), want)
    };
    let mut raw = Raw::connect(server);
    raw.send(&bytes);
    if way.is_multiple_of(3) && random.below(4) == 0 {
        // Some do not even wait.
        return;
    }
    let what = || format!("attack {number}, way {way}, {mode:?}, {} bytes", bytes.len());
    if let Want::Errors(mut errors) = want {
        raw.read(mode.agreed());
        // In any order.
        let mut got: Vec<u32> = errors.iter().map(|_| mode.error(&mut raw)).collect();
        got.sort_unstable();
        errors.sort_unstable();
        assert_eq!(got, errors, "{}", what());
        return assert!(raw.rest().is_empty(), "{}: more", what());
    }
    let got = raw.rest();
    match want {
        Want::Nothing => assert!(got.is_empty(), "{}: {got:02x?}", what()),
        Want::Answer(last, count) => {
            let kinds = answers(&got);
            assert_eq!((kinds.last(), kinds.len()), (Some(&last), count), "{}", what());
        }
        Want::Silence => assert_eq!(got.len(), mode.agreed(), "{}: {got:02x?}", what()),
        Want::Errors(_) | Want::End => {}
    }
}

/// The most memory that a process has had, in bytes.
fn peak(server: &Server) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("status");
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).expect("VmHWM");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// An honest client, which works until `stop` exists and then says how much it did.
fn honest(uri: &str, started: &Path, stop: &Path) -> String {
    let script = format!(
        "import os, random
random.seed(1)
model = bytearray(h.pread({BORDER}, 0))
turns = 0
while turns < 50 or not os.path.exists('{}'):
    start, length = random.randrange({BORDER} - 70000), random.randrange(1, 70000)
    what = random.randrange(3)
    if what == 0:
        model[start:start + length] = data = random.randbytes(length)
        h.pwrite(data, start)
    elif what == 1:
        model[start:start + length] = bytes(length)
        h.zero(length, start)
    assert h.pread(length, start) == model[start:start + length]
    turns += 1
    if turns == 1: open('{}', 'w').close()
assert h.pread({BORDER}, 0) == model
print(turns)",
        stop.display(),
        started.display()
    );
    util::nbdsh(uri, &script)
}

#[test]
fn two_thousand_bad_clients() {
    let server = Server::start(["memory", "2M"]);
    let (started, stop) = (server.dir().join("started"), server.dir().join("stop"));
    let (uri, files) = (server.uri(), (started.clone(), stop.clone()));
    let client = std::thread::spawn(move || honest(&uri, &files.0, &files.1));
    while !started.exists() {
        assert!(!client.is_finished(), "the honest client failed at once");
        std::thread::yield_now();
    }
    // Some at once: most of the time they wait.
    let attacks = |numbers: Range<u64>| {
        std::thread::scope(|scope| {
            for first in numbers.start..numbers.start + THREADS {
                let (server, mine) = (&server, (first..numbers.end).step_by(THREADS as usize));
                scope.spawn(move || {
                    let random = &mut Random(0x5eed + first);
                    mine.for_each(|number| attack(server, number, random));
                });
            }
        });
    };
    attacks(0..WAYS / 10);
    let before = peak(&server);
    attacks(WAYS / 10..WAYS);
    let grown = peak(&server) - before;
    fs::File::create(&stop).and_then(|mut file| file.write_all(b"now")).expect("a file");
    let turns = client.join().expect("the honest client");
    assert!(turns.trim().parse::<u64>().expect("a number") >= 50, "{turns}");
    assert!(grown < 16 << 20, "the server has grown by {} KiB", grown >> 10);
    assert!(!server.stderr().contains("panicked"), "{}", server.stderr());
}
