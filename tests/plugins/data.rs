//! The language of the data plugin, beside the C nbdkit: each expression is the same disk in both, or both refuse it.

use std::fs;

use super::C_NBDKIT;
use crate::util::{NBDKIT, Run, run, run_ok, temp};

/// Expressions that make a disk, with further parameters behind `|`. FILE is a file of six bytes, BIG one of 100,000.
const DISKS: &[&str] = &[
    // Bytes and words.
    "",
    " \t\n",
    "0",
    "1 2 3",
    "255",
    "0377",
    "0xFF 0Xfe",
    "08",
    "0x",
    "1\"a\"2",
    "1(2)3",
    "1be16:1",
    "le16:1",
    "le16:0x1234 be16:0x1234 le32:0x12345678 be32:0x12345678",
    "le64:0x123456789abcdef0 be64:0x123456789abcdef0",
    "be32:010 le16:+1 le16:65535 be64:18446744073709551615",
    "(be16:258 )*3",
    // Strings.
    "\"\"",
    "\"hello\"",
    r#""\a\b\f\n\r\t\v\\\"""#,
    r#""a\xfFb" "\x414""#,
    r#""\q\(""#,
    "\"é\"",
    "\"a b # c ) (\"",
    // Offsets.
    "@10",
    "@0x10 1",
    "@010 1",
    "@08",
    "@3\"a\"",
    "1@3",
    "@5#c",
    "@10 @-5 1",
    "1 2 3 @-2 9",
    "@+5 1 @+ 2 1",
    "@-0 @+0 @0",
    "@5 @-5 1",
    "@5 @^4 1 @^0x10 2 @^01 3",
    "@^4",
    "1 @0 2",
    "@32768 1",
    "@+0x10 1 @-0x8 2",
    "@10000000000 1",
    // Lists and repeats.
    "()",
    "()*5",
    "(((( 1 ))))",
    "1 2*3",
    "(1 2)*3",
    "1 *3",
    "1* 3",
    "1*+3",
    "1*0x10 2*010",
    "1*08",
    "1*0",
    "1*3*2",
    "(@5 1)*2",
    "@2 (@5 1)*2",
    "(@5)",
    "0x55*10 @0 (@5 1)",
    "0x55*10 @0 0*5",
    "(1*1000000*0)*5",
    "0x55*1000000",
    "(0x55 0xAA)*2048",
    "(1 2 3)*100000",
    "((1 2)*3000 3)*20",
    "(1*5000 @9000 2)*7",
    "\"ab\"*3",
    "()*99999",
    // Slices.
    "1[0:1]",
    "(1 2 3)[1:2]",
    "(1 2 3)[1:]",
    "(1 2 3)[:2]",
    "(1 2 3)[:]",
    "(1 2 3)[0x1:0x2]",
    "(1 2 3)[1:][1:]",
    "(1 2 3)*2[1:5]",
    "1*3 *2 [1:]",
    "1 [:]*2",
    "1[0: 1]",
    "1[+0:+1]",
    "1[:0] 1[1:]",
    "()[0:0] ()[:]",
    "\"hello\"[1:3]",
    "((1 2)*30000)[3:59999]",
    "(1*5000 2*5000 3*5000)[4000:11000]*2",
    // Names.
    "1 -> \\a",
    "1 -> \\a \\a \\a",
    "1->\\a \\a",
    "1 ->\\a\\a",
    "\"a\"->\\a\"b\"\\a",
    "1 -> \\a-b_9 \\a-b_9*2",
    "1*3[:2] -> \\x \\x*2",
    "1 -> \\a (\\a (\\a))",
    "1 -> \\a 2 -> \\a \\a",
    "1 -> \\a (2 -> \\a \\a) \\a",
    "1 -> \\a (\\a \\a) -> \\b 2 -> \\a \\b \\a",
    "(1 2 3) -> \\a \\a[0:1]*4 \\a[1:]",
    "(@5 1) -> \\a \\a*2 @100 \\a",
    "\\none -> \\a 1",
    "</nonexistent -> \\a <(exit 1) -> \\b 1[2:] -> \\c 5",
    // Variables.
    "$x|x=1 2",
    "$x*2|x=1 2",
    "$x$x ($x)|x=1 2",
    "$x -> \\a \\a[1:]|x=1 2",
    "$y|y=$x*2|x=(3)",
    "$ENVIRONMENT",
    "$ENVIRONMENT|ENVIRONMENT=1",
    "1 -> \\a $x|x=\\a*3",
    "1|x=(",
    // Comments.
    "#",
    "1#2",
    "( #)\n1)",
    "1 # two\n 3",
    // Files and scripts.
    "<FILE",
    "<FILE*2",
    "<FILE[1:3]",
    "<FILE[1:9]",
    "<FILE[9:]",
    "<FILE[9:12]",
    "<FILE[:0]",
    "<FILE*2[1:9]",
    "<FILE -> \\x \\x*2",
    "(1 <FILE)",
    "<BIG",
    "<BIG[99990:]*3",
    "@100000 <BIG",
    "</dev/zero[:5]",
    "</dev/zero[5:70000]",
    "<(echo hi)",
    "<(echo hi)*2",
    "<(echo hi)[1:2]",
    "<(echo hi)[:5]",
    "<(echo hi)(1)",
    "<( )",
    "<(true)",
    "<(exit 1)[:4]",
    "<(exit 1)[:]",
    "<(exit 1)[0:]",
    "<(cat /dev/zero)[:5]",
    "<(yes)[:100001]",
    "<(cat FILE; (echo a; echo b))",
    "<(printf '\\1\\2') -> \\x \\x @100 \\x*3",
    // Sizes.
    "1 2 3|size=2",
    "1 2 3|size=10",
    "0x55*100000|size=70001",
    "@10000000 1|size=512",
];

/// Expressions that both refuse, with the same words in the message.
const REFUSED: &[&str] = &[
    "256",
    "0777",
    "99999999999999999999",
    "1x",
    "0xg",
    "1,2",
    "é",
    "+1",
    "le16:65536",
    "le64:18446744073709551616",
    "le16:",
    "le16: 1",
    "le16:-1",
    "le16:1k",
    "le16:0x",
    "le16:1*2",
    "(le16:1)",
    "\"a",
    "\"\\",
    "\"\\x4\"",
    "\"\\xg0\"",
    "\"\\0\"",
    "\"\\1\"",
    "\"\\u1234\"",
    "@",
    "@x",
    "@ 5",
    "@-x",
    "@+",
    "@5x",
    "@0xg",
    "@0x1k",
    "@-1",
    "@5 @-6",
    "@+-3",
    "@^-4",
    "@^3",
    "@^0",
    "@+1k",
    "(1",
    "1(",
    "1)",
    "@5)",
    "*3",
    "@4*3",
    "1*",
    "1*x",
    "1*1k",
    "1[]",
    "1[:",
    "1[1]",
    "1[a:b]",
    "(1 2 3)[2:1]",
    "(1 2 3)[1:4]",
    "(1 2 3)[-1:2]",
    "1[2:]",
    "\\",
    "\\b",
    "1 -> \\",
    "1 -> a",
    "1 -",
    "@3 -> \\a",
    "(1 -> \\a \\a) \\a",
    "(\\a) 1 -> \\a",
    "\\x -> \\y 1 -> \\x \\y",
    "$NOTSET",
    "$x|x=)",
    "<",
    "< FILE",
    "<*",
    "</nonexistent",
    "<()",
    "<(echo",
    "<(echo \"(\" )",
    "<(echo \\))",
    "<(exit 1)",
    "<(echo hi; exit 3)[1:]",
    "<(echo hi)[2:9]",
    "1|raw=a",
    "1|data=1",
    "1|base64=YQ==",
];

/// Those where the C nbdkit says something else, or where its offsets do not count.
const SAID_OTHERWISE: &[(&str, &str)] = &[
    ("le8:1", "expected \"le16/32/64:\" or \"be16/32/64:\" at offset 0"),
    ("1 -> \\a b", "expected \"le16/32/64:\" or \"be16/32/64:\" at offset 8"),
    ("1*-1", "*N must not be negative"),
    ("1[0:1", "parsing error at offset 5"),
    ("1[0 :1]", "parsing error at offset 3"),
    ("1|size=-1", "cannot be negative"),
    ("1[ 0 : 1 ]", "parsing error at offset 4"),
    ("$", "parsing error at offset 0"),
    ("$1", "parsing error at offset 0"),
    ("<FILE[2:1]", "[N:M] does not describe a valid slice"),
    ("<FILE(1)", "unmatched ')'"),
    ("<FILE\"a\"", "FILE\"a\": No such file or directory"),
];

/// What nbdkit 1.44 and later take, or 1.32 gets wrong: the expression and the disk in hexadecimal, or the message.
const LATER: &[(&str, Result<&str, &str>)] = &[
    ("@1k @3 1", Ok("1024: 00000001")),
    ("@2s @1 9", Ok("1024: 00090000")),
    ("@5b 1", Ok("6: 00000000")),
    ("@9223372036854775808", Err("over 2^63-1")),
    ("@99999999999999999999", Err("over 2^63-1")),
    ("@9223372036854775807 @+1", Err("larger than 2^63-1")),
    ("1*99999999999999999999", Err("over 2^63-1")),
    ("((1 2)*4611686018427387904)*2", Err("larger than 2^63-1")),
    ("$x|x=$x", Err("the variable contains itself")),
    ("1*1048576*1048576|size=100", Ok("100: 01010101")),
    // Base64 within the language: the syntax is our own.
    ("base64:aGVsbG8=", Ok("5: 68656c6c")),
    ("base64:aGVsbG8*2[3:] 1", Ok("8: 6c6f6865")),
    ("(base64:/+8=)*2 -> \\a \\a", Ok("4: ffefffef")),
    ("9 base64:\"/ +\n8=\"[1:]@4", Ok("4: 09ef0000")),
    ("base64:\"\" 7", Ok("1: 07")),
    ("7 base64: 1", Err("base64: needs data, at offset 2")),
    ("7 base64:\"aGk=", Err("add the closing '\"'")),
    ("7 base64:aGVsbG", Err("cannot decode base64: at offset 2")),
    ("7 base64:\"a-k=\"", Err("cannot decode base64: at offset 2")),
];

/// Size and digest of a disk.
const DIGEST: &str = "nbdinfo --size \"$uri\"; nbdcopy \"$uri\" - | sha256sum";
/// Its size, and digests of its start and end: for sparse ones that would take long to copy.
const START: &str = "nbdinfo --size \"$uri\" | tr '\\n' ':'; nbdsh -u \"$uri\" -c 'print(\"\", h.pread(min(h.get_size(), 4), 0).hex())'";

fn serve(program: &str, dir: &std::path::Path, expression: &str, command: &str) -> Run {
    let at = |name: &str| dir.join(name).display().to_string();
    let expression = expression.replace("FILE", &at("file")).replace("BIG", &at("big"));
    let mut words = vec!["env", "ENVIRONMENT=\"env\" 7", program, "-U", "-", "data"];
    let (data, others) = expression.split_once('|').unwrap_or((&expression, ""));
    let data = format!("data={data}");
    words.push(&data);
    words.extend(others.split('|').filter(|word| !word.is_empty()));
    words.extend(["--run", command]);
    run(words)
}

fn files() -> tempfile::TempDir {
    let dir = temp();
    fs::write(dir.path().join("file"), "hello\n").expect("write");
    let big: Vec<u8> = (0..100_000_u32).map(|n| (n / 7) as u8).collect();
    fs::write(dir.path().join("big"), big).expect("write");
    dir
}

/// Runs a check on each item on two threads, and gives all complaints.
fn each<T: Sync>(items: &[T], check: impl Fn(&T) -> Option<String> + Sync) {
    let half = |items: &[T]| items.iter().filter_map(&check).collect::<Vec<_>>();
    let (one, two) = items.split_at(items.len() / 2);
    let wrong = std::thread::scope(|scope| {
        let other = scope.spawn(|| half(two));
        [half(one), other.join().expect("the other half")].concat()
    });
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn expressions_are_the_same_disk() {
    assert!(DISKS.len() + REFUSED.len() > 80);
    let dir = files();
    each(DISKS, |expression| {
        let command = if expression.starts_with("@10000000000") { START } else { DIGEST };
        let [ours, theirs] =
            [NBDKIT, C_NBDKIT].map(|program| serve(program, dir.path(), expression, command));
        let same = ours.code == 0 && theirs.code == 0 && ours.stdout == theirs.stdout;
        (!same).then(|| {
            format!("{expression}: {}{} / {}{}", ours.stdout, ours.stderr, theirs.stdout, theirs.stderr)
        })
    });
}

#[test]
fn both_refuse_for_the_same_reason() {
    let dir = files();
    each(REFUSED, |expression| {
        let [ours, theirs] = [NBDKIT, C_NBDKIT].map(|program| serve(program, dir.path(), expression, "true"));
        let message = |run: &Run| {
            let line = run.stderr.lines().find(|line| line.starts_with("nbdkit: error: "))?.to_owned();
            // Ours says which call failed in other words.
            Some(line.replace("nbdkit: error: ", "").replace("pclose: ", ""))
        };
        let same = ours.code == 1
            && theirs.code == 1
            && match (message(&ours), message(&theirs)) {
                (Some(ours), Some(theirs)) => ours.contains(&theirs),
                _ => false,
            };
        (!same).then(|| {
            format!("{expression}: {} {}/ {} {}", ours.code, ours.stderr, theirs.code, theirs.stderr)
        })
    });
}

#[test]
fn both_refuse_in_other_words() {
    let dir = files();
    each(SAID_OTHERWISE, |(expression, message)| {
        let [ours, theirs] = [NBDKIT, C_NBDKIT].map(|program| serve(program, dir.path(), expression, "true"));
        let message = message.replace("FILE", &dir.path().join("file").display().to_string());
        let same = ours.code == 1 && theirs.code == 1 && ours.stderr.contains(&message);
        (!same).then(|| format!("{expression}: {} {}/ {}", ours.code, ours.stderr, theirs.code))
    });
}

#[test]
fn what_later_versions_take() {
    let dir = files();
    each(LATER, |(expression, want)| {
        let ours = serve(NBDKIT, dir.path(), expression, START);
        let same = match want {
            Ok(disk) => ours.stdout.trim() == *disk,
            Err(message) => ours.code == 1 && ours.stderr.contains(message),
        };
        (!same).then(|| format!("{expression}: {} {}{}", ours.code, ours.stdout, ours.stderr))
    });
}

/// Relative names are those of the directory where the server was started, in the background too.
#[test]
fn files_are_opened_where_the_server_starts() {
    let dir = files();
    let script = format!(
        "cd {} && {NBDKIT} -U s -P p data '<file <(pwd)' && nbdcopy 'nbd+unix:///?socket=s' - | cat; kill $(cat p)",
        dir.path().display()
    );
    let output = crate::util::sh(&script);
    assert_eq!(output, format!("hello\n{}\n", dir.path().display()));
}

/// What a client sends on standard input is no script's.
#[test]
fn scripts_do_not_read_the_clients_socket() {
    let script = "import sys
h = nbd.NBD()
h.connect_command([sys.argv[1], \"-s\", \"data\", \"<(head -c 4 | wc -c)\"])
print(h.pread(h.get_size(), 0).decode())
h.shutdown()";
    let output = run_ok(["/usr/bin/python3", "-c", &format!("import nbd\n{script}"), NBDKIT]);
    assert_eq!(output.trim(), "0");
}

#[test]
fn dump_plugin_tells_what_scripts_look_for() {
    let dump = |program| {
        let dump = run([program, "data", "--dump-plugin"]).ok();
        let keys = ["data_base64", "mlock", "zstd", "magic_config_key", "thread_model"];
        let wanted = |line: &&str| keys.contains(&line.split('=').next().unwrap_or_default());
        let mut lines: Vec<_> = dump.lines().filter(wanted).map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(dump(NBDKIT), dump(C_NBDKIT));
}

#[test]
fn debug_flags_show_the_tree_and_the_pages() {
    let words =
        ["-f", "-v", "-D", "data.AST=1", "-D", "data.dir=1", "data", "(1 $x)*2 @4096 \"ab\"", "x=\"yz\""];
    let command = "nbdsh -u \"$uri\" -c 'h.pwrite(b\"x\", 4096)' -c 'h.trim(4098, 0)'";
    let said = |program| super::captive(program, &words, command).stderr.replace("nbdkit: debug: ", "");
    let ours = said(NBDKIT);
    let tree = "BEGIN AST (-D data.AST=1)\n(\n    (\n        1\n        (\n            \"yz\"\n        )\n    )*2\n    \
                @4096\n    \"ab\"\n)\nEND AST\n";
    assert!(ours.contains(tree), "{ours}");
    for page in [
        "data: dir: page 1 to 1, of 4096 bytes: write 2 bytes at 4096",
        "data: dir: page 1 to 1, of 4096 bytes: write 1 bytes at 4096",
        "data: dir: page 0 to 1, of 4096 bytes: clear 4098 bytes at 0",
    ] {
        assert!(ours.contains(page), "{page}: {ours}");
    }
    let theirs = said(C_NBDKIT);
    assert!(theirs.contains("BEGIN AST (-D data.AST=1)\n(\n") && theirs.contains(")\nEND AST\n"), "{theirs}");
    for word in ["AST", "dir"] {
        assert!(!ours.contains(&format!("data_debug_{word}")), "the flag is known: {ours}");
    }
    let quiet = super::captive(NBDKIT, &["-f", "-v", "data", "1"], "true").stderr;
    assert!(!quiet.contains("AST") && !quiet.contains("dir:"), "{quiet}");
}

/// An image comes back from what the script makes of it, in both servers; a sparse one costs what is in it.
#[test]
fn disk2data_gives_the_same_disk() {
    let dir = temp();
    let path = |name: &str| dir.path().join(name).display().to_string();
    crate::util::sh(&format!(
        "cd {} && truncate -s 1M partitioned && echo start=1 | sfdisk -q partitioned
         truncate -s 4M ext4 && mkfs.ext4 -q -F ext4
         head -c 5000 /dev/urandom > random
         printf '%s' 'it'\\''s \"quoted\" \\back' > text
         python3 -c 'import sys; sys.stdout.buffer.write(b\"\\x55\\xaa\" * 3000 + b\"abc\\0\" * 99 + bytes(20) + b\"z\" * 7)' > patterns
         truncate -s 0 empty
         truncate -s 5000 zeroes",
        dir.path().display()
    ));
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/disk2data.py");
    for image in ["partitioned", "ext4", "random", "text", "patterns", "empty", "zeroes"] {
        let (image, command) = (path(image), path("command"));
        let made = run_ok(["python3", script, &image]);
        assert!(made.starts_with("nbdkit data '"), "{made}");
        fs::write(&command, &made).expect("write");
        for program in [NBDKIT, C_NBDKIT] {
            // The script's own command, with our words after it.
            crate::util::sh(&format!(
                "nbdkit() {{ command {program} -U - \"$@\" --run 'nbdcopy --allocated \"$uri\" - | cmp - {image} || exit 9'; }}
                 . {command} || [ ! -s {image} ]"
            ));
        }
        let text = run_ok(["python3", script, "--text", &image]);
        assert!(made.contains(text.lines().next().unwrap_or_default()), "{text}");
    }
    let patterns = run_ok(["python3", script, "--text", &path("patterns")]);
    assert!(patterns.contains("(85 170)*3000") && patterns.contains("122*7"), "{patterns}");
    let large = path("large");
    crate::util::sh(&format!(
        "truncate -s 1T {large}; printf end | dd of={large} bs=1 seek=1099511627773 conv=notrunc status=none"
    ));
    let made = run_ok(["timeout", "20", "python3", script, &large]);
    assert_eq!(made, "nbdkit data '\n  @0xfffffffffd 101 110 100\n  ' size=1099511627776\n");
    let missing = run(["python3", script, "/nonexistent"]).refused();
    assert_eq!(missing.trim(), "disk2data: /nonexistent: No such file or directory");
}
