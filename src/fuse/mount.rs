//! The life of a mount: open the export, mount, serve until somebody unmounts or the server stops, flush, close.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use log::{debug, warn};
use nbdkit_core::{Chain, Client, Peer, Session, Stop, WriteObserver};
use rustix::io::Errno;

use crate::{
    Config,
    attr::Attributes,
    device::{self, Attachment, How},
    door::Door,
    fs::Fs,
    mountpoint::{self, Mountpoint},
    observer::Observer,
    options::Options,
    passthrough::Passthrough,
    pool::Pool,
    tree::Tree,
};

/// Requests at once, unless told otherwise.
const DEFAULT_THREADS: usize = 16;
/// The kernel's read-ahead for cached reads.
const READ_AHEAD_KIB: u32 = 4096;
/// How long a mount that is idle may take to write back what the kernel still has, before requests that sleep in
/// the chain are told that the server stops; and how long one in use has to be let go of.
const GRACE: Duration = Duration::from_secs(2);

/// A mounted export. Dropping it unmounts.
#[derive(Debug)]
pub struct Mount {
    file: PathBuf,
    /// None once finished.
    serving: Option<Serving>,
}

struct Serving {
    door: Arc<Door>,
    /// The session holds it too; the chain, weakly.
    _observer: Arc<dyn WriteObserver>,
    attachment: Attachment,
    life: Arc<Life>,
    thread: JoinHandle<io::Result<()>>,
}

impl std::fmt::Debug for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} at {:?}", self.door.session, self.attachment)
    }
}

/// What ends a mount.
struct Life {
    client: Arc<Client>,
    mounted: AtomicBool,
    /// The server stops, or the kernel has let go of the mount.
    over: Stop,
    /// The kernel has let go of the mount.
    ended: Stop,
}

impl Mount {
    /// Opens the export, mounts it and returns when the mount answers. The chain's `after_fork` was called.
    ///
    /// # Errors
    /// Those of the chain, before anything is mounted; a mountpoint or an option that does not do; those of mount(2)
    /// and of fusermount3. Nothing is left behind.
    pub fn new(chain: Arc<Chain>, config: Config, stop: Arc<Stop>) -> anyhow::Result<Mount> {
        let mountpoint = mountpoint::check(&config.mountpoint)?;
        let mut options = Options::parse(config.options.iter().map(String::as_str))?;
        let tree = if mountpoint.metadata.is_dir() { Tree::directory(&config.filename)? } else { Tree::File };
        let file = match tree {
            Tree::Directory(ref name) => mountpoint.path.join(name),
            Tree::File => mountpoint.path.clone(),
        };

        let client = Arc::new(Client::new(0, Peer::Local, stop.clone()));
        let life = Arc::new(Life {
            client: client.clone(),
            mounted: AtomicBool::new(false),
            over: Stop::new(),
            ended: Stop::new(),
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
        let export = if config.export_name.is_empty() {
            default.clone().context("there is no default export: name one with -e")?
        } else {
            config.export_name.clone()
        };
        let mut session = connection.open(&export, false)?;
        drop(connection);
        refuse_own_image(&session, &mountpoint)?;
        options.readonly = !session.caps().write;

        let attributes = Arc::new(Attributes::new(&options, session.caps().write));
        let observer = Arc::new(Observer::new(export, default, tree.file(), attributes.clone()));
        let dyn_observer: Arc<dyn WriteObserver> = observer.clone();
        session.set_observer(dyn_observer.clone());
        chain.observe(&dyn_observer);
        let passthrough = Passthrough::decide(config.passthrough, &session);
        let door = Arc::new(Door { session, tree, attributes });

        let threads = if config.threads == 0 { DEFAULT_THREADS } else { config.threads };
        let pool = (threads > 1).then(|| Pool::new(threads));
        let mut settings = fuser::Config::default();
        settings.acl = options.acl;
        settings.n_threads = Some(receivers().min(threads));
        settings.clone_fd = true; // each thread then waits for requests of its own

        let source = options.fsname.clone().unwrap_or_else(|| format!("nbdkit:{}", chain.plugin_name()));
        let (fd, attachment) = device::attach(&mountpoint, &options, &source)?;
        let fs = Fs::new(door.clone(), passthrough, pool);
        let served = fuser::Session::from_fd(fs, fd, settings.acl, settings)
            .context("the kernel and the mount do not agree")
            .and_then(|session| {
                observer.connect(session.notifier());
                let life = life.clone();
                thread::Builder::new()
                    .name("fuse".into())
                    .spawn(move || {
                        let result = session.run();
                        life.ended.raise();
                        life.over.raise();
                        result
                    })
                    .context("cannot start a thread for the mount")
            });
        let thread = match served {
            Ok(thread) => thread,
            Err(e) => {
                if let Err(e) = attachment.unmount(How::Lazy) {
                    warn!("cannot unmount {}: {e}", attachment.target().display());
                }
                return Err(e);
            }
        };
        let serving = Serving { door, _observer: dyn_observer, attachment, life, thread };
        serving.life.mounted.store(true, Ordering::Release);
        let mut mount = Mount { file, serving: Some(serving) };
        mount.check_answers()?;
        Ok(mount)
    }

    /// Makes one request, so that a mount that cannot serve is noticed here.
    fn check_answers(&mut self) -> anyhow::Result<()> {
        let Some(serving) = &self.serving else { return Ok(()) };
        if let Err(e) = rustix::fs::statfs(serving.attachment.target()) {
            let why = self.finish().err().unwrap_or_else(|| anyhow!(io::Error::from(e)));
            return Err(why.context("the mount does not answer"));
        }
        serving.attachment.raise_read_ahead(READ_AHEAD_KIB);
        Ok(())
    }

    /// Path of the file: in the mountpoint, or the mountpoint itself when that is a regular file. Absolute.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Serves until the mount is unmounted or the server stops; then unmounts, finishes the requests under way,
    /// flushes and closes the export. A mount that is still in use when the server stops is taken out of sight, and
    /// its users get errors.
    ///
    /// # Errors
    /// The last flush failed: data may be lost. The mount could not be unmounted.
    pub fn wait(mut self) -> anyhow::Result<()> {
        if let Some(serving) = &self.serving {
            serving.life.over.wait();
        }
        self.finish()
    }

    fn finish(&mut self) -> anyhow::Result<()> {
        let Some(serving) = self.serving.take() else { return Ok(()) };
        let released = serving.unmount()?;
        let Serving { door, _observer, attachment, life, thread } = serving;
        let ran = if released {
            let ran = thread.join().map_err(|_| anyhow!("the thread of the mount panicked"))?;
            ran.context("the connection to the kernel broke")
        } else {
            // Its threads wait for a kernel that only lets go when the process ends.
            Err(anyhow!(
                "{} is still in use: its users get errors from now on",
                attachment.target().display()
            ))
        };
        drop(attachment);
        life.client.gone.raise();
        let flushed = if door.session.caps().write && door.session.caps().flush {
            door.session.flush().map_err(|e| anyhow!(e).context("the last flush failed, data may be lost"))
        } else {
            Ok(())
        };
        drop(door);
        flushed?;
        ran
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
        let target = self.attachment.target().display();
        match self.unmount_idle() {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
                warn!("{target} is in use: it is unmounted all the same, its users get errors");
                life.client.gone.raise();
                let how = if self.attachment.can_abort() { How::Lazy } else { How::Force };
                self.attachment.unmount(how).with_context(|| format!("cannot unmount {target}"))?;
            }
            Err(e) => bail!("cannot unmount {target}: {e}"),
        }
        if life.ended.wait_for(GRACE) {
            return Ok(true);
        }
        // Somebody has the file open, or sees the mount in another name space.
        life.client.gone.raise();
        if let Err(e) = self.attachment.abort() {
            debug!("cannot abort the connection to the kernel: {e}");
            return Ok(life.ended.is_raised());
        }
        Ok(true)
    }

    /// Unmounts unless the mount is in use. The kernel's last writes go through the chain before this returns.
    fn unmount_idle(&self) -> io::Result<()> {
        let returned = Stop::new();
        thread::scope(|scope| {
            scope.spawn(|| {
                if !returned.wait_for(GRACE) {
                    self.life.client.gone.raise();
                }
            });
            let result = self.attachment.unmount(How::Idle);
            returned.raise();
            result
        })
    }
}

/// Threads that receive requests: those that need no wait run there.
fn receivers() -> usize {
    thread::available_parallelism().map_or(2, usize::from).max(2)
}

/// A mount must not cover the disk image that is served: the server would find the mount in its place.
fn refuse_own_image(session: &Session, mountpoint: &Mountpoint) -> anyhow::Result<()> {
    let Some(loan) = session.loan(0, session.size()) else { return Ok(()) };
    let shown = mountpoint.path.display();
    if let Ok(stat) = rustix::fs::fstat(loan.fd)
        && (stat.st_dev, stat.st_ino) == (mountpoint.metadata.dev(), mountpoint.metadata.ino())
    {
        bail!("{shown} is the disk image itself: mount it on another file or directory");
    }
    let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&loan.fd));
    if mountpoint.metadata.is_dir()
        && let Ok(image) = fs::read_link(link)
        && image.starts_with(&mountpoint.path)
    {
        bail!(
            "the disk image {} lies in {shown}, which the mount would cover: choose another mountpoint",
            image.display()
        );
    }
    Ok(())
}
