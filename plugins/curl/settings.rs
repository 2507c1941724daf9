//! How transfers are made: the parameters in libcurl's terms, and headers and cookies that a script makes up.

use std::{
    ffi::{CString, OsStr, OsString},
    os::unix::ffi::OsStrExt as _,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

use super::{
    answer::Answer,
    libcurl::{Easy, Opt},
};

/// How long the connection to a server may take, in seconds.
const CONNECT_TIMEOUT: i64 = 30;
/// Without `timeout=`, an answer that brings less than these bytes a second for so many seconds is given up.
const LOW_SPEED: (i64, i64) = (100, 60);
/// Redirections that are followed.
const REDIRECTIONS: i64 = 10;
/// Largest output of a script, in bytes.
const SCRIPT_OUTPUT: usize = 64 << 10;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Settings {
    pub(super) url: CString,
    pub(super) numbers: Vec<(Opt, i64)>,
    pub(super) texts: Vec<(Opt, CString)>,
    pub(super) headers: Vec<CString>,
    pub(super) resolve: Vec<CString>,
    /// In seconds; 0: none.
    pub(super) timeout: Option<i64>,
    pub(super) header_script: Option<Script>,
    pub(super) cookie_script: Option<Script>,
}

/// A script that prints lines for the next requests.
#[derive(Debug, Default)]
pub(super) struct Script {
    pub(super) text: OsString,
    /// How long what it has printed is good for; zero: for ever.
    pub(super) renew: Duration,
    run: u64,
    last: Option<(Instant, Vec<CString>)>,
}

impl Settings {
    /// A transfer with all that does not change.
    ///
    /// # Errors
    /// This libcurl does not know an option.
    pub(super) fn easy(&self) -> anyhow::Result<Easy<Answer>> {
        let mut easy = Easy::new(Answer::default())?;
        for (option, value) in [
            (Opt::NoSignal, 1),
            (Opt::FollowLocation, 1),
            (Opt::MaxRedirs, REDIRECTIONS),
            (Opt::ConnectTimeout, CONNECT_TIMEOUT),
            // Rather one connection with many requests, where the server can.
            (Opt::PipeWait, 1),
        ] {
            easy.set_number(option, value)?;
        }
        match self.timeout {
            Some(seconds) => easy.set_number(Opt::Timeout, seconds)?,
            None => {
                easy.set_number(Opt::LowSpeedLimit, LOW_SPEED.0)?;
                easy.set_number(Opt::LowSpeedTime, LOW_SPEED.1)?;
            }
        }
        for (option, value) in &self.numbers {
            easy.set_number(*option, *value)?;
        }
        for (option, value) in &self.texts {
            easy.set_text(*option, value)?;
        }
        if !self.resolve.is_empty() {
            easy.set_list(Opt::Resolve, &self.resolve)?;
        }
        if !self.headers.is_empty() {
            easy.set_list(Opt::HttpHeader, &self.headers)?;
        }
        Ok(easy)
    }

    /// Sets what scripts say now.
    ///
    /// # Errors
    /// A script fails.
    pub(super) fn refresh(&mut self, easy: &mut Easy<Answer>) -> anyhow::Result<()> {
        if let Some(script) = &mut self.header_script {
            let lines = script.lines("header-script", &self.url)?;
            easy.set_list(Opt::HttpHeader, &[&self.headers[..], lines].concat())?;
        }
        if let Some(script) = &mut self.cookie_script {
            let lines = script.lines("cookie-script", &self.url)?;
            let cookie = lines.iter().map(|line| line.to_bytes()).collect::<Vec<_>>().join(&b"; "[..]);
            easy.set_text(Opt::Cookie, &CString::new(cookie)?)?;
        }
        Ok(())
    }
}

impl Script {
    fn lines(&mut self, key: &str, url: &CString) -> anyhow::Result<&[CString]> {
        let good = |(since, _): &(Instant, _)| self.renew.is_zero() || since.elapsed() < self.renew;
        if !self.last.as_ref().is_some_and(good) {
            self.last = Some((Instant::now(), self.run(key, url)?));
        }
        Ok(self.last.as_ref().map_or(&[], |(_, lines)| lines))
    }

    fn run(&mut self, key: &str, url: &CString) -> anyhow::Result<Vec<CString>> {
        let output = Command::new("/bin/sh")
            .arg("-c")
            .arg(&self.text)
            .env("url", OsStr::from_bytes(url.to_bytes()))
            .env("iteration", self.run.to_string())
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("{key}: cannot run /bin/sh"))?;
        self.run += 1;
        ensure!(output.status.success(), "{key}: the script has failed: {}", output.status);
        if output.stdout.len() > SCRIPT_OUTPUT {
            bail!("{key}: the script prints more than 64K");
        }
        let lines =
            output.stdout.split(|b| *b == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty());
        lines.map(|line| Ok(CString::new(line)?)).collect()
    }
}
