use proptest::prelude::*;

use super::*;

fn parsed(text: &str) -> Result<List> {
    parse(text.as_bytes(), |name| match name {
        "X" => Some("1 2".into()),
        "TWICE" => Some("$X $X".into()),
        "SELF" => Some("( $SELF )".into()),
        "OPEN" => Some("(".into()),
        _ => None,
    })
}

fn bytes(bytes: &[u8]) -> Atom {
    Atom::Bytes(bytes.into())
}

fn put(atom: Atom, operators: &[Operator]) -> Item {
    Item::Put(Term { atom, operators: operators.into() })
}

#[test]
fn expressions() {
    use Operator::{Repeat, Slice};
    let list = |items| Atom::List(Rc::new(List(items)));
    let two = || list(vec![put(bytes(&[1]), &[]), put(bytes(&[2]), &[])]);
    for (text, items) in [
        ("", vec![]),
        (" # nothing", vec![]),
        ("1 0xff 08", [1, 0xff, 0, 8].map(|byte| put(bytes(&[byte]), &[])).into()),
        ("le16:0x102 be32:1", vec![put(bytes(&[2, 1]), &[]), put(bytes(&[0, 0, 0, 1]), &[])]),
        (
            "@0x10@+2 @- 3 @^8",
            vec![
                Item::Seek(Seek::To(16)),
                Item::Seek(Seek::Forward(2)),
                Item::Seek(Seek::Back(3)),
                Item::Seek(Seek::Align(8)),
            ],
        ),
        ("@2k @3b @0 @1s", [2048, 3, 0, 512].map(|at| Item::Seek(Seek::To(at))).into()),
        ("@5be16:1", vec![Item::Seek(Seek::To(5)), put(bytes(&[0, 1]), &[])]),
        (
            "\"a\" * 2[1:] *3[:4][0x1:02]",
            vec![put(
                bytes(b"a"),
                &[Repeat(2), Slice(1, None), Repeat(3), Slice(0, Some(4)), Slice(1, Some(2))],
            )],
        ),
        ("<a-\"b*2", vec![put(Atom::File("a-\"b".into()), &[Repeat(2)])]),
        ("<(a (b) c)[:]", vec![put(Atom::Script("a (b) c".into()), &[Slice(0, None)])]),
        (
            "(1 2)->\\a-b \\a-b*2",
            vec![
                Item::Assign(Term { atom: two(), operators: vec![] }, "a-b".into()),
                put(Atom::Name("a-b".into()), &[Repeat(2)]),
            ],
        ),
        ("$X*2", vec![put(two(), &[Repeat(2)])]),
        ("$TWICE", vec![put(list(vec![put(two(), &[]), put(two(), &[])]), &[])]),
    ] {
        assert_eq!(parsed(text).unwrap_or_else(|e| panic!("{text}: {e}")).0, items, "{text}");
    }
}

#[test]
fn errors_say_what_and_where() {
    for (text, message) in [
        ("256", "BYTE must be in the range 0..255"),
        ("1 x", "parsing error at offset 2"),
        ("é", "parsing error at offset 0"),
        ("le16:65536", "\"65536\": Numerical result out of range"),
        ("le16:", "empty string"),
        ("le16:1*2", "\"1*2\": trailing garbage"),
        ("(le16:1)", "\"1)\": trailing garbage"),
        ("le16:0x", "trailing garbage"),
        ("be64:-1", "negative numbers are not allowed"),
        ("1 le8:1", "expected \"le16/32/64:\" or \"be16/32/64:\" at offset 2"),
        ("@x", "parsing error at offset 1"),
        ("@", "parsing error at offset 1"),
        ("@-x", "parsing error at offset 2"),
        ("@+-3", "after @+ must not be negative"),
        ("@^3", "@^3 must be a power of 2"),
        ("@^0", "@^0 must be a power of 2"),
        ("@9223372036854775808", "over 2^63-1"),
        ("@8E", "over 2^63-1"),
        ("@0x1k", "parsing error at offset 4"),
        ("*3", "*N must follow an expression"),
        ("@3 *3", "*N cannot be applied to this type of expression"),
        ("1*x", "*N not numeric"),
        ("1*-1", "*N must not be negative"),
        ("[:]", "[N:M] must follow an expression"),
        ("1 -> \\a [:]", "[N:M] cannot be applied to this type of expression"),
        ("1[]", "[N:M] not numeric"),
        ("1[1]", "parsing error at offset 3"),
        ("1[0:1", "parsing error at offset 5"),
        ("1[2:1]", "[N:M] does not describe a valid slice"),
        ("1[-1:]", "[N:M] does not describe a valid slice"),
        ("-> \\a", "-> must follow an expression"),
        ("@3 -> \\a", "-> cannot be applied to this type of expression"),
        ("1 -", "parsing error at offset 3"),
        ("1 -> a", "parsing error at offset 4"),
        ("1 -> \\", "parsing error at offset 4"),
        ("\\", "parsing error at offset 0"),
        ("\"a", "unterminated string"),
        ("< a", "<FILE not a filename"),
        ("<()", "parsing error at offset 2"),
        ("<(a", "parsing error at offset 2"),
        ("(1", "unmatched '(' in data string"),
        ("1)", "unmatched ')' in data string"),
        ("$", "parsing error at offset 0"),
        ("$1", "parsing error at offset 0"),
        ("$NONE", "$NONE: variable not found"),
        ("$SELF", "$SELF: the variable contains itself"),
        ("$OPEN )", "unmatched '('"),
    ] {
        let error = format!("{:#}", parsed(text).expect_err(text));
        assert!(error.contains(message), "{text}: {error}");
    }
}

#[test]
fn nesting_is_bounded() {
    let nested = |depth| format!("{}{}", "(".repeat(depth), ")".repeat(depth));
    parsed(&nested(MAX_DEPTH - 1)).unwrap();
    let error = parsed(&nested(100_000)).unwrap_err().to_string();
    assert!(error.contains("nested more than"), "{error}");
}

proptest! {
    #[test]
    fn no_text_is_too_strange(text in "[0-9a-fxlbe:@+^*\\[\\]()<>\" \\\\$#X-]{0,30}") {
        drop(parsed(&text));
    }
}
