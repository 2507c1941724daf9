//! Programs that behave, and those that do not.

use std::{
    ffi::{CStr, CString},
    fs::File,
    os::fd::AsFd,
    time::Duration,
};

use nbdkit_core::{Errno, Flags, ShutdownFlag};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};

use super::{
    alarm::{Alarm, Patience},
    process::{Ended, How, Job, Output, run},
};
use crate::testkit::{config_error, disk, extents, open, read_all, start};

/// Runs a piece of shell script.
fn shell(text: &str, input: Option<&[u8]>, output: Output<'_>, patience: Patience<'_>) -> Ended {
    let text = CString::new(text).unwrap();
    let words: [&CStr; 3] = [c"sh", c"-c", &text];
    let environment: Vec<CString> = vec![c"PATH=/usr/bin:/bin".into()];
    let job = Job {
        program: c"/bin/sh",
        words: &words,
        environment: &environment,
        input,
        output,
        own_group: true,
        patience,
    };
    run(job, File::open("/dev/null").unwrap().as_fd()).unwrap()
}

fn kept(text: &str, input: Option<&[u8]>) -> Ended {
    shell(text, input, Output::Kept(1 << 16), Patience::default())
}

#[test]
fn both_ways_at_once_and_more_than_pipes_hold() {
    let input: Vec<u8> = (0..8 << 20).map(|i: u32| (i >> 4) as u8).collect();
    let mut output = vec![0; input.len()];
    let ended = shell("cat", Some(&input), Output::Into(&mut output), Patience::default());
    assert_eq!((ended.how, ended.printed, ended.too_much), (How::Exited(0), input.len(), false));
    assert!(output == input);
}

#[test]
fn a_program_need_not_read_its_input() {
    let ended = kept("echo full >&2; exit 1", Some(&[1; 1 << 20]));
    assert_eq!((ended.how, &ended.stderr[..]), (How::Exited(1), &b"full\n"[..]));
    assert_eq!(kept("exec <&-; exit 0", Some(&[1; 1 << 20])).how, How::Exited(0));
}

#[test]
fn the_input_is_empty_unless_there_is_one() {
    assert_eq!(kept("cat; echo end", None).stdout, b"end\n");
    assert_eq!(kept("cat; echo end", Some(b"")).stdout, b"end\n");
    assert_eq!(kept("cat; echo end", Some(b"x")).stdout, b"xend\n");
}

#[test]
fn output_is_bounded() {
    let ended = shell("yes; sleep 1000", None, Output::Kept(1000), Patience::default());
    assert!(ended.too_much && ended.stdout.len() < 1 << 17, "{}", ended.stdout.len());
    let mut buf = [0; 10];
    let ended = shell("printf 12345678901", None, Output::Into(&mut buf), Patience::default());
    assert!(ended.too_much && &buf == b"1234567890");
    let ended = kept("head -c 10000000 /dev/zero >&2", None);
    assert_eq!((ended.how, ended.stderr.len()), (How::Exited(0), 64 << 10));
}

#[test]
fn a_background_process_that_prints_elsewhere_is_not_waited_for() {
    let ended = kept("sleep 1000 >/dev/null & echo $!", None);
    assert_eq!(ended.how, How::Exited(0));
    let pid = String::from_utf8(ended.stdout).unwrap();
    let killed = std::process::Command::new("kill").arg(pid.trim()).status().unwrap();
    assert!(killed.success(), "it was there");
}

#[test]
fn output_that_comes_late_is_waited_for() {
    assert_eq!(kept("(read x; echo late) <&0 & exit 0", Some(b"\n")).stdout, b"late\n");
}

#[test]
fn signals_are_as_programs_expect() {
    let ended = kept("kill -TERM $$; sleep 1000", None);
    assert_eq!(ended.how, How::Killed(15));
    assert_eq!(kept("kill -PIPE $$; sleep 1000", None).how, How::Killed(13));
    let ended = kept("grep SigBlk /proc/self/status", None);
    assert_eq!(ended.stdout, b"SigBlk:\t0000000000000000\n");
}

#[test]
fn one_that_nobody_waits_for_is_ended_with_all_that_it_has_started() {
    let (stop, directory) = (ShutdownFlag::new(), tempfile::tempdir().unwrap());
    let alarm = Alarm::on(&stop).unwrap();
    stop.raise();
    let pids = directory.path().join("pids");
    let text = format!("trap '' TERM; sleep 1000 & echo $! $$ >{}; wait; sleep 1001", pids.display());
    // As one that has started before the flag was raised.
    let patience = Patience::until([&alarm]).at_least(Duration::from_millis(300));
    let ended = shell(&text, None, Output::Kept(1), patience.clone());
    assert_eq!(ended.how, How::GivenUp);
    for pid in std::fs::read_to_string(&pids).unwrap().split_whitespace() {
        let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        let minute = Timespec { tv_sec: 60, tv_nsec: 0 };
        assert_eq!(poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&minute)), Ok(1), "{pid:?} lives");
    }
    let late = shell("echo", None, Output::Kept(1), Patience::at_most(Duration::ZERO));
    assert_eq!((late.how, late.printed), (How::GivenUp, 0), "it did not start at all");
}

#[test]
fn what_eval_is_not_told_it_infers() {
    let size = ("get_size", "echo 8K");
    let caps = |more: &[(&str, &str)]| disk("eval", &[&[size], more].concat()).caps().clone();
    let bare = caps(&[]);
    assert!(!bare.write && !bare.extents && !bare.multi_conn && bare.cache == nbdkit_core::Support::None);
    let full =
        caps(&[("pwrite", "true"), ("zero", "true"), ("trim", "true"), ("flush", "true"), ("cache", "true")]);
    assert!(full.write && full.trim && full.flush && !full.fast_zero);
    assert_eq!((full.zero, full.fua), (nbdkit_core::Support::Native, nbdkit_core::Support::Emulate));
    assert_eq!(full.cache, nbdkit_core::Support::Native);
    assert!(caps(&[("pwrite", "true")]).fast_zero, "it fails fast");
    assert!(!caps(&[("pwrite", "true"), ("can_write", "exit 3")]).write);
}

#[test]
fn eval_is_a_disk() {
    let disk = disk(
        "eval",
        &[
            ("get_ready", "head -c 5000 /dev/zero >$tmpdir/disk"),
            ("get_size", "stat -c %s $tmpdir/disk"),
            ("pread", "dd if=$tmpdir/disk skip=$4 count=$3 iflag=skip_bytes,count_bytes status=none"),
            ("pwrite", "dd of=$tmpdir/disk seek=$4 conv=notrunc oflag=seek_bytes status=none"),
            ("extents", "echo 0 1000 hole,zero; echo 1000 4000"),
        ],
    );
    disk.pwrite(b"hello", 4990, Flags::empty()).unwrap();
    disk.zero(2, 4992, Flags::empty()).unwrap();
    let mut want = vec![0; 5000];
    want[4990..4995].copy_from_slice(b"he\0\0o");
    assert!(read_all(&disk) == want);
    assert_eq!(extents(&disk, 500, 1000), [(500, 500, 3), (1000, 4000, 0)]);
}

#[test]
fn errors_have_their_number_and_their_text() {
    let fails = |script: &str| {
        let disk = disk("eval", &[("get_size", "echo 8K"), ("pread", script)]);
        let error = disk.pread(&mut [0; 4], 0).unwrap_err();
        (error.errno(), error.to_string())
    };
    assert_eq!(fails("echo enospc no room >&2; exit 1"), (Errno::ENOSPC, "no room".into()));
    let (errno, text) = fails("printf 123");
    assert!(errno == Errno::EIO && text.contains("printed 3 bytes, and not 4"), "{text}");
    let (errno, text) = fails("printf 12345");
    assert!(errno == Errno::EIO && text.contains("more than the 4 bytes"), "{text}");
    let (errno, text) = fails("exit 2");
    assert!(errno == Errno::EIO && text.contains("no pread method"), "{text}");
    let (errno, text) = fails("exit 3");
    assert!(errno == Errno::EIO && text.contains("exit code 3"), "{text}");
}

#[test]
fn a_script_can_shut_the_server_down() {
    for (code, works) in [(4, true), (5, false)] {
        let script = format!("printf 1234; exit {code}");
        let chain = start("eval", &[("get_size", "echo 8K"), ("pread", &script)]).unwrap();
        let disk = open(&chain).unwrap();
        assert!(!chain.server().is_raised());
        assert_eq!(disk.pread(&mut [0; 4], 0).is_ok(), works);
        assert!(chain.server().is_raised());
    }
    let early = start("eval", &[("get_size", "echo 8K"), ("get_ready", "exit 4")]).unwrap();
    assert!(early.server().is_raised(), "as soon as there is a server");
}

#[test]
fn a_script_can_send_its_client_away() {
    for (code, works, gone) in [(6, false, true), (7, true, false), (8, false, false)] {
        let script = format!("printf 1234; exit {code}");
        let disk = disk("eval", &[("get_size", "echo 8K"), ("pread", &script)]);
        assert_eq!(disk.pread(&mut [0; 4], 0).is_ok(), works);
        assert!(disk.client().leave.is_raised());
        assert_eq!(disk.client().gone.is_raised(), gone);
    }
}

#[test]
fn bad_parameters_name_the_fix() {
    assert!(config_error("sh", &[]).contains("nbdkit sh SCRIPT"));
    assert!(config_error("sh", &[("file", "x")]).contains("the first parameter must be the script"));
    assert!(config_error("sh", &[("script", "/nonexistent")]).contains("script=/nonexistent: No such file"));
    assert!(config_error("sh", &[("script", "/")]).contains("/ is a directory"));
    assert!(config_error("sh", &[("script", "/etc/passwd")]).contains("chmod +x"));
    let unknown = config_error("eval", &[("get_size", "echo 1"), ("sise", "1")]);
    assert!(unknown.contains("unknown parameter 'sise': eval has no config method"), "{unknown}");
    let said = config_error("eval", &[("config", "echo $2=$3 is bad >&2; exit 1"), ("a", "b")]);
    assert_eq!(said, "eval: config: a=b is bad");
}
