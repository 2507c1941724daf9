//! The life of a mount, from a configured chain to the end.

use std::{
    ffi::OsString,
    fs::File,
    io::Write as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nbdkit_cli::{
    captive, daemon, descriptors, metrics, parent, pidfile, progress::Throughput, signals, stdio::Stdio,
};
use nbdkit_core::{Chain, ShutdownFlag};
use nbdkit_fuse::{Cache, Config, Mount};
use nbdkit_nbd::listen::{self, Listener};

use crate::{
    failure::{At as _, Failure, Stage},
    loop_mount::{Base, LoopMount},
    loop_writeback, loopdev,
    plan::Plan,
    ready::{self, ReadyFd},
    selector,
    state::{State, Stored},
    stats,
    watcher::Watcher,
};

/// How long what is set up on the disk has to be let go of, when the server is asked to end.
const GRACE: Duration = Duration::from_secs(2);
/// How long file systems of others on the disk may take to write what they have not.
const PATIENCE: Duration = Duration::from_secs(10);

/// Mounts, serves until it is unmounted or a signal or the `--run` command's end asks for it, and unmounts.
/// Returns the exit code.
///
/// # Errors
/// Anything that keeps the mount from starting, and a failed final flush.
pub(crate) fn mount(mut chain: Chain, plan: Plan, ready_fd: Option<ReadyFd>) -> Result<u8, Failure> {
    let place = Place::new(&plan).at(Stage::Mount)?;
    if plan.exit_with_parent {
        parent::exit_with_parent()?;
    }
    chain.count_requests();
    chain.set_readonly(plan.readonly);
    chain.get_ready().at(Stage::Setup)?;
    let stdio = Stdio::take().at(Stage::Setup)?;
    descriptors::raise_limit();
    signals::block().at(Stage::Signals)?;
    let mut socket = plan.socket.as_deref().map(Socket::bind).transpose().at(Stage::Setup)?;

    let mut metrics = plan.metrics.as_deref().map(metrics::Endpoint::bind).transpose().at(Stage::Setup)?;
    let background =
        || if plan.foreground { Ok(daemon::Ready::nobody()) } else { daemon::fork_to_background() };
    let ready = background().at(Stage::Daemon)?;
    let mut watcher = plan.auto_unmount.then(Watcher::start).transpose().at(Stage::Daemon)?;
    let stop = chain.server().clone();
    let events = signals::Events::new(stop.clone()).at(Stage::Signals)?;
    events.handle_on_thread().at(Stage::Signals)?;
    let chain = Arc::new(chain);
    chain.after_fork().at(Stage::Setup)?;
    let counted = Arc::downgrade(&chain);
    signals::on_report(move || counted.upgrade().map(|chain| stats::report(&chain)).unwrap_or_default());
    if let Some(metrics) = &mut metrics {
        metrics.serve(chain.clone(), nbdkit_fuse::stats::document).at(Stage::Setup)?;
    }
    let mount = Mount::new(chain.clone(), config(&plan, &place), stop.clone()).map_err(|error| {
        let of_chain = error.chain().any(|cause| cause.is::<nbdkit_core::Error>());
        Failure { stage: if of_chain { Stage::Setup } else { Stage::Mount }, error }
    })?;
    if let (Some(watcher), Some(device)) = (&mut watcher, mount.device()) {
        watcher.watch(device, &place.path);
    }

    let loop_mount = set_up(&plan, &place, &mount, &stdio).at(Stage::Mount);
    let mut stored = store(&place, &mount, loop_mount.as_ref().ok());
    let served = loop_mount.map(|loop_mount| {
        let server =
            serve(&plan, &mount, &chain, socket.as_mut(), &stop, (ready, ready_fd), &stdio).at(Stage::Setup);
        (loop_mount, server)
    });
    // Who waits for its end has all there is.
    drop(stdio);
    if !matches!(served, Ok((_, Ok(_)))) {
        stop.raise();
    }
    let throughput = plan.progress.then(|| Throughput::show(chain.clone())).transpose().at(Stage::Setup)?;
    mount.wait_for_end();
    drop(throughput);
    ready::notify("STOPPING=1");
    if let Ok((loop_mount, _)) = &served {
        take_down(loop_mount, &place, &mount);
    }
    let unmounted = mount.wait().at(Stage::Life);
    stop.raise();
    if let Some(stored) = &mut stored {
        conclude(stored, unmounted.as_ref().err());
    }
    drop(watcher);
    let (captive, server) = served?.1?;
    if let Some(server) = server {
        server
            .join()
            .map_err(|_| anyhow::anyhow!("the NBD server panicked"))
            .at(Stage::Life)?
            .at(Stage::Life)?;
    }
    unmounted?;
    nbdkit_cli::ending::clean_up(chain);
    Ok(captive.map_or(0, |captive| captive.status(None)))
}

fn config(plan: &Plan, place: &Place) -> Config {
    Config {
        mountpoint: place.path.clone(),
        readonly: plan.readonly,
        threads: plan.threads,
        export: plan.export.clone(),
        filename: plan.filename.clone(),
        partitions: plan.partitions || plan.loop_mount.partition.is_some() || looks_inside(plan, place),
        sector_size: plan.sector_size,
        cache: plan.cache,
        timeout: plan.timeout,
        source: plan.source.clone(),
        options: plan.options.clone(),
        passthrough: plan.passthrough,
    }
}

/// Whether the file system to be mounted may be in a partition, although none was named.
fn looks_inside(plan: &Plan, place: &Place) -> bool {
    plan.loop_mount.mount.is_some() && plan.cache != Cache::Writeback && place.path.is_dir()
}

/// The sectors of a loop device: what is on the disk may count in 512 bytes, although the disk below likes larger requests,
/// as many drives do; a partition table counts in its own.
fn sector_size(mount: &Mount) -> Result<u32> {
    if let Some(size) = mount.sector_size()?.and_then(|size| u32::try_from(size).ok()) {
        return Ok(size);
    }
    let mut head = [0; 104];
    let read = File::open(mount.file()).and_then(|file| file.read_exact_at(&mut head, 0));
    let xfs = read.is_ok() && head.starts_with(b"XFSB") && head[102..104] == [2, 0];
    Ok(if xfs { 512 } else { mount.block_size()?.clamp(512, 4096) })
}

/// Sets up what is wanted on the disk, and prints the name of the loop device.
fn set_up(plan: &Plan, place: &Place, mount: &Mount, stdio: &Stdio) -> Result<LoopMount> {
    let shape = || {
        let (readonly, block_size) = (mount.is_readonly()?, sector_size(mount)?);
        Ok(loopdev::Shape { readonly, block_size, autoclear: false })
    };
    let base = || {
        let options = &plan.loop_mount;
        let contents = mount.contents()?;
        let chosen = selector::choose(options.partition.as_ref(), options.mount.is_some(), &contents)?;
        let directory = mount.file().parent().context("the mount has no directory")?;
        Ok(match chosen {
            Some(part) => Base { file: directory.join(&part.file), content: part.content.clone() },
            None => Base { file: mount.file().to_owned(), content: contents.whole.clone() },
        })
    };
    let loop_mount = LoopMount::set_up(&plan.loop_mount, &place.path, base, shape)?;
    if let Some(device) = loop_mount.loop_device.as_deref().filter(|_| plan.loop_mount.loop_device) {
        let mut stdout = File::from(stdio.output.try_clone()?);
        writeln!(stdout, "{}", device.display()).context("cannot print the name of the loop device")?;
    }
    Ok(loop_mount)
}

/// Takes down what stands on the disk; what is in use has to be let go of soon.
fn take_down(loop_mount: &LoopMount, place: &Place, mount: &Mount) {
    if !mount.is_mounted() {
        return;
    }
    if let Err(e) = loop_mount.take_down(GRACE, |_| {}) {
        log::warn!("{e:#}: it is unmounted all the same");
        loop_mount.abandon();
    }
    if let Ok(place) = nbdkit_fuse::resolve(&place.path) {
        loop_writeback::write_back(&place, PATIENCE);
    }
}

/// Tells `-u` what there is.
fn store(place: &Place, mount: &Mount, loop_mount: Option<&LoopMount>) -> Option<Stored> {
    let loop_mount = loop_mount.cloned().unwrap_or_default();
    let state = State {
        pid: std::process::id(),
        started: crate::state::started(std::process::id()).unwrap_or_default(),
        mountpoint: nbdkit_fuse::resolve(&place.path).ok()?,
        loop_device: loop_mount.loop_device,
        inside: loop_mount.mount,
        error: None,
    };
    Stored::new(mount.device()?, state)
}

/// Leaves the reason behind when the mount ended badly.
fn conclude(stored: &mut Stored, failure: Option<&Failure>) {
    let Some(failure) = failure else { return stored.remove() };
    stored.state.error = Some(failure.to_string());
    if let Err(e) = stored.write() {
        log::debug!("the end is not on record: {e}");
    }
}

type Server = JoinHandle<Result<()>>;

/// Everything that starts once the mount answers; after it the parent may go.
fn serve(
    plan: &Plan,
    mount: &Mount,
    chain: &Arc<Chain>,
    socket: Option<&mut Socket>,
    stop: &Arc<ShutdownFlag>,
    (ready, ready_fd): (daemon::Ready, Option<ReadyFd>),
    stdio: &Stdio,
) -> Result<(Option<captive::Captive>, Option<Server>)> {
    let server = socket.map(|socket| serve_nbd(plan, chain, socket, stop)).transpose()?;
    if let Some(path) = &plan.pidfile {
        pidfile::write(path)?;
    }
    let captive = plan.run.as_deref().map(|command| captive::run(command, &variables(plan, mount)?, stdio));
    let captive = captive.transpose()?;
    ready.tell(plan.verbose)?;
    if let Some(fd) = ready_fd {
        fd.tell();
    }
    ready::notify(&format!("READY=1\nMAINPID={}", std::process::id()));
    Ok((captive, server))
}

/// What the command of `--run` finds its files by.
fn variables(plan: &Plan, mount: &Mount) -> Result<Vec<(String, OsString)>> {
    let file = mount.file();
    let directory = file.parent().unwrap_or(file);
    let mut variables = vec![("file".to_owned(), file.into()), ("mnt".to_owned(), directory.into())];
    if plan.partitions {
        let parts = mount.contents()?.parts;
        let files =
            parts.iter().map(|part| (format!("part{}", part.number), directory.join(&part.file).into()));
        variables.extend(files);
    }
    Ok(variables)
}

/// Serves the same chain over NBD.
fn serve_nbd(
    plan: &Plan,
    chain: &Arc<Chain>,
    socket: &mut Socket,
    stop: &Arc<ShutdownFlag>,
) -> Result<Server> {
    let config = nbdkit_nbd::Config {
        readonly: plan.readonly,
        threads: plan.threads,
        export_name: plan.export.clone().unwrap_or_default(),
        ..nbdkit_nbd::Config::default()
    };
    let (chain, stop) = (chain.clone(), stop.clone());
    let listeners = socket.listener.take().into_iter().collect();
    std::thread::Builder::new()
        .name("nbd".into())
        .spawn(move || nbdkit_nbd::serve(chain, config, listeners, stop, None))
        .context("cannot start a thread")
}

/// The socket of the NBD front end, which goes when the mount does.
struct Socket {
    listener: Option<Listener>,
    path: PathBuf,
}

impl Socket {
    fn bind(path: &Path) -> Result<Self> {
        Ok(Socket { listener: Some(listen::unix(path)?), path: path.to_owned() })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The mountpoint: the user's, or a private one that goes when the mount does.
struct Place {
    path: PathBuf,
    private: bool,
}

impl Place {
    fn new(plan: &Plan) -> Result<Self> {
        if let Some(path) = &plan.mountpoint {
            return Ok(Place { path: path.clone(), private: false });
        }
        let directory = tempfile::Builder::new()
            .prefix("nbdkit-mount")
            .tempdir()
            .context("cannot make a directory for the mount")?;
        Ok(Place { path: directory.keep(), private: true })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.private {
            // Never recursively: if it could not be unmounted, the disk is still in there.
            let _ = std::fs::remove_dir(&self.path);
        }
    }
}
