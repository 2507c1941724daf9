//! How many system calls requests take: counted exactly, by strace.
//!
//! Server and client are on one CPU, so nobody looks for input while the other runs, and each batch of requests is
//! there as a whole when the server receives.

use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    os::unix::fs::{FileExt, OpenOptionsExt},
    process::Stdio,
};

use crate::util::{self, Mount, Server, raw::Raw};

/// Batches that are counted.
const ROUNDS: u64 = 50;

/// What a server has called while `work` ran, by name.
fn calls(pid: u32, work: impl FnOnce()) -> BTreeMap<String, u64> {
    let dir = util::temp();
    let table = dir.path().join("calls");
    let mut strace = std::process::Command::new("strace")
        .args(["-f", "-c", "-U", "name,calls", "-o"])
        .arg(&table)
        .args(["-p", &pid.to_string()])
        .stderr(Stdio::piped())
        .spawn()
        .expect("strace");
    // It says so once it is attached to every thread.
    let mut said = std::io::BufReader::new(strace.stderr.take().expect("a pipe"));
    let mut line = String::new();
    std::io::BufRead::read_line(&mut said, &mut line).expect("a line");
    assert!(line.contains("attached"), "{line}");
    work();
    rustix::process::kill_process(rustix::process::Pid::from_child(&strace), rustix::process::Signal::INT)
        .expect("kill");
    strace.wait().expect("wait");
    let text = std::fs::read_to_string(&table).expect("a table");
    let rows = text.lines().filter_map(|line| {
        let (name, count) = line.trim().split_once(char::is_whitespace)?;
        Some((name.to_owned(), count.trim().parse().ok()?))
    });
    rows.filter(|(name, _)| name != "total").collect()
}

/// Gives a server one CPU, and this thread the same.
fn on_one_cpu(pid: u32) {
    let cpus = rustix::thread::sched_getaffinity(None).expect("CPUs");
    let cpu = (0..rustix::thread::CpuSet::MAX_CPU).find(|cpu| cpus.is_set(*cpu)).expect("a CPU");
    util::run_ok(["taskset", "-a", "-p", "-c", &cpu.to_string(), &pid.to_string()]);
    let mut one = rustix::thread::CpuSet::new();
    one.set(cpu);
    rustix::thread::sched_setaffinity(None, &one).expect("sched_setaffinity");
}

/// Sends batches of `depth` requests, each when the last is answered.
fn work(raw: &mut Raw, rounds: u64, depth: u64, command: u16) {
    const LENGTH: u32 = 4096;
    let request = |n: u64| {
        let head = Raw::encoded(0, command, n % 64 * u64::from(LENGTH), LENGTH);
        [head, vec![7; if command == 1 { LENGTH as usize } else { 0 }]].concat()
    };
    let batch: Vec<u8> = (0..depth).flat_map(request).collect();
    let reply = if command == 1 { 16 } else { 16 + LENGTH as usize };
    for _ in 0..rounds {
        raw.send(&batch);
        raw.read(reply * depth as usize);
    }
}

/// System calls for a request, in hundredths.
fn calls_for_a_request(words: &[&str], depth: u64, command: u16) -> u64 {
    let server = Server::start(words);
    on_one_cpu(server.pid());
    let mut raw = Raw::transmission(&server);
    work(&mut raw, 20, depth, command);
    let calls = calls(server.pid(), || work(&mut raw, ROUNDS, depth, command));
    let total: u64 = calls.values().sum();
    eprintln!("{words:?} depth {depth}: {calls:?}");
    assert!(total >= ROUNDS, "strace missed them: {calls:?}");
    total * 100 / (ROUNDS * depth)
}

#[test]
fn system_calls_are_shared_by_a_batch() {
    let dir = util::temp();
    let image = util::patterned(dir.path(), "disk", 1 << 20);
    let file = image.to_str().expect("UTF-8");
    for (command, depth, most) in [(0, 64, 110), (0, 16, 120), (0, 1, 310), (1, 64, 112), (1, 16, 120)] {
        for words in [&["memory", "1M"][..], &["file", file]] {
            let each = calls_for_a_request(words, depth, command);
            assert!(each <= most, "{words:?}: {each} hundredths at depth {depth}, command {command}");
        }
    }
}

/// Requests past the page cache are started and end later: a batch enters the ring and comes back from it.
#[test]
fn requests_past_the_page_cache_share_calls() {
    if util::is_left_out("io_uring") {
        return;
    }
    let dir = util::temp();
    let image = util::patterned(dir.path(), "disk", 1 << 20);
    let file = image.to_str().expect("UTF-8");
    for (command, depth, most) in [(0, 64, 120), (0, 16, 200), (1, 64, 200)] {
        let each = calls_for_a_request(&["file", file, "cache=none"], depth, command);
        assert!(each <= most, "{each} hundredths at depth {depth}, command {command}");
    }
}

/// A mount reads its requests and writes its answers.
#[test]
fn a_mount_takes_few_calls() {
    const LENGTH: usize = 4096;
    #[repr(align(4096))]
    struct Aligned([u8; LENGTH]);
    let dir = util::temp();
    let image = util::patterned(dir.path(), "disk", 1 << 20);
    let mount = Mount::start(["--no-passthrough", "file", image.to_str().expect("UTF-8")]);
    on_one_cpu(mount.pid());
    let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(direct).open(mount.file()).expect("open");
    let mut memory = Box::new(Aligned([7; LENGTH]));
    for (write, most) in [(false, 320), (true, 320)] {
        let mut work = |rounds| {
            for n in 0..rounds {
                let offset = n % 64 * LENGTH as u64;
                if write {
                    file.write_all_at(&memory.0, offset).expect("write");
                } else {
                    file.read_exact_at(&mut memory.0, offset).expect("read");
                }
            }
        };
        work(20);
        let calls = calls(mount.pid(), || work(ROUNDS));
        let each = calls.values().sum::<u64>() * 100 / ROUNDS;
        eprintln!("mount, write {write}: {calls:?}");
        assert!(each >= 200, "strace missed them: {calls:?}");
        assert!(each <= most, "{each} hundredths, write {write}: {calls:?}");
    }
}

#[test]
fn observing_filters_make_no_calls() {
    let dir = util::temp();
    let image = util::patterned(dir.path(), "disk", 1 << 20);
    let file = image.to_str().expect("UTF-8");
    let filters = ["--filter=nofilter", "--filter=offset", "--filter=noextents"];
    for command in [0, 1] {
        let without = calls_for_a_request(&["file", file], 64, command);
        let with = calls_for_a_request(&[&filters[..], &["file", file]].concat(), 64, command);
        assert_eq!(with, without, "command {command}");
    }
}

/// A mostly empty disk of 1 TiB with 10,000 pieces of data.
#[test]
fn a_map_takes_a_pair_of_calls_for_an_extent() {
    const PIECES: u64 = 10_000;
    const SIZE: u64 = 1 << 40;
    /// What a client asks for at once.
    const QUESTION: u64 = 1 << 32;
    let place = |n: u64| (n * (SIZE / PIECES)) & !0xffff;
    let dir = util::temp();
    let path = dir.path().join("sparse");
    let disk = std::fs::File::create(&path).expect("create");
    disk.set_len(SIZE).expect("set_len");
    for n in 0..PIECES {
        rustix::io::pwrite(&disk, &[1; 4096], place(n)).expect("pwrite");
    }
    disk.sync_all().expect("sync");
    let server = Server::start(["file", path.to_str().expect("UTF-8")]);
    let mut map = String::new();
    let calls = calls(server.pid(), || map = util::run_ok(["nbdinfo", "--map", &server.uri()]));
    let rows: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    let data = rows.iter().filter(|row| row[3] == "data");
    assert_eq!(data.clone().count() as u64, PIECES);
    assert!(
        data.clone()
            .enumerate()
            .all(|(n, row)| { row[0].parse() == Ok(place(n as u64)) && row[1] == "4096" })
    );
    let most = 2 * PIECES + 4 * SIZE.div_ceil(QUESTION) + 100;
    assert!(calls["lseek"] <= most, "{calls:?}");
    assert!(calls["lseek"] >= PIECES, "strace missed them: {calls:?}");
}
