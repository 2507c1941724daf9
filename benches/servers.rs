//! The contestants: where their programs are, how each is started, and how it is stopped without a trace.

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    os::unix::{fs::PermissionsExt, net::UnixStream, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::interrupt::poll;

/// The user's name and key, in a directory that only we can read. There is nothing to protect.
const KEYS: &str = "bench:3a5c0f1d2b4e6978a1b2c3d4e5f60718293a4b5c6d7e8f900112233445566778\n";
const START_LIMIT: Duration = Duration::from_secs(10);
const STOP_LIMIT: Duration = Duration::from_secs(3);

/// The first program of that name in `$PATH` or a system directory.
pub(crate) fn in_path(name: &str) -> Option<PathBuf> {
    all_in_path(name).next()
}

fn all_in_path(name: &str) -> impl Iterator<Item = PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let directories: Vec<_> =
        env::split_paths(&path).chain(["/usr/bin".into(), "/usr/sbin".into()]).collect();
    directories.into_iter().map(move |dir| dir.join(name)).filter(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Programs on this machine; None: not installed.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    pub(crate) ours: Option<PathBuf>,
    pub(crate) ours_mount: Option<PathBuf>,
    pub(crate) nbdkit: Option<PathBuf>,
    pub(crate) qemu_nbd: Option<PathBuf>,
    pub(crate) nbdfuse: Option<PathBuf>,
    pub(crate) qsd: Option<PathBuf>,
    pub(crate) fio: Option<PathBuf>,
    pub(crate) nbdcopy: Option<PathBuf>,
}

impl Programs {
    /// Looks for everything. The peer is the first nbdkit that is not our own.
    pub(crate) fn find(ours: &Path, ours_mount: &Path, peer: Option<PathBuf>) -> Self {
        let program = |file: &Path| is_program(file).then(|| file.to_owned());
        let is_ours = |file: &PathBuf| match (fs::read(file), fs::read(ours)) {
            (Ok(a), Ok(b)) => a == b,
            _ => false,
        };
        Programs {
            ours: program(ours),
            ours_mount: program(ours_mount),
            nbdkit: peer.or_else(|| all_in_path("nbdkit").find(|file| !is_ours(file))),
            qemu_nbd: in_path("qemu-nbd"),
            nbdfuse: in_path("nbdfuse"),
            qsd: in_path("qemu-storage-daemon"),
            fio: in_path("fio"),
            nbdcopy: in_path("nbdcopy"),
        }
    }
}

/// What the first line of `PROGRAM --version` says.
pub(crate) fn version(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output().ok()?;
    String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned)
}

/// A way to serve a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Ours,
    Nbdkit,
    QemuNbd,
    /// As `Ours`, with TLS by a pre-shared key.
    OursTls,
    /// As `Nbdkit`, with TLS by a pre-shared key.
    NbdkitTls,
    /// Our mount where each request passes the chain.
    OursMount,
    /// Our mount that hands the file to the kernel, which needs `-r`.
    OursPassthrough,
    /// nbdfuse over the peer's nbdkit.
    Nbdfuse,
    Qsd,
}

impl Kind {
    /// For the report.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Ours | Kind::OursMount | Kind::OursTls => "ours",
            Kind::Nbdkit | Kind::NbdkitTls => "nbdkit",
            Kind::QemuNbd => "qemu-nbd",
            Kind::OursPassthrough => "ours, passthrough",
            Kind::Nbdfuse => "nbdfuse",
            Kind::Qsd => "qsd",
        }
    }

    /// Takes no writes.
    pub(crate) fn is_readonly(self) -> bool {
        self == Kind::OursPassthrough
    }

    /// A server of this project: when it fails, the run fails.
    pub(crate) fn is_ours(self) -> bool {
        matches!(self, Kind::Ours | Kind::OursTls | Kind::OursMount | Kind::OursPassthrough)
    }
}

/// What to serve.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Disk<'a> {
    /// A raw image.
    File(&'a Path),
    /// Memory of this many bytes.
    Memory(u64),
}

impl Disk<'_> {
    fn size(&self) -> Result<u64> {
        Ok(match self {
            Disk::File(path) => fs::metadata(path)?.len(),
            Disk::Memory(size) => *size,
        })
    }

    /// As the plugin with its parameters.
    fn plugin(&self) -> Vec<OsString> {
        match self {
            Disk::File(path) => {
                let mut file = OsString::from("file=");
                file.push(path);
                vec!["file".into(), file]
            }
            Disk::Memory(size) => vec!["memory".into(), size.to_string().into()],
        }
    }
}

/// A server that answers. Dropping it unmounts, ends the processes and removes what they left.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) kind: Kind,
    children: Vec<Child>,
    /// The socket or the file in the mount.
    place: PathBuf,
    mount: Option<PathBuf>,
    size: u64,
    dir: TempDir,
}

impl Server {
    /// Starts a server and waits until it answers. `Ok(None)`: not installed here, or it has no such disk.
    pub(crate) fn start(kind: Kind, programs: &Programs, disk: Disk<'_>) -> Result<Option<Self>> {
        let dir = TempDir::with_prefix("nbdkit-bench-")?;
        let (place, size) = (dir.path().join("sock"), disk.size()?);
        let mut server = Server { kind, children: Vec::new(), place, mount: None, size, dir };
        let started = server.launch(programs, disk)?;
        Ok(started.then_some(server))
    }

    fn launch(&mut self, programs: &Programs, disk: Disk<'_>) -> Result<bool> {
        match (self.kind, disk) {
            (Kind::Ours | Kind::OursTls, _) => self.serve(programs.ours.as_deref(), disk),
            (Kind::Nbdkit | Kind::NbdkitTls, _) => self.serve(programs.nbdkit.as_deref(), disk),
            (Kind::QemuNbd, Disk::File(path)) => {
                let Some(program) = &programs.qemu_nbd else { return Ok(false) };
                let mut command = Command::new(program);
                command.args(["--persistent", "--format=raw", "--shared=8", "--socket"]);
                self.spawn(command.arg(&self.place).arg(path))?;
                self.await_socket()
            }
            (Kind::OursMount | Kind::OursPassthrough, _) => {
                let Some(program) = &programs.ours_mount else { return Ok(false) };
                let mount = self.mountpoint("mnt", true)?;
                let mut command = Command::new(program);
                command.arg("-f");
                command.arg(if self.kind == Kind::OursMount { "--no-passthrough" } else { "-r" });
                self.spawn(command.args(disk.plugin()).arg(&mount))?;
                self.await_mount(mount.join("nbd"), disk)
            }
            (Kind::Nbdfuse, _) => {
                let Some(program) = &programs.nbdfuse else { return Ok(false) };
                if !self.serve(programs.nbdkit.as_deref(), disk)? {
                    return Ok(false);
                }
                // By URI nbdfuse opens several connections, which is its fastest mode.
                let mut uri = OsString::from("nbd+unix:///?socket=");
                uri.push(&self.place);
                let mount = self.mountpoint("mnt", true)?;
                self.spawn(Command::new(program).arg(mount.join("nbd")).arg(uri))?;
                self.await_mount(mount.join("nbd"), disk)
            }
            (Kind::Qsd, Disk::File(path)) => {
                let Some(program) = &programs.qsd else { return Ok(false) };
                let mount = self.mountpoint("disk", false)?;
                let mut blockdev = OsString::from("driver=file,node-name=disk,locking=off,filename=");
                blockdev.push(path);
                let mut export = OsString::from("type=fuse,id=export,node-name=disk,writable=on,mountpoint=");
                export.push(&mount);
                let mut command = Command::new(program);
                self.spawn(command.arg("--blockdev").arg(blockdev).arg("--export").arg(export))?;
                self.await_mount(mount, disk)
            }
            (Kind::QemuNbd | Kind::Qsd, Disk::Memory(_)) => Ok(false),
        }
    }

    /// An nbdkit, ours or the peer's, on the socket.
    fn serve(&mut self, program: Option<&Path>, disk: Disk<'_>) -> Result<bool> {
        let Some(program) = program else { return Ok(false) };
        let mut command = Command::new(program);
        command.args(["-f", "-U"]).arg(&self.place);
        if matches!(self.kind, Kind::OursTls | Kind::NbdkitTls) {
            fs::write(self.keys(), KEYS)?;
            command.arg("--tls=require").arg("--tls-psk").arg(self.keys());
        }
        command.args(disk.plugin());
        self.spawn(&mut command)?;
        self.await_socket()
    }

    /// Where a server with TLS has its key, for its clients.
    pub(crate) fn keys(&self) -> PathBuf {
        self.dir.path().join("keys.psk")
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
    fn await_mount(&mut self, file: PathBuf, disk: Disk<'_>) -> Result<bool> {
        let size = disk.size()?;
        self.place.clone_from(&file);
        self.await_ready(move || fs::metadata(&file).is_ok_and(|meta| meta.len() == size))
    }

    fn await_ready(&mut self, mut ready: impl FnMut() -> bool) -> Result<bool> {
        let answer = poll(START_LIMIT, || {
            crate::interrupt::check()?;
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

    /// The size of the disk in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// The socket of an NBD server, the file of a mount.
    pub(crate) fn place(&self) -> &Path {
        &self.place
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
