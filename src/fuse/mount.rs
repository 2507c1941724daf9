//! The life of a mount: open the export, mount, serve until somebody unmounts or the server stops, flush, close.

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, bail};
use log::{debug, warn};
use nbdkit_core::{Chain, Client, Connection, Peer, ShutdownFlag, WriteObserver};
use rustix::io::Errno;

use crate::{
    Config,
    attr::Owner,
    export_file::ExportFile,
    fs::Fs,
    kernel_mount::{self, KernelMount, UnmountMode},
    mountpoint,
    observer::Observer,
    options::Options,
    partitions,
    receivers::Receivers,
    request_timeout::RequestTimeout,
    requests::Requests,
    tree::{self, Tree},
    volume::{Style, Volume},
};

/// Requests at once, unless told otherwise.
const DEFAULT_THREADS: usize = 16;
/// The kernel's read-ahead for cached reads.
const READ_AHEAD_KIB: u32 = 4096;
/// How long a mount in use has to be let go of, and requests under way have to end, before it is taken out of sight
/// and before requests that sleep in the chain are told that the server stops.
const GRACE: Duration = Duration::from_secs(2);
/// How long requests have to end after that. Those that do not, hang, and so would the flush.
const LAST_GRACE: Duration = Duration::from_secs(30);
/// Between two attempts to unmount: nothing tells when a mount gets idle.
const RETRY: Duration = Duration::from_millis(50);

/// A mounted export. Dropping it unmounts.
#[derive(Debug)]
pub struct Mount {
    file: PathBuf,
    device: Option<String>,
    /// None once finished.
    serving: Option<Serving>,
}

struct Serving {
    volume: Arc<Volume>,
    /// The sessions hold it too; the chain, weakly.
    _observer: Arc<dyn WriteObserver>,
    kernel_mount: KernelMount,
    life: Arc<Life>,
    thread: JoinHandle<io::Result<()>>,
}

impl std::fmt::Debug for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.kernel_mount)
    }
}

/// What ends a mount.
pub(crate) struct Life {
    client: Arc<Client>,
    mounted: AtomicBool,
    /// The server stops, or the kernel has let go of the mount.
    over: ShutdownFlag,
    /// The kernel has let go of the mount.
    ended: ShutdownFlag,
    /// And its last request has ended.
    drained: ShutdownFlag,
}

/// Tells when the kernel has let go of the mount: the file system drops it before it waits for requests.
pub(crate) struct Ended(Arc<Life>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.ended.raise();
        self.0.over.raise();
    }
}

impl Mount {
    /// Opens the export, mounts it and returns when the mount answers. The chain's `after_fork` was called.
    ///
    /// # Errors
    /// Those of the chain, before anything is mounted; a mountpoint or an option that is not usable; those of mount(2)
    /// and of fusermount3. Nothing is left behind.
    pub fn new(chain: Arc<Chain>, config: Config, stop: Arc<ShutdownFlag>) -> anyhow::Result<Mount> {
        let mountpoint = mountpoint::check(&config.mountpoint)?;
        let mut options = Options::parse(config.options.iter().map(String::as_str))?;
        let client = Arc::new(Client::new(0, Peer::Local, stop.clone()));
        let life = Arc::new(Life {
            client: client.clone(),
            mounted: AtomicBool::new(false),
            over: ShutdownFlag::new(),
            ended: ShutdownFlag::new(),
            drained: ShutdownFlag::new(),
        });
        stop.on_raise({
            let life = life.clone();
            move || {
                if !life.mounted.load(Ordering::Acquire) {
                    life.client.gone.raise();
                }
                life.over.raise();
            }
        });

        let readonly = config.readonly || options.readonly;
        let connection = Arc::new(chain.connect(client, readonly)?);
        let default = connection.default_export(false)?;
        let files = choose(&connection, default.as_ref(), &config, mountpoint.metadata.is_dir())?;
        let alone = files.1.len() == 1 && (config.export.is_some() || default.as_ref() == files.1.first());
        let path = mountpoint.path.clone();
        let file = files
            .0
            .names()
            .first()
            .filter(|_| !files.0.is_bare())
            .map_or(path.clone(), |name| path.join(name));
        let style = Style {
            owner: Owner::new(&options, config.cache == crate::Cache::Writeback),
            writable: !readonly,
            partitions: config.partitions,
            sector_size: config.sector_size,
            passthrough: config.passthrough,
        };
        let volume = Arc::new_cyclic(|this| {
            let volume = Volume::new(connection, default, files, style);
            volume.set_observer(Arc::new(Observer(this.clone())));
            volume
        });
        let observer = volume.observer().context("no observer")?;
        options.readonly = readonly;
        if alone {
            // What is wrong with it is said now.
            let file = volume.open(0)?;
            mountpoint::refuse_own_image(&file.session, &mountpoint)?;
            options.readonly |= !file.is_writable();
        }
        chain.observe(&observer);

        let threads = if config.threads == 0 { DEFAULT_THREADS } else { config.threads };
        let timeout = config.timeout.map(RequestTimeout::new).transpose().context("cannot start a thread")?;
        let mut settings = fuser::Config::default();
        settings.acl = options.acl;
        let receivers = receivers().min(threads);
        settings.n_threads = Some(receivers);
        settings.clone_fd = true; // each thread then waits for requests of its own

        let source = options
            .fsname
            .clone()
            .or(config.source)
            .unwrap_or_else(|| format!("nbdkit:{}", chain.plugin_name()));
        let (fd, kernel_mount) = kernel_mount::attach(&mountpoint, &options, &source)?;
        let served = fd
            .try_clone()
            .context("cannot have a second descriptor for the mount")
            .and_then(|device| {
                let receivers = Receivers::new(receivers, device);
                let requests = Requests::new(volume.clone(), threads, receivers, timeout);
                let fs = Fs::new(Ended(life.clone()), volume.clone(), requests, config.cache);
                fuser::Session::from_fd(fs, fd, settings.acl, settings)
                    .context("the kernel and the mount do not agree")
            })
            .and_then(|session| {
                volume.coherence.connect(session.notifier());
                let life = life.clone();
                thread::Builder::new()
                    .name("fuse".into())
                    .spawn(move || {
                        let result = session.run();
                        life.ended.raise();
                        life.over.raise();
                        life.drained.raise();
                        result
                    })
                    .context("cannot start a thread for the mount")
            });
        let thread = match served {
            Ok(thread) => thread,
            Err(e) => {
                if let Err(e) = kernel_mount.unmount(UnmountMode::Lazy) {
                    warn!("cannot unmount {}: {e}", kernel_mount.target().display());
                }
                return Err(e);
            }
        };
        let device = kernel_mount.device().map(String::from);
        let serving = Serving { volume, _observer: observer, kernel_mount, life, thread };
        serving.life.mounted.store(true, Ordering::Release);
        let mut mount = Mount { file, device, serving: Some(serving) };
        mount.check_answers()?;
        Ok(mount)
    }

    /// Makes one request, so that a mount that cannot serve is noticed here.
    fn check_answers(&mut self) -> anyhow::Result<()> {
        let Some(serving) = &self.serving else { return Ok(()) };
        if let Err(e) = rustix::fs::statfs(serving.kernel_mount.target()) {
            let why = self.finish().err().unwrap_or_else(|| anyhow!(io::Error::from(e)));
            return Err(why.context("the mount does not answer"));
        }
        serving.kernel_mount.raise_read_ahead(READ_AHEAD_KIB);
        Ok(())
    }

    /// Path of the file: in the mountpoint, or the mountpoint itself when that is a regular file. Absolute.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Number of the mounted file system, `MAJOR:MINOR`, as in the mount table.
    pub fn device(&self) -> Option<&str> {
        self.device.as_deref()
    }

    /// Whether the kernel still has the mount.
    pub fn is_mounted(&self) -> bool {
        self.serving.as_ref().is_some_and(|serving| !serving.life.ended.is_raised())
    }

    /// Whether the first export cannot be written to.
    ///
    /// # Errors
    /// Those of the chain: the export is opened if it is not.
    pub fn is_readonly(&self) -> anyhow::Result<bool> {
        self.first(|file| !file.is_writable())
    }

    /// The smallest block in bytes that requests to the first export have to consist of, 1 when any will do.
    ///
    /// # Errors
    /// Those of the chain: the export is opened if it is not.
    pub fn block_size(&self) -> anyhow::Result<u32> {
        self.first(|file| file.session.caps().block_size.minimum.max(1))
    }

    /// Bytes in a sector of the first export's partition table. None: it has none.
    ///
    /// # Errors
    /// Those of the chain: the export is opened if it is not.
    pub fn sector_size(&self) -> anyhow::Result<Option<u64>> {
        let volume = self.volume().context("the mount has ended")?;
        Ok(partitions::read(&volume.open(0)?.session, volume.style.sector_size).sector_size)
    }

    /// The files, while it is mounted.
    pub(crate) fn volume(&self) -> Option<&Volume> {
        self.serving.as_ref().map(|serving| &*serving.volume)
    }

    fn first<T>(&self, tell: impl FnOnce(&ExportFile) -> T) -> anyhow::Result<T> {
        let serving = self.serving.as_ref().context("the mount has ended")?;
        Ok(tell(&*serving.volume.open(0)?))
    }

    /// Returns when the mount was unmounted or the server stops. The mount is still there in the latter case.
    pub fn wait_for_end(&self) {
        if let Some(serving) = &self.serving {
            serving.life.over.wait();
        }
    }

    /// Serves until the mount is unmounted or the server stops; then unmounts, finishes the requests under way,
    /// flushes and closes the export. A mount that is still in use when the server stops is taken out of sight, and
    /// its users get errors.
    ///
    /// # Errors
    /// The last flush failed: data may be lost. The mount could not be unmounted.
    pub fn wait(mut self) -> anyhow::Result<()> {
        self.wait_for_end();
        self.finish()
    }

    fn finish(&mut self) -> anyhow::Result<()> {
        let Some(serving) = self.serving.take() else { return Ok(()) };
        let released = serving.unmount()?;
        let Serving { volume, _observer, kernel_mount, life, thread } = serving;
        if !released {
            // Its threads wait for a kernel that only lets go when the process ends.
            bail!("{} is still in use: its users get errors from now on", kernel_mount.target().display());
        }
        if !life.drained.wait_for(GRACE) {
            life.client.gone.raise();
            if !life.drained.wait_for(LAST_GRACE) {
                match volume.is_unflushed() {
                    true => {
                        bail!("requests hang in the chain, and with them the last flush: data may be lost")
                    }
                    false => bail!("requests hang in the chain"),
                }
            }
        }
        let ran = thread.join().map_err(|_| anyhow!("the thread of the mount panicked"))?;
        // A thread that takes a request in the moment in which the kernel lets go of the mount: it has ended like the rest.
        let ran = ran.or_else(|e| match e.raw_os_error() {
            Some(error) if error == rustix::io::Errno::CONNABORTED.raw_os_error() => Ok(()),
            _ => Err(e),
        });
        drop(kernel_mount);
        life.client.gone.raise();
        let mut flushed = Ok(());
        for (file, unflushed) in volume.unflushed() {
            let caps = file.session.caps();
            if !(caps.write && caps.flush) {
                continue;
            }
            match file.session.flush() {
                Err(e) if !unflushed => {
                    warn!("the last flush failed, but nothing was written since the one before: {e}");
                }
                result => flushed = flushed.and(result),
            }
        }
        volume.coherence.close();
        flushed.context("the last flush failed, data may be lost")?;
        ran.context("the connection to the kernel broke")
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(e) = self.finish() {
            log::error!("{e:#}");
        }
    }
}

impl Serving {
    /// Makes the kernel let go of the mount, gently if possible. Tells whether it does.
    fn unmount(&self) -> anyhow::Result<bool> {
        let life = &self.life;
        if life.ended.is_raised() {
            return Ok(true);
        }
        let target = self.kernel_mount.target().display();
        let deadline = Instant::now() + GRACE;
        loop {
            match self.unmount_idle() {
                Ok(()) => break,
                Err(e) if e.raw_os_error() != Some(Errno::BUSY.raw_os_error()) => {
                    bail!("cannot unmount {target}: {e}");
                }
                Err(_) if Instant::now() < deadline => {
                    if life.ended.wait_for(RETRY) {
                        break;
                    }
                }
                Err(_) => {
                    warn!("{target} is in use: it is unmounted all the same, its users get errors");
                    let how =
                        if self.kernel_mount.can_abort() { UnmountMode::Lazy } else { UnmountMode::Force };
                    self.kernel_mount.unmount(how).with_context(|| format!("cannot unmount {target}"))?;
                    break;
                }
            }
        }
        if life.ended.wait_for(GRACE) {
            return Ok(true);
        }
        // Somebody has the file open, or sees the mount in another name space.
        life.client.gone.raise();
        if let Err(e) = self.kernel_mount.abort() {
            debug!("cannot abort the connection to the kernel: {e}");
            return Ok(life.ended.is_raised());
        }
        Ok(life.ended.wait_for(LAST_GRACE))
    }

    /// Unmounts unless the mount is in use. The kernel's last writes go through the chain before this returns.
    fn unmount_idle(&self) -> io::Result<()> {
        let returned = ShutdownFlag::new();
        thread::scope(|scope| {
            scope.spawn(|| {
                if !returned.wait_for(GRACE) {
                    self.life.client.gone.raise();
                }
            });
            let result = self.kernel_mount.unmount(UnmountMode::Idle);
            returned.raise();
            result
        })
    }
}

/// Which exports are shown, and as what.
fn choose(
    connection: &Connection,
    default: Option<&OsString>,
    config: &Config,
    in_directory: bool,
) -> anyhow::Result<(Tree, Vec<OsString>)> {
    tree::check_name(&config.filename)?;
    let one = |export: OsString| {
        let tree = if in_directory { Tree::directory(vec![config.filename.clone()]) } else { Tree::file() };
        (tree, vec![export])
    };
    if !in_directory && config.partitions {
        bail!("partitions are files beside that of the disk: mount on a directory");
    }
    if let Some(export) = &config.export {
        let export =
            if export.is_empty() { default.context("there is no default export: name one")? } else { export };
        return Ok(one(export.clone()));
    }
    let nothing = "there is no default export: mount on a directory to see all, or name one with -e";
    if !in_directory {
        return Ok(one(default.context(nothing)?.clone()));
    }
    let exports = match connection.list_exports(false) {
        Ok(exports) => exports,
        Err(e) if default.is_some() => {
            warn!("only the default export is shown, the others cannot be listed: {e}");
            nbdkit_core::Exports::new()
        }
        Err(e) => return Err(e).context("the exports cannot be listed: name one with -e"),
    };
    let names = exports.into_iter().map(|export| export.name.as_os_str());
    let files = tree::file_names(default.map(OsString::as_os_str), names, &config.filename);
    if files.is_empty() {
        bail!("the plugin has no exports to show: name one with -e");
    }
    let (exports, names) = files.into_iter().unzip();
    Ok((Tree::directory(names), exports))
}

/// Threads that receive requests, and run those that need no wait: one for each CPU, and one on standby.
fn receivers() -> usize {
    thread::available_parallelism().map_or(2, usize::from) + 1
}
