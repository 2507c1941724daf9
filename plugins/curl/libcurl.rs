//! libcurl, opened when the plugin is used: what of it is needed, behind types that cannot be misused.
//!
//! The one module of the plugin with `unsafe`. The multi interface and its transfers belong to one thread; the only function
//! that others call is the one that wakes it.

#![allow(unsafe_code)]

use std::{
    ffi::{CStr, CString, c_char, c_int, c_long, c_void},
    panic::{AssertUnwindSafe, catch_unwind},
    ptr::null_mut,
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::{Context as _, anyhow, ensure};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

/// The libraries that will do, the first that there is.
const LIBRARIES: [&str; 2] = ["libcurl.so.4", "libcurl-gnutls.so.4"];

/// Options of a transfer, by libcurl's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Opt {
    Timeout = 13,
    LowSpeedLimit = 19,
    LowSpeedTime = 20,
    SslVersion = 32,
    NoBody = 44,
    FollowLocation = 52,
    SslVerifyPeer = 64,
    MaxRedirs = 68,
    ConnectTimeout = 78,
    SslVerifyHost = 81,
    HttpVersion = 84,
    NoSignal = 99,
    IpResolve = 113,
    TcpNoDelay = 121,
    TcpKeepalive = 213,
    PipeWait = 237,
    Url = 10002,
    Proxy = 10004,
    Range = 10007,
    UserAgent = 10018,
    Cookie = 10022,
    HttpHeader = 10023,
    CookieFile = 10031,
    CaInfo = 10065,
    CookieJar = 10082,
    SslCipherList = 10083,
    CaPath = 10097,
    UserName = 10173,
    Password = 10174,
    ProxyUserName = 10175,
    ProxyPassword = 10176,
    Resolve = 10203,
    UnixSocketPath = 10231,
    ProxyCaInfo = 10246,
    ProxyCaPath = 10247,
    Tls13Ciphers = 10276,
    ProtocolsStr = 10318,
    RedirProtocolsStr = 10319,
}

const WRITE_DATA: c_int = 10001;
const ERROR_BUFFER: c_int = 10010;
const HEADER_DATA: c_int = 10029;
const WRITE_FUNCTION: c_int = 20011;
const HEADER_FUNCTION: c_int = 20079;
const INFO_EFFECTIVE_URL: c_int = 0x10_0001;
const INFO_RESPONSE_CODE: c_int = 0x20_0002;
const INFO_CONTENT_LENGTH: c_int = 0x60_000f;
const MULTI_PIPELINING: c_int = 3;
const MULTI_MAX_TOTAL_CONNECTIONS: c_int = 13;
const GLOBAL_ALL: c_long = 3;
const MSG_DONE: c_int = 1;

#[repr(C)]
struct Message {
    kind: c_int,
    easy: *mut c_void,
    /// A union of a pointer and the result.
    result: MessageData,
}

#[repr(C)]
union MessageData {
    _pointer: *mut c_void,
    result: c_int,
}

/// Declares the functions and finds them.
macro_rules! functions {
    ($($field:ident = $name:literal: $type:ty;)*) => {
        struct Functions { $($field: $type),* }

        impl Functions {
            fn find(library: &Library) -> anyhow::Result<Self> {
                Ok(Functions { $($field: {
                    // SAFETY: the types are those of libcurl's headers, which have not changed since libcurl.so.4.
                    *unsafe { library.get::<$type>($name) }.context("it is too old: 7.68 or newer is needed")?
                }),* })
            }
        }
    };
}

functions! {
    global_init = "curl_global_init": unsafe extern "C" fn(c_long) -> c_int;
    easy_init = "curl_easy_init": unsafe extern "C" fn() -> *mut c_void;
    easy_cleanup = "curl_easy_cleanup": unsafe extern "C" fn(*mut c_void);
    easy_setopt = "curl_easy_setopt": unsafe extern "C" fn(*mut c_void, c_int, ...) -> c_int;
    easy_getinfo = "curl_easy_getinfo": unsafe extern "C" fn(*mut c_void, c_int, ...) -> c_int;
    easy_strerror = "curl_easy_strerror": unsafe extern "C" fn(c_int) -> *const c_char;
    slist_append = "curl_slist_append": unsafe extern "C" fn(*mut c_void, *const c_char) -> *mut c_void;
    slist_free_all = "curl_slist_free_all": unsafe extern "C" fn(*mut c_void);
    multi_init = "curl_multi_init": unsafe extern "C" fn() -> *mut c_void;
    multi_cleanup = "curl_multi_cleanup": unsafe extern "C" fn(*mut c_void) -> c_int;
    multi_setopt = "curl_multi_setopt": unsafe extern "C" fn(*mut c_void, c_int, ...) -> c_int;
    multi_add_handle = "curl_multi_add_handle": unsafe extern "C" fn(*mut c_void, *mut c_void) -> c_int;
    multi_remove_handle = "curl_multi_remove_handle": unsafe extern "C" fn(*mut c_void, *mut c_void) -> c_int;
    multi_perform = "curl_multi_perform": unsafe extern "C" fn(*mut c_void, *mut c_int) -> c_int;
    multi_poll = "curl_multi_poll": unsafe extern "C" fn(*mut c_void, *mut c_void, u32, c_int, *mut c_int) -> c_int;
    multi_wakeup = "curl_multi_wakeup": unsafe extern "C" fn(*mut c_void) -> c_int;
    multi_info_read = "curl_multi_info_read": unsafe extern "C" fn(*mut c_void, *mut c_int) -> *mut Message;
    version = "curl_version": unsafe extern "C" fn() -> *const c_char;
}

static FUNCTIONS: OnceLock<Functions> = OnceLock::new();

/// Opens the library.
///
/// # Errors
/// There is none, or it is too old.
pub(super) fn load() -> anyhow::Result<()> {
    if FUNCTIONS.get().is_some() {
        return Ok(());
    }
    let open = |name: &&str| {
        // SAFETY: the initialisers of libcurl and what it needs may run at any time.
        unsafe { Library::open(Some(*name), RTLD_NOW | RTLD_LOCAL) }.ok()
    };
    let library = LIBRARIES.iter().find_map(open);
    let library = library.context("cannot open libcurl.so.4: install libcurl (on Debian libcurl4)")?;
    let functions = Functions::find(&library).context("cannot use libcurl.so.4")?;
    // SAFETY: called once, before anything else of the library.
    let initialised = unsafe { (functions.global_init)(GLOBAL_ALL) };
    ensure!(initialised == 0, "libcurl cannot be initialised");
    let _ = FUNCTIONS.set(functions);
    // The functions are good for as long as the process lives.
    std::mem::forget(library);
    Ok(())
}

fn functions() -> &'static Functions {
    FUNCTIONS.get().expect("libcurl was opened before it is used")
}

/// The versions of the library and of what it is made with.
pub(super) fn version() -> String {
    // SAFETY: the library was opened.
    let text = unsafe { (functions().version)() };
    // SAFETY: a static string.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// What takes the answer of a transfer.
pub(super) trait Sink: Send {
    /// A piece of the body. False: no more is wanted.
    fn body(&mut self, bytes: &[u8]) -> bool;
    /// A line of the header. False: no more is wanted.
    fn header(&mut self, line: &[u8]) -> bool;
}

/// A transfer, to be used for one request after the other.
pub(super) struct Easy<S> {
    handle: *mut c_void,
    /// libcurl has the addresses of what is in here.
    sink: Box<S>,
    error: Box<[u8; 256]>,
    lists: Vec<*mut c_void>,
}

// SAFETY: libcurl's handles may move between threads as long as one uses them at a time, and so may the rest.
unsafe impl<S: Send> Send for Easy<S> {}

extern "C" fn on_body<S: Sink>(data: *const u8, size: usize, count: usize, sink: *mut S) -> usize {
    let length = size.saturating_mul(count);
    // SAFETY: libcurl hands over so many bytes.
    let bytes = unsafe { std::slice::from_raw_parts(data, length) };
    // SAFETY: this is the sink that libcurl was given, which lives as long as the transfer and is not used otherwise while
    // libcurl runs.
    let sink = unsafe { &mut *sink };
    let taken = catch_unwind(AssertUnwindSafe(|| sink.body(bytes))).unwrap_or(false);
    if taken { length } else { length.wrapping_add(1) }
}

extern "C" fn on_header<S: Sink>(data: *const u8, size: usize, count: usize, sink: *mut S) -> usize {
    let length = size.saturating_mul(count);
    // SAFETY: as in `on_body`.
    let bytes = unsafe { std::slice::from_raw_parts(data, length) };
    // SAFETY: as in `on_body`.
    let sink = unsafe { &mut *sink };
    let taken = catch_unwind(AssertUnwindSafe(|| sink.header(bytes))).unwrap_or(false);
    if taken { length } else { length.wrapping_add(1) }
}

impl<S: Sink> Easy<S> {
    /// A transfer whose answer goes to `sink`.
    ///
    /// # Errors
    /// There is no memory.
    pub(super) fn new(sink: S) -> anyhow::Result<Self> {
        // SAFETY: the library was initialised.
        let handle = unsafe { (functions().easy_init)() };
        ensure!(!handle.is_null(), "there is no memory for a transfer");
        let mut this = Easy { handle, sink: Box::new(sink), error: Box::new([0; 256]), lists: Vec::new() };
        let sink: *mut S = &mut *this.sink;
        this.set_pointer(WRITE_DATA, sink.cast())?;
        this.set_pointer(HEADER_DATA, sink.cast())?;
        let buffer = this.error.as_mut_ptr().cast();
        this.set_pointer(ERROR_BUFFER, buffer)?;
        let body: extern "C" fn(*const u8, usize, usize, *mut S) -> usize = on_body::<S>;
        let header: extern "C" fn(*const u8, usize, usize, *mut S) -> usize = on_header::<S>;
        this.set_pointer(WRITE_FUNCTION, body as *mut c_void)?;
        this.set_pointer(HEADER_FUNCTION, header as *mut c_void)?;
        Ok(this)
    }

    fn set_pointer(&mut self, option: c_int, value: *mut c_void) -> anyhow::Result<()> {
        // SAFETY: the options that this is called with take a pointer or a function, and what it leads to lives as long as
        // the handle.
        let result = unsafe { (functions().easy_setopt)(self.handle, option, value) };
        self.check(option, result)
    }

    fn check(&self, option: c_int, result: c_int) -> anyhow::Result<()> {
        match result {
            0 => Ok(()),
            _ => Err(anyhow!("{} (option {option})", reason(result))),
        }
    }

    /// Sets an option that is a number.
    ///
    /// # Errors
    /// This libcurl does not know it.
    pub(super) fn set_number(&mut self, option: Opt, value: i64) -> anyhow::Result<()> {
        assert!((option as c_int) < 10_000, "{option:?} is no number");
        // SAFETY: the option takes a long.
        let result = unsafe { (functions().easy_setopt)(self.handle, option as c_int, value as c_long) };
        self.check(option as c_int, result)
    }

    /// Sets an option that is a string, of which libcurl makes a copy.
    ///
    /// # Errors
    /// This libcurl does not know it.
    pub(super) fn set_text(&mut self, option: Opt, value: &CStr) -> anyhow::Result<()> {
        let is_list = matches!(option, Opt::HttpHeader | Opt::Resolve);
        assert!((option as c_int) > 10_000 && !is_list, "{option:?} is no string");
        // SAFETY: the option takes a string, which libcurl copies.
        let result = unsafe { (functions().easy_setopt)(self.handle, option as c_int, value.as_ptr()) };
        self.check(option as c_int, result)
    }

    /// Sets an option that is a list of strings.
    ///
    /// # Errors
    /// This libcurl does not know it, or there is no memory.
    pub(super) fn set_list(&mut self, option: Opt, values: &[CString]) -> anyhow::Result<()> {
        assert!(matches!(option, Opt::HttpHeader | Opt::Resolve), "{option:?} is no list");
        let mut list = null_mut();
        for value in values {
            // SAFETY: the list is libcurl's own or empty, and the string is copied.
            let longer = unsafe { (functions().slist_append)(list, value.as_ptr()) };
            ensure!(!longer.is_null(), "there is no memory for a list");
            list = longer;
        }
        self.set_pointer(option as c_int, list)?;
        // Lists that were set before are not used any more, but the transfer may run.
        self.lists.push(list);
        Ok(())
    }

    /// What takes the answer. Not to be used while the transfer runs.
    pub(super) fn sink(&mut self) -> &mut S {
        &mut self.sink
    }

    fn number(&self, info: c_int) -> i64 {
        let mut value = -1_i64;
        // SAFETY: both infos that this is called with are 64 bits, long and curl_off_t, on the machines there are.
        unsafe { (functions().easy_getinfo)(self.handle, info, &raw mut value) };
        value
    }

    /// The status of the answer; 0 where there is none.
    pub(super) fn status(&self) -> i64 {
        self.number(INFO_RESPONSE_CODE)
    }

    /// The length of the answer's body, if it is known.
    pub(super) fn content_length(&self) -> Option<u64> {
        u64::try_from(self.number(INFO_CONTENT_LENGTH)).ok()
    }

    /// Where the answer came from in the end.
    pub(super) fn effective_url(&self) -> Option<CString> {
        let mut url: *const c_char = std::ptr::null();
        // SAFETY: the info is a string, which lives until the transfer is used again.
        unsafe { (functions().easy_getinfo)(self.handle, INFO_EFFECTIVE_URL, &raw mut url) };
        // SAFETY: it is null or a string.
        (!url.is_null()).then(|| unsafe { CStr::from_ptr(url) }.to_owned())
    }

    /// Why a transfer with that result failed.
    fn failure(&self, result: c_int) -> String {
        let text = CStr::from_bytes_until_nul(&self.error[..]).unwrap_or_default().to_string_lossy();
        if text.is_empty() { reason(result) } else { text.trim_end().to_owned() }
    }
}

fn reason(result: c_int) -> String {
    // SAFETY: any number will do.
    let text = unsafe { (functions().easy_strerror)(result) };
    // SAFETY: a static string.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

impl<S> Drop for Easy<S> {
    fn drop(&mut self) {
        // SAFETY: no multi handle has it, and the lists go after what used them.
        unsafe { (functions().easy_cleanup)(self.handle) };
        for list in self.lists.drain(..) {
            // SAFETY: nobody else has it.
            unsafe { (functions().slist_free_all)(list) };
        }
    }
}

/// A multi handle of libcurl's.
struct MultiHandle(*mut c_void);

// SAFETY: of what is called with it, all but the wake-up is called by one thread at a time: the owner of [`Multi`] or, at
// the end, the last one who has it.
unsafe impl Send for MultiHandle {}
// SAFETY: the same; curl_multi_wakeup may be called from any thread.
unsafe impl Sync for MultiHandle {}

impl Drop for MultiHandle {
    fn drop(&mut self) {
        // SAFETY: nobody else has it, and nothing is left in it.
        unsafe { (functions().multi_cleanup)(self.0) };
    }
}

/// Ends the wait of the thread that has the transfers.
pub(super) struct Waker(Arc<MultiHandle>);

impl Waker {
    pub(super) fn wake(&self) {
        // SAFETY: the handle is there, and any thread may do this.
        unsafe { (functions().multi_wakeup)(self.0.0) };
    }
}

/// Transfers that run side by side, known by their numbers.
pub(super) struct Multi<S> {
    handle: Arc<MultiHandle>,
    running: Vec<(u64, Easy<S>)>,
}

/// How a transfer ended.
pub(super) struct Ended<S> {
    pub(super) number: u64,
    pub(super) easy: Easy<S>,
    /// Or why it failed.
    pub(super) result: Result<(), String>,
}

impl<S: Sink> Multi<S> {
    /// With at most so many connections.
    ///
    /// # Errors
    /// There is no memory.
    pub(super) fn new(connections: u32) -> anyhow::Result<Self> {
        // SAFETY: the library was initialised.
        let handle = unsafe { (functions().multi_init)() };
        ensure!(!handle.is_null(), "there is no memory for transfers");
        let this = Multi { handle: Arc::new(MultiHandle(handle)), running: Vec::new() };
        for (option, value) in
            [(MULTI_PIPELINING, 2), (MULTI_MAX_TOTAL_CONNECTIONS, connections.into())] as [(c_int, c_long); 2]
        {
            // SAFETY: both options take a long.
            unsafe { (functions().multi_setopt)(this.handle.0, option, value) };
        }
        Ok(this)
    }

    /// What wakes [`wait`](Self::wait).
    pub(super) fn waker(&self) -> Waker {
        Waker(self.handle.clone())
    }

    /// How many transfers run.
    pub(super) fn len(&self) -> usize {
        self.running.len()
    }

    /// Starts a transfer.
    pub(super) fn start(&mut self, number: u64, easy: Easy<S>) {
        // SAFETY: the transfer is in no other multi handle, and leaves this one before it is dropped.
        unsafe { (functions().multi_add_handle)(self.handle.0, easy.handle) };
        self.running.push((number, easy));
    }

    fn take(&mut self, at: usize) -> (u64, Easy<S>) {
        let (number, easy) = self.running.swap_remove(at);
        // SAFETY: it was added before.
        unsafe { (functions().multi_remove_handle)(self.handle.0, easy.handle) };
        (number, easy)
    }

    /// Ends a transfer early.
    pub(super) fn cancel(&mut self, number: u64) -> Option<Easy<S>> {
        let at = self.running.iter().position(|(other, _)| *other == number)?;
        Some(self.take(at).1)
    }

    /// Does what can be done now; the transfers that have ended.
    pub(super) fn perform(&mut self) -> Vec<Ended<S>> {
        let mut count = 0;
        // SAFETY: this thread has the handle.
        unsafe { (functions().multi_perform)(self.handle.0, &raw mut count) };
        let mut ended = Vec::new();
        while let Some((easy, result)) = self.message() {
            let Some(at) = self.running.iter().position(|(_, other)| other.handle == easy) else { continue };
            let (number, easy) = self.take(at);
            let result = if result == 0 { Ok(()) } else { Err(easy.failure(result)) };
            ended.push(Ended { number, easy, result });
        }
        ended
    }

    /// A transfer that has ended, and its result.
    fn message(&mut self) -> Option<(*mut c_void, c_int)> {
        let mut left = 0;
        loop {
            // SAFETY: this thread has the handle.
            let message = unsafe { (functions().multi_info_read)(self.handle.0, &raw mut left) };
            // SAFETY: it is null or lives until the next call.
            let message = unsafe { message.as_ref() }?;
            if message.kind == MSG_DONE {
                // SAFETY: a message of this kind has a result.
                return Some((message.easy, unsafe { message.result.result }));
            }
        }
    }

    /// Waits for something to happen, at most for so long.
    pub(super) fn wait(&self, timeout: Duration) {
        let milliseconds = timeout.as_millis().try_into().unwrap_or(c_int::MAX);
        // SAFETY: no descriptors are handed over.
        unsafe { (functions().multi_poll)(self.handle.0, null_mut(), 0, milliseconds, null_mut()) };
    }
}

impl<S> Drop for Multi<S> {
    fn drop(&mut self) {
        for (_, easy) in &self.running {
            // SAFETY: it was added before.
            unsafe { (functions().multi_remove_handle)(self.handle.0, easy.handle) };
        }
    }
}
