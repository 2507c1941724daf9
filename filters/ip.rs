//! Lets clients in or keeps them out, by where they come from and who they are.
//!
//! A client is looked at when it connects, before it can say anything. Rules about its certificate cannot be decided
//! then: a client whose fate depends on one is looked at again when it opens an export or asks for the list.

use std::{
    ffi::{OsStr, OsString},
    net::IpAddr,
    sync::Arc,
};

use anyhow::{Context as _, bail};
use nbdkit_core::{
    Below, Certificate, Client, Errno, Error, Exports, Filter, Handle, Info, NextConfig, NextConfigComplete,
    Open, Peer, Result, params,
};

use crate::{passthrough::Passthrough, wildcard::matches};

const HELP: &str = "\
allow=<RULE>[,<RULE>...]  Who may connect, whatever deny= says.
deny=<RULE>[,<RULE>...]   Who may not connect.
Rules: any, anyipv4, anyipv6, anyunix, anyvsock, ADDRESS, ADDRESS/BITS, pid:N, uid:N, gid:N,
vsock-cid:N, vsock-port:N, security:CONTEXT, dn:WILDCARD, issuer-dn:WILDCARD.";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Ip::default())
}

#[derive(Default)]
struct Ip {
    allow: Vec<Rule>,
    deny: Vec<Rule>,
    /// `-D ip.rules`: the rules are told in the log.
    tell: bool,
}

/// A kind of client.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Rule {
    Any,
    AnyIpv4,
    AnyIpv6,
    AnyUnix,
    AnyVsock,
    /// Addresses whose first bits are those of this one.
    Network(IpAddr, u8),
    Pid(i32),
    Uid(u32),
    Gid(u32),
    VsockCid(u32),
    VsockPort(u32),
    Security(String),
    Subject(String),
    Issuer(String),
}

/// The rules whose value may hold commas: they take the rest of the parameter.
const NAMES: [(&str, NameRule); 2] = [("dn:", Rule::Subject), ("issuer-dn:", Rule::Issuer)];

type NameRule = fn(String) -> Rule;

/// What follows a keyword, which may be in either case.
fn after<'a>(rule: &'a str, keyword: &str) -> Option<&'a str> {
    let (start, rest) = rule.split_at_checked(keyword.len())?;
    start.eq_ignore_ascii_case(keyword).then_some(rest)
}

/// Whether a name is that of a rule. One that is written out has backslashes where the certificate's has, which would stand
/// for something else in a wildcard.
fn is_meant(wanted: &str, name: &str) -> bool {
    wanted == name || matches(wanted, name)
}

/// The first rule of a list, and the others. The categories in a security label have commas between them too.
fn split(list: &str) -> (&str, &str) {
    let is_category = |word: &str| {
        let mut ends = word.split('.').map(|end| end.strip_prefix('c'));
        ends.all(|number| number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())))
    };
    let mut commas = list.match_indices(',').map(|(at, _)| (&list[..at], &list[at + 1..]));
    let ends = |(_, rest): &(&str, &str)| {
        after(list, "security:").is_none() || !rest.split(',').next().is_some_and(is_category)
    };
    commas.find(ends).unwrap_or((list, ""))
}

impl Rule {
    /// Adds the rules of a parameter's value, which may be none.
    fn parse_list(mut list: &str, rules: &mut Vec<Rule>) -> anyhow::Result<()> {
        while !list.is_empty() {
            let name = NAMES.iter().find_map(|(kind, rule)| Some((after(list, kind)?, rule)));
            if let Some((name, rule)) = name {
                if name.is_empty() {
                    bail!("rule '{list}' lacks a name after the colon");
                }
                rules.push(rule(name.to_owned()));
                return Ok(());
            }
            let (rule, rest) = split(list);
            if rule.is_empty() {
                bail!("empty entry in the list of rules: write one comma between two");
            }
            rules.push(Rule::parse(rule)?);
            list = rest;
        }
        Ok(())
    }

    fn parse(rule: &str) -> anyhow::Result<Self> {
        if let Some((kind, number)) = rule.split_once(':') {
            let what = format!("rule '{rule}'");
            match &*kind.to_ascii_lowercase() {
                "pid" => return Ok(Rule::Pid(params::integer(&what, OsStr::new(number))?)),
                "uid" => return Ok(Rule::Uid(params::integer(&what, OsStr::new(number))?)),
                "gid" => return Ok(Rule::Gid(params::integer(&what, OsStr::new(number))?)),
                "vsock-cid" => return Ok(Rule::VsockCid(params::integer(&what, OsStr::new(number))?)),
                "vsock-port" => return Ok(Rule::VsockPort(params::integer(&what, OsStr::new(number))?)),
                "security" if number.is_empty() => bail!("rule '{rule}' lacks a label after the colon"),
                "security" => return Ok(Rule::Security(number.to_owned())),
                _ => {}
            }
        }
        Ok(match &*rule.to_ascii_lowercase() {
            "all" | "any" => Rule::Any,
            "allipv4" | "anyipv4" => Rule::AnyIpv4,
            "allipv6" | "anyipv6" => Rule::AnyIpv6,
            "allunix" | "anyunix" => Rule::AnyUnix,
            "allvsock" | "anyvsock" => Rule::AnyVsock,
            _ => Self::network(rule)?,
        })
    }

    fn network(rule: &str) -> anyhow::Result<Self> {
        let (address, bits) = rule.split_once('/').map_or((rule, None), |(a, bits)| (a, Some(bits)));
        let address: IpAddr = address.parse().with_context(|| {
            format!(
                "cannot parse rule '{rule}': use any, an address, ADDRESS/BITS, pid:N, uid:N or another of --help"
            )
        })?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits =
            bits.map_or(Ok(most), |bits| params::integer(&format!("rule '{rule}'"), OsStr::new(bits)))?;
        if bits > most {
            bail!("rule '{rule}': the address has only {most} bits");
        }
        Ok(Rule::Network(address, bits))
    }

    fn is_about_certificate(&self) -> bool {
        matches!(self, Rule::Subject(_) | Rule::Issuer(_))
    }

    fn matches(&self, client: &Client) -> bool {
        let certificate = |name: fn(&Certificate) -> &String| client.certificate.get().map(name);
        match (self, &client.peer) {
            (Rule::Any, _) | (Rule::AnyUnix, Peer::Unix { .. }) | (Rule::AnyVsock, Peer::Vsock { .. }) => {
                true
            }
            (Rule::AnyIpv4, Peer::Tcp(address)) => address.ip().to_canonical().is_ipv4(),
            (Rule::AnyIpv6, Peer::Tcp(address)) => address.ip().to_canonical().is_ipv6(),
            (Rule::Network(network, bits), Peer::Tcp(address)) => same_network(*network, *bits, address.ip()),
            (Rule::Pid(wanted), Peer::Unix { pid, .. }) => wanted == pid,
            (Rule::Uid(wanted), Peer::Unix { uid, .. }) => wanted == uid,
            (Rule::Gid(wanted), Peer::Unix { gid, .. }) => wanted == gid,
            (Rule::VsockCid(wanted), Peer::Vsock { cid, .. }) => wanted == cid,
            (Rule::VsockPort(wanted), Peer::Vsock { port, .. }) => wanted == port,
            (Rule::Security(wanted), _) => client.security_context.get() == Some(wanted),
            (Rule::Subject(wanted), _) => {
                certificate(|c| &c.subject).is_some_and(|name| is_meant(wanted, name))
            }
            (Rule::Issuer(wanted), _) => {
                certificate(|c| &c.issuer).is_some_and(|name| is_meant(wanted, name))
            }
            _ => false,
        }
    }
}

/// Whether the first `bits` of both are the same. An IPv4 client of an IPv6 socket is an IPv4 client.
fn same_network(network: IpAddr, bits: u8, address: IpAddr) -> bool {
    match (network.to_canonical(), address.to_canonical()) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            let differing = network.to_bits() ^ address.to_bits();
            differing.leading_zeros() >= u32::from(bits)
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => {
            let differing = network.to_bits() ^ address.to_bits();
            differing.leading_zeros() >= u32::from(bits)
        }
        _ => false,
    }
}

/// When a client is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It has just connected; its certificate may come later.
    Connected,
    /// All that will be known of it is known.
    Known,
}

impl Ip {
    fn check(&self, client: Option<&Arc<Client>>, stage: Stage) -> Result<()> {
        // The user who mounts the disk runs the server itself.
        let Some(client) = client.filter(|client| !matches!(client.peer, Peer::Local)) else { return Ok(()) };
        if self.permits(client, stage) {
            return Ok(());
        }
        Err(Error::new(
            Errno::EPERM,
            format!(
                "the client ({}) is not permitted to connect by allow= and deny=",
                describe(&client.peer)
            ),
        ))
    }

    fn permits(&self, client: &Client, stage: Stage) -> bool {
        if self.allow.is_empty() && self.deny.is_empty() {
            return true;
        }
        let open = stage == Stage::Connected;
        if self.allow.iter().any(|rule| rule.matches(client) || (open && rule.is_about_certificate())) {
            return true;
        }
        // No rule but "any" can tell what this is, so it is not taken for a friend.
        let unknown = matches!(client.peer, Peer::Other) && client.certificate.get().is_none();
        !unknown && !self.deny.iter().any(|rule| rule.matches(client))
    }
}

fn describe(peer: &Peer) -> String {
    match peer {
        Peer::Tcp(address) => address.ip().to_canonical().to_string(),
        Peer::Unix { pid, uid, gid } => format!("pid {pid}, uid {uid}, gid {gid}"),
        Peer::Vsock { cid, port } => format!("vsock cid {cid}, port {port}"),
        Peer::Local | Peer::Other => "of an unknown kind".to_owned(),
    }
}

impl Filter for Ip {
    fn info(&self) -> Info {
        Info::bundled("ip", "nbdkit ip filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        let rules = match key {
            "allow" => &mut self.allow,
            "deny" => &mut self.deny,
            _ => return next(key, value),
        };
        Rule::parse_list(params::text(value)?, rules).context(key.to_owned())
    }

    fn debug_flag(&mut self, name: &str, value: i32) -> bool {
        let known = name == "rules";
        if known {
            self.tell = value != 0;
        }
        known
    }

    fn config_complete(&mut self, next: &mut NextConfigComplete<'_>) -> anyhow::Result<()> {
        if self.tell {
            log::debug!("ip: allow: {:?}", self.allow);
            log::debug!("ip: deny: {:?}", self.deny);
        }
        next()
    }

    fn preconnect(&self, next: &Below, readonly: bool) -> Result<()> {
        self.check(next.client(), Stage::Connected)?;
        next.preconnect(readonly)
    }

    fn list_exports(&self, next: &Below, readonly: bool, tls: bool) -> Result<Exports> {
        self.check(next.client(), Stage::Known)?;
        next.list_exports(readonly, tls)
    }

    fn default_export(&self, next: &Below, readonly: bool, tls: bool) -> Result<Option<OsString>> {
        self.check(next.client(), Stage::Known)?;
        next.default_export(readonly, tls)
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        self.check(Some(&open.client), Stage::Known)?;
        Ok(Box::new(Passthrough(next.open(open)?)))
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::{Chain, ShutdownFlag};

    use super::*;
    use crate::testing::{Spec, View, chain, check_model, config_error};

    fn tcp(address: &str) -> Peer {
        Peer::Tcp((address.parse::<IpAddr>().unwrap(), 1234).into())
    }

    const UNIX: Peer = Peer::Unix { pid: 11, uid: 12, gid: 13 };
    const VSOCK: Peer = Peer::Vsock { cid: 14, port: 15 };

    fn filtered(params: &[(&str, &str)]) -> Arc<Chain> {
        chain(&Spec::default().disk(), &["ip"], params).unwrap()
    }

    fn client(peer: &Peer) -> Arc<Client> {
        Arc::new(Client::new(1, peer.clone(), Arc::new(ShutdownFlag::new())))
    }

    /// Connects and opens.
    fn enter(params: &[(&str, &str)], client: Arc<Client>) -> Result<()> {
        crate::testing::open(&filtered(params), client, false).map(drop)
    }

    fn permitted(params: &[(&str, &str)], peer: &Peer) -> bool {
        enter(params, client(peer)).is_ok()
    }

    #[test]
    fn model() {
        check_model(&["ip"], &[], 20_000, &View::same(20_000));
        check_model(&["ip"], &[("deny", "all")], 20_000, &View::same(20_000));
    }

    #[test]
    fn each_rule_matches_its_clients_only() {
        let (v4, v6, mapped) = (tcp("10.1.2.3"), tcp("2001:db8::1"), tcp("::ffff:10.1.2.3"));
        let all = [&v4, &v6, &mapped, &UNIX, &VSOCK];
        for (rule, matched) in [
            ("all", vec![&v4, &v6, &mapped, &UNIX, &VSOCK]),
            ("any", vec![&v4, &v6, &mapped, &UNIX, &VSOCK]),
            ("allipv4", vec![&v4, &mapped]),
            ("anyipv4", vec![&v4, &mapped]),
            ("anyipv6", vec![&v6]),
            ("anyunix", vec![&UNIX]),
            ("allvsock", vec![&VSOCK]),
            ("10.1.2.3", vec![&v4, &mapped]),
            ("10.1.2.4", vec![]),
            ("10.1.2.2/31", vec![&v4, &mapped]),
            ("10.1.2.4/31", vec![]),
            ("0.0.0.0/0", vec![&v4, &mapped]),
            ("2001:db8::1", vec![&v6]),
            ("2001:db8::/32", vec![&v6]),
            ("2001:db9::/32", vec![]),
            ("::/0", vec![&v6]),
            ("pid:11", vec![&UNIX]),
            ("pid:12", vec![]),
            ("uid:12", vec![&UNIX]),
            ("uid:11", vec![]),
            ("gid:13", vec![&UNIX]),
            ("gid:12", vec![]),
            ("vsock-cid:14", vec![&VSOCK]),
            ("vsock-cid:15", vec![]),
            ("vsock-port:15", vec![&VSOCK]),
            ("vsock-port:14", vec![]),
            ("security:s", vec![]),
            ("dn:CN=x", vec![]),
        ] {
            for peer in all {
                let expected = matched.iter().any(|m| std::ptr::eq(*m, peer));
                assert_eq!(!permitted(&[("deny", rule)], peer), expected, "deny={rule} {peer:?}");
                let only = [("allow", rule), ("deny", "all")];
                assert_eq!(permitted(&only, peer), expected, "allow={rule} {peer:?}");
            }
        }
    }

    #[test]
    fn allow_goes_before_deny_and_lists_add_up() {
        let rules = [("deny", "10.0.0.0/8,anyunix"), ("allow", "uid:99,10.1.0.0/16"), ("deny", "::1")];
        assert!(permitted(&rules, &tcp("10.1.0.1")));
        assert!(!permitted(&rules, &tcp("10.2.0.1")));
        assert!(!permitted(&rules, &UNIX));
        assert!(!permitted(&rules, &tcp("::1")));
        assert!(permitted(&rules, &VSOCK));
    }

    #[test]
    fn a_client_is_refused_before_it_can_speak() {
        let error = filtered(&[("deny", "anyunix")]).connect(client(&UNIX), false).unwrap_err();
        assert_eq!(error.errno(), Errno::EPERM);
        assert!(error.to_string().contains("pid 11, uid 12, gid 13"), "{error}");
    }

    #[test]
    fn what_is_not_known_needs_any() {
        assert!(permitted(&[], &Peer::Other));
        assert!(!permitted(&[("deny", "10.0.0.0/8")], &Peer::Other));
        assert!(!permitted(&[("allow", "anyunix")], &Peer::Other));
        assert!(permitted(&[("allow", "any")], &Peer::Other));
    }

    #[test]
    fn what_scripts_write() {
        let rules = |list: &str| {
            let mut rules = Vec::new();
            Rule::parse_list(list, &mut rules).map(|()| rules).map_err(|e| e.to_string())
        };
        assert_eq!(rules(""), Ok(vec![]));
        assert_eq!(rules("ANY,AllIPv4,UID:7"), Ok(vec![Rule::Any, Rule::AnyIpv4, Rule::Uid(7)]));
        assert_eq!(rules("any,"), Ok(vec![Rule::Any]));
        assert!(rules("any,,any").unwrap_err().contains("empty entry"));
        let label = "system_u:object_r:t:s0:c1.c5,c7";
        let [plain, labelled] =
            ["security:a,pid:3".to_owned(), format!("Security:{label},uid:7")].map(|l| rules(&l));
        assert_eq!(plain, Ok(vec![Rule::Security("a".into()), Rule::Pid(3)]));
        assert_eq!(labelled, Ok(vec![Rule::Security(label.into()), Rule::Uid(7)]));
        assert_eq!(rules("DN:*,O=x"), Ok(vec![Rule::Subject("*,O=x".into())]));
        let (mut ip, mut flagged) = (Ip::default(), 0);
        for (name, known) in [("rules", true), ("other", false)] {
            assert_eq!(ip.debug_flag(name, 1), known);
            flagged += usize::from(ip.tell);
        }
        assert_eq!(flagged, 2, "another flag changes nothing");
    }

    #[test]
    fn security_contexts() {
        let labelled = client(&UNIX);
        labelled.security_context.set("system_u:system_r:svirt_t:s0:c1,c2".into()).unwrap();
        let rule = |rule| [("allow", rule), ("deny", "all")];
        enter(&rule("security:system_u:system_r:svirt_t:s0:c1,c2"), labelled.clone()).unwrap();
        enter(&rule("security:system_u:system_r:svirt_t:s0:c1"), labelled).unwrap_err();
    }

    #[test]
    fn rules_about_a_certificate_wait_for_it() {
        let params = [("allow", "uid:1,dn:CN=good,O=us"), ("allow", "issuer-dn:CN=ca"), ("deny", "all")];
        let chain = filtered(&params);
        let open = |subject: &str, issuer: &str| {
            let client = client(&UNIX);
            let connection = Arc::new(chain.connect(client.clone(), false).unwrap());
            let certificate = Certificate { subject: subject.into(), issuer: issuer.into() };
            client.certificate.set(certificate).unwrap();
            connection.open(OsStr::new(""), true).map(drop)
        };
        open("CN=good,O=us", "CN=other").unwrap();
        open("CN=bad", "CN=ca").unwrap();
        open("CN=bad", "CN=other").unwrap_err();

        let connection = Arc::new(chain.connect(client(&UNIX), false).unwrap());
        for refused in [
            connection.open(OsStr::new(""), false).map(drop).unwrap_err(),
            connection.list_exports(false).map(drop).unwrap_err(),
            connection.default_export(false).map(drop).unwrap_err(),
        ] {
            assert_eq!(refused.errno(), Errno::EPERM);
        }
    }

    #[test]
    fn a_denied_certificate() {
        let bad = client(&UNIX);
        bad.certificate.set(Certificate { subject: "CN=bad".into(), issuer: "CN=ca".into() }).unwrap();
        enter(&[("deny", "dn:CN=bad")], bad.clone()).unwrap_err();
        enter(&[("deny", "issuer-dn:*a"), ("allow", "dn:cn=*")], bad.clone()).unwrap_err();
        enter(&[("deny", "all"), ("allow", "dn:CN=b?d")], bad.clone()).unwrap();
        assert!(is_meant("O=a\\, b", "O=a\\, b") && is_meant("O=a*b", "O=a\\, b"));
        enter(&[("deny", "dn:CN=worse")], bad).unwrap();
    }

    #[test]
    fn rules_that_cannot_be_parsed_are_refused() {
        for (rule, message) in [
            ("foo", "cannot parse rule 'foo'"),
            ("127.0.0.1,,any", "empty entry"),
            ("1.2.3.4/33", "only 32 bits"),
            ("::1/129", "only 128 bits"),
            ("1.2.3.4/x", "could not parse number 'x'"),
            ("1.2.3", "cannot parse rule '1.2.3'"),
            ("uid:-1", "out of range"),
            ("pid:x", "could not parse number 'x'"),
            ("dn:", "lacks a name"),
        ] {
            let error = config_error("ip", &[("allow", rule)]);
            assert!(error.starts_with("allow: ") && error.contains(message), "{rule}: {error}");
        }
    }
}
