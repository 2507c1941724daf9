//! Calls methods of scripts: which program runs, in which environment, and where its requests to the server go.

use std::{
    ffi::{CStr, CString, OsString},
    fs::File,
    os::{
        fd::AsFd,
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::Context as _;
use nbdkit_core::{Client, Errno, Error, Info, Result, ShutdownFlag};
use parking_lot::Mutex;

use super::{
    alarm::{Alarm, Patience},
    answer::{Answer, Wish, judge},
    process::{Job, Output, run},
};

/// The most that a script may print where one line is asked for.
const MAX_LINE: usize = 64 << 10;
/// The most that a script may print where a list is asked for.
const MAX_LIST: usize = 64 << 20;
/// The methods that print lists.
const LISTS: [&str; 3] = ["dump_plugin", "extents", "list_exports"];
/// The variable with the directory for the scripts.
const DIRECTORY: &str = "tmpdir";

/// What stands for a method.
pub(crate) enum Found<'a> {
    /// A program with its words, to which the method's are added.
    Program(Vec<&'a CStr>),
    /// Nothing needs to run: it would succeed and print this.
    Prints(&'static str),
    /// Nothing.
    Missing,
}

/// Where the methods come from: one script for all, or one for each.
pub(crate) trait Methods: Send + Sync + 'static {
    /// What the plugin says about itself.
    fn info(&self) -> Info;

    /// What stands for a method.
    fn find(&self, method: &str) -> Found<'_>;

    /// Takes a parameter that defines methods; false: it is for the scripts. The directory is theirs.
    fn define(&mut self, key: &str, value: &std::ffi::OsStr, directory: &Path) -> anyhow::Result<bool>;

    /// Whether everything is there that must be defined.
    fn check(&self) -> anyhow::Result<()>;

    /// What a script is called in messages of the start.
    fn title(&self) -> String;

    /// From now on standard input is not for reading.
    fn stdio_is_taken(&mut self) {}
}

/// The surroundings of scripts.
struct Place {
    directory: tempfile::TempDir,
    environment: Vec<CString>,
    null: File,
}

impl Place {
    fn new() -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("nbdkit")
            .tempdir()
            .context("cannot make a directory for the scripts ($TMPDIR says where)")?;
        let own = (OsString::from(DIRECTORY), directory.path().as_os_str().to_owned());
        let inherited = std::env::vars_os().filter(|(name, _)| *name != *DIRECTORY);
        let environment = inherited.chain([own]).map(|(mut name, value)| {
            name.push("=");
            name.push(value);
            CString::new(name.into_vec())
        });
        let environment = environment.collect::<std::result::Result<_, _>>()?;
        Ok(Place { directory, environment, null: File::open("/dev/null").context("cannot open /dev/null")? })
    }
}

/// A method to call.
pub(super) struct Call<'a> {
    method: &'static str,
    words: Vec<CString>,
    input: Option<&'a [u8]>,
    buf: Option<&'a mut [u8]>,
    /// What it prints is its answer.
    answers: bool,
    client: Option<&'a Arc<Client>>,
    patience: Patience<'a>,
    own_group: bool,
}

impl<'a> Call<'a> {
    pub(super) fn new(method: &'static str) -> Self {
        Call {
            method,
            words: Vec::new(),
            input: None,
            buf: None,
            answers: false,
            client: None,
            patience: Patience::default(),
            own_group: true,
        }
    }

    /// Before the server serves: the script may use the terminal.
    pub(super) fn at_start(method: &'static str) -> Self {
        Call { own_group: false, ..Call::new(method) }
    }

    /// Adds a word.
    pub(super) fn word(mut self, word: impl Into<Vec<u8>>) -> Result<Self> {
        let word = CString::new(word)
            .map_err(|_| Error::new(Errno::EINVAL, format!("{}: a word holds a NUL byte", self.method)))?;
        self.words.push(word);
        Ok(self)
    }

    /// Adds a boolean.
    pub(super) fn boolean(mut self, value: bool) -> Self {
        self.words.push(if value { c"true" } else { c"false" }.to_owned());
        self
    }

    /// Adds a number.
    pub(super) fn number(self, value: u64) -> Result<Self> {
        self.word(value.to_string())
    }

    pub(super) fn input(self, input: &'a [u8]) -> Self {
        Call { input: Some(input), ..self }
    }

    /// What it prints has to fill this.
    pub(super) fn fill(self, buf: &'a mut [u8]) -> Self {
        Call { buf: Some(buf), ..self }
    }

    pub(super) fn client(self, client: &'a Arc<Client>) -> Self {
        Call { client: Some(client), ..self }
    }

    pub(super) fn patience(self, patience: Patience<'a>) -> Self {
        Call { patience, ..self }
    }
}

/// See the module.
pub(super) struct Scripts<M> {
    pub(super) methods: M,
    /// Made when something is defined that can run.
    place: Option<Place>,
    /// Known once there is a server.
    server: OnceLock<(Arc<ShutdownFlag>, Arc<Alarm>)>,
    /// `unload` is due at the end: `load` has not failed.
    pub(super) loaded: AtomicBool,
    /// A script of the start wants the server to stop.
    shut_down: AtomicBool,
    /// At most one script runs at a time.
    pub(super) serial: AtomicBool,
    turn: Mutex<()>,
}

impl<M: Methods> Scripts<M> {
    pub(super) fn new(methods: M) -> Self {
        Scripts {
            methods,
            place: None,
            server: OnceLock::new(),
            loaded: AtomicBool::new(true),
            shut_down: AtomicBool::new(false),
            serial: AtomicBool::new(false),
            turn: Mutex::new(()),
        }
    }

    /// Takes a parameter that defines methods; false: it is for the scripts.
    pub(super) fn define(&mut self, key: &str, value: &std::ffi::OsStr) -> anyhow::Result<bool> {
        let place = match self.place.take() {
            Some(place) => place,
            None => Place::new()?,
        };
        let place = self.place.insert(place);
        self.methods.define(key, value, place.directory.path())
    }

    /// There is a server now.
    pub(super) fn serve(&self, server: &Arc<ShutdownFlag>) -> Result<()> {
        let _ = self.server.set((server.clone(), Alarm::on(server)?));
        if self.shut_down.load(Ordering::Relaxed) {
            server.raise();
        }
        Ok(())
    }

    /// What goes off when the server stops.
    pub(super) fn alarm(&self) -> Option<&Arc<Alarm>> {
        self.server.get().map(|(_, alarm)| alarm)
    }

    /// Calls a method.
    pub(super) fn call(&self, call: Call<'_>) -> Result<Answer> {
        let method = call.method;
        let (mut words, place) = match (self.methods.find(method), &self.place) {
            (Found::Program(words), Some(place)) => (words, place),
            (Found::Prints(text), _) => return Ok(Answer::Done(text.into())),
            (Found::Missing | Found::Program(_), _) => return Ok(Answer::Missing),
        };
        let Some(&program) = words.first() else { return Ok(Answer::Missing) };
        let name = CString::new(method).unwrap_or_default();
        words.push(&name);
        words.extend(call.words.iter().map(|word| &**word));
        let expected = call.buf.as_ref().map(|buf| buf.len());
        let job = Job {
            program,
            words: &words,
            environment: &place.environment,
            input: call.input,
            output: match call.buf {
                Some(buf) => Output::Into(buf),
                None if !call.answers => Output::Ignored,
                None if LISTS.contains(&method) => Output::Kept(MAX_LIST),
                None => Output::Kept(MAX_LINE),
            },
            own_group: call.own_group,
            patience: call.patience,
        };
        let turn = self.serial.load(Ordering::Relaxed).then(|| self.turn.lock());
        log::debug!("calling {} {method}", program.to_string_lossy());
        let ended = run(job, place.null.as_fd()).map_err(|e| cannot_run(program, &e))?;
        drop(turn);
        for line in ended.stderr.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            log::debug!("{method}: {}", String::from_utf8_lossy(line));
        }
        let printed = ended.printed;
        let (wish, answer) = judge(method, ended);
        if let Some(wish) = wish {
            let server = self.server.get().map(|(server, _)| &**server);
            if wish == Wish::ShutDown && server.is_none() {
                self.shut_down.store(true, Ordering::Relaxed);
            }
            wish.fulfil(call.client.map(|client| &**client), server);
        }
        match (answer, expected) {
            (Ok(Answer::Done(_)), Some(expected)) if printed < expected => Err(Error::new(
                Errno::EIO,
                format!(
                    "the {method} script printed {printed} bytes, and not {expected} as it was asked for"
                ),
            )),
            (answer, _) => answer,
        }
    }

    /// Calls a method that just does something. Tells whether it is there.
    pub(super) fn run(&self, call: Call<'_>) -> Result<bool> {
        let method = call.method;
        match self.call(call)? {
            Answer::Done(_) => Ok(true),
            Answer::Missing => Ok(false),
            Answer::No => Err(unexpected_no(method)),
        }
    }

    /// Calls a method that prints something; None: it is missing.
    pub(super) fn ask(&self, call: Call<'_>) -> Result<Option<Vec<u8>>> {
        let method = call.method;
        match self.call(Call { answers: true, ..call })? {
            Answer::Done(output) => Ok(Some(output)),
            Answer::Missing => Ok(None),
            Answer::No => Err(unexpected_no(method)),
        }
    }

    /// Calls a method that says yes or no; None: it is missing.
    pub(super) fn decide(&self, call: Call<'_>) -> Result<Option<bool>> {
        Ok(match self.call(call)? {
            Answer::Done(_) => Some(true),
            Answer::Missing => None,
            Answer::No => Some(false),
        })
    }
}

fn unexpected_no(method: &str) -> Error {
    let text =
        format!("the {method} script ended with exit code 3, which only means something in can_ methods");
    Error::new(Errno::EIO, text)
}

/// The reason why a program does not start. The client hears of an input/output error.
fn cannot_run(program: &CStr, e: &std::io::Error) -> Error {
    let path = std::ffi::OsStr::from_bytes(program.to_bytes());
    let hint = match e.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) => " (is there the program that its first line names?)",
        Some(Errno::EACCES) => " (make it executable: chmod +x)",
        _ => "",
    };
    Error::new(Errno::EIO, format!("cannot run {}: {e}{hint}", path.display()))
}
