//! Which versions and ciphers of TLS are spoken, as `--tls-priority` has them.
//!
//! Two languages are understood: the priority strings of GnuTLS, which is what nbdkit's users write, and cipher lists
//! of OpenSSL. Of the former, what takes something away that the server could otherwise speak is obeyed or refused;
//! what would add something that it does not speak is ignored.

use std::path::PathBuf;

use anyhow::bail;
use openssl::ssl::SslVersion;

/// What to speak.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Priority {
    pub(crate) min: SslVersion,
    pub(crate) max: SslVersion,
    /// For TLS 1.3, fastest first.
    pub(crate) suites: String,
    /// For TLS 1.2.
    pub(crate) ciphers: String,
}

/// A cipher: GnuTLS's name, the suite of TLS 1.3, and what there is of it in TLS 1.2, with certificates and with keys.
struct Cipher {
    name: &'static str,
    suite: &'static str,
    certificates: &'static str,
    keys: &'static str,
}

/// The fastest comes first, which is what the server prefers.
const CIPHERS: [Cipher; 3] = [
    Cipher {
        name: "AES-128-GCM",
        suite: "TLS_AES_128_GCM_SHA256",
        certificates: "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:DHE-RSA-AES128-GCM-SHA256",
        keys: "PSK-AES128-GCM-SHA256:DHE-PSK-AES128-GCM-SHA256",
    },
    Cipher {
        name: "AES-256-GCM",
        suite: "TLS_AES_256_GCM_SHA384",
        certificates: "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384:DHE-RSA-AES256-GCM-SHA384",
        keys: "PSK-AES256-GCM-SHA384:DHE-PSK-AES256-GCM-SHA384",
    },
    Cipher {
        name: "CHACHA20-POLY1305",
        suite: "TLS_CHACHA20_POLY1305_SHA256",
        certificates: "ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305:DHE-RSA-CHACHA20-POLY1305",
        keys: "ECDHE-PSK-CHACHA20-POLY1305:PSK-CHACHA20-POLY1305",
    },
];

/// By what the sides know each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Certificates,
    Keys,
}

/// What a string of GnuTLS has left, at the places of [`CIPHERS`] and [`VERSIONS`].
struct Chosen {
    ciphers: [bool; 3],
    versions: [bool; 2],
}

const VERSIONS: [(&str, SslVersion); 2] = [("TLS1.2", SslVersion::TLS1_2), ("TLS1.3", SslVersion::TLS1_3)];

/// Words that a string of GnuTLS starts with, and what they stand for.
fn start(word: &str) -> Option<Chosen> {
    let ciphers = match word {
        "NORMAL" | "PERFORMANCE" | "SECURE" | "SECURE128" | "LEGACY" | "PFS" => [true; 3],
        "SECURE192" | "SECURE256" => [false, true, true],
        "SUITEB128" => [true, true, false],
        "SUITEB192" => [false, true, false],
        "NONE" => return Some(Chosen { ciphers: [false; 3], versions: [false; 2] }),
        _ => return None,
    };
    Some(Chosen { ciphers, versions: [true; 2] })
}

/// What may be taken away, for it is never spoken or does not decide anything: how keys are exchanged follows from the
/// credentials, and every cipher here authenticates by itself.
const NEVER: [&str; 18] = [
    "KX-ALL",
    "MAC-ALL",
    "ANON-",
    "VERS-SSL3.0",
    "VERS-TLS1.0",
    "VERS-TLS1.1",
    "VERS-DTLS",
    "3DES-CBC",
    "ARCFOUR-128",
    "AES-128-CBC",
    "AES-256-CBC",
    "AES-128-CCM",
    "AES-256-CCM",
    "CAMELLIA-",
    "RSA",
    "MD5",
    "SHA1",
    "COMP-",
];

impl Chosen {
    /// Obeys one word, such as `-VERS-TLS1.2`.
    fn obey(&mut self, word: &str) -> anyhow::Result<()> {
        let Some((sign, name)) = word.split_at_checked(1) else { return Ok(()) };
        let on = match sign {
            "+" => true,
            "-" | "!" => false,
            // About what clients do wrong.
            "%" => return Ok(()),
            _ => bail!("--tls-priority: '{word}' does not begin with +, - or %"),
        };
        let version = name.strip_prefix("VERS-");
        if let Some("ALL" | "TLS-ALL") = version {
            self.versions = [on; 2];
        } else if let Some(at) = VERSIONS.iter().position(|(v, _)| version == Some(v)) {
            self.versions[at] = on;
        } else if name == "CIPHER-ALL" {
            self.ciphers = [on; 3];
        } else if let Some(at) = CIPHERS.iter().position(|c| c.name == name) {
            self.ciphers[at] = on;
        } else if !on && !NEVER.iter().any(|never| name.starts_with(never)) {
            bail!("--tls-priority: this server cannot do without '{name}'");
        }
        Ok(())
    }

    fn priority(&self, kind: Kind) -> anyhow::Result<Priority> {
        let left: Vec<_> = CIPHERS.iter().zip(self.ciphers).filter(|(_, on)| *on).map(|(c, _)| c).collect();
        let mut versions = VERSIONS.iter().zip(self.versions).filter(|(_, on)| *on).map(|((_, v), _)| *v);
        let Some(min) = versions.next() else { bail!("--tls-priority leaves no version of TLS 1.2 and 1.3") };
        if left.is_empty() {
            bail!(
                "--tls-priority leaves no cipher: AES-128-GCM, AES-256-GCM and CHACHA20-POLY1305 are known"
            );
        }
        let join =
            |part: fn(&Cipher) -> &'static str| left.iter().map(|c| part(c)).collect::<Vec<_>>().join(":");
        Ok(Priority {
            min,
            max: versions.next().unwrap_or(min),
            suites: join(|c| c.suite),
            ciphers: match kind {
                Kind::Certificates => join(|c| c.certificates),
                Kind::Keys => join(|c| c.keys),
            },
        })
    }
}

impl Priority {
    /// Reads the option's value; None: the default.
    ///
    /// # Errors
    /// Words that are not understood, and strings that leave nothing to speak.
    pub(crate) fn parse(text: Option<&str>, kind: Kind) -> anyhow::Result<Self> {
        let text = text.filter(|text| !text.is_empty()).unwrap_or("NORMAL");
        if let Some(text) = text.strip_prefix('@') {
            return Self::system(text, &system_file(), kind);
        }
        let mut words = text.split(':');
        if let Some(mut chosen) = words.next().and_then(start) {
            words.try_for_each(|word| chosen.obey(word))?;
            return chosen.priority(kind);
        }
        // OpenSSL itself has two lists, whose names tell them apart.
        let mut priority = Priority::parse(None, kind)?;
        let (suites, ciphers): (Vec<_>, Vec<_>) = text.split(':').partition(|word| word.starts_with("TLS_"));
        if suites.is_empty() {
            priority.ciphers = text.to_owned();
        } else if ciphers.is_empty() {
            (priority.suites, priority.min) = (text.to_owned(), SslVersion::TLS1_3);
        } else {
            (priority.suites, priority.ciphers) = (suites.join(":"), ciphers.join(":"));
        }
        Ok(priority)
    }
}

/// The machine's policy, for programs that use GnuTLS: where GnuTLS looks for it, and where crypto-policies(7) puts it.
/// Empty: there is none.
fn system_file() -> String {
    let named = std::env::var_os("GNUTLS_SYSTEM_PRIORITY_FILE").map(PathBuf::from);
    let usual = ["/etc/crypto-policies/back-ends/gnutls.config", "/etc/gnutls/config"].map(PathBuf::from);
    let places = named.into_iter().chain(usual);
    places.filter_map(|path| std::fs::read_to_string(path).ok()).next().unwrap_or_default()
}

impl Priority {
    /// Reads `KEYWORD,KEYWORD…:WORD…`, where the first keyword that the file of the machine has stands for what it has
    /// there; none: for NORMAL. What the administrator allows or forbids for the machine counts too.
    fn system(text: &str, file: &str, kind: Kind) -> anyhow::Result<Self> {
        let mut words = text.split(':');
        let keywords = words.next().unwrap_or_default();
        // A word that is not known here was not written for this server.
        let mut chosen = None;
        let policy = Policy::parse(file);
        for keyword in keywords.split(',') {
            if let Some(value) =
                policy.values.iter().find_map(|(key, value)| (*key == keyword).then_some(*value))
            {
                let mut parts = value.split(':');
                chosen = parts.next().and_then(start);
                if let Some(chosen) = &mut chosen {
                    parts.for_each(|word| chosen.obey(word).unwrap_or_default());
                }
                break;
            }
        }
        let all = Chosen { ciphers: [true; 3], versions: [true; 2] };
        let mut chosen = chosen.unwrap_or(all);
        policy.overrides.iter().for_each(|word| chosen.obey(word).unwrap_or_default());
        words.try_for_each(|word| chosen.obey(word))?;
        chosen.priority(kind)
    }
}

/// A file of GnuTLS's system-wide configuration.
struct Policy<'a> {
    /// Keywords and what they stand for.
    values: Vec<(&'a str, &'a str)>,
    /// What is forbidden or, where all else is forbidden, allowed: as words of a priority string.
    overrides: Vec<String>,
}

impl<'a> Policy<'a> {
    fn parse(file: &'a str) -> Self {
        let mut policy = Policy { values: Vec::new(), overrides: Vec::new() };
        let mut section = "priorities";
        for line in file.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
            if let Some(name) = line.strip_prefix('[').and_then(|name| name.strip_suffix(']')) {
                section = name;
            } else if let Some((key, value)) = line.split_once('=').map(|(k, v)| (k.trim(), v.trim())) {
                let word = match (section, key) {
                    ("priorities", _) => {
                        policy.values.push((key, value));
                        continue;
                    }
                    ("overrides", "tls-disabled-cipher") => format!("-{value}"),
                    ("overrides", "tls-enabled-cipher") => format!("+{value}"),
                    ("overrides", "disabled-version") => format!("-VERS-{value}"),
                    ("overrides", "enabled-version") => format!("+VERS-{value}"),
                    _ => continue,
                };
                policy.overrides.push(word.to_ascii_uppercase());
            }
        }
        policy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Priority {
        Priority::parse(Some(text), Kind::Keys).unwrap()
    }

    #[test]
    fn the_default_is_normal_and_fast() {
        let normal = parse("NORMAL");
        assert_eq!(Priority::parse(None, Kind::Keys).unwrap(), normal);
        assert_eq!(parse(""), normal);
        assert_eq!((normal.min, normal.max), (SslVersion::TLS1_2, SslVersion::TLS1_3));
        assert!(normal.suites.starts_with("TLS_AES_128_GCM_SHA256:"));
        assert!(normal.ciphers.starts_with("PSK-AES128-GCM-SHA256:"));
        let other = Priority::parse(None, Kind::Certificates).unwrap();
        assert!(
            other.ciphers.starts_with("ECDHE-ECDSA-AES128-GCM-SHA256:") && !other.ciphers.contains("PSK")
        );
    }

    #[test]
    fn strings_of_gnutls() {
        let only = parse("NORMAL:-VERS-ALL:+VERS-TLS1.3:+PSK:%SERVER_PRECEDENCE");
        assert_eq!((only.min, only.max), (SslVersion::TLS1_3, SslVersion::TLS1_3));
        let only = parse("NORMAL:-VERS-TLS1.3:-VERS-TLS1.0:!AES-128-CBC:-RSA:-CHACHA20-POLY1305");
        assert_eq!((only.min, only.max), (SslVersion::TLS1_2, SslVersion::TLS1_2));
        assert_eq!(only.suites, "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384");
        assert_eq!(parse("SUITEB192").suites, "TLS_AES_256_GCM_SHA384");
        assert_eq!(parse("NORMAL:-KX-ALL:+ECDHE-PSK:+DHE-PSK:+PSK"), parse("NORMAL"));
        let none = parse("NONE:+VERS-TLS1.2:+AES-256-GCM:+AEAD:+PSK");
        assert_eq!((none.min, none.max), (SslVersion::TLS1_2, SslVersion::TLS1_2));
        assert_eq!(none.ciphers, "PSK-AES256-GCM-SHA384:DHE-PSK-AES256-GCM-SHA384");
    }

    #[test]
    fn the_policy_of_the_machine() {
        let parse = |text, file| Priority::system(text, file, Kind::Keys).unwrap();
        let old = "SYSTEM=NONE:+MAC-ALL:-MD5:+GROUP-ALL:+VERS-TLS1.2:+AES-256-GCM:+ODD:%PROFILE_MEDIUM\n";
        let system = parse("SYSTEM", old);
        assert_eq!((system.max, &*system.suites), (SslVersion::TLS1_2, "TLS_AES_256_GCM_SHA384"));
        let both = "[priorities]\nNBDKIT=NORMAL:-VERS-TLS1.2\nSYSTEM = NONE:+VERS-TLS1.2:+AES-128-GCM\n";
        assert_eq!(parse("NBDKIT,SYSTEM", both).min, SslVersion::TLS1_3);
        assert_eq!(parse("OTHER,SYSTEM", both).max, SslVersion::TLS1_2);
        assert_eq!(parse("SYSTEM:+VERS-TLS1.3", both).max, SslVersion::TLS1_3);
        // What crypto-policies writes today: nothing, and then what is allowed.
        let allowed = "[global]\noverride-mode = allowlist\n[overrides]\n# x\ntls-enabled-cipher = AES-256-GCM\n\
                       enabled-version = TLS1.3\nenabled-version = dtls1.2\n[priorities]\nSYSTEM=NONE\n";
        let system = parse("SYSTEM", allowed);
        assert_eq!((system.min, &*system.suites), (SslVersion::TLS1_3, "TLS_AES_256_GCM_SHA384"));
        let forbidden = "[overrides]\ntls-disabled-cipher = CHACHA20-POLY1305\ndisabled-version = tls1.2\n";
        let system = parse("SYSTEM", forbidden);
        assert_eq!((system.min, system.suites.matches(':').count()), (SslVersion::TLS1_3, 1));
        assert_eq!(parse("NBDKIT,SYSTEM", ""), super::Priority::parse(None, Kind::Keys).unwrap());
        assert!(Priority::system("SYSTEM:-VERS-ALL", "", Kind::Keys).is_err());
    }

    #[test]
    fn lists_of_openssl() {
        let list = parse("PSK-AES256-GCM-SHA384");
        assert_eq!((&*list.ciphers, list.min), ("PSK-AES256-GCM-SHA384", SslVersion::TLS1_2));
        assert_eq!(list.suites, parse("NORMAL").suites);
        let suite = parse("TLS_CHACHA20_POLY1305_SHA256");
        assert_eq!((&*suite.suites, suite.min), ("TLS_CHACHA20_POLY1305_SHA256", SslVersion::TLS1_3));
        let both = parse("TLS_AES_128_GCM_SHA256:PSK-AES128-GCM-SHA256");
        assert_eq!((&*both.suites, &*both.ciphers), ("TLS_AES_128_GCM_SHA256", "PSK-AES128-GCM-SHA256"));
    }

    #[test]
    fn what_cannot_be_obeyed_is_refused() {
        for (text, why) in [
            ("NORMAL:-VERS-ALL", "no version"),
            ("NONE:+AES-128-GCM", "no version"),
            ("NONE:+VERS-TLS1.3", "no cipher"),
            ("NORMAL:-GROUP-X25519", "cannot do without 'GROUP-X25519'"),
            ("NORMAL:AES-128-GCM", "does not begin with"),
        ] {
            let error = Priority::parse(Some(text), Kind::Keys).unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
