//! What a thread model means: a disk that reads as the number of requests at work in the plugin at that moment, 10 ms
//! each.
//!
//! ```console
//! $ cargo build --example thread_model
//! $ nbdkit target/debug/examples/libthread_model.so model=parallel --run 'nbdcopy "$uri" - | od -An -tu1'
//! ```
//!
//! Under `serialize-all-requests` and `serialize-connections` every byte is 1.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    thread,
    time::Duration,
};

use nbdkit::*;

static MODEL: Mutex<ThreadModel> = Mutex::new(ThreadModel::Parallel);
static AT_WORK: AtomicU8 = AtomicU8::new(0);

struct AtWork;

impl Server for AtWork {
    fn name() -> &'static str {
        "threadmodel"
    }

    fn config_help() -> Option<&'static str> {
        Some("model=serialize-connections|serialize-all-requests|serialize-requests|parallel")
    }

    fn magic_config_key() -> Option<&'static str> {
        Some("model")
    }

    fn config(key: &str, value: &str) -> Result<()> {
        let model = match (key, value) {
            ("model", "serialize-connections") => ThreadModel::SerializeConnections,
            ("model", "serialize-all-requests") => ThreadModel::SerializeAllRequests,
            ("model", "serialize-requests") => ThreadModel::SerializeRequests,
            ("model", "parallel") => ThreadModel::Parallel,
            ("model", _) => {
                return Err(Error::new(libc::EINVAL, format!("model={value}: no such thread model")));
            }
            _ => {
                return Err(Error::new(
                    libc::EINVAL,
                    format!("unknown parameter {key}: there is only model="),
                ));
            }
        };
        *MODEL.lock().unwrap_or_else(PoisonError::into_inner) = model;
        Ok(())
    }

    fn thread_model() -> Result<ThreadModel> {
        Ok(*MODEL.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn open(_readonly: bool) -> Result<Box<dyn Server>> {
        Ok(Box::new(AtWork))
    }

    fn get_size(&self) -> Result<i64> {
        Ok(4096)
    }

    fn can_multi_conn(&self) -> Result<bool> {
        Ok(true)
    }

    fn read_at(&self, buf: &mut [u8], _offset: u64) -> Result<()> {
        let at_work = AT_WORK.fetch_add(1, Ordering::SeqCst) + 1;
        thread::sleep(Duration::from_millis(10));
        buf.fill(at_work);
        AT_WORK.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }
}

plugin!(AtWork { config, thread_model, can_multi_conn });
