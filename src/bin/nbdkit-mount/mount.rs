//! The life of a mount, from a configured chain to the end.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
};

use anyhow::{Context as _, Result};
use nbdkit_core::{Chain, Stop};
use nbdkit_fuse::{Config, Mount};
use nbdkit_nbd::listen::{self, Listener};

use crate::{captive, daemon, pidfile, plan::Plan, progress::Throughput, signals};

/// Mounts, serves until it is unmounted or a signal or the `--run` command's end asks for it, and unmounts.
/// Returns the exit code.
///
/// # Errors
/// Anything that keeps the mount from starting, and a failed final flush.
pub(crate) fn mount(mut chain: Chain, plan: Plan) -> Result<u8> {
    chain.count_requests();
    chain.get_ready()?;
    signals::block()?;
    let place = Place::new(&plan)?;
    let mut socket = plan.socket.as_deref().map(Socket::bind).transpose()?;

    let ready = if plan.foreground { daemon::Ready::nobody() } else { daemon::fork_to_background()? };
    let stop = chain.server().clone();
    signals::watch(stop.clone())?;
    let chain = Arc::new(chain);
    chain.after_fork()?;
    let config = Config {
        mountpoint: place.path.clone(),
        readonly: plan.readonly,
        threads: plan.threads,
        export_name: plan.export_name.clone(),
        filename: plan.filename.clone(),
        options: plan.options.clone(),
        passthrough: plan.passthrough,
    };
    let mount = Mount::new(chain.clone(), config, stop.clone())?;
    let served = serve(&plan, &mount, &chain, socket.as_mut(), &stop, ready);
    if served.is_err() {
        stop.raise();
    }
    let throughput = plan.progress.then(|| Throughput::show(chain.clone())).transpose()?;
    let unmounted = mount.wait();
    drop(throughput);
    stop.raise();
    let (captive, server) = served?;
    if let Some(server) = server {
        server.join().map_err(|_| anyhow::anyhow!("the NBD server panicked"))??;
    }
    unmounted?;
    chain.cleanup();
    Ok(captive.map_or(0, |captive| captive.status()))
}

type Server = JoinHandle<Result<()>>;

/// Everything that starts once the mount answers; after it the parent may go.
fn serve(
    plan: &Plan,
    mount: &Mount,
    chain: &Arc<Chain>,
    socket: Option<&mut Socket>,
    stop: &Arc<Stop>,
    ready: daemon::Ready,
) -> Result<(Option<captive::Captive>, Option<Server>)> {
    let server = socket.map(|socket| nbd_door(plan, chain, socket, stop)).transpose()?;
    if let Some(path) = &plan.pidfile {
        pidfile::write(path)?;
    }
    let captive = plan.run.as_deref().map(|command| {
        let file = mount.file();
        let directory = file.parent().unwrap_or(file);
        captive::run(command, &[("file", file.into()), ("mnt", directory.into())], stop.clone())
    });
    let captive = captive.transpose()?;
    ready.tell(plan.verbose)?;
    Ok((captive, server))
}

/// Serves the same chain over NBD.
fn nbd_door(plan: &Plan, chain: &Arc<Chain>, socket: &mut Socket, stop: &Arc<Stop>) -> Result<Server> {
    let config = nbdkit_nbd::Config {
        readonly: plan.readonly,
        threads: plan.threads,
        export_name: plan.export_name.clone(),
        ..nbdkit_nbd::Config::default()
    };
    let (chain, stop) = (chain.clone(), stop.clone());
    let listeners = socket.listener.take().into_iter().collect();
    std::thread::Builder::new()
        .name("nbd".into())
        .spawn(move || nbdkit_nbd::serve(chain, config, listeners, stop))
        .context("cannot start a thread")
}

/// The socket of the NBD door, which goes when the mount does.
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
