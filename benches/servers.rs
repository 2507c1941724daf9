//! Servers: how each contestant is started, and how it is stopped without a trace.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    os::unix::{net::UnixStream, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::{NamedTempFile, TempDir};

use crate::{
    contestants::{Contestant, Disk, Kind, Variant},
    images::{self, Images},
    interrupt::{self, poll},
    jobs, libnbd,
    load::{Address, Clients},
    programs::{Programs, Release},
};

/// The user's name and key, in a directory that only we can read. There is nothing to protect.
const KEYS: &str = "bench:3a5c0f1d2b4e6978a1b2c3d4e5f60718293a4b5c6d7e8f900112233445566778\n";
const KEYS_FILE: &str = "keys.psk";
/// How many connections qemu-nbd takes.
const SHARED: &str = "--shared=2000";
const START_LIMIT: Duration = Duration::from_secs(10);
const STOP_LIMIT: Duration = Duration::from_secs(3);

/// A server that answers. Dropping it unmounts, ends the processes and removes what they left.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) contestant: Contestant,
    children: Vec<Child>,
    /// The socket, or the file in the mount.
    place: PathBuf,
    mount: Option<PathBuf>,
    /// The file that is served.
    image: Option<PathBuf>,
    /// The program with its plugin and filters.
    command: Vec<OsString>,
    size: u64,
    dir: TempDir,
    /// What a server without a memory plugin serves instead.
    _memory: Option<NamedTempFile>,
}

impl Server {
    /// Starts a server and waits until it answers. `Ok(None)`: not installed here.
    pub(crate) fn start(
        contestant: Contestant,
        programs: &Programs,
        images: &Images,
    ) -> Result<Option<Self>> {
        let dir = TempDir::with_prefix("nbdkit-bench-")?;
        let memory = match (contestant.disk, contestant.kind) {
            (Disk::Memory(size), Kind::QemuNbd) => Some(images::memory(size)?),
            _ => None,
        };
        let image = match &memory {
            Some(memory) => Some(memory.path().to_owned()),
            None => images.file(contestant.disk)?.map(Path::to_owned),
        };
        let size = match (contestant.disk, &image) {
            (Disk::Memory(size) | Disk::Empty(size), _) => size,
            (_, Some(image)) => fs::metadata(image)?.len(),
            _ => 0,
        };
        let place = dir.path().join("sock");
        let (children, command, mount) = Default::default();
        let mut server =
            Server { contestant, children, place, mount, image, command, size, dir, _memory: memory };
        let started = server.launch(programs)?;
        if started && matches!(contestant.disk, Disk::Memory(_)) {
            jobs::fill(&server)?;
        }
        Ok(started.then_some(server))
    }

    fn launch(&mut self, programs: &Programs) -> Result<bool> {
        match self.contestant.kind {
            Kind::Ours => {
                let release = self.release(programs)?;
                self.serve(release.server.as_deref(), programs)
            }
            Kind::Nbdkit => self.serve(programs.nbdkit.as_deref(), programs),
            Kind::QemuNbd => self.qemu_nbd(programs),
            Kind::OursMount | Kind::OursMountSocket | Kind::OursPassthrough => {
                let release = self.release(programs)?;
                let Some(program) = &release.mount else { return Ok(false) };
                let Some(chain) = self.chain(programs)? else { return Ok(false) };
                let mount = self.mountpoint("mnt", true)?;
                self.command = [program.into()].into_iter().chain(chain).collect();
                let kind = self.contestant.kind;
                let mut command = self.command();
                command.arg("-f");
                command.arg(if kind == Kind::OursPassthrough { "-r" } else { "--no-passthrough" });
                if kind == Kind::OursMountSocket {
                    self.spawn(command.arg("-U").arg(&self.place).arg(&mount))?;
                    return self.await_socket();
                }
                self.spawn(command.arg(&mount))?;
                self.await_mount(mount.join("nbd"))
            }
            Kind::Nbdfuse => {
                let Some(program) = &programs.nbdfuse else { return Ok(false) };
                if !self.serve(programs.nbdkit.as_deref(), programs)? {
                    return Ok(false);
                }
                // By URI nbdfuse opens several connections, which is its fastest mode.
                let uri = libnbd::uri(&self.place, None);
                let mount = self.mountpoint("mnt", true)?;
                self.spawn(Command::new(program).arg(mount.join("nbd")).arg(uri))?;
                self.await_mount(mount.join("nbd"))
            }
            Kind::Qsd => {
                let (Some(program), Some(image)) = (&programs.qsd, &self.image) else { return Ok(false) };
                let mut blockdev = OsString::from("driver=file,node-name=disk,locking=off,filename=");
                blockdev.push(image);
                let mount = self.mountpoint("disk", false)?;
                let mut export = OsString::from("type=fuse,id=export,node-name=disk,writable=on,mountpoint=");
                export.push(&mount);
                let mut command = Command::new(program);
                self.spawn(command.arg("--blockdev").arg(blockdev).arg("--export").arg(export))?;
                self.await_mount(mount)
            }
            Kind::Raw => {
                self.place = self.image.clone().context("no file")?;
                Ok(true)
            }
        }
    }

    /// An nbdkit, ours or the peer's, on the socket.
    fn serve(&mut self, program: Option<&Path>, programs: &Programs) -> Result<bool> {
        let Some(program) = program else { return Ok(false) };
        let Some(chain) = self.chain(programs)? else { return Ok(false) };
        self.command = [program.into()].into_iter().chain(chain).collect();
        let mut command = self.command();
        command.args(["-f", "-U"]).arg(&self.place);
        if self.contestant.variant == Variant::Tls {
            command.arg("--tls=require").arg("--tls-psk").arg(self.make_keys()?);
        }
        self.spawn(&mut command)?;
        self.await_socket()
    }

    /// The programs of this project that serve.
    fn release<'a>(&self, programs: &'a Programs) -> Result<&'a Release> {
        let earlier = programs.earlier.as_ref();
        if self.contestant.earlier { earlier.context("no earlier release") } else { Ok(&programs.ours) }
    }

    /// The filters, and the disk as a plugin with its parameters; None: the plugin is not installed.
    fn chain(&self, programs: &Programs) -> Result<Option<Vec<OsString>>> {
        let mut plugin = self.plugin(programs)?;
        let mut chain = Vec::new();
        match self.contestant.variant {
            Variant::Plain | Variant::Tls => {}
            Variant::CPlugin => {
                let Some(library) = &programs.file_plugin else { return Ok(None) };
                plugin = vec![library.into(), self.file_parameter()?];
            }
            Variant::Filters(filters, parameters) => {
                chain.extend(filters.iter().map(|filter| format!("--filter={filter}").into()));
                plugin.extend(parameters.iter().map(Into::into));
            }
        }
        chain.extend(plugin);
        Ok(Some(chain))
    }

    fn file_parameter(&self) -> Result<OsString> {
        let mut file = OsString::from("file=");
        file.push(self.image.as_ref().context("no file")?);
        Ok(file)
    }

    fn plugin(&self, programs: &Programs) -> Result<Vec<OsString>> {
        Ok(match self.contestant.disk {
            Disk::Memory(size) | Disk::Empty(size) => vec!["memory".into(), size.to_string().into()],
            Disk::Cached | Disk::Cold | Disk::Sparse => {
                let uncached = (self.contestant.disk == Disk::Cold).then(|| "cache=none".into());
                // All contestants serve one image, at the same time.
                let locks = self.contestant.kind.is_ours() && self.release(programs)?.locks;
                let unlocked = locks.then(|| "lock=off".into());
                ["file".into(), self.file_parameter()?].into_iter().chain(uncached).chain(unlocked).collect()
            }
        })
    }

    fn qemu_nbd(&mut self, programs: &Programs) -> Result<bool> {
        let (Some(program), Some(image)) = (&programs.qemu_nbd, &self.image) else { return Ok(false) };
        let mut command = Command::new(program);
        command.args(["--persistent", "--format=raw", SHARED, "--socket"]).arg(&self.place);
        if self.contestant.disk == Disk::Cold {
            command.args(["--cache=none", "--aio=io_uring"]);
        }
        command.arg(image);
        if self.contestant.variant == Variant::Tls {
            self.make_keys()?;
            let mut object = OsString::from("tls-creds-psk,id=tls,endpoint=server,dir=");
            object.push(self.dir.path());
            command.arg("--object").arg(object).arg("--tls-creds=tls");
        }
        self.spawn(&mut command)?;
        self.await_socket()
    }

    fn make_keys(&self) -> Result<PathBuf> {
        let keys = self.dir.path().join(KEYS_FILE);
        fs::write(&keys, KEYS)?;
        Ok(keys)
    }

    fn mountpoint(&mut self, name: &str, directory: bool) -> Result<PathBuf> {
        let mount = self.dir.path().join(name);
        if directory {
            fs::create_dir(&mount)?
        } else {
            drop(File::create(&mount)?)
        }
        self.mount = Some(mount.clone());
        Ok(mount)
    }

    /// Starts a process of its own group, so that Ctrl-C reaches it only through us, after the unmount.
    fn spawn(&mut self, command: &mut Command) -> Result<()> {
        let log = File::options().create(true).append(true).open(self.dir.path().join("log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let child = command.spawn().with_context(|| format!("cannot start {:?}", command.get_program()))?;
        self.children.push(child);
        Ok(())
    }

    fn await_socket(&mut self) -> Result<bool> {
        let socket = self.place.clone();
        self.await_ready(move || UnixStream::connect(&socket).is_ok())
    }

    /// The mountpoint itself may exist before, but only the mounted disk has the right size.
    fn await_mount(&mut self, file: PathBuf) -> Result<bool> {
        let size = self.size;
        self.place.clone_from(&file);
        self.await_ready(move || fs::metadata(&file).is_ok_and(|meta| meta.len() == size))
    }

    fn await_ready(&mut self, mut ready: impl FnMut() -> bool) -> Result<bool> {
        let answer = poll(START_LIMIT, || {
            interrupt::check()?;
            for child in &mut self.children {
                if let Some(status) = child.try_wait()? {
                    return Ok(Some(Err(status)));
                }
            }
            Ok(ready().then_some(Ok(())))
        })?;
        let log = || fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        let last =
            || log().lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no message").to_owned();
        match answer {
            Some(Ok(())) => Ok(true),
            Some(Err(status)) => bail!("did not start: {} ({status})", last()),
            None => bail!("did not answer within {} s: {}", START_LIMIT.as_secs(), last()),
        }
    }

    /// The program with its plugin and filters, but no socket or mountpoint.
    pub(crate) fn command(&self) -> Command {
        let mut words = self.command.iter();
        let mut command = Command::new(words.next().map_or(OsStr::new("false"), OsString::as_os_str));
        command.args(words);
        command
    }

    /// The size of the disk in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// The socket of an NBD server, the file of a mount.
    pub(crate) fn place(&self) -> &Path {
        &self.place
    }

    /// For the programs of libnbd.
    pub(crate) fn uri(&self) -> String {
        let keys = self.dir.path().join(KEYS_FILE);
        libnbd::uri(&self.place, (self.contestant.variant == Variant::Tls).then_some(&*keys))
    }

    /// Opens connections for our own client.
    pub(crate) fn connect(&self, count: usize, structured: bool) -> Result<Clients> {
        let content = images::content(self.contestant.disk, self.contestant.variant);
        Clients::connect(&Address::socket(&self.place), count, structured, content)
    }

    /// Empties the page cache of a disk that is to be read from the storage.
    pub(crate) fn cool(&self) -> Result<()> {
        match (&self.image, self.contestant.disk) {
            (Some(image), Disk::Cold) => images::evict(&File::open(image)?),
            _ => Ok(()),
        }
    }

    /// All its processes.
    pub(crate) fn pids(&self) -> Vec<Pid> {
        self.children.iter().map(Pid::from_child).collect()
    }

    fn unmount(mount: &Path) {
        let attempts: [(&str, &[&str]); 3] =
            [("fusermount3", &["-u"]), ("fusermount3", &["-uz"]), ("umount", &["-l"])];
        for (program, options) in attempts {
            let mut command = Command::new(program);
            command.args(options).arg(mount).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            if command.process_group(0).status().is_ok_and(|status| status.success()) {
                return;
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mount) = &self.mount {
            Server::unmount(mount);
        }
        for child in self.children.iter_mut().rev() {
            if matches!(child.try_wait(), Ok(None)) {
                let _ = kill_process(Pid::from_child(child), Signal::TERM);
                let ended = poll(STOP_LIMIT, || Ok(child.try_wait()?));
                if !matches!(ended, Ok(Some(_))) {
                    let _ = child.kill();
                    let _ = child.wait();
                }
            }
        }
    }
}
