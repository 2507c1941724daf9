//! The locks of the request path: parking_lot's, which builds with debug assertions count.
//!
//! A lock that a request takes is cheap while nobody else wants it, and dear when connections share it; and one is added
//! unseen. So a test bounds how many there are per request. Release builds have parking_lot's types and no counter.

#[cfg(debug_assertions)]
pub use counted::{Mutex, RwLock, locks_taken};
#[cfg(not(debug_assertions))]
pub use parking_lot::{Mutex, RwLock};

#[cfg(debug_assertions)]
mod counted {
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    use parking_lot::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};

    static TAKEN: AtomicU64 = AtomicU64::new(0);

    /// How many locks the process has taken so far; those that it only tried to take count too.
    pub fn locks_taken() -> u64 {
        TAKEN.load(Relaxed)
    }

    fn count() {
        TAKEN.fetch_add(1, Relaxed);
    }

    /// [`parking_lot::Mutex`], counted.
    #[derive(Debug, Default)]
    pub struct Mutex<T: ?Sized>(parking_lot::Mutex<T>);

    impl<T> Mutex<T> {
        /// An unlocked one.
        pub const fn new(value: T) -> Self {
            Mutex(parking_lot::Mutex::new(value))
        }

        /// What it guards.
        pub fn into_inner(self) -> T {
            self.0.into_inner()
        }
    }

    impl<T: ?Sized> Mutex<T> {
        /// Waits for its turn.
        pub fn lock(&self) -> MutexGuard<'_, T> {
            count();
            self.0.lock()
        }

        /// None: it is locked.
        pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            count();
            self.0.try_lock()
        }

        /// What it guards: nobody else has it.
        pub fn get_mut(&mut self) -> &mut T {
            self.0.get_mut()
        }
    }

    /// [`parking_lot::RwLock`], counted.
    #[derive(Debug, Default)]
    pub struct RwLock<T: ?Sized>(parking_lot::RwLock<T>);

    impl<T> RwLock<T> {
        /// An unlocked one.
        pub const fn new(value: T) -> Self {
            RwLock(parking_lot::RwLock::new(value))
        }
    }

    impl<T: ?Sized> RwLock<T> {
        /// Waits until nobody writes.
        pub fn read(&self) -> RwLockReadGuard<'_, T> {
            count();
            self.0.read()
        }

        /// Waits until nobody reads or writes.
        pub fn write(&self) -> RwLockWriteGuard<'_, T> {
            count();
            self.0.write()
        }

        /// None: somebody writes.
        pub fn try_read(&self) -> Option<RwLockReadGuard<'_, T>> {
            count();
            self.0.try_read()
        }

        /// None: somebody reads or writes.
        pub fn try_write(&self) -> Option<RwLockWriteGuard<'_, T>> {
            count();
            self.0.try_write()
        }
    }
}
